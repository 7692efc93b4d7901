"""What every implementation of the operator is given, declares and returns.

An implementation sees a kernel as a matrix: one row for each output channel, and one column for
each pair of an input channel (of the group) and a kernel position. The filter attention f scales
the rows. The channel and the spatial attention scale the columns: c ⊗ s.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import ArgumentError, check_sizes
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
    pad_first: bool = False,
) -> tuple[Geometry, tuple[int, ...]]:
    """The arguments of ``torch.nn.functional.conv2d`` with one int for each dimension.

    Args:
        kernel_size (Sequence[int]): Kernel size, one int for each dimension.
        stride, padding, dilation, groups: As in ``torch.nn.functional.conv2d``.
        pad_first (bool): Whether all padding is left to a call of ``F.pad``. Default: False.

    Returns:
        tuple: The geometry, and what the input has to be padded by first, in the order of
        ``F.pad``. The latter is empty where there is nothing to pad; without ``pad_first`` there is
        only where padding='same' differs between the two sides.

    Raises:
        ArgumentError: A ValueError. The message names the argument and its value.
    """
    ndim = len(kernel_size)
    strides = check_sizes('stride', stride, ndim, least=1)
    dilations = check_sizes('dilation', dilation, ndim, least=1)
    if not isinstance(padding, str):
        paddings = check_sizes('padding', padding, ndim, least=0)
        totals = [2 * p for p in paddings]
    elif padding == 'valid':
        totals = [0] * ndim
    elif padding != 'same':
        raise ArgumentError(f"padding must be 'same', 'valid' or int(s), got {padding!r}")
    elif any(s != 1 for s in strides):
        raise ArgumentError(f"padding='same' needs stride 1, got stride={stride}")
    else:
        totals = [d * (k - 1) for d, k in zip(dilations, kernel_size, strict=True)]
    paddings = tuple(total // 2 for total in totals)
    widths: tuple[int, ...] = ()
    if any(total % 2 or (total and pad_first) for total in totals):
        # F.pad wants the last dimension first. As in PyTorch, the odd one goes after.
        widths = tuple(n for t in reversed(totals) for n in (t // 2, t - t // 2))
        paddings = (0,) * ndim
    return Geometry(strides, paddings, dilations, groups), widths


class Problem(NamedTuple):
    """A call of the operator, as far as the choice of an implementation depends on it.

    Attributes:
        device (str): Type of the device.
        training (bool): Whether a backward pass will follow.
        kernel_num (int): K.
        depthwise (bool): Whether each group reads a single channel.
        pointwise (bool): Whether the kernel has a single position.
        rows (int): Output channels of a group.
        positions (int): Output positions of a sample.
        kernel_bytes (int): Size of the kernels of all samples.
    """

    device: str
    training: bool
    kernel_num: int
    depthwise: bool
    pointwise: bool
    rows: int
    positions: int
    kernel_bytes: int


class Needed(NamedTuple):
    """Which gradients are wanted, by the operator's inputs."""

    x: bool
    bank: bool
    channel: bool
    filter: bool
    spatial: bool
    kernel: bool

    @property
    def kernels(self) -> bool:
        """Whether the gradient of the samples' kernels is needed for any of them."""
        return any(self[1:])


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

    ``bank`` is contiguous, ``x`` and ``grad`` are contiguous or channels-last, all are of floating
    types, and B is at least 1. ``x`` has the type that the output is to have; under automatic
    mixed precision the bank's type is wider.
    """

    name: str

    @staticmethod
    @abstractmethod
    def unsupported_reason(problem: Problem) -> str | None:
        """Why this implementation cannot solve ``problem``, or None where it can."""

    @staticmethod
    def is_fastest(problem: Problem) -> bool:
        """Whether it beats those that come after it in the order of priority."""
        return True

    @staticmethod
    @abstractmethod
    def forward(
        x: Tensor, bank: Tensor, attentions: Attentions, bias: Tensor | None, geometry: Geometry
    ) -> Tensor:
        """y, shape (B, C_out, *output size), in any layout."""

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


def add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """``y``, shape (B, C_out, *size), with the bias added in place."""
    return y if bias is None else y.add_(bias.view(-1, *(1,) * (y.dim() - 2)))


class Shapes(NamedTuple):
    """In which shapes the mixtures and the attentions are multiplied with each other.

    A dimension for the samples is there where there are several, and one for the groups likewise.

    Attributes:
        kernels (tuple[int, ...]): (B, groups, rows of a group, reads, *kernel_size), -1 for B.
        channel, spatial, filter (tuple[int, ...]): With 1 for what an attention does not scale.
        weight (tuple[int, ...]): That of a convolution's weight.
    """

    kernels: tuple[int, ...]
    channel: tuple[int, ...]
    spatial: tuple[int, ...]
    filter: tuple[int, ...]
    weight: tuple[int, ...]


def kernel_shapes(
    batch: int, groups: int, bank_shape: torch.Size, every_dimension: bool = False
) -> Shapes:
    """The shapes for so many samples and groups and a bank (K, C_out, reads, *kernel_size).

    With ``every_dimension`` there is one for the samples and the groups even if there is one.
    """
    _, c_out, reads, *kernel_size = bank_shape
    samples = (batch,) if batch > 1 or every_dimension else ()
    of_groups = (groups,) if groups > 1 or every_dimension else ()
    one_group, ones, rows = (1,) * len(of_groups), (1,) * len(kernel_size), c_out // groups
    return Shapes(
        ((-1,) * len(samples) + of_groups + (rows, reads, *kernel_size)),
        (samples + of_groups + (1, reads, *ones)),
        (samples + one_group + (1, 1, *kernel_size)),
        (samples + of_groups + (rows, 1, *ones)),
        (-1, reads, *kernel_size),
    )


# For all but torch.compile, which looks into the function.
remembered_shapes = lru_cache(maxsize=4096)(kernel_shapes)


def column_scale(
    c: Tensor | None, s: Tensor | None, c_shape: tuple[int, ...], s_shape: tuple[int, ...]
) -> Tensor | None:
    """c ⊗ s, which scales the columns of the kernel matrix; None where both are absent.

    Args:
        c, s (Tensor, optional): The channel and the spatial attention.
        c_shape, s_shape (tuple[int, ...]): In which shapes they are multiplied.
    """
    if s is None:
        return None if c is None else c.view(c_shape)
    s = s.view(s_shape)
    return s if c is None else c.view(c_shape) * s


def column_scale_backward(
    grad: Tensor, attentions: Attentions, needed: Needed
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of c and s.

    Args:
        grad (Tensor): That of c ⊗ s, shape (B, C_in, kernel positions), whichever is absent.
        attentions (Attentions): Those of the forward pass.
        needed (Needed): Which gradients are wanted.
    """
    c, s = attentions.channel, attentions.spatial
    channel = spatial = None
    if needed.channel and c is not None:
        wide = cast(grad, c.dtype)
        channel = wide.sum(2) if s is None else (wide @ cast(s, c.dtype).unsqueeze(2)).squeeze(2)
    if needed.spatial and s is not None:
        wide = cast(grad, s.dtype)
        spatial = wide.sum(1) if c is None else (cast(c, s.dtype).unsqueeze(1) @ wide).squeeze(1)
    return channel, spatial


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
