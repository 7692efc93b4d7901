"""Per-sample kernels with all attentions folded in, and one grouped convolution.

The cheapest form where the map is large: no pass over the activations but the convolution's own.
The kernels are made some output channels at a time, so that they stay in the cache.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import Attentions
from ..geometry import Block, Geometry, output_blocks
from ..gradients import Gradients, Needed
from ..mixture import column_scale, mix_rows, mix_rows_backward, rows_within
from ..workspace import workspace

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


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
    inner, outer = attentions, None
    if attentions.filter is not None and math.prod(size) < matrices.shape[2]:
        # The output is smaller than the kernels: f scales it instead.
        inner = attentions._replace(filter=None)
        outer = attentions.filter[(..., *(None,) * len(size))]

    def block_output(block: Block) -> Tensor:
        mixed = mix_rows(matrices, attentions.kernel, block.outputs)
        # A mixture is ours to overwrite; without one, the rows are those of the bank itself.
        in_place = attentions.kernel is not None
        kernels = _fold(_grouped(mixed, block), scale, inner, block, in_place)
        y = _convolve(x, kernels.to(x.dtype), kernel_size, geometry, block)
        return y if outer is None else y.mul_(outer[:, block.outputs].to(y.dtype))

    if len(blocks) == 1:
        return block_output(blocks[0])
    y = x.new_empty(x.shape[0], bank.shape[1], *size)
    for block in blocks:
        y[:, block.outputs] = block_output(block)
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
        kernels = _fold(mixed, scale, attentions, block, in_place=False)
        grad_x, grad_kernels = _convolve_backward(
            grad, x, kernels.to(x.dtype), kernel_size, geometry, block, needed.x, kernel_needed
        )
        if len(blocks) == 1:
            total_x = grad_x
        elif grad_x is not None:
            total_x = x.new_zeros(x.shape) if total_x is None else total_x
            total_x[:, block.inputs].add_(grad_x)
        if grad_kernels is None:
            continue
        grad_kernels = grad_kernels.to(mixed.dtype).view(-1, *mixed.shape[1:])
        if grads.columns is not None:
            product = workspace('product', grad_kernels.shape, grad_kernels)
            torch.mul(grad_kernels, mixed, out=product)
            _scales_backward(product, scale, attentions, block, grads)
        grad_mixed = _fold(grad_kernels, scale, attentions, block, in_place=True).flatten(1, 2)
        mix_rows_backward(
            grad_mixed, matrices, attentions.kernel, block.outputs, grads.bank, grads.kernel
        )
    return grads._replace(x=total_x)


def _blocks(x: Tensor, matrices: Tensor, geometry: Geometry, block_bytes: int) -> list[Block]:
    rows = rows_within(block_bytes, matrices, x.shape[0])
    return list(output_blocks(x.shape[1], matrices.shape[1], geometry.groups, rows))


def _grouped(kernels: Tensor, block: Block) -> Tensor:
    """(B, rows, columns) to (B, groups, rows / groups, columns)."""
    groups = block.groups.stop - block.groups.start
    return kernels.unflatten(1, (groups, -1))


def _fold(
    kernels: Tensor, scale: Tensor, attentions: Attentions, block: Block, in_place: bool
) -> Tensor:
    """``kernels`` (B or 1, groups, rows / groups, columns) scaled by c ⊗ s and f."""
    scale = scale[:, block.groups, None].to(kernels.dtype)
    shape = (scale.shape[0], *kernels.shape[1:])
    out = kernels if in_place else workspace('kernels', shape, kernels)
    kernels = torch.mul(kernels, scale, out=out)
    if attentions.filter is not None:
        kernels *= _row_scale(attentions.filter, block).to(kernels.dtype)
    return kernels


def _row_scale(filter_attention: Tensor, block: Block) -> Tensor:
    """f of a block's rows, shape (B, groups, rows / groups, 1)."""
    groups = block.groups.stop - block.groups.start
    return filter_attention[:, block.outputs].unflatten(1, (groups, -1))[..., None]


def _scales_backward(
    product: Tensor, scale: Tensor, attentions: Attentions, block: Block, grads: Gradients
) -> None:
    """Gradients of c ⊗ s and f from the kernels times their gradients, neither yet scaled."""
    assert grads.columns is not None
    if attentions.filter is None:
        grads.columns[:, block.groups] += product.sum(2)
        return
    rows = _row_scale(attentions.filter, block).to(product.dtype)
    columns = scale[:, block.groups, :, None].to(product.dtype)
    grads.columns[:, block.groups] += (rows.transpose(2, 3) @ product)[:, :, 0]
    if grads.filter is not None:
        grads.filter[:, block.outputs] = (product @ columns).flatten(1)


def _by_matmul(kernels: Tensor, kernel_size: torch.Size, geometry: Geometry) -> bool:
    return kernels.shape[1] == 1 and geometry.is_pointwise(kernel_size)


def _convolve(
    x: Tensor, kernels: Tensor, kernel_size: torch.Size, geometry: Geometry, block: Block
) -> Tensor:
    """Each sample with its own kernels (B, groups, rows / groups, columns): (B, rows, *size)."""
    batch = x.shape[0]
    if _by_matmul(kernels, kernel_size, geometry):
        y = torch.bmm(kernels[:, 0], x[:, block.inputs].flatten(2))
        return y.unflatten(2, x.shape[2:])
    weight, tall = _tall(x, kernels, kernel_size, block)
    conv = _CONV[len(kernel_size)]
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
    grad = grad[:, block.outputs]
    part = x[:, block.inputs]
    if _by_matmul(kernels, kernel_size, geometry):
        grad, part = grad.flatten(2), part.flatten(2)
        grad_x = torch.bmm(kernels[:, 0].mT, grad) if x_needed else None
        grad_kernels = torch.bmm(grad, part.mT) if kernels_needed else None
        return None if grad_x is None else grad_x.unflatten(2, x.shape[2:]), grad_kernels
    weight, tall = _tall(x, kernels, kernel_size, block)
    grad_tall, grad_weight, _ = torch.ops.aten.convolution_backward(
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
        (x_needed, kernels_needed, False),
    )
    return None if grad_tall is None else grad_tall.view(part.shape), grad_weight


def _tall(
    x: Tensor, kernels: Tensor, kernel_size: torch.Size, block: Block
) -> tuple[Tensor, Tensor]:
    """Sample b is group b of a grouped convolution: its weight and its one tall image."""
    columns = kernels.shape[3] // math.prod(kernel_size)
    weight = kernels.reshape(-1, columns, *kernel_size)
    return weight, x[:, block.inputs].reshape(1, -1, *x.shape[2:])
