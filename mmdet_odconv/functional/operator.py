"""ODConv as one operator of input, kernel bank and attentions, for eager and compiled PyTorch.

Paper: Omni-Dimensional Dynamic Convolution, equation 3
(https://openreview.net/forum?id=DmpCfq6Mg39)
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..compat import (
    COMPILED_OPERATOR,
    autocast_dtype,
    autocast_is_on,
    is_compiling,
    is_legacy_batched,
    not_compiled,
    without_autocast,
)
from .attention import Attentions, cast
from .dispatch import RECORDS, check_strategy, pick, record
from .formula import odconv_formula
from .grouped_conv import GroupedConv
from .implementation import Geometry, Gradients, Implementation, Needed, resolve_geometry

# Memory of all samples' kernels up to which a compiled network gets the operations.
MOST_COMPILED_BYTES = 4 << 20
# Tensors whose memory can be written directly; others have a say in each operation.
_PLAIN_TENSORS = (Tensor, nn.Parameter)


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
    """y = f ⊙ conv(c ⊙ x, Σ_j k_j · (s ⊙ W_j)) + bias, with attentions for each sample.

    The number of spatial dimensions n (one, two or three) is that of the bank. For the backward
    pass autograd keeps x, the bank and the attentions, and nothing else, in eager mode and under
    ``torch.compile``.

    Args:
        x (Tensor): Input, shape (B, C_in, *size) with n sizes. B may be 0.
        bank (Tensor): Kernel bank W, shape (K, C_out, C_in / groups, *kernel_size).
        attentions (Attentions): c, f, s and k of each of the B samples.
        bias (Tensor, optional): Static bias, shape (C_out,). Default: None.
        stride, padding, dilation, groups: As in ``torch.nn.functional.conv2d``.
        strategy (str): The implementation to use; the result is the same with all of them. 'auto'
            follows the priorities in :mod:`~mmdet_odconv.functional.dispatch`. A name in
            ``STRATEGIES`` selects that implementation. Default: 'auto'.

    Returns:
        Tensor: Shape (B, C_out, *output size), in the memory format of ``x``, and in the type
        that a convolution gives: that of ``x``, or that of autocast.

    Raises:
        RuntimeError: ``x`` and ``bank`` have different types, as in ``torch.nn.functional.conv2d``.
        ValueError: The shapes of the arguments do not fit each other, the stride, padding or
            dilation is out of its range, or the strategy is unknown or cannot be used here.
    """
    geometry, uneven = resolve_geometry(bank.shape[3:], stride, padding, dilation, groups)
    dtype = convolution_dtype(x, bank)
    _check_shapes(x, bank, attentions, bias, groups)
    if uneven:
        x = F.pad(x, uneven)
    plain = needs_plain_operations(x, bank)
    return odconv_unchecked(cast(x, dtype), bank, attentions, bias, geometry, strategy, plain)


def odconv_unchecked(
    x: Tensor,
    bank: Tensor,
    attentions: Attentions,
    bias: Tensor | None,
    geometry: Geometry,
    strategy: str,
    plain: bool,
) -> Tensor:
    """:func:`odconv` for a caller that has checked and resolved its arguments.

    Args:
        x, bank, attentions, bias, strategy: As in :func:`odconv`; x has the type of
            :func:`convolution_dtype`.
        geometry (Geometry): Geometry of the convolution.
        plain (bool): What :func:`needs_plain_operations` says of x and the bank.
    """
    if plain:
        return _in_plain_operations(x, bank, attentions, bias, geometry, strategy)
    return _call(x, bank, attentions, bias, geometry, strategy)


def _in_plain_operations(
    x: Tensor,
    bank: Tensor,
    attentions: Attentions,
    bias: Tensor | None,
    geometry: Geometry,
    strategy: str,
) -> Tensor:
    check_strategy(strategy, bank.shape[0])
    if _becomes_one_call(strategy):
        training = torch.is_grad_enabled() and _require_gradients(x, bank, attentions, bias)
        if strategy == 'auto' and not training and _is_left_to_compiler(x, bank):
            with without_autocast(x.device.type):
                return laid_out_as(x, GroupedConv.forward(x, bank, attentions, bias, geometry))
        return _compiled_odconv(x, bank, *attentions, bias, *geometry, strategy, training)
    return odconv_formula(x, bank, attentions, bias, geometry)


@not_compiled
def _call(
    x: Tensor,
    bank: Tensor,
    attentions: Attentions,
    bias: Tensor | None,
    geometry: Geometry,
    strategy: str,
) -> Tensor:
    bank = bank.contiguous()
    training = torch.is_grad_enabled() and _require_gradients(x, bank, attentions, bias)
    implementation = _choose(strategy, x, bank, geometry, training)
    if implementation is None:
        return odconv_formula(x, bank, attentions, bias, geometry)
    if training:
        return _ODConv.apply(x, bank, *attentions, bias, geometry, implementation)
    return _forward(x, bank, attentions, bias, geometry, implementation)


def convolution_dtype(x: Tensor, bank: Tensor) -> torch.dtype:
    """The type in which ``torch.nn.functional.conv2d`` would compute.

    Raises:
        RuntimeError: A convolution would refuse an input of this type.
    """
    autocast = None
    if not x.is_meta and autocast_is_on(x.device.type):
        autocast = autocast_dtype(x.device.type)
    if autocast is not None and _is_eligible(x) and _is_eligible(bank):
        return autocast
    if x.dtype != bank.dtype:
        raise RuntimeError(
            f'Input type ({x.dtype}) and weight type ({bank.dtype}) should be the same'
        )
    return x.dtype


def _is_eligible(tensor: Tensor) -> bool:
    """Whether autocast casts ``tensor``."""
    return tensor.is_floating_point() and tensor.dtype != torch.float64


def _check_shapes(
    x: Tensor, bank: Tensor, attentions: Attentions, bias: Tensor | None, groups: int
) -> None:
    if torch.jit.is_tracing():  # Sizes are tensors in a trace, and each comparison warns.
        return
    kernel_num, c_out, reads, *kernel_size = bank.shape
    if x.dim() != bank.dim() - 1 or x.shape[1] != reads * groups or c_out % groups:
        raise ValueError(
            f'an input of shape {tuple(x.shape)} does not fit a bank of shape '
            f'{tuple(bank.shape)} (kernels, output channels, input channels of a group, kernel '
            f'size) with groups={groups}'
        )
    batch = x.shape[0]
    for name, attention, size in zip(
        Attentions._fields,
        attentions,
        (x.shape[1], c_out, math.prod(kernel_size), kernel_num),
        strict=True,
    ):
        if attention is None:
            # Absent means 1, which takes no sum over several kernels.
            if name == 'kernel' and kernel_num > 1:
                raise ValueError(f'a bank of {kernel_num} kernels needs a kernel attention')
        elif attention.shape != (batch, size):
            raise ValueError(
                f'the {name} attention must have shape {(batch, size)}, '
                f'got {tuple(attention.shape)}'
            )
    if bias is not None and bias.shape != (c_out,):
        raise ValueError(f'the bias must have shape {(c_out,)}, got {tuple(bias.shape)}')


def _becomes_one_call(strategy: str) -> bool:
    """Whether torch.compile is to put the operator as a whole into its graph."""
    return (
        COMPILED_OPERATOR
        and is_compiling()
        and not torch.compiler.is_exporting()
        and strategy != 'reference'
    )


def _is_left_to_compiler(x: Tensor, bank: Tensor) -> bool:
    """Whether torch.compile does better with the operations than with the operator.

    It fuses them with what comes before and after, and is spared a call from its code to Python.
    Where the kernels are large, the implementation matters more. In a graph for any number of
    samples no convolution has as many groups.
    """
    batch = x.shape[0]
    if isinstance(batch, torch.SymInt) or batch == 0:
        return False
    return batch * bank.shape[1:].numel() * bank.element_size() <= MOST_COMPILED_BYTES


def needs_plain_operations(x: Tensor, *others: Tensor) -> bool:
    """Whether something follows the operations one by one, or there is nothing to compute.

    That is: tracing, a function transform (``torch.func``), forward-mode derivatives, tensors
    without memory (meta, fake) or of another class (DTensor), complex numbers, an empty batch.
    """
    for tensor in others:
        if type(tensor) not in _PLAIN_TENSORS:
            return True
    return (
        is_compiling()
        or type(x) not in _PLAIN_TENSORS
        or x.shape[0] == 0
        or x.is_meta
        or x.is_complex()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def is_batched(grad: Tensor) -> bool:
    """Whether ``grad`` is one of a vmap's, either of today's or of autograd's older one."""
    return torch._C._functorch.is_batchedtensor(grad) or is_legacy_batched(grad)


