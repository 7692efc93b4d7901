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
    BlockGradients,
    mix_rows,
    output_blocks,
    product_in_workspace,
    rows_within,
    workspace,
)
from .implementation import Geometry, Gradients, Implementation, Needed, Problem, column_scale

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
    def forward(x: Tensor, bank: Tensor, attentions: Attentions, geometry: Geometry) -> Tensor:
        matrices, f = bank.flatten(2), attentions.filter
        scale = column_scale(attentions, geometry.groups)
        patches = extract_patches(x, bank.shape[3:], geometry)
        columns = scale_patches(patches, scale)
        y = x.new_empty(x.shape[0], bank.shape[1], columns.shape[-1])
        for block in _blocks(x, bank, geometry):
            rows = block.outputs
            mixed = cast(mix_rows(matrices, attentions.kernel, rows), x.dtype)
            part = mixed @ columns[:, block.groups.start]
            if f is None:
                y[:, rows] = part
            else:
                torch.mul(part, cast(f[:, rows, None], x.dtype), out=y[:, rows])
        return y.view(*y.shape[:2], *patches.shape[bank.dim() - 1 :])

    @staticmethod
    def backward(
        grad: Tensor,
        x: Tensor,
        bank: Tensor,
        attentions: Attentions,
        geometry: Geometry,
        needed: Needed,
    ) -> Gradients:
        matrices = bank.flatten(2)
        scale = column_scale(attentions, geometry.groups)
        patches = extract_patches(x, bank.shape[3:], geometry)
        columns = scale_patches(patches, scale)
        grad = grad.flatten(2)
        grads = BlockGradients(matrices, attentions, scale, needed)
        grad_columns = torch.zeros_like(columns) if needed.x or needed.attentions else None
        for block in _blocks(x, bank, geometry):
            rows, group = block.outputs, block.groups.start
            mixed = mix_rows(matrices, attentions.kernel, rows)
            f = None if attentions.filter is None else attentions.filter[:, rows, None]
            grad_rows = grad[:, rows]
            if needed.bank or needed.attentions:
                # The gradient of the mixture, but for f.
                grad_mixed = product_in_workspace('gradient', grad_rows, columns[:, group].mT)
                grad_mixed = cast(grad_mixed, mixed.dtype)
                if grads.filter is not None:
                    product = workspace('product', grad_mixed.shape, grad_mixed.dtype)
                    grads.filter[:, rows] = torch.mul(grad_mixed, mixed, out=product).sum(2)
                if f is not None:
                    grad_mixed *= cast(f, grad_mixed.dtype)
                grads.add_mixture(grad_mixed, rows)
            if grad_columns is not None:
                if f is not None:
                    grad_rows = grad_rows * cast(f, grad_rows.dtype)
                kernels = cast(mixed, x.dtype).expand(x.shape[0], -1, -1)
                grad_columns[:, group].baddbmm_(kernels.mT, grad_rows)
        grad_x = None
        if grad_columns is not None:
            grad_x, grads.scale = scale_patches_backward(
                grad_columns, patches, scale, x, geometry, needed
            )
        return grads.gradients(grad_x, bank)


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


def scale_patches(patches: Tensor, scale: Tensor) -> Tensor:
    """The patches scaled by c ⊗ s, with one column for each output position.

    Args:
        patches (Tensor): Shape (B, C_in, *kernel_size, *output size).
        scale (Tensor): c ⊗ s, shape (B, groups, columns of the kernel matrix).

    Returns:
        Tensor: Shape (B, groups, columns of the kernel matrix, output positions).
    """
    # A new tensor of its own: a product would follow the strides of the overlapping patches.
    columns = patches.new_empty(patches.shape)
    torch.mul(patches, per_patch(scale, patches), out=columns)
    return columns.view(*scale.shape, -1)


def scale_patches_backward(
    grad: Tensor, patches: Tensor, scale: Tensor, x: Tensor, geometry: Geometry, needed: Needed
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and of c ⊗ s from that of :func:`scale_patches`, which is overwritten."""
    grad_scale = None
    if needed.attentions:
        grad_scale = cast((grad * patches.reshape(grad.shape)).sum(3), scale.dtype)
    if not needed.x:
        return None, grad_scale
    grad *= cast(scale[..., None], grad.dtype)
    return extract_patches_backward(grad.view(patches.shape), x, geometry), grad_scale


def per_patch(scale: Tensor, patches: Tensor) -> Tensor:
    """``scale``, shaped to multiply ``patches``, in their type."""
    ndim = patches.dim() // 2 - 1
    return cast(scale.reshape(*patches.shape[: 2 + ndim], *(1,) * ndim), patches.dtype)
