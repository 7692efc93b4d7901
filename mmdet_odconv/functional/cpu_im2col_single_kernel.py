"""K = 1: attentions folded into the patches (im2col) and the output, one product for the batch.

With a single kernel in the bank no sample needs a kernel of its own: the patches of all samples,
scaled by c ⊗ s, stand side by side in one matrix.
"""

import torch
from torch import Tensor

from .attention import Attentions, cast
from .cpu_im2col import extract_patches, patch_scale, scale_patches_backward
from .implementation import (
    Geometry,
    Gradients,
    Implementation,
    Needed,
    Problem,
    add_bias,
)


class CpuIm2colSingleKernel(Implementation):
    name = 'cpu_im2col_single_kernel'

    @staticmethod
    def unsupported_reason(problem: Problem) -> str | None:
        if problem.device != 'cpu':
            return f'the device is {problem.device}, not a CPU'
        if problem.kernel_num > 1:
            return f'it needs a bank of one kernel, got kernel_num={problem.kernel_num}'
        return None

    @staticmethod
    def is_fastest(problem: Problem) -> bool:
        # To make the patches takes as long as to scale kernels of so many rows for each sample.
        if problem.depthwise or problem.rows < 2 * problem.positions:
            return False
        # In inference a 1×1 kernel is not scaled: c and f scale the maps.
        return problem.training or not problem.pointwise or problem.kernel_bytes > 4 << 20

    @staticmethod
    def forward(
        x: Tensor, bank: Tensor, attentions: Attentions, bias: Tensor | None, geometry: Geometry
    ) -> Tensor:
        patches = extract_patches(x.contiguous(), bank.shape[3:], geometry)
        columns = _side_by_side(patches, patch_scale(patches, attentions), geometry)
        products = torch.bmm(_matrices(bank, geometry, x.dtype), columns)
        y = x.new_empty(x.shape[0], bank.shape[1], *patches.shape[bank.dim() - 1 :])
        flat = y.flatten(2)
        products = _by_sample(products, flat)
        if attentions.filter is None:
            flat.copy_(products)
        else:
            torch.mul(products, cast(attentions.filter[..., None], y.dtype), out=flat)
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
        x, grad = x.contiguous(), grad.contiguous().flatten(2)
        patches = extract_patches(x, bank.shape[3:], geometry)
        scale, f = patch_scale(patches, attentions), attentions.filter
        columns = _side_by_side(patches, scale, geometry)
        matrices = _matrices(bank, geometry, x.dtype)
        # In the layout of a product with `columns`.
        grad_products = grad.new_empty(grad.shape[1], grad.shape[0], grad.shape[2])
        if f is None:
            grad_products.copy_(grad.transpose(0, 1))
        else:
            torch.mul(grad.transpose(0, 1), cast(f.t()[..., None], grad.dtype), out=grad_products)
        grad_products = grad_products.view(geometry.groups, -1, columns.shape[2])

        grad_x = grad_bank = grad_filter = channel = spatial = None
        if needed.bank:
            product = torch.bmm(grad_products, columns.mT)
            grad_bank = cast(product, bank.dtype).view(bank.shape)
        if needed.filter and f is not None:
            products = _by_sample(torch.bmm(matrices, columns), grad)
            grad_filter = cast((products * grad).sum(2), f.dtype)
        if needed.x or needed.channel or needed.spatial:
            grad_columns = torch.bmm(matrices.mT, grad_products)
            by_sample = grad_columns.view(*grad_columns.shape[:2], x.shape[0], -1)
            grad_x, channel, spatial = scale_patches_backward(
                by_sample.permute(2, 0, 1, 3), patches, scale, x, attentions, geometry, needed
            )
        return Gradients(grad_x, grad_bank, channel, grad_filter, spatial)


def _matrices(bank: Tensor, geometry: Geometry, dtype: torch.dtype) -> Tensor:
    """The one kernel as a matrix for each group: (groups, C_out / groups, columns)."""
    return cast(bank.view(geometry.groups, bank.shape[1] // geometry.groups, -1), dtype)


def _side_by_side(patches: Tensor, scale: Tensor | None, geometry: Geometry) -> Tensor:
    """Patches scaled by c ⊗ s, shape (groups, columns of the kernel matrix, B · positions)."""
    ndim = patches.dim() // 2 - 1
    kernel, size = patches.shape[1 : 2 + ndim], patches.shape[2 + ndim :]
    columns = patches.new_empty(*kernel, patches.shape[0], *size)
    by_sample = columns.movedim(1 + ndim, 0)
    if scale is None:
        by_sample.copy_(patches)
    else:
        torch.mul(patches, scale, out=by_sample)
    return columns.view(geometry.groups, kernel.numel() // geometry.groups, -1)


def _by_sample(products: Tensor, like: Tensor) -> Tensor:
    """A product with patches side by side, as (B, C_out, positions), the shape of ``like``."""
    batch, channels, positions = like.shape
    return products.view(channels, batch, positions).transpose(0, 1)
