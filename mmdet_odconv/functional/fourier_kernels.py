"""The kernels of FDConv, and a convolution with them that never holds a whole kernel.

A kernel is seen as the matrix that the transform gives: a row for each pair of an output channel
and a row of the kernel, and a column for each pair of an input channel and a column of the kernel.
The patches of the input are put into the same order, so nothing of a kernel's size is reordered.
On a CPU the second half of the transform, the local factors and the products run over some output
channels at a time, in the cache. Fresh memory for whole kernels would cost more than all
that is computed (docs/performance/fdconv.md).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu_blocks import workspace
from .cpu_im2col import extract_patches, extract_patches_backward
from .dynamic_conv import FactoredKernels
from .implementation import Geometry

# Entries of the part of a kernel that is in use at a time.
BLOCK_ENTRIES = 1 << 18
# Where patches are faster than whole kernels: entries of a kernel from which on, and output
# positions for each output channel up to which.
LEAST_ENTRIES = 1 << 18
MOST_POSITIONS = 4


@dataclass(eq=False)
class FourierKernels(FactoredKernels):
    """The kernels f ⊗ c ⊙ σ(W · U) ⊙ F⁻¹(k · P), one for each sample.

    Attributes:
        kernel_shape (tuple[int, ...]): (C_out, C_in / groups, k_h, k_w).
        frequency_group (Tensor): The group of each frequency, shape (rows, columns // 2 + 1).
        spectrum (Tensor): P, shape (groups, rows, columns // 2 + 1, 2).
        kernel (Tensor, optional): k, shape (B, K); None for 1.
        filter (Tensor, optional): f, shape (B, C_out).
        columns (Tensor, optional): c, a factor of each input channel and position, shape
            (B, groups, k_h, C_in / groups, k_w).
        weight (Tensor, optional): W, shape (groups, rows, n).
        windows (Tensor, optional): U, shape (B, groups, n, columns).
    """

    kernel_shape: tuple[int, ...]
    frequency_group: Tensor
    spectrum: Tensor
    kernel: Tensor | None
    filter: Tensor | None
    columns: Tensor | None
    weight: Tensor | None
    windows: Tensor | None

    @property
    def tensors(self) -> list[Tensor]:
        return list(self._named().values())

    def _named(self) -> dict[str, Tensor]:
        names = ('spectrum', 'kernel', 'filter', 'columns', 'weight', 'windows')
        return {name: t for name in names if (t := getattr(self, name)) is not None}

    def whole(self) -> Tensor:
        # In plain operations.
        groups, rows, half, _ = self.spectrum.shape
        c_out, reads, k_h, k_w = self.kernel_shape
        coefficients = self.spectrum[None]
        if self.kernel is not None:
            index = self.frequency_group.flatten().long().expand(len(self.kernel), -1)
            by_frequency = self.kernel.gather(1, index)
            coefficients = coefficients * by_frequency.view(-1, 1, rows, half, 1)
        if len(coefficients) == 0:  # which MKL does not transform
            kernels = coefficients.flatten(3)[..., : reads * k_w]
        else:
            # As two transforms, because irfft2 makes a copy first.
            kernels = torch.fft.ifft(torch.view_as_complex(coefficients), dim=2)
            kernels = torch.fft.irfft(kernels, n=reads * k_w)
        kernels = kernels.reshape(-1, groups, c_out // groups, k_h * reads * k_w)
        if self.columns is not None:
            kernels = kernels * self.columns.flatten(2).unsqueeze(2)
        if self.filter is not None:
            kernels = kernels * self.filter.view(-1, groups, c_out // groups, 1)
        if self.weight is not None and self.windows is not None:
            gates = torch.sigmoid(self.weight @ self.windows)
            kernels = kernels * gates.view(-1, *kernels.shape[1:])
        kernels = kernels.view(-1, groups, c_out // groups, k_h, reads, k_w)
        return kernels.transpose(3, 4).reshape(-1, *self.kernel_shape)

    def convolves_faster(self, x: Tensor, geometry: Geometry) -> bool:
        if x.device.type != 'cpu' or self.kernel is None or geometry.groups > 1:
            return False
        size = geometry.output_size(x.shape[2:], self.kernel_shape[2:])
        return (
            x.dtype == self.spectrum.dtype
            and math.prod(self.kernel_shape) >= LEAST_ENTRIES
            and min(size) > 0
            and math.prod(size) <= MOST_POSITIONS * self.kernel_shape[0]
        )

    def convolve(self, x: Tensor, geometry: Geometry) -> Tensor:
        patches = self._patches(x, geometry)
        y = x.new_empty(len(x), self.kernel_shape[0], *patches.shape[4:])
        for b, sample in enumerate(patches):
            product, half = self._scaled(b, sample), self._half_transformed(b)[0]
            for rows in self._row_blocks():
                kernels = self._mixed(half, rows)
                if self.weight is not None:
                    kernels *= self._gates(b, rows)
                torch.mm(kernels.view(-1, len(product)), product, out=y[b, rows].flatten(1))
        if self.filter is not None:
            y *= self.filter[:, :, None, None]
        return y

    def convolve_backward(self, grad: Tensor, x: Tensor, geometry: Geometry) -> list[Tensor]:
        patches, grad = self._patches(x, geometry), grad.flatten(2)
        grads = {name: torch.zeros_like(t) for name, t in self._named().items()}
        grad_patches = torch.zeros_like(patches, memory_format=torch.contiguous_format)
        f, w, u = self.filter, self.weight, self.windows
        k_h = self.kernel_shape[2]
        for b, sample in enumerate(patches):
            columns, (half, weights) = self._scaled(b, sample), self._half_transformed(b)
            grad_columns = grad_patches[b].view(columns.shape)
            for rows in self._row_blocks():
                of_rows = slice(rows.start * k_h, rows.stop * k_h)
                mixed, grad_rows = self._mixed(half, rows), grad[b, rows]
                kernels = mixed.view(-1, len(columns))
                grad_kernels = workspace('gradient', kernels.shape, x.dtype)
                torch.mm(grad_rows, columns.t(), out=grad_kernels)
                gates = None if w is None else self._gates(b, rows).view(kernels.shape)
                if gates is not None:
                    kernels *= gates
                if f is not None:
                    grad_rows = grad_rows * f[b, rows, None]
                grad_columns.addmm_(kernels.t(), grad_rows)
                product = kernels.mul_(grad_kernels) if w is not None or f is not None else kernels
                if f is not None:
                    torch.sum(product, 1, out=grads['filter'][b, rows])
                    grad_kernels *= f[b, rows, None]
                if w is not None and u is not None and gates is not None:
                    logits = product.addcmul_(product, gates, value=-1).view(mixed.shape)
                    own = w[0, of_rows]
                    total = logits @ u[b, 0].t()
                    if f is not None:
                        scale = f[b, rows].repeat_interleave(k_h).unsqueeze(1)
                        total, own = total * scale, own * scale
                    grads['weight'][0, of_rows] += total
                    grads['windows'][b, 0].addmm_(own.t(), logits)
                    grad_kernels *= gates
                half[of_rows] = torch.fft.rfft(grad_kernels.view(mixed.shape))
            self._transform_backward(b, half, weights, grads)
        if self.columns is not None:
            torch.sum(grad_patches * patches, (4, 5), out=grads['columns'].squeeze(1))
            grad_patches *= self.columns.view(len(x), *patches.shape[1:4], 1, 1)
        grad_x = extract_patches_backward(grad_patches.permute(0, 2, 1, 3, 4, 5), x, geometry)
        return [grad_x, *grads.values()]

    def _patches(self, x: Tensor, geometry: Geometry) -> Tensor:
        """The patches in the order of the grid, (B, k_h, C_in, k_w, *output size), a view."""
        return extract_patches(x, self.kernel_shape[2:], geometry).permute(0, 2, 1, 3, 4, 5)

    def _scaled(self, b: int, patches: Tensor) -> Tensor:
        """The patches of a sample, scaled by c, as a matrix that is valid until the next call."""
        columns, positions = patches.shape[:3].numel(), patches.shape[3:].numel()
        out = workspace('patches', patches.shape, patches.dtype)
        if self.columns is None:
            out.copy_(patches)
        else:
            torch.mul(patches, self.columns[b, 0, ..., None, None], out=out)
        return out.view(columns, positions)

    def _row_blocks(self) -> Iterator[slice]:
        """All output channels, some at a time."""
        c_out = self.kernel_shape[0]
        step = max(BLOCK_ENTRIES * c_out // self.frequency_group.numel() // 2, 1)
        return (slice(i, min(i + step, c_out)) for i in range(0, c_out, step))

    def _column_blocks(self) -> Iterator[slice]:
        """All columns of the spectrum, some at a time."""
        rows, half = self.frequency_group.shape
        step = max(BLOCK_ENTRIES // (2 * rows), 1)
        return (slice(i, i + step) for i in range(0, half, step))

    def _half_transformed(self, b: int) -> tuple[Tensor, Tensor]:
        """k · P, transformed along its columns, and k of each frequency in both its parts."""
        assert self.kernel is not None
        shape = self.frequency_group.shape
        half, weights = (
            torch.view_as_complex(workspace(name, (*shape, 2), self.spectrum.dtype))
            for name in ('spectrum', 'weights')
        )
        # As complex numbers, because a lookup of pairs takes many times as long.
        pairs, index = torch.complex(self.kernel[b], self.kernel[b]), self._index
        torch.index_select(pairs, 0, index, out=weights.flatten())
        torch.mul(self.spectrum[0], torch.view_as_real(weights), out=torch.view_as_real(half))
        for columns in self._column_blocks():
            # As rows in one piece, which are transformed in half the time.
            half[:, columns] = torch.fft.ifft(half[:, columns].t().contiguous()).t()
        return half, weights

    @cached_property
    def _index(self) -> Tensor:
        return self.frequency_group.flatten().int()

    def _mixed(self, half: Tensor, rows: slice) -> Tensor:
        """F⁻¹(k · P) of some output channels."""
        _, reads, k_h, k_w = self.kernel_shape
        return torch.fft.irfft(half[rows.start * k_h : rows.stop * k_h], n=reads * k_w)

    def _transform_backward(
        self, b: int, half: Tensor, weights: Tensor, grads: dict[str, Tensor]
    ) -> None:
        """Adds the gradients of P and k, from that of F⁻¹(k · P) transformed along its rows."""
        for columns in self._column_blocks():
            half[:, columns] = torch.fft.fft(half[:, columns].t().contiguous()).t()
        _, reads, _, k_w = self.kernel_shape
        # All frequencies but these stand for their conjugates, too.
        for single in (0, -1) if reads * k_w % 2 == 0 else (0,):
            half[:, single] *= 0.5
        found, scale = torch.view_as_real(half), 2 / (half.shape[0] * reads * k_w)
        grads['spectrum'][0].addcmul_(found, torch.view_as_real(weights), value=scale)
        found *= self.spectrum[0]
        # The sums of both parts, side by side.
        sums = half.new_zeros(grads['kernel'].shape[1]).index_add_(0, self._index, half.flatten())
        torch.mul(sums.real + sums.imag, scale, out=grads['kernel'][b])

    def _gates(self, b: int, rows: slice) -> Tensor:
        """σ(W · U) of some output channels, valid until the next call."""
        assert self.weight is not None
        assert self.windows is not None
        k_h = self.kernel_shape[2]
        weight, windows = self.weight[0, rows.start * k_h : rows.stop * k_h], self.windows[b, 0]
        out = workspace('gates', (len(weight), windows.shape[1]), windows.dtype)
        return torch.mm(weight, windows, out=out).sigmoid_()


def local_windows(descriptor: Tensor, groups: int, size: int, k_w: int) -> Tensor:
    """U, whose product with the filters gives the local logits in the order of the matrix.

    Args:
        descriptor (Tensor): Shape (B, C_in).
        groups (int): Groups of the convolution.
        size (int): q, the length of the filters, odd.
        k_w (int): Columns of the kernel.

    Returns:
        Tensor: Shape (B, groups, k_w · q, C_in / groups · k_w). Row (x, j) has neighbour j of each
        channel at the column x of the kernel, and 0 at the others.
    """
    windows = F.pad(descriptor, (size // 2, size // 2)).unfold(1, size, 1)
    windows = windows.unflatten(1, (groups, -1)).mT
    ones = torch.eye(k_w, dtype=windows.dtype, device=windows.device)
    placed = windows[:, :, None, :, :, None] * ones[:, None, None]
    return placed.flatten(4).flatten(2, 3)
