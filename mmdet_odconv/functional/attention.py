"""The four attentions of ODConv as functions of logits.

Paper: Omni-Dimensional Dynamic Convolution, section 3.2 (https://openreview.net/forum?id=DmpCfq6Mg39)
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .precision import as_type


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


def attentions_from_logits(logits: Tensor, sizes: Sequence[int], temperature: float) -> Attentions:
    """The four attentions from the outputs of their heads.

    Args:
        logits (Tensor): Shape (B, sum of ``sizes``), in the order of :class:`Attentions`. Types
            narrower than float32 are computed in float32.
        sizes (Sequence[int]): How many belong to each of the four attentions; 0 where it is absent.
        temperature (float): T, positive.
    """
    logits = _divided(logits, temperature)
    # One sigmoid for all, the kernel's logits too: few calls, which are what costs here.
    parts = torch.split_with_sizes(torch.sigmoid(logits), sizes, 1)
    kernel_num = sizes[3]
    return Attentions(
        channel=parts[0],
        filter=parts[1] if sizes[1] else None,
        spatial=parts[2] if sizes[2] else None,
        kernel=torch.softmax(logits[:, -kernel_num:], dim=1) if kernel_num else None,
    )


def sigmoid_attention(logits: Tensor, temperature: float) -> Tensor:
    """Channel, filter and spatial attention: sigmoid(logits / T).

    Args:
        logits (Tensor): Any shape. Types narrower than float32 are computed in float32.
        temperature (float): T, positive; the larger, the closer is the result to 1/2.

    Returns:
        Tensor: The shape of ``logits``, float32 or wider.
    """
    return torch.sigmoid(_divided(logits, temperature))


def softmax_attention(logits: Tensor, temperature: float) -> Tensor:
    """Kernel-number attention: softmax(logits / T) over the K kernels.

    Args:
        logits (Tensor): Shape (B, K). Types narrower than float32 are computed in float32.
        temperature (float): T, positive; the larger, the closer is the result to 1/K.

    Returns:
        Tensor: Shape (B, K), float32 or wider; each row sums to 1.
    """
    return torch.softmax(_divided(logits, temperature), dim=1)


def _divided(logits: Tensor, temperature: float) -> Tensor:
    """logits / T in float32 or wider."""
    logits = as_type(logits, torch.promote_types(logits.dtype, torch.float32))
    # Not while compiling: a compiler would compile once more.
    if not torch.compiler.is_compiling() and temperature == 1:
        return logits
    return logits / temperature
