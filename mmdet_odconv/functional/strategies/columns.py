"""Attentions folded into the windows and the output, and matrix products with mixed kernels.

The cheapest form where the map is small and the kernel large, as in the last stage of a ResNet:
the windows (im2col) are then fewer than the kernel's entries. c ⊗ s scales the windows and f the
output; what is left of a sample's kernel, its mixture, is made some output channels at a time in
memory that stays in the cache, and the bank is read once for the whole batch.
"""

import torch
from torch import Tensor

from ..attention import Attentions
from ..geometry import Block, Geometry, output_blocks
from ..gradients import Gradients, Needed
from ..im2col import windows, windows_backward
from ..mixture import column_scale, mix_rows, mix_rows_backward, rows_within
from ..precision import as_type
from ..workspace import product_in_workspace, workspace


def forward(
    x: Tensor, bank: Tensor, attentions: Attentions, geometry: Geometry, block_bytes: int
) -> Tensor:
    """``odconv`` without its bias.

    Args:
        x (Tensor): Shape (B, C_in, *size), B at least 1.
        bank (Tensor): Shape (K, C_out, C_in / groups, *kernel_size).
        attentions (Attentions): Of the B samples.
        geometry (Geometry): Of the convolution.
        block_bytes (int): Memory that the mixtures made at a time may take.

    Returns:
        Tensor: Shape (B, C_out, *output size).
    """
    matrices = bank.flatten(2)
    seen = windows(x, bank.shape[3:], geometry)
    scale = column_scale(attentions, geometry.groups)
    columns = scaled_columns(seen, scale)
    y = x.new_empty(x.shape[0], bank.shape[1], columns.shape[-1])
    blocks = _blocks(x, matrices, geometry, block_bytes)
    for block in blocks:
        rows = block.outputs
        mixed = as_type(mix_rows(matrices, attentions.kernel, rows), x.dtype)
        part = torch.matmul(mixed, columns[:, block.groups.start])
        if attentions.filter is None:
            y[:, rows] = part
        else:
            torch.mul(part, as_type(attentions.filter[:, rows, None], x.dtype), out=y[:, rows])
    return y.unflatten(2, seen.shape[2 + bank.dim() - 3 :])


def backward(
    grad: Tensor,
    x: Tensor,
    bank: Tensor,
    attentions: Attentions,
    geometry: Geometry,
    block_bytes: int,
    needed: Needed,
) -> Gradients:
    """Gradients of :func:`forward`, from its inputs alone: windows and mixtures are made again.

    Args:
        grad (Tensor): Of the output.
        x, bank, attentions, geometry, block_bytes: As in :func:`forward`.
        needed (Needed): Which gradients to compute.
    """
    matrices = bank.flatten(2)
    seen = windows(x, bank.shape[3:], geometry)
    scale = column_scale(attentions, geometry.groups)
    columns = scaled_columns(seen, scale)
    grad = grad.flatten(2)
    grads = Gradients.allocate(needed, matrices, scale, attentions)
    grad_columns = torch.zeros_like(columns) if needed.x or needed.attentions else None
    blocks = _blocks(x, matrices, geometry, block_bytes)
    for block in blocks:
        rows, group = block.outputs, block.groups.start
        mixed = mix_rows(matrices, attentions.kernel, rows)
        f = None if attentions.filter is None else attentions.filter[:, rows, None]
        grad_rows = grad[:, rows]
        if needed.bank or needed.attentions:
            # The gradient of the mixture, but for f.
            grad_mixed = product_in_workspace('gradient', grad_rows, columns[:, group].mT)
            grad_mixed = as_type(grad_mixed, mixed.dtype)
            if grads.filter is not None:
                product = workspace('product', grad_mixed.shape, grad_mixed)
                grads.filter[:, rows] = torch.mul(grad_mixed, mixed, out=product).sum(2)
            if f is not None:
                grad_mixed *= as_type(f, grad_mixed.dtype)
            mix_rows_backward(
                grad_mixed, matrices, attentions.kernel, rows, grads.bank, grads.kernel
            )
        if grad_columns is not None:
            if f is not None:
                grad_rows = grad_rows * as_type(f, grad_rows.dtype)
            kernels = as_type(mixed, x.dtype).expand(x.shape[0], -1, -1)
            grad_columns[:, group].baddbmm_(kernels.mT, grad_rows)
    if grad_columns is None:
        return grads
    grad_x, grad_scale = columns_backward(grad_columns, seen, scale, x, geometry, needed)
    return grads._replace(x=grad_x, columns=grad_scale)


def scaled_columns(seen: Tensor, scale: Tensor) -> Tensor:
    """Windows scaled by c ⊗ s, a column for each output position.

    Args:
        seen (Tensor): Windows, shape (B, C_in, *kernel_size, *output size).
        scale (Tensor): c ⊗ s, shape (B, groups, columns of the kernel matrix).

    Returns:
        Tensor: Shape (B, groups, columns of the kernel matrix, output positions).
    """
    # A new tensor of its own: a product would follow the strides of the overlapping windows.
    columns = seen.new_empty(seen.shape)
    torch.mul(seen, as_type(per_window(scale, seen), seen.dtype), out=columns)
    return columns.view(*scale.shape, -1)


def columns_backward(
    grad: Tensor, seen: Tensor, scale: Tensor, x: Tensor, geometry: Geometry, needed: Needed
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and of c ⊗ s from that of :func:`scaled_columns`, which is overwritten."""
    grad_scale = None
    if needed.attentions:
        raw = seen.reshape(grad.shape)
        grad_scale = as_type((grad * raw).sum(3), scale.dtype)
    if not needed.x:
        return None, grad_scale
    grad *= as_type(scale[..., None], grad.dtype)
    return windows_backward(grad.view(seen.shape), x, geometry), grad_scale


def per_window(scale: Tensor, seen: Tensor) -> Tensor:
    """``scale`` shaped to multiply the windows ``seen``."""
    ndim = seen.dim() // 2 - 1
    return scale.reshape(*seen.shape[: 2 + ndim], *(1,) * ndim)


def _blocks(x: Tensor, matrices: Tensor, geometry: Geometry, block_bytes: int) -> tuple[Block, ...]:
    """Blocks of output channels, none of several groups."""
    out_channels = matrices.shape[1]
    rows = min(rows_within(block_bytes, matrices, x.shape[0]), out_channels // geometry.groups)
    return output_blocks(x.shape[1], out_channels, geometry.groups, rows)
