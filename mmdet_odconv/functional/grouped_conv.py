"""One kernel for each sample with all attentions folded in, and one grouped convolution.

This is the implementation for accelerators: it makes few calls, it works in the input's type (the
matrix product and the convolution then run on tensor cores under automatic mixed precision), and
it never waits for the device.
"""

import torch
from torch import Tensor

from .attention import Attentions
from .formula import convolve_each_sample
from .implementation import (
    Geometry,
    Gradients,
    Implementation,
    Needed,
    Problem,
    column_scale,
    column_scale_backward,
    convolution_backward,
)


class GroupedConv(Implementation):
    name = 'grouped_conv'

    @staticmethod
    def unsupported_reason(problem: Problem) -> str | None:
        return None

    @staticmethod
    def forward(x: Tensor, bank: Tensor, attentions: Attentions, geometry: Geometry) -> Tensor:
        mixed = _mixture(bank, attentions.kernel, geometry.groups, x.dtype)
        scale, f = _scales(attentions, geometry.groups, x.dtype)
        kernels = mixed * scale if f is None else mixed * scale * f
        return convolve_each_sample(x, kernels.view(-1, *bank.shape[1:]), geometry)

    @staticmethod
    def backward(
        grad: Tensor,
        x: Tensor,
        bank: Tensor,
        attentions: Attentions,
        geometry: Geometry,
        needed: Needed,
    ) -> Gradients:
        batch, k = len(x), attentions.kernel
        mixed = _mixture(bank, k, geometry.groups, x.dtype)
        scale, f = _scales(attentions, geometry.groups, x.dtype)
        both = scale if f is None else scale * f
        batch_as_groups = geometry._replace(groups=batch * geometry.groups)
        grad_x, grad_kernels = convolution_backward(
            grad.reshape(1, -1, *grad.shape[2:]),
            x.reshape(1, -1, *x.shape[2:]),
            (mixed * both).view(-1, *bank.shape[2:]),
            batch_as_groups,
            needed.x,
            needed.bank or needed.attentions,
        )
        grads = Gradients(x=None if grad_x is None else grad_x.view(x.shape))
        if grad_kernels is None:
            return grads
        grad_kernels = grad_kernels.view(batch, *mixed.shape[1:])
        grad_mixed = (grad_kernels * both).flatten(1)
        if needed.bank:
            summed = grad_mixed.sum(0) if k is None else k.to(x.dtype).t() @ grad_mixed
            grads = grads._replace(bank=summed.view(bank.shape).to(bank.dtype))
        if needed.attentions:
            product = (grad_kernels * mixed).to(attentions.channel.dtype)
            by_rows = product if f is None else product * f
            channel, spatial = column_scale_backward(by_rows.sum(2), attentions)
            grads = grads._replace(channel=channel, spatial=spatial)
            if attentions.filter is not None:
                grads = grads._replace(filter=(product * scale).sum(3).flatten(1))
            if k is not None:
                grad_k = grad_mixed @ bank.to(x.dtype).flatten(1).t()
                grads = grads._replace(kernel=grad_k.to(k.dtype))
        return grads


def _mixture(bank: Tensor, kernel: Tensor | None, groups: int, dtype: torch.dtype) -> Tensor:
    """Σ_j k_j · W_j as matrices: (B, groups, rows of a group, columns), or 1 for B if K = 1."""
    matrices = bank.to(dtype).flatten(1)
    mixed = matrices if kernel is None else kernel.to(dtype) @ matrices
    return mixed.view(len(mixed), groups, bank.shape[1] // groups, -1)


def _scales(
    attentions: Attentions, groups: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """c ⊗ s, shape (B, groups, 1, columns), and f, shape (B, groups, rows of a group, 1)."""
    scale = column_scale(attentions, groups).unsqueeze(2).to(dtype)
    f = attentions.filter
    return scale, None if f is None else f.reshape(len(f), groups, -1, 1).to(dtype)
