"""What every implementation of the operator is given, declares and returns.

An implementation sees a kernel as a matrix: one row for each output channel, and one column for
each pair of an input channel (of the group) and a kernel position. The filter attention f scales
the rows. The channel and the spatial attention scale the columns: c ⊗ s.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import ArgumentError, check_sizes
from .attention import Attentions, cast

# By the number of spatial dimensions.
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Geometry(NamedTuple):
    """Where a convolution's kernel goes, with one int for each spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def output_size(self, size: Sequence[int], kernel_size: Sequence[int]) -> tuple[int, ...]:
        """The spatial size of the output for an input of spatial size ``size``."""
        return tuple(
            (s + 2 * p - d * (k - 1) - 1) // stride + 1
            for s, k, stride, p, d in zip(
                size, kernel_size, self.stride, self.padding, self.dilation, strict=True
            )
        )

    def is_pointwise(self, kernel_size: Sequence[int]) -> bool:
        """Whether each output position reads only the input position at the same place."""
        return (
            math.prod(kernel_size) == 1
            and not any(self.padding)
            and all(s == 1 for s in self.stride)
        )


def resolve_geometry(
    kernel_size: Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
) -> tuple[Geometry, tuple[int, ...]]:
    """The arguments of ``torch.nn.functional.conv2d`` with one int for each dimension.

    Returns:
        tuple: The geometry, and what the input has to be padded by first, in the order of
        ``F.pad``. The latter is empty unless padding='same' differs between the two sides.

    Raises:
        ArgumentError: A ValueError. The message names the argument and its value.
    """
    ndim = len(kernel_size)
    strides = check_sizes('stride', stride, ndim, least=1)
    dilations = check_sizes('dilation', dilation, ndim, least=1)
    uneven: tuple[int, ...] = ()
    if not isinstance(padding, str):
        paddings = check_sizes('padding', padding, ndim, least=0)
    elif padding == 'valid':
        paddings = (0,) * ndim
    elif padding != 'same':
        raise ArgumentError(f"padding must be 'same', 'valid' or int(s), got {padding!r}")
    elif any(s != 1 for s in strides):
        raise ArgumentError(f"padding='same' needs stride 1, got stride={stride}")
    else:
        totals = [d * (k - 1) for d, k in zip(dilations, kernel_size, strict=True)]
        paddings = tuple(total // 2 for total in totals)
        if any(total % 2 for total in totals):
            # F.pad wants the last dimension first. As in PyTorch, the odd one goes after.
            uneven = tuple(n for t in reversed(totals) for n in (t // 2, t - t // 2))
            paddings = (0,) * ndim
    return Geometry(strides, paddings, dilations, groups), uneven


class Problem(NamedTuple):
    """A call of the operator, as far as the choice of an implementation depends on it.

    Attributes:
        device (str): Type of the device.
        training (bool): Whether a backward pass will follow.
        kernel_num (int): K.
        depthwise (bool): Whether each group reads a single channel.
        positions (int): Output positions of a sample.
        kernel_bytes (int): Size of the kernels of all samples.
    """

    device: str
    training: bool
    kernel_num: int
    depthwise: bool
    positions: int
    kernel_bytes: int


class Needed(NamedTuple):
    """Which gradients are wanted: that of x, that of the bank, and that of any attention."""

    x: bool
    bank: bool
    attentions: bool


class Gradients(NamedTuple):
    """The gradients of the operator's inputs; None for those that are absent or not needed."""

    x: Tensor | None = None
    bank: Tensor | None = None
    channel: Tensor | None = None
    filter: Tensor | None = None
    spatial: Tensor | None = None
    kernel: Tensor | None = None


class Implementation(ABC):
    """One way to compute the operator. Subclasses have no instances and no state.

    ``x`` and ``bank`` are contiguous, of floating types, and B is at least 1. ``x`` has the type
    that the output is to have; under automatic mixed precision the bank's type is wider.
    """

    name: str

    @staticmethod
    @abstractmethod
    def unsupported_reason(problem: Problem) -> str | None:
        """Why this implementation cannot solve ``problem``, or None where it can."""

    @staticmethod
    @abstractmethod
    def forward(x: Tensor, bank: Tensor, attentions: Attentions, geometry: Geometry) -> Tensor:
        """y without its bias, contiguous, shape (B, C_out, *output size)."""

    @staticmethod
    @abstractmethod
    def backward(
        grad: Tensor,
        x: Tensor,
        bank: Tensor,
        attentions: Attentions,
        geometry: Geometry,
        needed: Needed,
    ) -> Gradients:
        """The gradients from that of y and from the inputs of the forward pass alone."""


def column_scale(attentions: Attentions, groups: int) -> Tensor:
    """c ⊗ s, which scales the columns of the kernel matrix.

    Returns:
        Tensor: Shape (B, groups, C_in / groups · kernel positions).
    """
    scale = attentions.channel
    if attentions.spatial is not None:
        scale = scale.unsqueeze(2) * attentions.spatial.unsqueeze(1)
    return scale.reshape(len(scale), groups, -1)


def column_scale_backward(grad: Tensor, attentions: Attentions) -> tuple[Tensor, Tensor | None]:
    """The gradients of c and s from that of :func:`column_scale`."""
    channel, spatial = attentions.channel, attentions.spatial
    grad = grad.reshape(*channel.shape, -1)
    if spatial is None:
        return cast(grad.squeeze(2), channel.dtype), None
    return (
        cast((grad * spatial.unsqueeze(1)).sum(2), channel.dtype),
        cast((grad * channel.unsqueeze(2)).sum(1), spatial.dtype),
    )


def convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, x_needed: bool, weight_needed: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the input and of the weight of a plain convolution."""
    stride, padding, dilation, groups = geometry
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        None,
        stride,
        padding,
        dilation,
        False,
        (0,) * len(stride),
        groups,
        (x_needed, weight_needed, False),
    )
    return grad_x, grad_weight
