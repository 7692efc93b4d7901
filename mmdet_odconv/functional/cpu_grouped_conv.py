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
    mix,
    mix_backward,
    output_blocks,
    product_in_workspace,
    rows_within,
    workspace,
)
from .cpu_im2col import extract_patches
from .formula import per_channel
from .implementation import (
    CONV,
    Geometry,
    Gradients,
    Implementation,
    Needed,
    Problem,
    add_bias,
    column_scale,
    column_scale_backward,
    convolution_backward,
    remembered_shapes,
)

# Memory of the kernels that are made at a time.
BLOCK_BYTES = 24 << 20
# Entries of a kernel up to which there is nothing to win by a choice.
LEAST_LATE = 1 << 14
# The gradient of the samples' kernels is a product with the patches up to so many output positions
# and from so much memory of all kernels on.
MOST_PATCHES = 512
LEAST_PATCHED_BYTES = 8 << 20


class CpuGroupedConv(Implementation):
    name = 'cpu_grouped_conv'

    @staticmethod
    def unsupported_reason(problem: Problem) -> str | None:
        return None if problem.device == 'cpu' else f'the device is {problem.device}, not a CPU'

    @staticmethod
    def forward(
        x: Tensor, bank: Tensor, attentions: Attentions, bias: Tensor | None, geometry: Geometry
    ) -> Tensor:
        if x.shape[0] * (bank.nbytes // bank.shape[0]) <= BLOCK_BYTES:
            return _forward(x, bank, attentions, bias, geometry)
        size = geometry.output_size(x.shape[2:], bank.shape[3:])
        y = x.new_empty(x.shape[0], bank.shape[1], *size)
        for block in _blocks(x, bank, geometry):
            rows, part = block.outputs, x[:, block.inputs]
            y[:, rows] = _forward(
                part, bank[:, rows], block.of(attentions), None, block.within(geometry)
            )
        return add_bias(y, bias)

    @staticmethod
    def backward(
        grad: Tensor,
        x: Tensor,
        bank: Tensor,
        attentions: Attentions,
        geometry: Geometry,
        needed: Needed,
    ) -> Gradients:
        grad, x = grad.contiguous(), x.contiguous()
        grad_bank = torch.empty_like(bank) if needed.bank else None
        blocks = _blocks(x, bank, geometry)
        if len(blocks) == 1:
            return _backward(grad, x, bank, attentions, geometry, needed, grad_bank)
        zeros = [
            torch.zeros_like(t) if t is not None and need else None
            for t, need in zip((x, *attentions), (needed.x, *needed[2:]), strict=True)
        ]
        for block in blocks:
            rows, reads = block.outputs, block.inputs
            part = _backward(
                grad[:, rows],
                x[:, reads],
                bank[:, rows],
                block.of(attentions),
                block.within(geometry),
                needed,
                None if grad_bank is None else grad_bank[:, rows],
            )
            parts = (part.x, *part[2:])
            for total, some, own in zip(
                zeros, (reads, reads, rows, None, None), parts, strict=True
            ):
                if total is not None and own is not None:
                    (total if some is None else total[:, some]).add_(own)
        return Gradients(zeros[0], grad_bank, *zeros[1:])


def _blocks(x: Tensor, bank: Tensor, geometry: Geometry) -> tuple[Block, ...]:
    rows = rows_within(BLOCK_BYTES, bank, x.shape[0])
    return output_blocks(x.shape[1], bank.shape[1], geometry.groups, rows)


def _forward(
    x: Tensor, bank: Tensor, attentions: Attentions, bias: Tensor | None, geometry: Geometry
) -> Tensor:
    """y of one block."""
    c, f, s, k = attentions
    batch, groups, kernel_size = x.shape[0], geometry.groups, bank.shape[3:]
    entries, late_f = bank.shape[1:].numel(), None
    if entries >= LEAST_LATE:
        # Maps that are smaller than the kernels are scaled in place of them.
        if c is not None and s is None and x.shape[1:].numel() < entries:
            x, c = x * per_channel(c, x), None
        size = geometry.output_size(x.shape[2:], kernel_size)
        if f is not None and math.prod(size) * bank.shape[1] < entries:
            late_f, f = f, None
    shapes = remembered_shapes(batch, groups, bank.shape)
    kernels = mix(bank, k).view(shapes.kernels)
    writable = k is not None  # without, it is the bank itself
    scale = column_scale(c, s, shapes.channel, shapes.spatial)
    for factor in (scale, None if f is None else f.view(shapes.filter)):
        if factor is not None:
            kernels, writable = _scaled(kernels, factor, batch, writable), True
    conv = CONV[len(kernel_size)]
    if kernels.dtype != x.dtype:
        kernels = kernels.to(x.dtype)
    weight = kernels if kernels.dim() == x.dim() else kernels.view(shapes.weight)
    if batch == 1 or not writable:  # one kernel for all samples
        early, bias = (None, bias) if late_f is not None or bias is None else (bias, None)
        y = conv(x, weight, None if early is None else cast(early, x.dtype), *geometry)
    elif groups == 1 and geometry.is_pointwise(kernel_size):
        y = _products(x, kernels.flatten(2))
    else:
        batch_as_groups = x.reshape(1, -1, *x.shape[2:])
        y = conv(batch_as_groups, weight, None, *geometry[:3], batch * groups)
        y = y.view(batch, -1, *y.shape[2:])
    if late_f is not None:
        y.mul_(per_channel(late_f, y))
    return y if bias is None else add_bias(y, bias)


def _scaled(kernels: Tensor, scale: Tensor, batch: int, writable: bool) -> Tensor:
    """``kernels`` scaled for each sample, in place or in the workspace."""
    if scale.dtype != kernels.dtype:
        scale = scale.to(kernels.dtype)
    if writable:
        return kernels.mul_(scale)
    shape = scale.shape[:1] + kernels.shape[1:] if batch > 1 else kernels.shape
    return torch.mul(kernels, scale, out=workspace('kernels', shape, kernels.dtype))


def _products(x: Tensor, matrices: Tensor) -> Tensor:
    """Each sample's matrix, (B, C_out, C_in), at every position of x, in the layout of x."""
    batch, _, *size = x.shape
    if x.is_contiguous():
        return torch.bmm(matrices, x.flatten(2)).view(batch, -1, *size)
    y = torch.bmm(x.movedim(1, -1).flatten(1, -2), matrices.mT)
    return y.view(batch, *size, -1).movedim(-1, 1)


def _backward(
    grad: Tensor,
    x: Tensor,
    bank: Tensor,
    attentions: Attentions,
    geometry: Geometry,
    needed: Needed,
    grad_bank: Tensor | None,
) -> Gradients:
    """The gradients of one block; that of the bank is written into ``grad_bank``."""
    c, f, s, k = attentions
    batch, groups = x.shape[0], geometry.groups
    shapes = remembered_shapes(batch, groups, bank.shape, every_dimension=True)
    mixed = mix(bank, k).view(shapes.kernels)
    scale = column_scale(c, s, shapes.channel, shapes.spatial)
    rows = None if f is None else cast(f.view(shapes.filter), mixed.dtype)
    kernels = mixed
    for factor in (scale, rows):
        if factor is not None:
            kernels = _scaled(kernels, factor, batch, writable=kernels is not mixed)
    grad_x, grad_kernels = _convolve_backward(
        grad, x, cast(kernels, x.dtype), bank.shape[3:], geometry, needed
    )
    if grad_kernels is None:
        return Gradients(grad_x)
    grad_kernels = cast(grad_kernels, bank.dtype).view(-1, *mixed.shape[1:])
    channel = grad_filter = spatial = None
    if needed.channel or needed.filter or needed.spatial:
        product = workspace('product', grad_kernels.shape, grad_kernels.dtype)
        torch.mul(grad_kernels, mixed, out=product)
        if needed.channel or needed.spatial:
            columns = product.flatten(3)
            summed = columns.sum(2) if rows is None else rows.flatten(2).unsqueeze(2) @ columns
            summed = summed.view(batch, -1, bank.shape[3:].numel())
            channel, spatial = column_scale_backward(summed, attentions, needed)
        if needed.filter and f is not None:
            # A product with a single column would take many times as long.
            product = product if scale is None else product.mul_(cast(scale, product.dtype))
            grad_filter = cast(product.flatten(3).sum(3).flatten(1), f.dtype)
    kernel = None
    if needed.bank or needed.kernel:
        for factor in (scale, rows):
            if factor is not None:
                grad_kernels.mul_(cast(factor, grad_kernels.dtype))
        kernel = mix_backward(grad_kernels.flatten(1), bank, k, needed, grad_bank)
    return Gradients(grad_x, grad_bank, channel, grad_filter, spatial, kernel)


def _convolve_backward(
    grad: Tensor,
    x: Tensor,
    kernels: Tensor,
    kernel_size: torch.Size,
    geometry: Geometry,
    needed: Needed,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the input and of the samples' kernels."""
    samples, groups, of_group, reads, *_ = kernels.shape
    grad_x = grad_kernels = None
    kernels_needed = needed.kernels
    single = samples < x.shape[0]  # one kernel for all samples
    by_product = not single and groups == 1 and geometry.is_pointwise(kernel_size)
    by_patches = not single and fastest_by_patches(grad, kernels, groups)
    if kernels_needed and (by_product or by_patches):
        patches = x if by_product else extract_patches(x, kernel_size, geometry)
        columns = patches.reshape(samples, kernels[0, 0, 0].numel(), -1)
        grad_kernels = product_in_workspace('gradient', grad.flatten(2), columns.mT)
        kernels_needed = False
    if by_product:
        if needed.x:
            matrices = kernels.view(samples, of_group, reads)
            grad_x = torch.bmm(matrices.mT, grad.flatten(2)).view(x.shape)
    elif needed.x or kernels_needed:
        if not single:
            x_shape = x.shape
            grad = grad.reshape(1, -1, *grad.shape[2:])
            x = x.reshape(1, -1, *x.shape[2:])
            geometry = geometry._replace(groups=samples * groups)
        conv_x, conv_kernels = convolution_backward(
            grad, x, kernels.reshape(-1, reads, *kernel_size), geometry, needed.x, kernels_needed
        )
        grad_x = conv_x if single or conv_x is None else conv_x.view(x_shape)
        grad_kernels = conv_kernels if kernels_needed else grad_kernels
    return grad_x, grad_kernels


def fastest_by_patches(grad: Tensor, kernels: Tensor, groups: int) -> bool:
    """Whether the gradient of each sample's kernels is a product with its patches."""
    large = kernels.nbytes >= LEAST_PATCHED_BYTES
    return large and groups == 1 and grad.shape[2:].numel() <= MOST_PATCHES
