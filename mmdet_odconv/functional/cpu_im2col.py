"""Attentions folded into the patches (im2col) and the output, and products with mixed kernels.

It is the cheapest form where the map is small and the kernel large, as in the last stage of a
ResNet, because the patches then have fewer entries than the kernels. c ⊗ s scales the patches and
f the output. What is left of a sample's kernel is its mixture, which is made a block of output
channels at a time; the bank is read once for the whole batch.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import Attentions, cast
from .cpu_blocks import (
    Block,
    mix,
    mix_backward,
    output_blocks,
    product_in_workspace,
    rows_within,
    workspace,
)
from .implementation import (
    Geometry,
    Gradients,
    Implementation,
    Needed,
    Problem,
    add_bias,
    column_scale,
    column_scale_backward,
)

# Memory of the mixtures that are made at a time. A single sample reads its kernels once in any
# case, so larger blocks with fewer calls are faster there.
BLOCK_BYTES = 4 << 20
SINGLE_SAMPLE_BLOCK_BYTES = 24 << 20


class CpuIm2col(Implementation):
    name = 'cpu_im2col'

    @staticmethod
    def unsupported_reason(problem: Problem) -> str | None:
        return None if problem.device == 'cpu' else f'the device is {problem.device}, not a CPU'

    @staticmethod
    def is_fastest(problem: Problem) -> bool:
        # In inference a 1×1 kernel is not scaled: c and f scale the maps.
        large = problem.kernel_bytes >= 4 << 20 and (problem.training or not problem.pointwise)
        return large and problem.positions <= 64 and not problem.depthwise

    @staticmethod
    def forward(
        x: Tensor, bank: Tensor, attentions: Attentions, bias: Tensor | None, geometry: Geometry
    ) -> Tensor:
        x, f = x.contiguous(), attentions.filter
        patches = extract_patches(x, bank.shape[3:], geometry)
        columns = scale_patches(patches, patch_scale(patches, attentions), geometry)
        y = x.new_empty(x.shape[0], bank.shape[1], columns.shape[-1])
        for block in _blocks(x, bank, geometry):
            rows = block.outputs
            mixed = cast(_mixed(bank, attentions, block), x.dtype)
            part = mixed @ columns[:, block.inputs.start // bank.shape[2]]
            if f is None:
                y[:, rows] = part
            else:
                torch.mul(part, cast(f[:, rows, None], x.dtype), out=y[:, rows])
        return add_bias(y.view(*y.shape[:2], *patches.shape[bank.dim() - 1 :]), bias)

    @staticmethod
    def backward(
        grad: Tensor,
        x: Tensor,
        bank: Tensor,
        attentions: Attentions,
        geometry: Geometry,
        needed: Needed,
    ) -> Gradients:
        x, grad = x.contiguous(), grad.contiguous().flatten(2)
        f, k = attentions.filter, attentions.kernel
        patches = extract_patches(x, bank.shape[3:], geometry)
        scale = patch_scale(patches, attentions)
        columns = scale_patches(patches, scale, geometry)
        grad_bank = torch.empty_like(bank) if needed.bank else None
        grad_f = torch.zeros_like(f) if needed.filter and f is not None else None
        grad_k = torch.zeros_like(k) if needed.kernel and k is not None else None
        columns_needed = needed.x or needed.channel or needed.spatial
        grad_columns = torch.zeros_like(columns) if columns_needed else None
        for block in _blocks(x, bank, geometry):
            rows, group = block.outputs, block.inputs.start // bank.shape[2]
            mixed = _mixed(bank, attentions, block)
            f_rows = None if f is None else f[:, rows, None]
            grad_rows = grad[:, rows]
            if needed.bank or needed.filter or needed.kernel:
                # The gradient of the mixture, but for f.
                grad_mixed = product_in_workspace('gradient', grad_rows, columns[:, group].mT)
                grad_mixed = cast(grad_mixed, mixed.dtype)
                if grad_f is not None:
                    product = workspace('product', grad_mixed.shape, grad_mixed.dtype)
                    grad_f[:, rows] = torch.mul(grad_mixed, mixed, out=product).sum(2)
                if f_rows is not None:
                    grad_mixed *= cast(f_rows, grad_mixed.dtype)
                out = None if grad_bank is None else grad_bank[:, rows]
                part = mix_backward(grad_mixed.flatten(1), bank[:, rows], k, needed, out)
                if grad_k is not None and part is not None:
                    grad_k += part
            if grad_columns is not None:
                if f_rows is not None:
                    grad_rows = grad_rows * cast(f_rows, grad_rows.dtype)
                kernels = cast(mixed, x.dtype).expand(x.shape[0], -1, -1)
                grad_columns[:, group].baddbmm_(kernels.mT, grad_rows)
        grad_x = channel = spatial = None
        if grad_columns is not None:
            grad_x, channel, spatial = scale_patches_backward(
                grad_columns, patches, scale, x, attentions, geometry, needed
            )
        return Gradients(grad_x, grad_bank, channel, grad_f, spatial, grad_k)


def _mixed(bank: Tensor, attentions: Attentions, block: Block) -> Tensor:
    """The mixtures of a block's rows, shape (B or 1, rows, columns of the kernel matrix)."""
    part = bank[:, block.outputs]
    return mix(part, attentions.kernel).view(-1, part.shape[1], part[0, 0].numel())