def _require_gradients(
    x: Tensor, bank: Tensor, attentions: Attentions, bias: Tensor | None
) -> bool:
    """Whether any of these tensors requires a gradient."""
    for tensor in (x, bank, *attentions, bias):
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def _choose(
    strategy: str, x: Tensor, bank: Tensor, geometry: Geometry, training: bool
) -> type[Implementation] | None:
    """The implementation for a call, None for the formula, also entered into the records."""
    shapes = x.shape, bank.shape, bank.element_size()
    implementation = pick(strategy, x.device.type, *shapes, geometry, training)
    if RECORDS:
        name = 'reference' if implementation is None else implementation.name
        record(x.shape, bank.shape, training, name)
    return implementation


def _forward(
    x: Tensor,
    bank: Tensor,
    attentions: Attentions,
    bias: Tensor | None,
    geometry: Geometry,
    implementation: type[Implementation],
) -> Tensor:
    memory_format = _memory_format(x)
    if memory_format is None:
        x, memory_format = x.contiguous(), torch.contiguous_format
    if autocast_is_on(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            y = implementation.forward(x, bank, attentions, bias, geometry)
    else:
        y = implementation.forward(x, bank, attentions, bias, geometry)
    return y.contiguous(memory_format=memory_format)


def _backward(
    grad: Tensor,
    x: Tensor,
    bank: Tensor,
    attentions: Attentions,
    geometry: Geometry,
    implementation: type[Implementation],
    needed: Needed,
) -> Gradients:
    """The gradients of all inputs but the bias."""
    memory_format = _memory_format(x)
    if memory_format is None:
        x, memory_format = x.contiguous(), torch.contiguous_format
    if _memory_format(grad) is None:
        grad = grad.contiguous()
    with without_autocast(x.device.type):
        grads = implementation.backward(grad, x, bank, attentions, geometry, needed)
    if grads.x is None:
        return grads
    return grads._replace(x=grads.x.contiguous(memory_format=memory_format))


def _memory_format(x: Tensor) -> torch.memory_format | None:
    """Contiguous, or the channels-last format that ``x`` has, or None for any other layout."""
    if x.is_contiguous():
        return torch.contiguous_format
    for memory_format, ndim in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
        if x.dim() == ndim and x.is_contiguous(memory_format=memory_format):
            return memory_format
    return None


class _ODConv(torch.autograd.Function):
    """An implementation with its own backward pass, which makes again what it does not keep."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bank: Tensor,
        channel: Tensor | None,
        filter_: Tensor | None,
        spatial: Tensor | None,
        kernel: Tensor | None,
        bias: Tensor | None,
        geometry: Geometry,
        implementation: type[Implementation],
    ) -> Tensor:
        attentions = Attentions(channel, filter_, spatial, kernel)
        ctx.save_for_backward(x, bank, *attentions)
        ctx.geometry, ctx.implementation = geometry, implementation
        ctx.bias_dtype = None if bias is None else bias.dtype
        y = _forward(x, bank, attentions, bias, geometry, implementation)
        # What follows may write into y, which autograd forbids for views made in a Function.
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        inputs = ctx.saved_tensors
        x, bank, *rest = inputs
        *needed, bias_needed = ctx.needs_input_grad[:7]
        grads: Sequence[Tensor | None]
        if torch.is_grad_enabled() or is_batched(grad):
            # A second derivative, or a backward pass for many gradients at once.
            grads = _differentiable_backward(grad, inputs, ctx.geometry, needed)
        else:
            needed = Needed(*needed)
            grads = _backward(
                grad, x, bank, Attentions(*rest), ctx.geometry, ctx.implementation, needed
            )
        grad_bias = _bias_backward(grad, ctx.bias_dtype) if bias_needed else None
        return *grads, grad_bias, None, None


def _bias_backward(grad: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.sum((0, *range(2, grad.dim())), dtype=dtype)


def _differentiable_backward(
    grad: Tensor, inputs: Sequence[Any], geometry: Geometry, needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients as functions of the inputs, by the formula."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: the attentions may themselves be functions of x, whose graph is the caller's.
        inputs = [None if t is None else t.view_as(t) for t in inputs]
        wanted = [t for t, need in zip(inputs, needed, strict=True) if t is not None and need]
        x, bank, *rest = inputs
        y = odconv_formula(x, bank, Attentions(*rest), None, geometry)
        found = iter(torch.autograd.grad(y, wanted, grad, create_graph=create_graph))
    return [
        next(found) if t is not None and need else None
        for t, need in zip(inputs, needed, strict=True)
    ]


def laid_out_as(x: Tensor, y: Tensor) -> Tensor:
    """``y`` in the layout in which :func:`_forward` gives what it makes of ``x``."""
    return y.contiguous(memory_format=_memory_format(x) or torch.contiguous_format)


if COMPILED_OPERATOR:
    # What torch.compile puts into its graphs in place of the operations. An implementation is
    # picked when the graph runs, for the shapes of that time.

    @torch.library.custom_op('mmdet_odconv::odconv', mutates_args=())
    def _compiled_odconv(
        x: Tensor,
        bank: Tensor,
        channel: Tensor | None,
        filter_: Tensor | None,
        spatial: Tensor | None,
        kernel: Tensor | None,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        strategy: str,
        training: bool,
    ) -> Tensor:
        attentions = Attentions(channel, filter_, spatial, kernel)
        geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
        bank = bank.contiguous()
        implementation = _choose(strategy, x, bank, geometry, training)
        if implementation is None:  # no sample, or no output position: this words the error
            return odconv_formula(x, bank, attentions, bias, geometry)
        return _forward(x, bank, attentions, bias, geometry, implementation)

    @torch.library.custom_op('mmdet_odconv::odconv_backward', mutates_args=())
    def _compiled_backward(
        grad: Tensor,
        x: Tensor,
        bank: Tensor,
        channel: Tensor | None,
        filter_: Tensor | None,
        spatial: Tensor | None,
        kernel: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        strategy: str,
        needed: Sequence[bool],
    ) -> list[Tensor]:
        """The gradients that are needed, in the order of the inputs."""
        attentions = Attentions(channel, filter_, spatial, kernel)
        geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
        bank = bank.contiguous()
        implementation = _choose(strategy, x, bank, geometry, training=True)
        if implementation is None:  # no sample
            inputs = (x, bank, *attentions)
            return [
                torch.zeros_like(t)
                for t, need in zip(inputs, needed, strict=True)
                if need and t is not None
            ]
        grads = _backward(grad, x, bank, attentions, geometry, implementation, Needed(*needed))
        return [g for g, need in zip(grads, needed, strict=True) if need and g is not None]

    @_compiled_odconv.register_fake
    def _(x: Tensor, bank: Tensor, *args: Any) -> Tensor:
        geometry = Geometry(*args[5:9])
        size = geometry.output_size(x.shape[2:], bank.shape[3:])
        y = x.new_empty(x.shape[0], bank.shape[1], *size)
        return laid_out_as(x, y)

    @_compiled_backward.register_fake
    def _(grad: Tensor, *args: Any) -> list[Tensor]:
        inputs, needed = args[:6], args[-1]
        return [
            laid_out_as(t, t.new_empty(t.shape))
            for t, need in zip(inputs, needed, strict=True)
            if need
        ]

    def _setup_compiled_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:6])
        bias, *ctx.arguments = inputs[6:-1]
        ctx.bias_dtype = None if bias is None else bias.dtype

    def _differentiate_compiled(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        inputs = ctx.saved_tensors
        *needed, bias_needed = ctx.needs_input_grad[:7]
        found = iter(_compiled_backward(grad, *inputs, *ctx.arguments, needed))
        grads = [next(found) if need else None for need in needed]
        grad_bias = _bias_backward(grad, ctx.bias_dtype) if bias_needed else None
        return *grads, grad_bias, *(None,) * (len(ctx.arguments) + 1)

    _compiled_odconv.register_autograd(
        _differentiate_compiled, setup_context=_setup_compiled_context
    )
