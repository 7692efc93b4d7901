"""ODConv's formula as it stands in the paper, in plain PyTorch operations.

    y = f ⊙ conv(c ⊙ x, Σ_j k_j · (s ⊙ W_j)) + bias

All other implementations are tested against this one. It is also what tracers, exporters,
function transforms, forward-mode and second derivatives, and empty batches are given.

Paper: Omni-Dimensional Dynamic Convolution, equation 3
(https://openreview.net/forum?id=DmpCfq6Mg39)
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import Attentions, cast
from .implementation import CONV, Geometry


def odconv_formula(
    x: Tensor, bank: Tensor, attentions: Attentions, bias: Tensor | None, geometry: Geometry
) -> Tensor:
    """Compute y. The shapes are those of :func:`~mmdet_odconv.functional.odconv`."""
    c, f, s, k = attentions
    kernels = mix_kernel_bank(bank, s, k).to(x.dtype)
    if c is not None:
        x = x * per_channel(c, x)
    y = convolve_each_sample(x, kernels, geometry)
    if f is not None:
        y = y * per_channel(f, y)
    return y if bias is None else y + per_channel(bias[None], y)


def mix_kernel_bank(bank: Tensor, spatial: Tensor | None, kernel: Tensor | None) -> Tensor:
    """The kernel of each sample, Σ_j k_j · (s ⊙ W_j).

    s does not depend on j, so the sum is one matrix product, whose result s scales.

    Args:
        bank (Tensor): W, shape (K, C_out, C_in / groups, *kernel_size).
        spatial (Tensor, optional): s, shape (B, kernel positions), or None for 1.
        kernel (Tensor, optional): k, shape (B, K), or None for 1, which needs K = 1.

    Returns:
        Tensor: Shape (B, C_out, C_in / groups, *kernel_size). The first dimension is 1 when
        neither s nor k is given, because all samples then share one kernel.
    """
    kernels = bank
    if kernel is not None:
        mixed = kernel.to(bank.dtype) @ bank.flatten(1)
        kernels = mixed.reshape(-1, *bank.shape[1:])
    if spatial is not None:
        kernels = kernels * spatial.to(bank.dtype).reshape(-1, 1, 1, *bank.shape[3:])
    return kernels


def convolve_each_sample(x: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """The convolution of each sample with its own kernel, or of all samples with a single one."""
    stride, padding, dilation, groups = geometry
    conv, batch = CONV[x.dim() - 2], x.shape[0]
    if kernels.shape[0] == 1:
        # Not kernels[0]: a trace for a batch of one must fail with another batch.
        return conv(x, kernels.flatten(0, 1), None, stride, padding, dilation, groups)
    if batch == 0:
        # The sum over no samples is a zero kernel of the right shape, which keeps every
        # parameter in the graph. DDP needs that, and no convolution has zero groups.
        return conv(x, kernels.sum(0), None, stride, padding, dilation, groups)
    if isinstance(batch, torch.SymInt):
        # In a graph for any number of samples no convolution has as many groups.
        return multiply_patches(x, kernels, geometry)
    # Sample b becomes group b of one grouped convolution.
    batch_as_groups = x.reshape(1, -1, *x.shape[2:])
    y = conv(
        batch_as_groups, kernels.flatten(0, 1), None, stride, padding, dilation, batch * groups
    )
    return y.reshape(batch, -1, *y.shape[2:])


def multiply_patches(x: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """The convolution of each sample with its own kernel, as products with its patches.

    It takes no convolution, and as many times the memory of ``x`` as a kernel has positions.

    Args:
        x (Tensor): Shape (B, C_in, *size).
        kernels (Tensor): Shape (B, C_out, C_in / groups, *kernel_size).
        geometry (Geometry): Geometry of the convolution.
    """
    batch, (c_out, reads, *kernel_size) = x.shape[0], kernels.shape[1:]
    size = geometry.output_size(x.shape[2:], kernel_size)
    x = F.pad(x, [p for p in reversed(geometry.padding) for _ in range(2)])
    steps = list(zip(geometry.dilation, size, geometry.stride, strict=True))
    shifted = []
    for position in itertools.product(*map(range, kernel_size)):
        window = x
        for i, (start, (dilation, length, stride)) in enumerate(zip(position, steps, strict=True)):
            first = start * dilation
            last = first + (length - 1) * stride
            window = torch.ops.aten.slice(window, 2 + i, first, last + 1, stride)
        shifted.append(window)
    patches = torch.stack(shifted, 2).flatten(3)  # (B, C_in, kernel positions, positions)
    groups = geometry.groups
    if reads == 1:
        scaled = patches.repeat_interleave(c_out // groups, 1) * kernels.flatten(2).unsqueeze(3)
        y = scaled.sum(2)
    else:
        patches = patches.reshape(batch, groups, reads * patches.shape[2], -1)
        y = kernels.reshape(batch, groups, c_out // groups, -1) @ patches
    return y.reshape(batch, c_out, *size)


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """``values`` (B, C), shaped to scale ``like`` (B, C, *size), in its type."""
    return cast(values, like.dtype).reshape(*values.shape, *(1,) * (like.dim() - 2))
