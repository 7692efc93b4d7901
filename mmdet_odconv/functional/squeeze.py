"""The squeeze of the attention branch: the average of a map, taken beside its convolution."""

import math
from typing import Any

import torch
from torch import Tensor

from .attention import at_least_float32, cast
from .operator import is_batched

_POSITIONS = (2, 3, 4)  # the dimensions of x that are averaged over


def squeeze(x: Tensor, plain: bool = False) -> tuple[Tensor, Tensor]:
    """``x`` and its average over all positions, for a layer that uses this ``x`` once.

    In the backward pass the gradient of the average, the same at all positions, is added in
    place to the gradient that comes from that one use. Autograd alone would make a tensor of the
    size of x for the sum (docs/performance.md has what this saves).

    Args:
        x (Tensor): Shape (B, C, *size).
        plain (bool): Whether plain operations are needed. Default: False.

    Returns:
        tuple[Tensor, Tensor]: ``x``, to be used once from here on, and the average, shape (B, C),
        float32 or wider.
    """
    if not plain and torch.is_grad_enabled() and x.requires_grad:
        return _Squeeze.apply(x)
    return x, average(x)


def average(x: Tensor) -> Tensor:
    """The average over all positions, from (B, C, *size) to (B, C), float32 or wider."""
    wide = None if x.dtype == torch.float32 else at_least_float32(x.dtype)
    return x.mean(_POSITIONS[: x.dim() - 2], dtype=wide)


class _Squeeze(torch.autograd.Function):
    """The identity and the average, whose gradients are added up in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return x.view_as(x), average(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_average: Tensor | None) -> Tensor | None:
        if grad_average is None:
            return grad
        share = cast(grad_average / math.prod(ctx.shape[2:]), ctx.dtype)
        share = share.view(*share.shape, *(1,) * (len(ctx.shape) - 2))
        if grad is None:
            return share.expand(ctx.shape)
        # One that is expanded cannot be written.
        if torch.is_grad_enabled() or is_batched(grad) or 0 in grad.stride():
            return grad + share
        return grad.add_(share)
