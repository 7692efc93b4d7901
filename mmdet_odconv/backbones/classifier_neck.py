"""What stands between a backbone and the classifier in the paper's ImageNet training.

Paper: Omni-Dimensional Dynamic Convolution, appendix A.1
(https://openreview.net/forum?id=DmpCfq6Mg39)
"""

from collections.abc import Sequence

import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class GlobalAverageDropout(nn.Module):
    """Average each feature map, and drop some of the averages in training.

    mmpretrain's ``GlobalAveragePooling`` has no dropout, and its heads have it only between layers.

    Args:
        dropout (float): Probability with which an average is set to 0. Default: 0.2.
    """

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """From maps (B, C, H, W) to vectors (B, C)."""
        return tuple(self.dropout(F.adaptive_avg_pool2d(x, 1).flatten(1)) for x in inputs)
