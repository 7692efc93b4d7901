"""ODConv layers: drop-in replacements of ``nn.Conv1d/2d/3d``.

Paper: Omni-Dimensional Dynamic Convolution (https://openreview.net/forum?id=DmpCfq6Mg39)
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from .._checks import ArgumentError, check_number
from ..functional import (
    DEFAULT_SPREAD,
    Attentions,
    bank_from_static_weight,
    check_strategy,
    mix_kernel_bank,
    squeeze,
)
from ..functional.attention import cast
from ..functional.implementation import resolve_geometry
from ..functional.operator import convolution_dtype, needs_plain_operations, odconv_unchecked
from .attention import ODAttention
from .dynamic_conv import DynamicConvNd, resolved


class _ODConvNd(DynamicConvNd):
    """Omni-dimensional dynamic convolution.

    y = f ⊙ conv(c ⊙ x, Σ_j k_j · (s ⊙ W_j)) + bias, where the channel, filter, spatial and kernel
    attentions c, f, s and k are computed from x (:class:`ODAttention`) and W is a bank of K
    kernels.

    The defaults are made for training from scratch. With ``attention_init='zero'`` the attentions
    start as constants, because with the published initialisation the gradients are many times those
    of a plain convolution. For the paper's form, use ``attention_init='published'`` and
    anneal the temperature from 30 (:class:`ODConvTemperatureHook`).

    You can load the state dict of a plain convolution, with every loader that goes through
    PyTorch's modules. The attentions and the bank are then set so that the layer computes what that
    convolution computes (:func:`~mmdet_odconv.functional.bank_from_static_weight`), at the
    temperature of that moment.

    In training, a BatchNorm of the attention sees one value per sample. A single sample has no
    variance, so such a step normalises with the running statistics and does not change them.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode: As in ``torch.nn.Conv2d``.
        device, dtype: As in ``torch.nn.Conv2d``.
        kernel_num (int): K, kernels in the bank. Default: 4.
        reduction (float, optional): Width of the attention branch relative to ``in_channels``,
            None for heads that read the average itself. Default: 1/16.
        min_attention_channels (int): The least width of the attention branch. Default: 16.
        temperature (float): T of the attentions, positive. Default: 1.0.
        norm_cfg (dict, optional): Norm of the attention branch: BN, SyncBN, CalibratedNorm, LN or
            GN, or None. Default: ``dict(type='BN')``.
        attention_init (str): 'zero' or 'published'
            (:meth:`ODAttention.reset_parameters`). Default: 'zero'.
        attention_bias (float): Bias of the sigmoid heads at the 'zero' init. Default: 2.2.
        attentions (Sequence[str]): Which of the attentions 'channel', 'filter', 'spatial' and
            'kernel' the layer has; K > 1 needs 'kernel'. Default: all four.
        kernel_activation (str): 'softmax' or 'sigmoid', for the kernel attention.
            Default: 'softmax'.
        spread (float): How far apart the kernels of the bank are after static weights are loaded:
            the standard deviation of the noise that is added to each of them, relative to the size
            of the static kernel. It does not change what the layer computes. Default: 1.0.
        strategy (str): Which implementation computes the convolution: 'auto' or a name
            (:func:`~mmdet_odconv.functional.odconv`). The result is the same with all of them.
            Default: 'auto'.

    Shape:
        Input (B, C_in, *size) or (C_in, *size), output (B, C_out, *size') or (C_out, *size'),
        with the sizes of the plain convolution. B may be 0.

    Raises:
        ValueError: An argument is out of its range (the message names it and its value), or an
            input has the wrong number of channels or dimensions.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = 'zeros',
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        kernel_num: int = 4,
        reduction: float | None = 1 / 16,
        min_attention_channels: int = 16,
        temperature: float = 1.0,
        norm_cfg: dict[str, Any] | None = dict(type='BN'),  # noqa: B006  mmdet's idiom
        attention_init: str = 'zero',
        attention_bias: float = 2.2,
        attentions: Sequence[str] = Attentions._fields,
        kernel_activation: str = 'softmax',
        spread: float = DEFAULT_SPREAD,
        strategy: str = 'auto',
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
        )
        self.kernel_num = kernel_num
        self.spread = check_number('spread', spread)
        if spread < 0:
            raise ArgumentError(f'spread must not be negative, got {spread}')
        self.strategy = strategy
        check_strategy(strategy, kernel_num)
        # Before the bank, whose size it checks, and registered after it.
        attention = ODAttention(
            in_channels,
            out_channels,
            self.kernel_size,
            groups=groups,
            kernel_num=kernel_num,
            reduction=reduction,
            min_attention_channels=min_attention_channels,
            temperature=temperature,
            norm_cfg=norm_cfg,
            attention_init=attention_init,
            attention_bias=attention_bias,
            attentions=attentions,
            kernel_activation=kernel_activation,
            device=device,
            dtype=dtype,
        )
        self.create_parameters((kernel_num, *self.kernel_shape), device, dtype)
        self.attention = attention

    def forward_batch(self, x: Tensor) -> Tensor:
        bank, pad_first = self.weight, self.padding_mode != 'zeros'
        dtype = convolution_dtype(x, bank)  # refuses a wrong type before a norm sees the batch
        plain = needs_plain_operations(x, bank)
        pooled = None if self.valid_sizes is None else self.valid_sizes.average(x)
        if pooled is None:
            x, pooled = squeeze(x, plain)
        attentions: Any = self.attention(pooled)
        geometry, widths = (resolve_geometry if plain else resolved)(
            self.kernel_size, self.stride, self.padding, self.dilation, self.groups, pad_first
        )
        if widths:
            x = F.pad(x, widths, self.padding_mode if pad_first else 'constant')
        if x.dtype != dtype:
            x = x.to(dtype)
        bias: Tensor | None = self.bias
        if bias is None or bias.dim() == 1:
            return odconv_unchecked(x, bank, attentions, bias, geometry, self.strategy, plain)
        y = odconv_unchecked(x, bank, attentions, None, geometry, self.strategy, plain)
        mixed = cast(cast(attentions.kernel, bias.dtype) @ bias, y.dtype)
        return y + mixed.view(*y.shape[:2], *(1,) * self.ndim)

    @property
    def mixes_biases(self) -> bool:
        """Whether each kernel of the bank has a bias of its own."""
        return self.bias is not None and self.bias.dim() == 2

    def reset_weight(self) -> None:
        """Kaiming normal (fan_out, ReLU) for each kernel of the bank."""
        for kernel in self.weight:
            nn.init.kaiming_normal_(kernel, mode='fan_out', nonlinearity='relu')

    def from_static(self, kernel: Tensor, name: str) -> Tensor:
        """A bank that computes what ``kernel`` does, its kernels ``spread`` apart.

        Each process of a distributed run loads for itself and must draw what the others do,
        whatever the states of their generators. So the seed is the name and the bank so far, which
        is random in each run and equal in its processes.
        """
        has_values = type(self.weight) is nn.Parameter and not self.weight.is_meta
        values = self.weight.detach().flatten()[:16].tolist() if has_values else None
        generator = torch.Generator().manual_seed(zlib.crc32(f'{name} {values}'.encode()))
        attention = self.attention.constant_product()
        return bank_from_static_weight(kernel, self.kernel_num, attention, self.spread, generator)

    def fold_norm(self, scale: Tensor, shift: Tensor) -> bool:
        wide = self.weight.detach().double() * scale.view(-1, *(1,) * (self.ndim + 1))
        self.weight = self.parameter_like_weight(wide)
        self.fold_into_bias(scale, shift)
        return True

    def compensation(self, sgd: bool) -> float:
        attention = self.attention.constant_product()
        if sgd:
            return self.kernel_num / attention**2
        return math.hypot(1, self.spread if self.kernel_num > 1 else 0.0) / attention

    def at_attentions(self, means: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        bank = self.weight.detach().double()
        c, f, s, k = (
            means[name].to(bank)[None] if name in means else None for name in Attentions._fields
        )
        kernel = mix_kernel_bank(bank, s, k)[0]
        bias: Tensor | None = self.bias
        if bias is not None and k is not None and bias.dim() == 2:
            bias = (k @ bias.double())[0]
        ones = (1,) * (self.ndim + 1)
        if f is not None:
            kernel = kernel * f.view(-1, *ones)
        if c is not None:
            # Filter i of group g reads the channels of g.
            of_group = c.view(self.groups, 1, -1, *ones[1:])
            kernel = (kernel.view(self.groups, -1, *kernel.shape[1:]) * of_group).flatten(0, 1)
        return kernel, bias

    def kernel_bank(self) -> Tensor | None:
        weight = self.weight.detach()
        # `fully_shard` spreads its values. FullyShardedDataParallel leaves a flat piece of it, or
        # nothing, in each process.
        weight = weight.full_tensor() if hasattr(weight, 'full_tensor') else weight
        return weight if self.kernel_num > 1 and weight.dim() == self.ndim + 3 else None

    def extra_repr(self) -> str:
        text = f'{super().extra_repr()}, kernel_num={self.kernel_num}'
        is_known = not self.attention.temperature.is_meta
        return f'{text}, temperature={self.temperature:g}' if is_known else text


@MODELS.register_module()
class ODConv1d(_ODConvNd):
    __doc__ = _ODConvNd.__doc__
    ndim = 1


@MODELS.register_module()
@MODELS.register_module(name='ODConv')
class ODConv2d(_ODConvNd):
    __doc__ = _ODConvNd.__doc__
    ndim = 2


@MODELS.register_module()
class ODConv3d(_ODConvNd):
    __doc__ = _ODConvNd.__doc__
    ndim = 3
