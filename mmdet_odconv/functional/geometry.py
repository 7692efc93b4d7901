"""Sizes of a convolution, and its outputs cut into blocks."""

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

# By the number of spatial dimensions.
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Geometry(NamedTuple):
    """Where a convolution's kernel goes: one int for each spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @lru_cache(maxsize=4096)  # noqa: B019  a tuple of ints lives for as long as its layer anyhow
    def output_size(self, size: Sequence[int], kernel_size: Sequence[int]) -> tuple[int, ...]:
        """Spatial size of the output for an input of spatial size ``size``."""
        return tuple(
            (s + 2 * p - d * (k - 1) - 1) // stride + 1
            for s, k, stride, p, d in zip(
                size, kernel_size, self.stride, self.padding, self.dilation, strict=True
            )
        )

    @cache  # noqa: B019
    def is_pointwise(self, kernel_size: Sequence[int]) -> bool:
        """Whether each output position reads the input position at the same place only."""
        return (
            math.prod(kernel_size) == 1
            and not any(self.padding)
            and all(s == 1 for s in self.stride)
        )


class Block(NamedTuple):
    """Some output channels of a convolution, the input channels that they read, their groups."""

    outputs: slice
    inputs: slice
    groups: slice


@cache
def output_blocks(in_channels: int, out_channels: int, groups: int, size: int) -> tuple[Block, ...]:
    """All output channels in blocks of about ``size``: whole groups, or parts of one group.

    Args:
        in_channels, out_channels, groups (int): Of the convolution.
        size (int): Channels wanted in a block, at least 1.
    """
    of_group, reads = out_channels // groups, in_channels // groups
    blocks = []
    whole = size // of_group
    if whole:
        for g in range(0, groups, whole):
            end = min(g + whole, groups)
            inputs = slice(g * reads, end * reads)
            blocks.append(Block(slice(g * of_group, end * of_group), inputs, slice(g, end)))
    else:
        for g in range(groups):
            inputs = slice(g * reads, (g + 1) * reads)
            for o in range(g * of_group, (g + 1) * of_group, size):
                end = min(o + size, (g + 1) * of_group)
                blocks.append(Block(slice(o, end), inputs, slice(g, g + 1)))
    return tuple(blocks)


def channels(tensor: Tensor, some: slice) -> Tensor:
    """``tensor[:, some]``, without the cost of a view where that is all of it."""
    return tensor if some.stop - some.start == tensor.shape[1] else tensor[:, some]


def resolve_geometry(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
) -> tuple[Tensor, Geometry]:
    """The arguments of ``torch.nn.functional.conv*d`` as ints for each dimension.

    Returns:
        tuple[Tensor, Geometry]: ``x``, padded where padding='same' is not the same on both sides,
        and the geometry of what is left to do.
    """
    ndim = len(kernel_size)
    stride, dilation = _repeated(stride, ndim), _repeated(dilation, ndim)
    if padding == 'same':
        totals = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
        if any(total % 2 for total in totals):
            # F.pad wants the last dimension first; the odd one goes after, as in PyTorch.
            widths = [w for t in reversed(totals) for w in (t // 2, t - t // 2)]
            return F.pad(x, widths), Geometry(stride, (0,) * ndim, dilation, groups)
        padding = [total // 2 for total in totals]
    elif padding == 'valid':
        padding = 0
    assert not isinstance(padding, str)
    return x, Geometry(stride, _repeated(padding, ndim), dilation, groups)


def _repeated(value: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    return (value,) * ndim if isinstance(value, int) else tuple(value)
