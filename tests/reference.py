"""ODConv written as slowly and obviously as the formula: a loop over samples and kernels.

The judge of the layers in every option. Also ``fill``, the weights of the reference backbones.
"""

import math
import zlib
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from mmdet_odconv.layers import CalibratedNorm
from mmdet_odconv.layers.odconv import _ODConvNd


def reference_forward(
    layer: _ODConvNd, x: Tensor, valid: Sequence[tuple[Fraction, Fraction]] | None = None
) -> Tensor:
    """What ``layer`` must give for ``x``, sample by sample.

    ``valid`` has the part of the height and of the width that each image takes, if not all.
    """
    attention = layer.attention
    pooled = []
    for b, sample in enumerate(x):
        if valid is not None:
            sizes = zip(x.shape[2:], valid[b], strict=True)
            height, width = (math.ceil(size * part) for size, part in sizes)
            sample = sample[:, :height, :width]
        pooled.append(torch.stack([channel.sum() / channel.numel() for channel in sample]))
    h = torch.stack([attention.fc.weight.flatten(1) @ p for p in pooled])
    h = torch.relu(reference_norm(attention.bn, h))
    outputs = [_one_sample(layer, sample, h_b) for sample, h_b in zip(x, h, strict=True)]
    return torch.stack(outputs)


def reference_norm(norm: torch.nn.Module, h: Tensor) -> Tensor:
    """A norm of (B, A) by hand."""
    if isinstance(norm, torch.nn.Identity):
        return h
    if isinstance(norm, torch.nn.GroupNorm):
        groups = h.reshape(len(h), norm.num_groups, -1)
        mean, var = groups.mean(2, keepdim=True), groups.var(2, keepdim=True, unbiased=False)
        h = ((groups - mean) / (var + norm.eps).sqrt()).reshape(h.shape)
        return h * norm.weight + norm.bias
    if isinstance(norm, CalibratedNorm):
        mean, var = norm.running_mean, norm.running_var
    elif isinstance(norm, torch.nn.LayerNorm):
        mean, var = h.mean(1, keepdim=True), h.var(1, keepdim=True, unbiased=False)
    elif norm.training and len(h) > 1:
        mean, var = h.mean(0), h.var(0, unbiased=False)
    else:
        mean, var = norm.running_mean, norm.running_var
    return (h - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias


def _one_sample(layer: _ODConvNd, x: Tensor, h: Tensor) -> Tensor:
    attention, t = layer.attention, layer.temperature

    def head(conv) -> Tensor:
        return (conv.weight.flatten(1) @ h + conv.bias) / t

    channel = torch.sigmoid(head(attention.channel_fc))
    filter_ = torch.ones(layer.out_channels, dtype=x.dtype)
    spatial = torch.ones(layer.kernel_size, dtype=x.dtype)
    kernel = torch.ones(layer.kernel_num, dtype=x.dtype)
    if not layer.groups == layer.in_channels == layer.out_channels:
        filter_ = torch.sigmoid(head(attention.filter_fc))
    if spatial.numel() > 1:
        spatial = torch.sigmoid(head(attention.spatial_fc)).reshape(layer.kernel_size)
    if layer.kernel_num > 1:
        logits = head(attention.kernel_fc)
        kernel = logits.exp() / logits.exp().sum()

    x = torch.stack([c * plane for c, plane in zip(channel, x, strict=True)])
    weight = sum(k * (spatial * w) for k, w in zip(kernel, layer.weight, strict=True))

    # torch's own plain convolution settles padding; that is not what is tested here.
    plain_type = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[layer.ndim - 1]
    plain = plain_type(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        bias=False,
        padding_mode=layer.padding_mode,
        dtype=x.dtype,
    )
    y = torch.func.functional_call(plain, {'weight': weight}, (x[None],))[0]
    y = torch.stack([f * plane for f, plane in zip(filter_, y, strict=True)])
    if layer.bias is not None:
        y = y + layer.bias.reshape(-1, *[1] * layer.ndim)
    return y


def randomise(module: torch.nn.Module) -> None:
    """Give every parameter and statistic a random value, so that none hides behind a 0 or 1.

    Temperatures stay, which must be positive.
    """
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_floating_point() and not name.endswith('temperature'):
                tensor.normal_(std=0.5)
                if name.endswith('running_var'):
                    tensor.abs_().add_(0.5)


def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of the state-dict entry ``name`` (published name) of the reference backbones."""
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith('running_var'):
        return np.abs(values) * 0.25 + 0.75
    if name.endswith('running_mean'):
        return values * 0.05
    if name.endswith('num_batches_tracked'):
        return np.zeros(shape)
    if len(shape) == 5:
        return values * 2 * (2 / np.prod(shape[2:])) ** 0.5
    if len(shape) >= 2:
        return values * (1 / np.prod(shape[1:])) ** 0.5
    return values * 0.1 + (1.0 if name.endswith('weight') else 0.0)


def relative_error(actual: Tensor, expected: np.ndarray | Tensor) -> float:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    return ((actual - expected).abs().max() / expected.abs().max()).item()