def _blocks(x: Tensor, bank: Tensor, geometry: Geometry) -> tuple[Block, ...]:
    block_bytes = SINGLE_SAMPLE_BLOCK_BYTES if x.shape[0] == 1 else BLOCK_BYTES
    rows = rows_within(block_bytes, bank, x.shape[0])
    return output_blocks(x.shape[1], bank.shape[1], geometry.groups, rows, within_group=True)


def extract_patches(x: Tensor, kernel_size: Sequence[int], geometry: Geometry) -> Tensor:
    """What each kernel position reads for each output position.

    Args:
        x (Tensor): Shape (B, C, *size).
        kernel_size (Sequence[int]): Kernel size of the convolution.
        geometry (Geometry): Geometry of the convolution.

    Returns:
        Tensor: Shape (B, C, *kernel_size, *output size), a view of ``x`` or of its padded copy.
    """
    size = geometry.output_size(x.shape[2:], kernel_size)
    if any(geometry.padding):
        x = F.pad(x, [p for p in reversed(geometry.padding) for _ in range(2)])
    batch, channel, *steps = x.stride()
    positions = [d * step for d, step in zip(geometry.dilation, steps, strict=True)]
    moves = [s * step for s, step in zip(geometry.stride, steps, strict=True)]
    return x.as_strided((*x.shape[:2], *kernel_size, *size), (batch, channel, *positions, *moves))


def extract_patches_backward(grad: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """The gradient of ``x`` from that of :func:`extract_patches`; overlapping patches add up."""
    ndim = x.dim() - 2
    kernel_size, size = grad.shape[2 : 2 + ndim], grad.shape[2 + ndim :]
    sizes = [n + 2 * p for n, p in zip(x.shape[2:], geometry.padding, strict=True)]
    padded = grad.new_zeros(*x.shape[:2], *sizes)
    every: Any = slice(None)
    for position in itertools.product(*map(range, kernel_size)):
        starts = [i * d for i, d in zip(position, geometry.dilation, strict=True)]
        region: list[Any] = [
            slice(start, start + s * (n - 1) + 1, s)
            for start, s, n in zip(starts, geometry.stride, size, strict=True)
        ]
        padded[(every, every, *region)] += grad[(every, every, *position)]
    inner: list[Any] = [slice(p, p + n) for p, n in zip(geometry.padding, x.shape[2:], strict=True)]
    return padded[(every, every, *inner)]


def patch_scale(patches: Tensor, attentions: Attentions) -> Tensor | None:
    """c ⊗ s, shaped to multiply ``patches``, in their type; None where both are absent."""
    batch, channels, ndim = *patches.shape[:2], patches.dim() // 2 - 1
    ones = (1,) * ndim
    scale = column_scale(
        attentions.channel,
        attentions.spatial,
        (batch, channels, *ones, *ones),
        (batch, 1, *patches.shape[2 : 2 + ndim], *ones),
    )
    return None if scale is None else cast(scale, patches.dtype)


def scale_patches(patches: Tensor, scale: Tensor | None, geometry: Geometry) -> Tensor:
    """The patches scaled by c ⊗ s, with one column for each output position.

    Args:
        patches (Tensor): Shape (B, C_in, *kernel_size, *output size).
        scale (Tensor, optional): c ⊗ s, as :func:`patch_scale` gives it.
        geometry (Geometry): Geometry of the convolution.

    Returns:
        Tensor: Shape (B, groups, columns of the kernel matrix, output positions).
    """
    # A new tensor of its own: a product would follow the strides of the overlapping patches.
    columns = patches.new_empty(patches.shape)
    if scale is None:
        columns.copy_(patches)
    else:
        torch.mul(patches, scale, out=columns)
    positions = patches.shape[patches.dim() // 2 + 1 :].numel()
    return columns.view(patches.shape[0], geometry.groups, -1, positions)


def scale_patches_backward(
    grad: Tensor,
    patches: Tensor,
    scale: Tensor | None,
    x: Tensor,
    attentions: Attentions,
    geometry: Geometry,
    needed: Needed,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, c and s from that of :func:`scale_patches`, which is overwritten."""
    channel = spatial = None
    if needed.channel or needed.spatial:
        ndim = x.dim() - 2
        summed = (grad * patches.reshape(grad.shape)).sum(3)
        summed = summed.view(x.shape[0], x.shape[1], patches.shape[2 : 2 + ndim].numel())
        channel, spatial = column_scale_backward(summed, attentions, needed)
    if not needed.x:
        return None, channel, spatial
    grad = grad.view(patches.shape)
    if scale is not None:
        grad *= scale
    return extract_patches_backward(grad, x, geometry), channel, spatial
