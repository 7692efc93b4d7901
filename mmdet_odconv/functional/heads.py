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

from .gradients import needs_gradients


class JoinedHeads:
    """The parameters of several heads, moved into one piece of memory, and seen as one head.

    Args:
        weights (Sequence[nn.Parameter]): Of each head, shape (n, A), or with trailing sizes of 1.
        biases (Sequence[nn.Parameter]): Of each head, shape (n,).
    """

    def __init__(self, weights: Sequence[nn.Parameter], biases: Sequence[nn.Parameter]) -> None:
        parameters = [*weights, *biases]
        flat = torch.cat([p.detach().flatten() for p in parameters])
        parts = flat.split([p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.data = part.view(parameter.shape)
        rows = sum(len(b) for b in biases)
        self.weight, self.bias = flat[:-rows].view(rows, -1), flat[-rows:]
        self._offsets = self._offsets_of(parameters)

    def hold(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> bool:
        """Whether these, the parameters of that time, are still where they were put."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False  # Neither follows memory.
        offsets = self._offsets_of([*weights, *biases])
        return offsets is not None and offsets == self._offsets

    def _offsets_of(self, parameters: Sequence[Tensor]) -> list[int] | None:
        """Bytes from the start of the memory; None for a type without memory (DTensor, fake)."""
        if type(parameters[0]) not in (Tensor, nn.Parameter):
            return None
        start = self.weight.data_ptr()
        return [p.data_ptr() - start for p in parameters]


def linear_heads(
    h: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    joined: JoinedHeads | None = None,
) -> Tensor:
    """The outputs of all heads, side by side.

    Args:
        h (Tensor): Features, shape (B, A).
        weights (Sequence[Tensor]): Of each head, shape (n, A), or with trailing sizes of 1.
        biases (Sequence[Tensor]): Of each head, shape (n,).
        joined (JoinedHeads, optional): Makes one product of it while it holds the parameters;
            else there is one for each head, with the same result. Default: None.

    Returns:
        Tensor: Shape (B, sum of all n).
    """
    if joined is None or not joined.hold(weights, biases):
        pairs = zip(weights, biases, strict=True)
        return torch.cat([F.linear(h, w.flatten(1), b) for w, b in pairs], 1)
    if needs_gradients(h, *weights, *biases):
        return _LinearHeads.apply(h, joined.weight, joined.bias, len(weights), *weights, *biases)
    return F.linear(h, joined.weight, joined.bias)


class _LinearHeads(torch.autograd.Function):
    """The one product, with a gradient for each head's parameters."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, bias: Tensor, count: int, *parameters: Tensor
    ) -> Tensor:
        weights, biases = parameters[:count], parameters[count:]
        # The heads' own, too: they tell when one was overwritten before the backward pass.
        ctx.save_for_backward(h, *weights)
        ctx.weight, ctx.sizes = weight, [len(b) for b in biases]
        return F.linear(h, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        h, *weights = ctx.saved_tensors
        weight = ctx.weight
        if torch.is_grad_enabled():  # A second derivative has to reach each weight.
            weight = torch.cat([w.flatten(1) for w in weights])
        parts = (grad.t() @ h).split(ctx.sizes)
        grad_weights = [part.view(w.shape) for part, w in zip(parts, weights, strict=True)]
        grad_biases = grad.sum(0).split(ctx.sizes)
        return grad @ weight, None, None, None, *grad_weights, *grad_biases
