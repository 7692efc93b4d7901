"""Omni-dimensional dynamic convolution as a function of input, kernel bank and attentions.

Paper: Omni-Dimensional Dynamic Convolution, equation 3
(https://openreview.net/forum?id=DmpCfq6Mg39)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .attention import Attentions
from .choice import STRATEGIES, block_bytes, choose, fastest, record
from .geometry import Geometry, resolve_geometry
from .gradients import Needed, needs_gradients
from .mixture import column_scale_backward
from .precision import without_autocast
from .strategies import columns, formula, kernels, shared

_BY_NAME: dict[str, Any] = {'kernels': kernels, 'columns': columns, 'shared': shared}


def odconv(
    x: Tensor,
    bank: Tensor,
    attentions: Attentions,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    strategy: str = 'auto',
) -> Tensor:
    """y = f ⊙ conv(c ⊙ x, Σ_j k_j · (s ⊙ W_j)) + bias, each sample with its own attentions.

    The number of spatial dimensions n is read off the bank: one, two and three are possible.

    For the backward pass autograd keeps x, the bank and the attentions, and nothing else, but for
    the strategy 'formula', which is also the one that compilers, exporters and a second
    derivative get.

    Args:
        x (Tensor): Input, shape (B, C_in, *size) with n sizes. B may be 0.
        bank (Tensor): Kernel bank W, shape (K, C_out, C_in / groups, *kernel_size).
        attentions (Attentions): c, f, s and k of each of the B samples.
        bias (Tensor, optional): Static bias, shape (C_out,).
        stride, padding, dilation, groups: As in ``torch.nn.functional.conv2d``.
        strategy (str): How to compute it, the result being the same: 'auto' for the table of
            rules in :mod:`~mmdet_odconv.functional.choice`, 'benchmark' for the fastest as
            measured at the first call of each shape, or one of ``STRATEGIES``. Default: 'auto'.

    Returns:
        Tensor: Shape (B, C_out, *output size), in the type that the convolution gives: x's, or
        autocast's.

    Raises:
        ValueError: The strategy is unknown, or cannot compute this: 'shared' with K > 1.
    """
    x, geometry = resolve_geometry(x, bank.shape[3:], stride, padding, dilation, groups)
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    if autocast and x.dtype == torch.float32:
        x = x.to(torch.get_autocast_dtype(device))
    training = needs_gradients(x, bank, *attentions)
    name = choose(strategy, x, bank, geometry, training)
    if name == 'benchmark':
        name = _measured_choice(x, bank, attentions, geometry, training)
    record(x, bank, training, name)
    y = _compute(name, x, bank, attentions, geometry, training)
    if bias is None:
        return y
    bias = bias.to(y.dtype).reshape(-1, *(1,) * len(geometry.stride))
    return y + bias if name == 'formula' or y.requires_grad else y.add_(bias)


def _compute(
    name: str, x: Tensor, bank: Tensor, attentions: Attentions, geometry: Geometry, training: bool
) -> Tensor:
    """The convolution by the strategy ``name``, without its bias."""
    if name == 'formula':
        return formula.forward(x, bank, attentions, geometry)
    if training:
        return _ODConv.apply(name, geometry, x, bank, *attentions)
    with without_autocast(x.device.type):
        return _BY_NAME[name].forward(x, bank, attentions, geometry, block_bytes(name, x.shape[0]))


def _measured_choice(
    x: Tensor, bank: Tensor, attentions: Attentions, geometry: Geometry, training: bool
) -> str:
    """The fastest strategy for this shape, with the backward pass where there will be one."""
    inputs = (x, bank, *attentions)
    needed = tuple(t is not None and t.requires_grad for t in inputs) if training else ()
    key = (x.shape, bank.shape, x.dtype, bank.dtype, x.device, geometry, needed)
    candidates = [n for n in STRATEGIES if n != 'shared' or attentions.kernel is None]

    def run(name: str) -> None:
        # Copies, so that no hook of the caller's tensors runs and no gradient reaches them.
        copies: list[Any] = [
            None if t is None else t.detach().requires_grad_(training and t.requires_grad)
            for t in inputs
        ]
        with torch.set_grad_enabled(training):
            given = Attentions(*copies[2:])
            y = _compute(name, copies[0], copies[1], given, geometry, training)
            if training:
                leaves = [t for t in copies if t is not None and t.requires_grad]
                torch.autograd.grad(y.sum(), leaves)

    return fastest(candidates, run, key, x.device.type)


class _ODConv(torch.autograd.Function):
    """A strategy with its own backward pass, which makes again what it does not keep."""

    @staticmethod
    def forward(
        ctx: Any,
        name: str,
        geometry: Geometry,
        x: Tensor,
        bank: Tensor,
        *attentions: Any,
    ) -> Tensor:
        ctx.name, ctx.geometry = name, geometry
        ctx.save_for_backward(x, bank, *attentions)
        with without_autocast(x.device.type):
            return _BY_NAME[name].forward(
                x, bank, Attentions(*attentions), geometry, block_bytes(name, x.shape[0])
            )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, bank, *rest = ctx.saved_tensors
        attentions = Attentions(*rest)
        x_needed, bank_needed, *others_needed = ctx.needs_input_grad[2:]
        with without_autocast(x.device.type):
            if torch.is_grad_enabled():
                return None, None, *_differentiable_backward(ctx, grad, x, bank, attentions)
            needed = Needed(x_needed, bank_needed, any(others_needed))
            grads = _BY_NAME[ctx.name].backward(
                grad, x, bank, attentions, ctx.geometry, block_bytes(ctx.name, x.shape[0]), needed
            )
        channel = spatial = None
        if grads.columns is not None:
            channel, spatial = column_scale_backward(grads.columns, attentions)
        grad_bank = None if grads.bank is None else grads.bank.view(bank.shape)
        return None, None, grads.x, grad_bank, channel, grads.filter, spatial, grads.kernel


def _differentiable_backward(
    ctx: Any, grad: Tensor, x: Tensor, bank: Tensor, attentions: Attentions
) -> list[Tensor | None]:
    """The gradients as functions of the inputs, for a second derivative: by the formula."""
    inputs = (x, bank, *attentions)
    wanted = [
        tensor
        for tensor, needed in zip(inputs, ctx.needs_input_grad[2:], strict=True)
        if tensor is not None and needed
    ]
    y = formula.forward(x, bank, attentions, ctx.geometry)
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return [
        next(found) if tensor is not None and needed else None
        for tensor, needed in zip(inputs, ctx.needs_input_grad[2:], strict=True)
    ]
