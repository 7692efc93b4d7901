"""The four attentions of ODConv as functions of logits.

Paper: Omni-Dimensional Dynamic Convolution, section 3.2 (https://openreview.net/forum?id=DmpCfq6Mg39)
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Attentions(NamedTuple):
    """What ODConv's attention branch says about each sample of a batch.

    ``None`` stands for an attention that is absent, that is, identically 1.

    Attributes:
        channel (Tensor): Input-channel attention c, shape (B, C_in).
        filter (Tensor, optional): Output-filter attention f, shape (B, C_out). Absent when the
            convolution is depthwise: there c already scales each filter.
        spatial (Tensor, optional): Spatial attention s, shape (B, kernel positions), shared by
            all kernels of the bank. Absent when the kernel has one position.
        kernel (Tensor, optional): Kernel-number attention k, shape (B, K). Absent when K = 1.
    """

    channel: Tensor
    filter: Tensor | None = None
    spatial: Tensor | None = None
    kernel: Tensor | None = None


def global_average_pool(x: Tensor) -> Tensor:
    """The mean of each channel over all positions: (B, C, *) to (B, C)."""
    return x.mean(dim=tuple(range(2, x.dim())))


def sigmoid_attention(logits: Tensor, temperature: float) -> Tensor:
    """Channel, filter and spatial attention: sigmoid(logits / T).

    Args:
        logits (Tensor): Any shape. Types narrower than float32 are computed in float32.
        temperature (float): T, positive; the larger, the closer is the result to 1/2.

    Returns:
        Tensor: The shape of ``logits``, float32 or wider.
    """
    return torch.sigmoid(_at_least_float32(logits) / temperature)


def softmax_attention(logits: Tensor, temperature: float) -> Tensor:
    """Kernel-number attention: softmax(logits / T) over the K kernels.

    Args:
        logits (Tensor): Shape (B, K). Types narrower than float32 are computed in float32.
        temperature (float): T, positive; the larger, the closer is the result to 1/K.

    Returns:
        Tensor: Shape (B, K), float32 or wider; each row sums to 1.
    """
    return torch.softmax(_at_least_float32(logits) / temperature, dim=1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
