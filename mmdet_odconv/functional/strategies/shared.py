"""K = 1: attentions folded into the windows and the output, and one product for the whole batch.

With a single kernel in the bank no sample needs a kernel of its own: the windows of all samples,
scaled by c ⊗ s, stand side by side in one matrix.
"""

import torch
from torch import Tensor

from ..attention import Attentions
from ..geometry import Geometry
from ..gradients import Gradients, Needed
from ..im2col import windows
from ..mixture import column_scale
from ..precision import as_type
from .columns import columns_backward, per_window


def forward(
    x: Tensor, bank: Tensor, attentions: Attentions, geometry: Geometry, block_bytes: int
) -> Tensor:
    """``odconv`` without its bias.

    Args:
        x (Tensor): Shape (B, C_in, *size), B at least 1.
        bank (Tensor): Shape (1, C_out, C_in / groups, *kernel_size).
        attentions (Attentions): Of the B samples, without a kernel attention.
        geometry (Geometry): Of the convolution.
        block_bytes (int): Unused: there are no per-sample kernels.

    Returns:
        Tensor: Shape (B, C_out, *output size).
    """
    ndim = bank.dim() - 3
    seen = windows(x, bank.shape[3:], geometry)
    columns = _side_by_side(seen, column_scale(attentions, geometry.groups))
    products = torch.bmm(as_type(_per_group(bank, geometry), x.dtype), columns)
    y = x.new_empty(x.shape[0], bank.shape[1], *seen.shape[2 + ndim :])
    products = _by_sample(products, y.flatten(2))
    if attentions.filter is None:
        y.flatten(2).copy_(products)
    else:
        torch.mul(products, as_type(attentions.filter[..., None], y.dtype), out=y.flatten(2))
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
    """Gradients of :func:`forward`, from its inputs alone: the windows are made once more.

    Args:
        grad (Tensor): Of the output.
        x, bank, attentions, geometry, block_bytes: As in :func:`forward`.
        needed (Needed): Which gradients to compute.
    """
    seen = windows(x, bank.shape[3:], geometry)
    scale = column_scale(attentions, geometry.groups)
    columns = _side_by_side(seen, scale)
    matrices = as_type(_per_group(bank, geometry), x.dtype)
    grad = grad.flatten(2)
    # The layout of a product with `columns`.
    grad_products = grad.new_empty(grad.shape[1], grad.shape[0], grad.shape[2])
    f = attentions.filter
    if f is None:
        grad_products.copy_(grad.transpose(0, 1))
    else:
        torch.mul(grad.transpose(0, 1), f.t()[..., None].to(grad.dtype), out=grad_products)
    grad_products = grad_products.view(geometry.groups, -1, columns.shape[2])

    grad_bank = grad_filter = grad_x = grad_scale = None
    if needed.bank:
        grad_bank = as_type(torch.bmm(grad_products, columns.mT), bank.dtype)
        grad_bank = grad_bank.view(bank.flatten(2).shape)
    if needed.attentions and f is not None:
        products = _by_sample(torch.bmm(matrices, columns), grad)
        grad_filter = as_type((products * grad).sum(2), f.dtype)
    if needed.x or needed.attentions:
        grad_columns = torch.bmm(matrices.mT, grad_products)
        by_sample = grad_columns.view(*grad_columns.shape[:2], x.shape[0], -1).permute(2, 0, 1, 3)
        grad_x, grad_scale = columns_backward(by_sample, seen, scale, x, geometry, needed)
    return Gradients(grad_x, grad_bank, grad_scale, grad_filter, None)


def _per_group(bank: Tensor, geometry: Geometry) -> Tensor:
    """The one kernel as matrices: (1, C_out, ...) to (groups, C_out / groups, columns)."""
    return bank[0].flatten(1).unflatten(0, (geometry.groups, -1))


def _side_by_side(seen: Tensor, scale: Tensor) -> Tensor:
    """Windows scaled by c ⊗ s, shape (groups, columns of the kernel matrix, B · positions)."""
    ndim = seen.dim() // 2 - 1
    batch, kernel, size = seen.shape[0], seen.shape[1 : 2 + ndim], seen.shape[2 + ndim :]
    columns = seen.new_empty(*kernel, batch, *size)
    torch.mul(seen, as_type(per_window(scale, seen), seen.dtype), out=columns.movedim(1 + ndim, 0))
    return columns.view(*scale.shape[1:], -1)


def _by_sample(products: Tensor, like: Tensor) -> Tensor:
    """A product with windows side by side, as (B, C_out, positions), the shape of ``like``."""
    batch, channels, positions = like.shape
    return products.view(channels, batch, positions).transpose(0, 1)
