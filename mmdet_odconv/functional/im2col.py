"""A feature map as the windows that a kernel sees, and back, in any number of dimensions."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .geometry import Geometry


def windows(x: Tensor, kernel_size: Sequence[int], geometry: Geometry) -> Tensor:
    """What each kernel position reads for each output position.

    Args:
        x (Tensor): Shape (B, C, *size).
        kernel_size (Sequence[int]): Of the convolution.
        geometry (Geometry): Of the convolution.

    Returns:
        Tensor: Shape (B, C, *kernel_size, *output size), a view of ``x`` or of its padded copy.
    """
    size = geometry.output_size(x.shape[2:], kernel_size)
    if any(geometry.padding):
        x = F.pad(x, [p for p in reversed(geometry.padding) for _ in range(2)])
    batch, channel, *steps = x.stride()
    positions = [d * step for d, step in zip(geometry.dilation, steps, strict=True)]
    moves = [s * step for s, step in zip(geometry.stride, steps, strict=True)]
    return x.as_strided((*x.shape[:2], *kernel_size, *size), (batch, channel, *positions, *moves))


def windows_backward(grad: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """The gradient of ``x`` from that of :func:`windows`: overlapping windows add up.

    Args:
        grad (Tensor): Shape (B, C, *kernel_size, *output size).
        x (Tensor): The input of :func:`windows`.
        geometry (Geometry): Of the convolution.
    """
    ndim = x.dim() - 2
    kernel_size, size = grad.shape[2 : 2 + ndim], grad.shape[2 + ndim :]
    sizes = [n + 2 * p for n, p in zip(x.shape[2:], geometry.padding, strict=True)]
    padded = grad.new_zeros(*x.shape[:2], *sizes)
    every: Any = slice(None)
    for position in itertools.product(*map(range, kernel_size)):
        starts = [i * d for i, d in zip(position, geometry.dilation, strict=True)]
        region: list[Any] = [
            slice(start, start + s * (n - 1) + 1, s)
            for start, s, n in zip(starts, geometry.stride, size, strict=True)
        ]
        padded[(every, every, *region)] += grad[(every, every, *position)]
    inner: list[Any] = [slice(p, p + n) for p, n in zip(geometry.padding, x.shape[2:], strict=True)]
    return padded[(every, every, *inner)]
