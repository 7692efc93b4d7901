"""Per-sample kernels with all attentions folded in, and one grouped convolution.

The cheapest form where the map is large: no pass over the activations but the convolution's own.
The kernels are made some output channels at a time, so that they stay in the cache.
"""

import math

import torch
from torch import Tensor

from ..attention import Attentions
from ..geometry import CONV, Block, Geometry, channels, output_blocks
from ..gradients import Gradients, Needed
from ..im2col import windows
from ..mixture import column_scale, mix_rows, mix_rows_backward, rows_within
from ..precision import as_type
from ..workspace import product_in_workspace, workspace

# Output positions up to which a product with the windows gives the kernels' gradient faster than
# the convolution's own backward pass: 256→256 3×3 at 14×14, batch 8, takes 13 ms instead of 31.
_MOST_WINDOWS = 512


def forward(
    x: Tensor, bank: Tensor, attentions: Attentions, geometry: Geometry, block_bytes: int
) -> Tensor:
    """``odconv`` without its bias.

    Args:
        x (Tensor): Shape (B, C_in, *size), B at least 1.
        bank (Tensor): Shape (K, C_out, C_in / groups, *kernel_size).
        attentions (Attentions): Of the B samples.
        geometry (Geometry): Of the convolution.
        block_bytes (int): Memory that the kernels made at a time may take.

    Returns:
        Tensor: Shape (B, C_out, *output size).
    """
    matrices, kernel_size = bank.flatten(2), bank.shape[3:]
    blocks = _blocks(x, matrices, geometry, block_bytes)
    scale = column_scale(attentions, geometry.groups)
    size = geometry.output_size(x.shape[2:], kernel_size)
    # Where the output is smaller than the kernels, f scales it instead.
    late = attentions.filter is not None and math.prod(size) < matrices.shape[2]
    f = attentions.filter
    y = x.new_empty(x.shape[0], bank.shape[1], *size) if len(blocks) > 1 else None
    for block in blocks:
        mixed = mix_rows(matrices, attentions.kernel, block.outputs)
        # A mixture is ours to overwrite; without one, the rows are those of the bank itself.
        in_place = attentions.kernel is not None
        kernels = _fold(_grouped(mixed, block), scale, None if late else f, block, in_place)
        part = _convolve(x, as_type(kernels, x.dtype), kernel_size, geometry, block)
        if late:
            assert f is not None
            rows = as_type(channels(f, block.outputs), x.dtype)
            part.mul_(rows.reshape(*rows.shape, *(1,) * len(size)))
        if y is None:
            return part
        y[:, block.outputs] = part
    assert y is not None
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    bank: Tensor,
    attentions: Attentions,
    geometry: Geometry,
    block_bytes: int,
    needed: Needed,
) -> Gradients:
    """Gradients of :func:`forward`, from its inputs alone: the kernels are made once more.

    Args:
        grad (Tensor): Of the output.
        x, bank, attentions, geometry, block_bytes: As in :func:`forward`.
        needed (Needed): Which gradients to compute.
    """
    matrices, kernel_size = bank.flatten(2), bank.shape[3:]
    blocks = _blocks(x, matrices, geometry, block_bytes)
    scale = column_scale(attentions, geometry.groups)
    grads = Gradients.allocate(needed, matrices, scale, attentions)
    kernel_needed = needed.bank or needed.attentions
    total_x: Tensor | None = None
    for block in blocks:
        mixed = _grouped(mix_rows(matrices, attentions.kernel, block.outputs), block)
        kernels = _fold(mixed, scale, attentions.filter, block, in_place=False)
        kernels = as_type(kernels, x.dtype)
        grad_x, grad_kernels = _convolve_backward(
            grad,
            x,
            kernels,
            kernel_size,
            geometry,
            block,
            needed.x,
            kernel_needed,
        )
        if len(blocks) == 1:
            total_x = grad_x
        elif grad_x is not None:
            total_x = x.new_zeros(x.shape) if total_x is None else total_x
            total_x[:, block.inputs].add_(grad_x)
        if grad_kernels is None:
            continue
        grad_kernels = as_type(grad_kernels, mixed.dtype).view(-1, *mixed.shape[1:])
        if grads.columns is not None:
            product = workspace('product', grad_kernels.shape, grad_kernels)
            torch.mul(grad_kernels, mixed, out=product)
            _scales_backward(product, scale, attentions, block, grads)
        grad_mixed = _fold(grad_kernels, scale, attentions.filter, block, in_place=True).flatten(
            1, 2
        )
        mix_rows_backward(
            grad_mixed, matrices, attentions.kernel, block.outputs, grads.bank, grads.kernel
        )
    return grads._replace(x=total_x)


def _blocks(x: Tensor, matrices: Tensor, geometry: Geometry, block_bytes: int) -> tuple[Block, ...]:
    rows = rows_within(block_bytes, matrices, x.shape[0])
    return output_blocks(x.shape[1], matrices.shape[1], geometry.groups, rows)


