"""Omni-dimensional dynamic convolution as a function of input, kernel bank and attentions.

Paper: Omni-Dimensional Dynamic Convolution, equation 3
(https://openreview.net/forum?id=DmpCfq6Mg39)
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import Attentions

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def odconv(
    x: Tensor,
    bank: Tensor,
    attentions: Attentions,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """y = f ⊙ conv(c ⊙ x, Σ_j k_j · (s ⊙ W_j)) + bias, each sample with its own attentions.

    The number of spatial dimensions n is read off the bank: one, two and three are possible.

    Args:
        x (Tensor): Input, shape (B, C_in, *size) with n sizes. B may be 0.
        bank (Tensor): Kernel bank W, shape (K, C_out, C_in / groups, *kernel_size).
        attentions (Attentions): c, f, s and k of each of the B samples.
        bias (Tensor, optional): Static bias, shape (C_out,).
        stride, padding, dilation, groups: As in ``torch.nn.functional.conv2d``.

    Returns:
        Tensor: Shape (B, C_out, *output size), in the type that the convolution gives.
    """
    ndim = bank.dim() - 3
    conv = _CONV[ndim]
    batch = x.shape[0]

    x = x * _per_channel(attentions.channel, x)
    kernels = mix_kernel_bank(bank, attentions.spatial, attentions.kernel)

    if kernels.shape[0] == 1:
        y = conv(x, kernels.flatten(0, 1), None, stride, padding, dilation, groups)
    elif batch == 0:
        # No grouped convolution has zero groups. The sum over no samples is a zero kernel of the
        # right shape that keeps every parameter in the graph, as DDP needs.
        y = conv(x, kernels.sum(0), None, stride, padding, dilation, groups)
    else:
        # All samples at once: sample b is group b of a grouped convolution over one tall image.
        tall = x.reshape(1, -1, *x.shape[2:])
        y = conv(tall, kernels.flatten(0, 1), None, stride, padding, dilation, batch * groups)
        y = y.reshape(batch, -1, *y.shape[2:])

    if attentions.filter is not None:
        y = y * _per_channel(attentions.filter, y)
    if bias is not None:
        y = y + _per_channel(bias[None], y)
    return y


def mix_kernel_bank(bank: Tensor, spatial: Tensor | None, kernel: Tensor | None) -> Tensor:
    """The kernel of each sample: Σ_j k_j · (s ⊙ W_j).

    s does not depend on j, so the sum is one matrix product and s scales its result.

    Args:
        bank (Tensor): W, shape (K, C_out, C_in / groups, *kernel_size).
        spatial (Tensor, optional): s, shape (B, kernel positions); None for 1.
        kernel (Tensor, optional): k, shape (B, K); None for 1, only where K = 1.

    Returns:
        Tensor: Shape (B, C_out, C_in / groups, *kernel_size); the first dimension is 1 when
        neither s nor k is given, since all samples then share one kernel.
    """
    kernels = bank
    if kernel is not None:
        mixed = torch.matmul(kernel.to(bank.dtype), bank.flatten(1))
        kernels = mixed.reshape(-1, *bank.shape[1:])
    if spatial is not None:
        scale = spatial.to(kernels.dtype).reshape(-1, 1, 1, *bank.shape[3:])
        kernels = kernels * scale
    return kernels


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    """``values`` (B, C) shaped to scale ``like`` (B, C, *size), in its type."""
    return values.to(like.dtype).reshape(*values.shape, *(1,) * (like.dim() - 2))
