"""Kernels for each sample and one grouped convolution, made for a CPU's cache and allocator.

It is the cheapest form where the map is large, because the activations are passed over only by
the convolution itself. The kernels are made a block of output channels at a time.
"""

import math

import torch
from torch import Tensor

from .attention import Attentions, cast
from .cpu_blocks import (
    Block,
    BlockGradients,
    mix_rows,
    output_blocks,
    product_in_workspace,
    rows_within,
    slice_channels,
    workspace,
)
from .cpu_im2col import extract_patches
from .formula import convolve_each_sample
from .implementation import (
    Geometry,
    Gradients,
    Implementation,
    Needed,
    Problem,
    column_scale,
    convolution_backward,
)

# Memory of the kernels that are made at a time.
BLOCK_BYTES = 24 << 20
# Output positions up to which the kernels' gradient is a product with the patches.
MOST_PATCHES = 512


class CpuGroupedConv(Implementation):
    name = 'cpu_grouped_conv'

    @staticmethod
    def unsupported_reason(problem: Problem) -> str | None:
        return None if problem.device == 'cpu' else f'the device is {problem.device}, not a CPU'

    @staticmethod
    def forward(x: Tensor, bank: Tensor, attentions: Attentions, geometry: Geometry) -> Tensor:
        kernel_size, f = bank.shape[3:], attentions.filter
        blocks = _blocks(x, bank, geometry)
        matrices, scale = bank.flatten(2), column_scale(attentions, geometry.groups)
        size = geometry.output_size(x.shape[2:], kernel_size)
        # f scales whichever is smaller, the output or the kernels.
        late, early = (f, None) if math.prod(size) < matrices.shape[2] else (None, f)
        y = x.new_empty(x.shape[0], bank.shape[1], *size) if len(blocks) > 1 else None
        for block in blocks:
            kernels = _grouped(mix_rows(matrices, attentions.kernel, block.outputs), block)
            # A mixture may be overwritten; without one these are rows of the bank itself.
            out = None if attentions.kernel is None else kernels
            kernels = _fold(kernels, scale, early, block, out)
            part = _convolve(x, cast(kernels, x.dtype), kernel_size, geometry, block)
            if late is not None:
                rows = cast(slice_channels(late, block.outputs), x.dtype)
                part.mul_(rows.view(*rows.shape, *(1,) * len(size)))
            if y is None:
                return part
            y[:, block.outputs] = part
        assert y is not None  # there is at least one block
        return y

    @staticmethod
    def backward(
        grad: Tensor,
        x: Tensor,
        bank: Tensor,
        attentions: Attentions,
        geometry: Geometry,
        needed: Needed,
    ) -> Gradients:
        blocks = _blocks(x, bank, geometry)
        matrices, scale = bank.flatten(2), column_scale(attentions, geometry.groups)
        grads = BlockGradients(matrices, attentions, scale, needed)
        grad_x = torch.zeros_like(x) if needed.x and len(blocks) > 1 else None
        for block in blocks:
            mixed = _grouped(mix_rows(matrices, attentions.kernel, block.outputs), block)
            kernels = _fold(mixed, scale, attentions.filter, block)
            part_x, grad_kernels = _convolve_backward(
                grad, x, cast(kernels, x.dtype), bank.shape[3:], geometry, block, needed
            )
            if grad_x is None:
                grad_x = part_x
            elif part_x is not None:
                grad_x[:, block.inputs].add_(part_x)
            if grad_kernels is None:
                continue
            grad_kernels = cast(grad_kernels, bank.dtype).view(-1, *mixed.shape[1:])
            if needed.attentions:
                _add_scales(grads, grad_kernels, mixed, scale, attentions.filter, block)
            grad_mixed = _fold(grad_kernels, scale, attentions.filter, block, out=grad_kernels)
            grads.add_mixture(grad_mixed.flatten(1, 2), block.outputs)
        return grads.gradients(grad_x, bank)


def _blocks(x: Tensor, bank: Tensor, geometry: Geometry) -> tuple[Block, ...]:
    rows = rows_within(BLOCK_BYTES, bank, x.shape[0])
    return output_blocks(x.shape[1], bank.shape[1], geometry.groups, rows)


def _grouped(kernels: Tensor, block: Block) -> Tensor:
    """(B, rows, columns) to (B, groups, rows of a group, columns)."""
    groups = block.groups.stop - block.groups.start
    return kernels.view(kernels.shape[0], groups, -1, kernels.shape[2])


