"""One kernel for each sample with all attentions folded in, and one grouped convolution.

This is the implementation for accelerators: it makes few calls, it works in the input's type (the
matrix product and the convolution then run on tensor cores under automatic mixed precision), and
it never waits for the device.
"""

import torch
from torch import Tensor

from ..compat import is_compiling
from .attention import Attentions, cast
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
    kernel_shapes,
    remembered_shapes,
)


class GroupedConv(Implementation):
    name = 'grouped_conv'

    @staticmethod
    def unsupported_reason(problem: Problem) -> str | None:
        return None

    @staticmethod
    def forward(
        x: Tensor, bank: Tensor, attentions: Attentions, bias: Tensor | None, geometry: Geometry
    ) -> Tensor:
        c, f, s, k = attentions
        batch, dtype = x.shape[0], x.dtype
        find_shapes = kernel_shapes if is_compiling() else remembered_shapes
        shapes = find_shapes(batch, geometry.groups, bank.shape)
        kernels = _mixture(bank, k, dtype).view(shapes.kernels)
        scale = column_scale(c, s, shapes.channel, shapes.spatial)
        for factor in (scale, None if f is None else f.view(shapes.filter)):
            if factor is not None:
                kernels = kernels * cast(factor, dtype)
        several = batch > 1 and kernels.shape[0] > 1
        weight = kernels.view(shapes.weight)
        conv = CONV[x.dim() - 2]
        if not several:
            return conv(x, weight, None if bias is None else cast(bias, dtype), *geometry)
        y = conv(
            x.reshape(1, -1, *x.shape[2:]), weight, None, *geometry[:3], geometry.groups * batch
        )
        return add_bias(y.view(batch, -1, *y.shape[2:]), bias)

    @staticmethod
    def backward(
        grad: Tensor,
        x: Tensor,
        bank: Tensor,
        attentions: Attentions,
        geometry: Geometry,
        needed: Needed,
    ) -> Gradients:
        c, f, s, k = attentions
        samples, groups, shape = x.shape[0], geometry.groups, x.shape
        shapes = remembered_shapes(samples, groups, bank.shape, every_dimension=True)
        mixed = _mixture(bank, k, x.dtype).view(shapes.kernels)
        scale = column_scale(c, s, shapes.channel, shapes.spatial)
        rows = None if f is None else f.view(shapes.filter)
        both = scale if rows is None else rows if scale is None else scale * rows
        if both is not None:
            both = cast(both, x.dtype)
        kernels = mixed if both is None else mixed * both
        if len(kernels) > 1:
            grad, x = grad.reshape(1, -1, *grad.shape[2:]), x.reshape(1, -1, *shape[2:])
            geometry = geometry._replace(groups=samples * groups)
        grad_x, grad_kernels = convolution_backward(
            grad, x, kernels.view(-1, *bank.shape[2:]), geometry, needed.x, needed.kernels
        )
        grads = Gradients(None if grad_x is None else grad_x.view(shape))
        if grad_kernels is None:
            return grads
        grad_kernels = grad_kernels.view(kernels.shape)
        if needed.bank or needed.kernel:
            grad_mixed = (grad_kernels if both is None else grad_kernels * both).flatten(1)
            if needed.bank:
                summed = grad_mixed.sum(0) if k is None else cast(k, x.dtype).t() @ grad_mixed
                grads = grads._replace(bank=cast(summed.view(bank.shape), bank.dtype))
            if needed.kernel and k is not None:
                grad_k = grad_mixed @ cast(bank, x.dtype).flatten(1).t()
                grads = grads._replace(kernel=cast(grad_k, k.dtype))
        if needed.channel or needed.filter or needed.spatial:
            # As products with a row or a column: each is one call, where a sum would be two.
            product = (grad_kernels * mixed).flatten(3)
            for factor in (scale, rows):
                product = product if factor is None else cast(product, factor.dtype)
            if needed.channel or needed.spatial:
                total = product.sum(2) if rows is None else rows.flatten(2).unsqueeze(2) @ product
                total = total.view(samples, -1, bank.shape[3:].numel())
                channel, spatial = column_scale_backward(total, attentions, needed)
                grads = grads._replace(channel=channel, spatial=spatial)
            if needed.filter and f is not None:
                if scale is None:
                    grad_f = product.sum(3)
                else:
                    columns = scale.expand(samples, groups, 1, *mixed.shape[3:]).flatten(2)
                    grad_f = product @ columns.unsqueeze(3)
                grads = grads._replace(filter=cast(grad_f.flatten(1), f.dtype))
        return grads


def _mixture(bank: Tensor, kernel: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Σ_j k_j · W_j of each sample, or the bank itself if K = 1."""
    mixed = cast(bank, dtype)
    return mixed if kernel is None else cast(kernel, dtype) @ mixed.flatten(1)
