"""The convolution of each sample with a kernel of its own, made from any tensors.

It is for dynamic convolutions without a tuned path like ODConv's: what makes the kernels is a
differentiable function, and only what that function reads is kept for the backward pass.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compat import without_autocast
from .attention import cast
from .cpu_grouped_conv import fastest_by_patches
from .cpu_im2col import extract_patches
from .formula import convolve_each_sample
from .implementation import Geometry, convolution_backward, resolve_geometry
from .operator import convolution_dtype, is_batched, laid_out_as, needs_plain_operations


class FactoredKernels(ABC):
    """Kernels that can convolve without being made as a whole.

    What makes kernels may give them in this form, where that saves time on some shapes.

    Attributes:
        kernel_shape (tuple[int, ...]): (C_out, C_in / groups, *kernel_size).
    """

    kernel_shape: tuple[int, ...]

    @property
    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """All tensors that the kernels are computed from."""

    @abstractmethod
    def whole(self) -> Tensor:
        """The kernels, shape (B or 1, C_out, C_in / groups, *kernel_size)."""

    @abstractmethod
    def convolves_faster(self, x: Tensor, geometry: Geometry) -> bool:
        """Whether :meth:`convolve` can be used, and is faster than with :meth:`whole`."""

    @abstractmethod
    def convolve(self, x: Tensor, geometry: Geometry) -> Tensor:
        """The convolution of each sample with its kernel, without a graph."""

    @abstractmethod
    def convolve_backward(self, grad: Tensor, x: Tensor, geometry: Geometry) -> list[Tensor]:
        """The gradients of x and of the ``tensors``, with :meth:`convolve` for that convolution."""


def dynamic_conv(
    x: Tensor,
    make_kernels: Callable[..., Tensor | FactoredKernels],
    sources: Sequence[Tensor],
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    modulate: Callable[..., Tensor] | None = None,
    modulators: Sequence[Tensor] = (),
) -> Tensor:
    """y_b = conv(modulate(x)_b, make_kernels(*sources)_b) + bias, for each sample b.

    For the backward pass autograd keeps ``x``, the ``sources`` and the ``modulators``, and nothing
    else: the kernels and the modulated input are made again there. So both functions must give the
    same for the same tensors, and everything in them that needs a gradient must be an argument.

    Where something follows the operations one by one (``torch.compile``, an export, a transform of
    ``torch.func``), they are given to it as they are, and nothing is made again.

    Args:
        x (Tensor): Input, shape (B, C_in, *size). B may be 0.
        make_kernels (Callable): From the sources to the kernels, shape (B, C_out, C_in / groups,
            *kernel_size), or with 1 in place of B for a kernel that all samples share. It runs
            without autocast, and its result is cast to the type of the convolution. It may also be
            :class:`FactoredKernels`.
        sources (Sequence[Tensor]): What it is called with. The type of the first is that of the
            layer's weights, which tells the type of the convolution.
        bias (Tensor, optional): Shape (C_out,), or (B, C_out) for one of each sample.
            Default: None.
        stride, padding, dilation, groups: As in ``torch.nn.functional.conv2d``.
        modulate (Callable, optional): From ``x`` and the modulators to what is convolved, of any
            shape that the convolution takes, in the type of ``x``. Default: ``x`` itself.
        modulators (Sequence[Tensor]): What it is called with besides ``x``. Default: none.

    Returns:
        Tensor: Shape (B, C_out, *output size), in the memory format of ``x``, and in the type
        that a convolution gives: that of ``x``, or that of autocast.

    Raises:
        RuntimeError: ``x`` and the first source have different types, or one of the functions reads
            a tensor that needs a gradient and is none of its arguments.
        ValueError: The stride, padding or dilation is out of its range.
    """
    x = cast(x, convolution_dtype(x, sources[0]))
    call = _Call(make_kernels, modulate, len(sources), (stride, padding, dilation, groups))
    tensors = (x, *sources, *modulators)
    plain = needs_plain_operations(*tensors)
    if plain:
        y = call.formula(tensors)
    elif torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        y = _DynamicConv.apply(call, *tensors)
    else:
        y = call.forward(tensors)
    if bias is None:
        return y
    bias = cast(bias, y.dtype).reshape(-1, y.shape[1], *(1,) * (y.dim() - 2))
    return y + bias if plain else y.add_(bias)


class _Call(NamedTuple):
    """What a call has besides its tensors, which are x, the sources and the modulators."""

    make_kernels: Callable[..., Tensor | FactoredKernels]
    modulate: Callable[..., Tensor] | None
    sources: int
    conv_args: tuple[Any, ...]

    def prepare(
        self, tensors: Sequence[Tensor], whole: bool = False
    ) -> tuple[Tensor, Any, Geometry]:
        """What is convolved, the kernels, and the geometry; ``whole`` kernels are a tensor."""
        x, end = tensors[0], 1 + self.sources
        with without_autocast(x.device.type):
            kernels: Any = self.make_kernels(*tensors[1:end])
            factored = isinstance(kernels, FactoredKernels)
            if self.modulate is not None:
                x = self.modulate(x, *tensors[end:])
            shape = kernels.kernel_shape if factored else kernels.shape[1:]
            geometry, uneven = resolve_geometry(shape[2:], *self.conv_args)
            x = F.pad(x, uneven) if uneven else x
            if factored and (whole or not kernels.convolves_faster(x, geometry)):
                kernels, factored = kernels.whole(), False
        return x, kernels if factored else cast(kernels, x.dtype), geometry

    def formula(self, tensors: Sequence[Tensor]) -> Tensor:
        """The output in plain operations."""
        x, kernels, geometry = self.prepare(tensors, whole=True)
        with without_autocast(x.device.type):
            return convolve_each_sample(x, kernels, geometry)

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        """The output without a graph."""
        with torch.enable_grad():  # of what it should not read; the tensors themselves need none
            x, kernels, geometry = self.prepare([t.detach() for t in tensors])
        if any(t.requires_grad for t in (x, *_tensors(kernels))):
            raise RuntimeError(
                'make_kernels or modulate reads a tensor that needs a gradient and is none of its '
                'arguments: pass it with the sources or modulators'
            )
        with torch.no_grad(), without_autocast(x.device.type):
            if isinstance(kernels, FactoredKernels):
                y = kernels.convolve(x, geometry)
            else:
                y = _convolve(x.contiguous(), kernels, geometry)
            return laid_out_as(tensors[0], y)

    def backward(
        self, grad: Tensor, tensors: Sequence[Tensor], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """The gradients of the tensors; the kernels and what is convolved are made again."""
        inputs = [t.detach().requires_grad_(n) for t, n in zip(tensors, needed, strict=True)]
        with torch.enable_grad():
            x, kernels, geometry = self.prepare(inputs)
        grad = grad.contiguous()
        with torch.no_grad(), without_autocast(x.device.type):
            grads: Sequence[Tensor | None]
            if isinstance(kernels, FactoredKernels):
                grads = kernels.convolve_backward(grad, x, geometry)
            else:
                wanted = x.requires_grad, kernels.requires_grad
                grads = _convolution_backward(grad, x.contiguous(), kernels, geometry, *wanted)
        return _gradients((x, *_tensors(kernels)), grads, inputs, create_graph=False)

    def differentiable_backward(
        self, grad: Tensor, tensors: Sequence[Tensor], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """The gradients as functions of the tensors, by the formula."""
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Aliases: the sources may themselves be functions of x, whose graph is the caller's.
            inputs = [
                t.view_as(t) if n else t.detach() for t, n in zip(tensors, needed, strict=True)
            ]
            return _gradients([self.formula(inputs)], [grad], inputs, create_graph)


class _DynamicConv(torch.autograd.Function):
    """Keeps its tensors alone."""

    @staticmethod
    def forward(call: _Call, *tensors: Tensor) -> Tensor:
        y = call.forward(tensors)
        # What follows may write into y, which autograd forbids for views made in a Function.
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
        if torch.is_grad_enabled() or is_batched(grad):
            # A second derivative, or a backward pass for many gradients at once.
            return None, *ctx.call.differentiable_backward(grad, tensors, needed)
        return None, *ctx.call.backward(grad, tensors, needed)


def _tensors(kernels: Tensor | FactoredKernels) -> list[Tensor]:
    return kernels.tensors if isinstance(kernels, FactoredKernels) else [kernels]


def _gradients(
    outputs: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    create_graph: bool,
) -> list[Tensor | None]:
    """The gradients of the inputs, None for those that need none."""
    pairs = zip(outputs, grads, strict=True)
    made = [(t, g) for t, g in pairs if g is not None and t.requires_grad]
    found = iter(
        torch.autograd.grad(
            [t for t, _ in made],
            [t for t in inputs if t.requires_grad],
            [g for _, g in made],
            create_graph=create_graph,
            allow_unused=True,
        )
    )
    return [next(found) if t.requires_grad else None for t in inputs]


def _is_product(kernels: Tensor, geometry: Geometry) -> bool:
    """Whether the convolution is one matrix product for each sample."""
    return geometry.groups == 1 and geometry.is_pointwise(kernels.shape[3:])


def _convolve(x: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    if _is_product(kernels, geometry) and len(kernels) == len(x):
        y = torch.bmm(kernels.flatten(2), x.flatten(2))
        return y.view(*y.shape[:2], *x.shape[2:])
    return convolve_each_sample(x, kernels, geometry)


def _convolution_backward(
    grad: Tensor,
    x: Tensor,
    kernels: Tensor,
    geometry: Geometry,
    x_needed: bool,
    kernels_needed: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of what is convolved and of the kernels."""
    shared = len(kernels) < len(x)
    grad_x = grad_kernels = None
    product = _is_product(kernels, geometry)
    on_cpu = grad.device.type == 'cpu'
    by_patches = on_cpu and fastest_by_patches(grad, kernels, geometry.groups)
    if kernels_needed and not shared and (product or by_patches):
        patches = x if product else extract_patches(x, kernels.shape[3:], geometry)
        columns = patches.reshape(len(x), kernels[0, 0].numel(), -1)
        grad_kernels = torch.bmm(grad.flatten(2), columns.mT).view(kernels.shape)
        kernels_needed = False
    if product and x_needed and not shared:
        grad_x = torch.bmm(kernels.flatten(2).mT, grad.flatten(2)).view(x.shape)
    elif x_needed or kernels_needed:
        # Sample b is group b of one grouped convolution, unless all share a kernel.
        grad_x, by_groups = convolution_backward(
            grad if shared else grad.reshape(1, -1, *grad.shape[2:]),
            x if shared else x.reshape(1, -1, *x.shape[2:]),
            kernels.flatten(0, 1),
            geometry._replace(groups=geometry.groups * len(kernels)),
            x_needed,
            kernels_needed,
        )
        grad_kernels = by_groups.view(kernels.shape) if by_groups is not None else grad_kernels
        grad_x = grad_x.view(x.shape) if grad_x is not None else None
    return grad_x, grad_kernels