def _grouped(kernels: Tensor, block: Block) -> Tensor:
    """(B, rows, columns) to (B, groups, rows / groups, columns)."""
    groups = block.groups.stop - block.groups.start
    return kernels.view(kernels.shape[0], groups, -1, kernels.shape[2])


def _fold(kernels: Tensor, scale: Tensor, f: Tensor | None, block: Block, in_place: bool) -> Tensor:
    """``kernels`` (B or 1, groups, rows / groups, columns) scaled by c ⊗ s and f."""
    scale = as_type(channels(scale, block.groups).unsqueeze(2), kernels.dtype)
    shape = (scale.shape[0], *kernels.shape[1:])
    out = kernels if in_place else workspace('kernels', shape, kernels)
    kernels = torch.mul(kernels, scale, out=out)
    if f is not None:
        kernels *= as_type(_row_scale(f, block), kernels.dtype)
    return kernels


def _row_scale(f: Tensor, block: Block) -> Tensor:
    """f of a block's rows, shape (B, groups, rows / groups, 1)."""
    groups = block.groups.stop - block.groups.start
    return channels(f, block.outputs).reshape(f.shape[0], groups, -1, 1)


def _scales_backward(
    product: Tensor, scale: Tensor, attentions: Attentions, block: Block, grads: Gradients
) -> None:
    """Gradients of c ⊗ s and f from the kernels times their gradients, neither yet scaled.

    ``product`` is overwritten.
    """
    assert grads.columns is not None
    if attentions.filter is None:
        grads.columns[:, block.groups] += product.sum(2)
        return
    rows = as_type(_row_scale(attentions.filter, block), product.dtype)
    columns = as_type(channels(scale, block.groups).unsqueeze(2), product.dtype)
    grads.columns[:, block.groups] += (rows.transpose(2, 3) @ product)[:, :, 0]
    if grads.filter is not None:
        # A product with a single column would take many times as long.
        grads.filter[:, block.outputs] = product.mul_(columns).sum(3).flatten(1)


def _by_matmul(kernels: Tensor, kernel_size: torch.Size, geometry: Geometry) -> bool:
    return kernels.shape[1] == 1 and geometry.is_pointwise(kernel_size)


def _convolve(
    x: Tensor, kernels: Tensor, kernel_size: torch.Size, geometry: Geometry, block: Block
) -> Tensor:
    """Each sample with its own kernels (B, groups, rows / groups, columns): (B, rows, *size)."""
    batch = x.shape[0]
    if _by_matmul(kernels, kernel_size, geometry):
        y = torch.bmm(kernels[:, 0], channels(x, block.inputs).flatten(2))
        return y.view(*y.shape[:2], *x.shape[2:])
    weight, tall = _tall(x, kernels, kernel_size, block)
    conv = CONV[len(kernel_size)]
    y = conv(
        tall,
        weight,
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        batch * kernels.shape[1],
    )
    return y.view(batch, -1, *y.shape[2:])


def _convolve_backward(
    grad: Tensor,
    x: Tensor,
    kernels: Tensor,
    kernel_size: torch.Size,
    geometry: Geometry,
    block: Block,
    x_needed: bool,
    kernels_needed: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x, these of its channels that the block reads, and of the kernels."""
    batch = x.shape[0]
    grad, part = channels(grad, block.outputs), channels(x, block.inputs)
    if _by_matmul(kernels, kernel_size, geometry):
        grad_x = torch.bmm(kernels[:, 0].mT, grad.flatten(2)) if x_needed else None
        grad_kernels = None
        if kernels_needed:
            grad_kernels = product_in_workspace('gradient', grad.flatten(2), part.flatten(2).mT)
        return None if grad_x is None else grad_x.view(part.shape), grad_kernels
    by_windows = kernels.shape[1] == 1 and math.prod(grad.shape[2:]) <= _MOST_WINDOWS
    weight, tall = _tall(x, kernels, kernel_size, block)
    grad_tall, grad_kernels, _ = torch.ops.aten.convolution_backward(
        grad.reshape(1, -1, *grad.shape[2:]),
        tall,
        weight,
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        False,
        (0,) * len(kernel_size),
        batch * kernels.shape[1],
        (x_needed, kernels_needed and not by_windows, False),
    )
    if kernels_needed and by_windows:
        seen = windows(part, kernel_size, geometry)
        columns = seen.reshape(batch, kernels.shape[3], -1)
        grad_kernels = product_in_workspace('gradient', grad.flatten(2), columns.mT)
    return None if grad_tall is None else grad_tall.view(part.shape), grad_kernels


def _tall(
    x: Tensor, kernels: Tensor, kernel_size: torch.Size, block: Block
) -> tuple[Tensor, Tensor]:
    """Sample b is group b of a grouped convolution: its weight and its one tall image."""
    columns = kernels.shape[3] // math.prod(kernel_size)
    weight = kernels.reshape(-1, columns, *kernel_size)
    return weight, channels(x, block.inputs).reshape(1, -1, *x.shape[2:])
