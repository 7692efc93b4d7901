"""The maths of FDConv: kernels stored by frequency, and maps modulated by frequency band.

A kernel of shape (C_out, C_in / groups, k_h, k_w) is seen as one matrix for each group, with
C_out / groups · k_h rows and C_in / groups · k_w columns, and is stored as the Fourier
coefficients of that matrix. Each frequency belongs to one of K groups of nearly equal size, from
the lowest to the highest. A kernel attention scales the groups, so K kernels take the room of one.

Paper: Frequency Dynamic Convolution for Dense Image Prediction (https://arxiv.org/abs/2503.18783)
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .attention import at_least_float32, cast
from .fourier_kernels import FourierKernels, local_windows


def spectrum_from_kernel(kernel: Tensor, groups: int = 1) -> Tensor:
    """The coefficients of a kernel's matrices, divided by :func:`spectrum_scale`.

    Args:
        kernel (Tensor): Shape (C_out, C_in / groups, k_h, k_w), float32 or wider.
        groups (int): Groups of the convolution. Default: 1.

    Returns:
        Tensor: Shape (groups, rows, columns // 2 + 1, 2), real and imaginary parts.
    """
    c_out, reads, k_h, k_w = kernel.shape
    matrices = kernel.reshape(groups, c_out // groups, reads, k_h, k_w).transpose(2, 3)
    matrices = matrices.reshape(groups, c_out // groups * k_h, reads * k_w)
    return torch.view_as_real(torch.fft.rfft2(matrices)) / spectrum_scale(kernel.shape, groups)


def spectrum_scale(kernel_shape: Sequence[int], groups: int = 1) -> int:
    """min(C_out, C_in) // 2 of a group, which makes coefficients as small as other weights."""
    return max(min(kernel_shape[0] // groups, kernel_shape[1]) // 2, 1)


def frequency_groups(rows: int, columns: int, kernel_num: int) -> Tensor:
    """Which of K groups each frequency of a real matrix belongs to.

    The frequencies, sorted by their distance from 0, are cut into K groups whose sizes differ by
    one at most. Equal distances stay in the order of the grid. The distances are compared as
    integers, so the groups are the same everywhere.

    Args:
        rows, columns (int): Size of the matrix.
        kernel_num (int): K, at most the number of frequencies, rows · (columns // 2 + 1).

    Returns:
        Tensor: Shape (rows, columns // 2 + 1), of the least integer type.
    """
    return torch.tensor(_frequency_groups(rows, columns, kernel_num))


@lru_cache(maxsize=64)
def _frequency_groups(rows: int, columns: int, kernel_num: int) -> Any:
    # NumPy, because a tensor that is remembered must not be made under FakeTensorMode or the like.
    common = math.gcd(rows, columns)
    u = np.arange(rows)
    u = np.minimum(u, rows - u) * (columns // common)
    v = np.arange(columns // 2 + 1) * (rows // common)
    distance = u[:, None] ** 2 + v**2
    groups = np.empty(distance.size, np.min_scalar_type(-kernel_num))
    order = distance.argsort(axis=None, kind='stable')
    for group, part in enumerate(np.array_split(order, kernel_num)):
        groups[part] = group
    return groups.reshape(distance.shape)


def fdconv_kernels(
    spectrum: Tensor,
    frequency_group: Tensor,
    kernel_shape: Sequence[int],
    gain: float = 1.0,
    kernel: Tensor | None = None,
    channel: Tensor | None = None,
    filter: Tensor | None = None,
    spatial: Tensor | None = None,
    descriptor: Tensor | None = None,
    local: Tensor | None = None,
) -> FourierKernels:
    """The kernel of each sample, c ⊗ f ⊗ s ⊙ 2σ(l) ⊙ F⁻¹(k · P) times ``gain``.

    Args:
        spectrum (Tensor): P, as :func:`spectrum_from_kernel` gives it.
        frequency_group (Tensor): The group of each frequency, see :func:`frequency_groups`.
        kernel_shape (Sequence[int]): (C_out, C_in / groups, k_h, k_w).
        gain (float): A factor of the result. Default: 1.0.
        kernel (Tensor, optional): k, one factor for each group of frequencies, shape (B, K).
        channel, filter, spatial (Tensor, optional): c, f and s, shapes (B, C_in), (B, C_out) and
            (B, k_h · k_w).
        descriptor (Tensor, optional): One number for each input channel, shape (B, C_in). Its
            convolution along the channels with ``local`` is l.
        local (Tensor, optional): Shape (C_out · k_h · k_w, 1, q), q odd.

    Returns:
        FourierKernels: Its method ``whole`` gives them as a tensor of shape (B, C_out,
        C_in / groups, k_h, k_w), float32 or wider, with 1 in place of B if nothing depends on
        the sample.
    """
    dtype = at_least_float32(spectrum.dtype)
    optional = (kernel, channel, filter, spatial, descriptor, local)
    kernel, channel, filter, spatial, descriptor, local = (
        None if t is None else cast(t, dtype) for t in optional
    )
    spectrum = cast(spectrum, dtype)
    (_, reads, k_h, k_w), (groups, rows) = kernel_shape, spectrum.shape[:2]
    scale = spectrum_scale(kernel_shape, groups) * gain * (1 if descriptor is None else 2)
    if kernel is None:
        spectrum = spectrum * scale
    else:
        kernel = kernel * scale
    columns = None if channel is None else channel.view(-1, groups, 1, reads, 1)
    if spatial is not None:
        spatial = spatial.view(-1, 1, k_h, 1, k_w)
        columns = spatial if columns is None else columns * spatial
    if columns is not None:
        columns = columns.expand(-1, groups, k_h, reads, k_w)
    windows = None
    if descriptor is not None and local is not None:
        windows = local_windows(descriptor, groups, local.shape[2], k_w)
        local = local.view(groups, rows, -1)
    return FourierKernels(
        tuple(kernel_shape), frequency_group, spectrum, kernel, filter, columns, local, windows
    )


def modulate_bands(x: Tensor, attention: Tensor, factors: Sequence[int] = (2, 4, 8)) -> Tensor:
    """Scale the frequency bands of a map, each at each place.

    L_f is the low-pass that keeps the frequencies with max(|u|, |v|) < 1 / (2f), in cycles for each
    pixel. The bands are x - L_2 x, L_2 x - L_4 x and L_4 x - L_8 x for ``factors=(2, 4, 8)``. What
    remains, L_8 x, is not scaled.

    Args:
        x (Tensor): Shape (B, C, H, W).
        attention (Tensor): Shape (B, number of bands, H, W).
        factors (Sequence[int]): The f, ascending. Default: (2, 4, 8).

    Returns:
        Tensor: The shape and type of ``x``. Half types are computed in float32.
    """
    wide = cast(x, at_least_float32(x.dtype))
    attention = cast(attention, wide.dtype)
    height, width = (low_pass_basis(size, factors[0], wide) for size in x.shape[2:])
    coefficients = height.t() @ (wide @ width)
    out = wide * attention[:, :1]
    # Σ band_i · A_i, written as x · A_1 + Σ L_i x · (A_{i+1} - A_i) with 1 after the last A.
    for i, factor in enumerate(factors):
        after = attention[:, i + 1 : i + 2] if i + 1 < len(factors) else 1
        rows, columns = (low_pass_rank(size, factor) for size in x.shape[2:])
        low = height[:, :rows] @ (coefficients[..., :rows, :columns] @ width[:, :columns].t())
        out = out + low * (after - attention[:, i : i + 1])
    return cast(out, x.dtype)


def low_pass_rank(size: int, factor: int) -> int:
    """How many of ``size`` frequencies are below 1 / (2 · factor) in absolute value."""
    return 2 * ((size + 2 * factor - 1) // (2 * factor)) - 1


def low_pass_basis(size: int, factor: int, like: Tensor) -> Tensor:
    """An orthonormal basis of the signals with frequencies below 1 / (2 · factor).

    The columns are the constant, then a cosine and a sine of each frequency, from low to high; so
    the basis for a greater factor is made of the first columns.

    Returns:
        Tensor: Shape (size, :func:`low_pass_rank`), the type and device of ``like``.
    """
    places = torch.arange(size, device=like.device)
    waves = torch.arange(1, low_pass_rank(size, factor) // 2 + 1, device=like.device)
    # The product modulo the size is exact, where a large angle would not be.
    angles = (places[:, None] * waves % size).to(like.dtype) * (2 * math.pi / size)
    pairs = torch.stack([angles.cos(), angles.sin()], 2).flatten(1) * math.sqrt(2 / size)
    constant = torch.full((size, 1), 1 / math.sqrt(size), dtype=like.dtype, device=like.device)
    return torch.cat([constant, pairs], 1)
