"""The maths of ODConv as pure functions of tensors: no module state, no parameters."""

from .attention import (
    Attentions,
    attentions_from_logits,
    sigmoid_attention,
    softmax_attention,
)
from .choice import STRATEGIES, check_strategy, record_strategies
from .heads import JoinedHeads, linear_heads
from .odconv import odconv
from .pool import global_average_pool, pool_beside
from .static_weight import bank_from_static_weight
from .strategies.formula import mix_kernel_bank
from .temperature import annealed_temperature

__all__ = [
    'STRATEGIES',
    'Attentions',
    'JoinedHeads',
    'annealed_temperature',
    'attentions_from_logits',
    'bank_from_static_weight',
    'check_strategy',
    'global_average_pool',
    'linear_heads',
    'mix_kernel_bank',
    'odconv',
    'pool_beside',
    'record_strategies',
    'sigmoid_attention',
    'softmax_attention',
]
