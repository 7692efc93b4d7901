"""The formula as it stands, in operations that autograd, compilers and exporters follow.

y = f ⊙ conv(c ⊙ x, Σ_j k_j · (s ⊙ W_j)): one line for each part of it. The judge of the others.
"""

import torch
from torch import Tensor

from ..attention import Attentions
from ..geometry import CONV, Geometry


def forward(x: Tensor, bank: Tensor, attentions: Attentions, geometry: Geometry) -> Tensor:
    """``odconv`` without its bias, differentiable any number of times.

    Args:
        x (Tensor): Shape (B, C_in, *size). B may be 0.
        bank (Tensor): Shape (K, C_out, C_in / groups, *kernel_size).
        attentions (Attentions): Of the B samples.
        geometry (Geometry): Of the convolution.

    Returns:
        Tensor: Shape (B, C_out, *output size).
    """
    conv = CONV[bank.dim() - 3]
    stride, padding, dilation, groups = geometry
    batch = x.shape[0]

    x = x * _per_channel(attentions.channel, x)
    kernels = mix_kernel_bank(bank, attentions.spatial, attentions.kernel).to(x.dtype)

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
