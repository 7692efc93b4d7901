"""The four attentions of ODConv.

Paper: Omni-Dimensional Dynamic Convolution, section 3.2 and appendix
(https://openreview.net/forum?id=DmpCfq6Mg39)
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Attentions(NamedTuple):
    """The attentions of each sample of a batch.

    ``None`` stands for an attention that is absent, that is, equal to 1 everywhere.

    Attributes:
        channel (Tensor, optional): Input-channel attention c, shape (B, C_in).
        filter (Tensor, optional): Output-filter attention f, shape (B, C_out). It is absent when
            the convolution is depthwise, because c already scales each filter there.
        spatial (Tensor, optional): Spatial attention s, shape (B, kernel positions), shared by
            all kernels of the bank.
        kernel (Tensor, optional): Kernel-number attention k, shape (B, K). It is absent when K = 1.
    """

    channel: Tensor | None = None
    filter: Tensor | None = None
    spatial: Tensor | None = None
    kernel: Tensor | None = None


def activate(
    logits: Tensor,
    sizes: Sequence[int],
    temperature: float | Tensor | None = None,
    kernel_activation: str = 'softmax',
) -> Attentions:
    """The attentions from their logits: σ(logits / T), and softmax(logits / T) over the kernels.

    Args:
        logits (Tensor): The logits of the channel, filter, spatial and kernel attention side by
            side, shape (B, sum of ``sizes``). Types narrower than float32 are computed in float32.
        sizes (Sequence[int]): Width of each of the four; 0 for one that is absent.
        temperature (float | Tensor, optional): T, positive, a number or a tensor of no dimensions.
            The larger T is, the closer the results are to 1/2 and 1/K. None is 1. Default: None.
        kernel_activation (str): 'softmax', or 'sigmoid' for a kernel attention that need not sum
            to 1. Default: 'softmax'.

    Returns:
        Attentions: Of float32 or wider.
    """
    if logits.dtype != torch.float32:
        logits = cast(logits, at_least_float32(logits.dtype))
    if temperature is not None:
        logits = logits / temperature
    kernel, kernel_num = [], sizes[3]
    softmax = kernel_activation == 'softmax'
    if kernel_num and kernel_num == logits.shape[1]:  # the only one, with nothing to split
        return Attentions(kernel=logits.softmax(1) if softmax else logits.sigmoid())
    if kernel_num and softmax:
        logits, last = logits.split_with_sizes((logits.shape[1] - kernel_num, kernel_num), 1)
        kernel, sizes = [last.softmax(1)], sizes[:3]
    parts = list(logits.sigmoid().split_with_sizes([size for size in sizes if size], 1))
    return Attentions(*[parts.pop(0) if size else None for size in sizes], *kernel)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float32 in place of the half-precision types, in which sums and exponents lose too much."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, without the cost of a call where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