def _fold(
    kernels: Tensor, scale: Tensor, f: Tensor | None, block: Block, out: Tensor | None = None
) -> Tensor:
    """``kernels``, shape (B or 1, groups, rows of a group, columns), scaled by c ⊗ s and f."""
    scale = _column_scale(scale, block, kernels.dtype)
    if out is None:
        out = workspace('kernels', (len(scale), *kernels.shape[1:]), kernels.dtype)
    torch.mul(kernels, scale, out=out)
    return out if f is None else out.mul_(_row_scale(f, block, out.dtype))


def _column_scale(scale: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    """c ⊗ s of a block's groups, shape (B, groups, 1, columns)."""
    return cast(slice_channels(scale, block.groups).unsqueeze(2), dtype)


def _row_scale(f: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    """f of a block's rows, shape (B, groups, rows of a group, 1)."""
    groups = block.groups.stop - block.groups.start
    return cast(slice_channels(f, block.outputs).reshape(len(f), groups, -1, 1), dtype)


def _add_scales(
    grads: BlockGradients,
    grad_kernels: Tensor,
    mixed: Tensor,
    scale: Tensor,
    f: Tensor | None,
    block: Block,
) -> None:
    """Add what a block contributes to the gradients of c ⊗ s and f."""
    assert grads.scale is not None  # the attentions' gradients are wanted
    product = workspace('product', grad_kernels.shape, grad_kernels.dtype)
    torch.mul(grad_kernels, mixed, out=product)
    if f is None:
        grads.scale[:, block.groups] += product.sum(2)
        return
    rows = _row_scale(f, block, product.dtype)
    grads.scale[:, block.groups] += (rows.transpose(2, 3) @ product)[:, :, 0]
    # A product with a single column would take many times as long.
    product.mul_(_column_scale(scale, block, product.dtype))
    assert grads.filter is not None
    grads.filter[:, block.outputs] = product.sum(3).flatten(1)


def _is_product(kernels: Tensor, kernel_size: torch.Size, geometry: Geometry) -> bool:
    """Whether the convolution is one matrix product for each sample."""
    return kernels.shape[1] == 1 and geometry.is_pointwise(kernel_size)


def _convolve(
    x: Tensor, kernels: Tensor, kernel_size: torch.Size, geometry: Geometry, block: Block
) -> Tensor:
    """Each sample with its own kernels, (B, groups, rows of a group, columns)."""
    part = slice_channels(x, block.inputs)
    if _is_product(kernels, kernel_size, geometry):
        y = torch.bmm(kernels[:, 0], part.flatten(2))
        return y.view(*y.shape[:2], *x.shape[2:])
    groups, rows = kernels.shape[1:3]
    weight = kernels.view(x.shape[0], groups * rows, -1, *kernel_size)
    return convolve_each_sample(part, weight, geometry._replace(groups=groups))


def _convolve_backward(
    grad: Tensor,
    x: Tensor,
    kernels: Tensor,
    kernel_size: torch.Size,
    geometry: Geometry,
    block: Block,
    needed: Needed,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the input channels that a block reads, and of its kernels."""
    batch, groups = kernels.shape[:2]
    grad, part = slice_channels(grad, block.outputs), slice_channels(x, block.inputs)
    kernels_needed = needed.bank or needed.attentions
    by_product = _is_product(kernels, kernel_size, geometry)
    by_patches = groups == 1 and math.prod(grad.shape[2:]) <= MOST_PATCHES
    grad_kernels = None
    if kernels_needed and (by_product or by_patches):
        patches = part if by_product else extract_patches(part, kernel_size, geometry)
        columns = patches.reshape(batch, kernels.shape[3], -1)
        grad_kernels = product_in_workspace('gradient', grad.flatten(2), columns.mT)
        kernels_needed = False
    if by_product:
        grad_x = torch.bmm(kernels[:, 0].mT, grad.flatten(2)) if needed.x else None
    elif needed.x or kernels_needed:
        grad_x, conv_kernels = convolution_backward(
            grad.reshape(1, -1, *grad.shape[2:]),
            part.reshape(1, -1, *part.shape[2:]),
            kernels.reshape(-1, part.shape[1] // groups, *kernel_size),
            geometry._replace(groups=batch * groups),
            needed.x,
            kernels_needed,
        )
        grad_kernels = conv_kernels if kernels_needed else grad_kernels
    else:
        grad_x = None
    return None if grad_x is None else grad_x.view(part.shape), grad_kernels
