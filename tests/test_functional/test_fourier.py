"""FDConv's maths against slow formulas in float64, written from the paper's description."""

import cmath
import math

import pytest
import torch

from mmdet_odconv.functional.fourier import (
    fdconv_kernels,
    frequency_groups,
    modulate_bands,
    spectrum_from_kernel,
)

GRIDS = [(6, 9, 4), (8, 8, 7), (1, 5, 3), (5, 1, 2), (12, 10, 72), (3, 3, 1)]


def frequencies(n):
    """The frequency of each row of a transform of length n, in cycles for each sample."""
    return [(i if 2 * i < n else i - n) / n for i in range(n)]


@pytest.mark.parametrize(('rows', 'columns', 'kernel_num'), GRIDS)
def test_groups_of_frequencies(rows, columns, kernel_num):
    groups = frequency_groups(rows, columns, kernel_num)
    points = [
        # The norm of the two frequencies, as a fraction without rounding.
        ((abs(round(u * rows)) * columns) ** 2 + (v * rows) ** 2, i, v)
        for i, u in enumerate(frequencies(rows))
        for v in range(columns // 2 + 1)
    ]
    in_order = [groups[i, v].item() for _, i, v in sorted(points)]  # ties: by row, then column
    assert in_order == sorted(in_order)
    sizes = [in_order.count(group) for group in range(kernel_num)]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes) == len(points)
    assert sizes == sorted(sizes, reverse=True)


def test_the_groups_of_a_large_layer_take_little_time_and_room():
    groups = frequency_groups(512 * 3, 512 * 3, 64)
    assert groups.dtype == torch.int8
    assert groups.max() == 63
    assert groups[0, 0] == 0
    assert groups[768, 768] == 63


def slow_kernel(spectrum, groups_of, pi, kernel_shape):
    """Σ over all frequencies of the whole plane, for one sample and one group of channels."""
    c_out, c_in, k_h, k_w = kernel_shape
    rows, columns = c_out * k_h, c_in * k_w
    scale = max(min(c_out, c_in) // 2, 1)
    kernel = torch.zeros(kernel_shape, dtype=torch.float64)
    for y in range(rows):
        for x in range(columns):
            total = 0.0
            for u in range(rows):
                for v in range(columns // 2 + 1):
                    # The other half of the plane has the conjugate coefficients.
                    times = 1 if v == 0 or 2 * v == columns else 2
                    wave = cmath.exp(2j * math.pi * (u * y / rows + v * x / columns))
                    p = complex(*spectrum[u, v].tolist()) * pi[groups_of[u, v]].item()
                    total += times * (p * wave).real
            kernel[y // k_h, x // k_w, y % k_h, x % k_w] = scale * total / (rows * columns)
    return kernel


@pytest.mark.parametrize(
    ('shape', 'groups'),
    [((4, 3, 2, 2), 1), ((3, 2, 3, 1), 1), ((4, 2, 1, 1), 2), ((3, 1, 2, 2), 3)],
)
def test_the_kernels_are_the_sums_over_all_frequencies(shape, groups):
    torch.manual_seed(0)
    c_out, reads, k_h, k_w = shape
    rows, columns = c_out // groups * k_h, reads * k_w
    spectrum = torch.randn(groups, rows, columns // 2 + 1, 2, dtype=torch.float64)
    number = min(3, rows * (columns // 2 + 1))
    groups_of = frequency_groups(rows, columns, number)
    pi = torch.rand(2, number, dtype=torch.float64)
    found = fdconv_kernels(spectrum, groups_of, shape, kernel=pi).whole()
    part = (c_out // groups, *shape[1:])
    expected = [
        torch.cat([slow_kernel(s, groups_of, sample, part) for s in spectrum]) for sample in pi
    ]
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize(
    ('shape', 'groups'), [((6, 5, 3, 3), 1), ((8, 3, 3, 2), 2), ((5, 1, 5, 5), 5)]
)
def test_a_spectrum_gives_its_kernel_back(shape, groups):
    kernel = torch.randn(shape, dtype=torch.float64)
    c_out, reads, k_h, k_w = shape
    groups_of = frequency_groups(c_out // groups * k_h, reads * k_w, 2)
    spectrum = spectrum_from_kernel(kernel, groups)
    found = fdconv_kernels(spectrum, groups_of, shape, kernel=torch.ones(3, 2).double()).whole()
    torch.testing.assert_close(found, kernel.expand(3, -1, -1, -1, -1))
    torch.testing.assert_close(fdconv_kernels(spectrum, groups_of, shape).whole()[0], kernel)


@pytest.mark.parametrize(('shape', 'groups'), [((4, 6, 3, 3), 1), ((4, 3, 1, 2), 2)])
def test_the_factors_of_the_kernel_entry_by_entry(shape, groups):
    torch.manual_seed(0)
    c_out, reads, k_h, k_w = shape
    kernel = torch.randn(shape, dtype=torch.float64)
    c, f, s = (torch.rand(2, n).double() for n in (reads * groups, c_out, k_h * k_w))
    u, weight = torch.randn(2, reads * groups).double(), torch.randn(c_out * k_h * k_w, 1, 5)
    weight = weight.double()
    found = fdconv_kernels(
        spectrum_from_kernel(kernel, groups),
        frequency_groups(c_out // groups * k_h, reads * k_w, 1),
        shape,
        gain=3.0,
        channel=c,
        filter=f,
        spatial=s,
        descriptor=u,
        local=weight,
    ).whole()
    for b in range(2):
        along = torch.nn.functional.conv1d(u[b][None, None], weight, padding=2)[0]
        along = along.view(c_out, k_h, k_w, reads * groups)
        for o in range(c_out):
            for i in range(reads):
                channel = o // (c_out // groups) * reads + i
                for y in range(k_h):
                    for x in range(k_w):
                        local = 2 / (1 + math.exp(-along[o, y, x, channel].item()))
                        expected = 3 * local * c[b, channel] * f[b, o] * s[b, y * k_w + x]
                        expected = expected * kernel[o, i, y, x]
                        torch.testing.assert_close(found[b, o, i, y, x], expected)


@pytest.mark.parametrize(('height', 'width'), [(8, 8), (16, 24), (7, 13), (1, 9), (2, 3), (33, 5)])
@pytest.mark.parametrize('factors', [(2, 4, 8), (1, 3), (2,)])
def test_bands_are_those_of_exact_masks(height, width, factors):
    torch.manual_seed(0)
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    attention = torch.rand(2, len(factors), height, width, dtype=torch.float64)
    u = torch.tensor(frequencies(height), dtype=torch.float64).abs()
    v = torch.tensor(frequencies(width), dtype=torch.float64).abs()
    spectrum = torch.fft.fft2(x)
    lows = [
        torch.fft.ifft2(spectrum * (torch.maximum(u[:, None], v) < 0.5 / f)).real for f in factors
    ]
    bands = [a - b for a, b in zip([x, *lows], lows, strict=False)]
    expected = lows[-1] + sum(band * attention[:, i : i + 1] for i, band in enumerate(bands))
    torch.testing.assert_close(modulate_bands(x, attention, factors), expected)


def test_bands_scaled_by_one_are_the_map_itself():
    x = torch.randn(1, 4, 50, 76)
    assert torch.equal(modulate_bands(x, torch.ones(1, 3, 50, 76)), x)
    half = x.bfloat16()
    assert torch.equal(modulate_bands(half, torch.ones(1, 3, 50, 76)), half)
