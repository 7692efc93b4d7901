"""The squeeze of the attention branch: the average of a map, taken beside its convolution."""

import math
from typing import Any

import torch
from torch import Tensor

from .attention import at_least_float32
from .operator import is_batched, needs_plain_operations


def squeeze(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` and its average over all positions, for a layer that uses this ``x`` once.

    In the backward pass the gradient of the average, the same at all positions, is added in
    place to the gradient that comes from that one use. Autograd alone would make a tensor of the
    size of x for the sum (docs/performance.md has what this saves).

    Args:
        x (Tensor): Shape (B, C, *size).

    Returns:
        tuple[Tensor, Tensor]: ``x``, to be used once from here on, and the average, shape
        (B, C, 1, ...), float32 or wider.
    """
    if torch.is_grad_enabled() and x.requires_grad and not needs_plain_operations(x):
        return _Squeeze.apply(x)
    return x, _average(x)


def _average(x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.dim())), keepdim=True, dtype=at_least_float32(x.dtype))


class _Squeeze(torch.autograd.Function):
    """The identity and the average, whose gradients are added up in place."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.view_as(x), _average(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.dtype = inputs[0].shape, inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_average: Tensor | None) -> Tensor | None:
        if grad_average is None:
            return grad
        share = (grad_average / math.prod(ctx.shape[2:])).to(ctx.dtype)
        if grad is None:
            return share.expand(ctx.shape)
        # One that is expanded cannot be written.
        writable = 0 not in grad.stride()
        if torch.is_grad_enabled() or is_batched(grad) or not writable:
            return grad + share
        return grad.add_(share)
