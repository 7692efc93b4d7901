"""What the layers of a model do and cost: how much attentions move, parameters, multiply-adds."""

from .attentions import (
    DYNAMIC,
    AttentionMeter,
    AttentionStatistics,
    attention_statistics,
    evaluation_mode,
    kernel_similarity,
    odconv_layers,
    share_by_class,
    static_attentions,
)
from .complexity import Complexity, count_complexity, plain_twin

__all__ = [
    'DYNAMIC',
    'AttentionMeter',
    'AttentionStatistics',
    'Complexity',
    'attention_statistics',
    'count_complexity',
    'evaluation_mode',
    'kernel_similarity',
    'odconv_layers',
    'plain_twin',
    'share_by_class',
    'static_attentions',
]
