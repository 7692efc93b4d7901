"""Linear heads that read the same features, as one matrix product.

Heads whose parameters lie one behind another in memory are one matrix as they are: nothing is put
together at a call, and each head stays a parameter of its own for optimisers, averages and
checkpoints. (``nn.LSTM`` lays out its weights in the same way.)
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear_heads(h: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """The outputs of all heads, side by side.

    One product where the parameters were laid out by :func:`lay_out_consecutively`; else one for
    each head, with the same result.

    Args:
        h (Tensor): Features, shape (B, A).
        weights (Sequence[Tensor]): Of each head, shape (n, A), or with trailing sizes of 1.
        biases (Sequence[Tensor]): Of each head, shape (n,).

    Returns:
        Tensor: Shape (B, sum of all n).
    """
    weight, bias = _as_one(weights), _as_one(biases)
    if weight is None or bias is None:
        pairs = zip(weights, biases, strict=True)
        return torch.cat([F.linear(h, w.flatten(1), b) for w, b in pairs], 1)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (h, *weights, *biases)):
        return _LinearHeads.apply(h, len(weights), *weights, *biases)
    return F.linear(h, weight, bias)


def lay_out_consecutively(parameters: Sequence[nn.Parameter]) -> None:
    """Move the data of ``parameters``, all of one type and device, into one piece of memory.

    Nothing is done where they already are: memory that is shared between processes stays so.
    """
    if _as_one(parameters) is not None:
        return
    flat = torch.cat([p.detach().flatten() for p in parameters])
    parts = flat.split([p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.data = part.view(parameter.shape)


class _LinearHeads(torch.autograd.Function):
    """The one product, with a gradient for each head's parameters."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, count: int, *parameters: Tensor) -> Tensor:
        weights, biases = parameters[:count], parameters[count:]
        ctx.save_for_backward(h, *weights)
        ctx.bias_sizes = [len(b) for b in biases]
        weight = _as_one(weights)
        assert weight is not None
        return F.linear(h, weight, _as_one(biases))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        h, *weights = ctx.saved_tensors
        # A second derivative has to reach each weight.
        weight = None if torch.is_grad_enabled() else _as_one(weights)
        if weight is None:
            weight = torch.cat([w.flatten(1) for w in weights])
        parts = (grad.t() @ h).split(ctx.bias_sizes)
        grad_weights = [part.view(w.shape) for part, w in zip(parts, weights, strict=True)]
        return grad @ weight, None, *grad_weights, *grad.sum(0).split(ctx.bias_sizes)


def _as_one(tensors: Sequence[Tensor]) -> Tensor | None:
    """``tensors``, shape (n, ...), as one of shape (sum of n, ...) where memory has them so."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    first = tensors[0]
    if type(first) not in (Tensor, nn.Parameter):
        return None  # A subclass (DTensor, FakeTensor) need not have memory.
    start, size = first.storage_offset(), first.element_size()
    base, offset = first.data_ptr() - start * size, start
    for tensor in tensors:
        if (
            tensor.dtype != first.dtype
            or tensor.storage_offset() != offset
            or tensor.data_ptr() != base + offset * size
            or not tensor.is_contiguous()
        ):
            return None
        offset += tensor.numel()
    columns = first.numel() // len(first)
    rows = (offset - start) // columns
    if first.dim() == 1:
        return first.as_strided((rows,), (1,), start)
    return first.as_strided((rows, columns), (columns, 1), start)
