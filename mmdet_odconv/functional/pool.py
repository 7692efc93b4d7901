"""The squeeze of the attention branch: global average pooling."""

import math
from typing import Any

import torch
from torch import Tensor


def global_average_pool(x: Tensor) -> Tensor:
    """The mean of each channel over all positions: (B, C, *) to (B, C)."""
    dims = tuple(range(2, x.dim()))
    if x.dtype in (torch.float16, torch.bfloat16):
        return x.mean(dims)  # Their sums could overflow.
    return x.sum(dims) / math.prod(x.shape[2:])  # On a CPU half the time of mean.


def pool_beside(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` and its :func:`global_average_pool`, for a layer that uses the first of them once.

    In the backward pass the gradient of the mean, the same at all positions, is then added in
    place to the gradient that comes from that use. Autograd alone would make a tensor of x's size
    of it, and another one of the sum.

    Args:
        x (Tensor): Shape (B, C, *size).

    Returns:
        tuple[Tensor, Tensor]: ``x``, to be used once from here on, and its mean, shape (B, C).
    """
    follows = torch.is_grad_enabled() and x.requires_grad
    if not follows or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return x, global_average_pool(x)
    return _PoolBeside.apply(x)


class _PoolBeside(torch.autograd.Function):
    """The identity and the mean, whose gradients are added up in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.shape = x.shape
        return x.view_as(x), global_average_pool(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_mean: Tensor | None) -> Tensor | None:
        if grad_mean is None:
            return grad
        size = ctx.shape[2:]
        share = (grad_mean / math.prod(size)).reshape(*grad_mean.shape, *(1,) * len(size))
        if grad is None:
            return share.expand(ctx.shape)
        if torch.is_grad_enabled() or not grad.is_contiguous():
            return grad + share
        return grad.add_(share)
