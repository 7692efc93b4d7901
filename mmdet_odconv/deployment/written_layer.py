"""ODConv layers as they are written to files: in the operations that runtimes do fastest.

A runtime takes a node for each operation, and has no operator that picks one of several ways. So
the attentions scale the kernel, which is smaller than most maps, in few operations over long rows.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..conversion.convert import replace_modules
from ..functional.formula import convolve_each_sample, per_channel
from ..functional.implementation import CONV, resolve_geometry
from ..layers import ODConv1d, ODConv2d, ODConv3d
from ..layers.attention import PreparedAttention, is_bare
from .fuse import prepare_for_inference


def prepare_for_export(model: nn.Module) -> nn.Module:
    """:func:`prepare_for_inference`, and each ODConv layer becomes a :class:`WrittenODConv`.

    The model computes the same, for exporters that follow it operation by operation. In PyTorch
    itself it is slower than after :func:`prepare_for_inference` alone.

    Args:
        model (nn.Module): Any module, in evaluation mode.

    Returns:
        nn.Module: ``model`` itself, which is changed in place.
    """
    return use_written_layers(prepare_for_inference(model))


def use_written_layers(model: nn.Module) -> nn.Module:
    """Let the ODConv layers of a model that is prepared be :class:`WrittenODConv`, in place."""
    layers = [layer for layer in model.modules() if WrittenODConv.can_replace(layer)]
    replace_modules(model, {layer: WrittenODConv(layer) for layer in layers})
    return model


class WrittenODConv(nn.Module):
    """What an ODConv layer in evaluation mode computes, (B, C_in, *size) to (B, C_out, *size').

    The kernel of a sample is a matrix with a row for each output channel, and a column for each
    pair of an input channel and a kernel position. The filter and the kernel attention are one
    factor of the product that mixes the bank, f ⊗ k, and c ⊗ s scales the columns. The heads of c
    and s give a logit for each column, so that nothing has to be reshaped between.

    Args:
        layer (nn.Module): One for which :meth:`can_replace` holds. It is not changed.
    """

    bank: Tensor
    bias: Tensor | None

    def __init__(self, layer: Any) -> None:
        super().__init__()
        attention, bank = layer.attention, layer.weight.detach()
        pad_first = layer.padding_mode != 'zeros'
        self.pad_mode = layer.padding_mode if pad_first else 'constant'
        self.geometry, self.widths = resolve_geometry(
            layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, pad_first
        )
        groups, (c_out, reads, *size) = layer.groups, layer.kernel_shape
        self.kernel_shape, positions = layer.kernel_shape, math.prod(size)
        # In which shapes the kernels, c and s are multiplied; with groups each has its own c.
        self.shapes: tuple[tuple[int, ...], ...] = ((c_out, 1, reads * positions),)
        if groups == c_out > 1:
            self.shapes = self.kernel_shape, (groups, reads, *(1 for _ in size)), (1, 1, *size)
        if groups not in (1, c_out):
            rows = c_out // groups
            self.shapes = (
                (groups, rows, reads, positions),
                (groups, 1, reads, 1),
                (1, 1, 1, positions),
            )
        places = torch.arange(sum(attention.sizes)).split(attention.sizes)
        channel, filter_, spatial, kernel = places
        if groups == 1:  # else the heads would outgrow the bank
            channel = channel.repeat_interleave(positions)
            spatial = spatial.repeat(reads)
        self.attention = attention.rearranged((channel, filter_, spatial, kernel))
        if len(filter_):  # for each row a product with its own kernels, (C_out, K, columns)
            bank = bank.transpose(0, 1).flatten(2)
        elif len(kernel):  # one product, (K, C_out · columns)
            bank = bank.flatten(1)
        else:
            bank = bank[0].reshape(self.shapes[0])
        self.register_buffer('bank', bank.contiguous())
        self.register_buffer('bias', None if layer.bias is None else layer.bias.detach().clone())

    @staticmethod
    def can_replace(layer: Any) -> bool:
        """Whether ``layer`` is an ODConv layer whose attention is prepared, and nothing more."""
        return (
            type(layer) in (ODConv1d, ODConv2d, ODConv3d)
            and type(layer.attention) is PreparedAttention
            and type(layer.weight) is nn.Parameter
            and is_bare(layer)
            and is_bare(layer.attention)
            and layer.valid_sizes is None
            and not layer.mixes_biases
            and layer.weight.dtype == layer.attention.head_weight.dtype
            and layer.weight.dtype in (torch.float32, torch.float64)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of each sample with its own kernel.

        Args:
            x (Tensor): Shape (B, C_in, *size).
        """
        several = not (isinstance(x.shape[0], int) and x.shape[0] == 1)
        c, f, s, k = self.attention(x)
        kernels = self._scaled(self._mixed(f, k, several), c, s, several)
        if self.widths:
            x = F.pad(x, self.widths, self.pad_mode)
        if not several:
            conv = CONV[x.dim() - 2]
            if kernels.shape != self.kernel_shape:
                kernels = kernels.reshape(self.kernel_shape)
            return conv(x, kernels, self.bias, *self.geometry)
        y = convolve_each_sample(x, kernels.reshape(-1, *self.kernel_shape), self.geometry)
        return y if self.bias is None else y + per_channel(self.bias[None], y)

    def _mixed(self, f: Tensor | None, k: Tensor | None, several: bool) -> Tensor:
        """The kernels before their columns are scaled, in rows, with B of them if several."""
        rows = (-1,) if several else ()
        if f is None:
            return self.bank if k is None else (k @ self.bank).reshape(*rows, *self.shapes[0])
        f = f.reshape(*rows, self.kernel_shape[0], 1, 1)
        if k is None:
            return f * self.bank
        return (f * (k.reshape(-1, 1, 1, k.shape[1]) if several else k)) @ self.bank

    def _scaled(self, kernels: Tensor, c: Tensor | None, s: Tensor | None, several: bool) -> Tensor:
        """The kernels with their columns scaled by c ⊗ s."""
        samples, (rows, *shapes) = (-1,) if several else (), self.shapes
        if shapes:
            c = None if c is None else c.reshape(*samples, *shapes[0])
            s = None if s is None else s.reshape(*samples, *shapes[1])
        columns = c if s is None else s if c is None else c * s
        if columns is None:
            return kernels
        if several and not shapes:
            columns = columns.reshape(-1, 1, 1, rows[2])
        elif kernels.shape[kernels.dim() - len(rows) :] != rows:
            kernels = kernels.reshape(*samples[: kernels.dim() - 3], *rows)
        return kernels * columns
