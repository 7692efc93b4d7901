"""FDConv: a dynamic convolution whose kernels are groups of frequencies of one kernel.

Paper: Frequency Dynamic Convolution for Dense Image Prediction (https://arxiv.org/abs/2503.18783)
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from .._checks import ArgumentError, check_integer
from ..compat import without_autocast
from ..functional import Attentions, at_least_float32
from ..functional.attention import cast
from ..functional.fourier import (
    FourierKernels,
    fdconv_kernels,
    frequency_groups,
    modulate_bands,
    spectrum_from_kernel,
    spectrum_scale,
)
from .attention import ODAttention
from .dynamic_conv import DynamicConvNd


@MODELS.register_module()
@MODELS.register_module(name='FDConv')
class FDConv2d(DynamicConvNd):
    """Frequency dynamic convolution.

    y = f ⊙ conv(c ⊙ bands(x), s ⊙ l ⊙ F⁻¹(Σ_j k_j · P_j)) + bias. The weight P is the Fourier
    transform of one kernel, cut into K groups of frequencies P_j, so K kernels take the room of
    one. The attentions c, f, s and k (:class:`GlobalModulation`) are as in ODConv, but from 0 to 2.
    l (:class:`LocalModulation`) is a factor for each entry of the kernel. Both are computed from
    the average of x. bands(x) scales the frequency bands of x, each at each place
    (:class:`BandModulation`). Only layers whose kernel has several positions have it.

    All factors start as 1, so a layer starts as a plain convolution. The state dict of a plain
    convolution can be loaded, and gives the same function. The published code starts from random
    factors of size 1e-6, and leaves one head, by mistake, at its random initialisation.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode: As in ``torch.nn.Conv2d``.
        device, dtype: As in ``torch.nn.Conv2d``.
        kernel_num (int): K, at most the number of frequencies, to which a greater one is reduced.
            1 for a kernel whose frequencies are not weighted. Default: 64.
        reduction (float): Width of the attention branch relative to ``in_channels``.
            Default: 1/16.
        min_attention_channels (int): The least width of the attention branch. Default: 16.
        temperature (float): T of the attentions, positive. Default: 1.0.
        norm_cfg (dict, optional): Norm of the attention branch: BN, SyncBN, CalibratedNorm, LN or
            GN, or None. Default: ``dict(type='BN')``.
        attentions (Sequence[str]): Which of the attentions 'channel', 'filter', 'spatial' and
            'kernel' the layer has; K > 1 needs 'kernel'. Default: all four.
        local (bool): Whether the layer has l. Default: True.
        bands (Sequence[int]): The bands end at the frequencies 1 / (2 · f) for these f, ascending;
            none for no modulation of bands. Default: (2, 4, 8).

    Shape:
        Input (B, C_in, H, W) or (C_in, H, W), output (B, C_out, H', W') or (C_out, H', W'), with
        the sizes of the plain convolution. B may be 0.

    Raises:
        ValueError: An argument is out of its range (the message names it and its value), or an
            input has the wrong number of channels or dimensions.
    """

    ndim = 2
    frequency_group: Tensor
    scale: nn.Parameter | None
    local: 'LocalModulation | None'
    bands: 'BandModulation | None'

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
        kernel_num: int = 64,
        reduction: float = 1 / 16,
        min_attention_channels: int = 16,
        temperature: float = 1.0,
        norm_cfg: dict[str, Any] | None = dict(type='BN'),  # noqa: B006  mmdet's idiom
        attentions: Sequence[str] = Attentions._fields,
        local: bool = True,
        bands: Sequence[int] = (2, 4, 8),
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
        check_integer('kernel_num', kernel_num, least=1)
        for factor in bands:
            check_integer('each of bands', factor, least=1)
        if list(bands) != sorted(set(bands)):
            raise ArgumentError(f'bands must ascend, got {bands!r}')
        c_out, reads, k_h, k_w = self.kernel_shape
        self._grid = rows, columns = c_out // groups * k_h, reads * k_w
        self.kernel_num = min(kernel_num, rows * (columns // 2 + 1))
        self.attention = GlobalModulation(
            in_channels,
            out_channels,
            self.kernel_size,
            groups=groups,
            kernel_num=self.kernel_num,
            reduction=reduction,
            min_attention_channels=min_attention_channels,
            temperature=temperature,
            norm_cfg=norm_cfg,
            attention_bias=0.0,
            attentions=attentions,
            kernel_activation='sigmoid',
            device=device,
            dtype=dtype,
        )
        place: dict[str, Any] = dict(device=device, dtype=dtype)
        self.local = LocalModulation(in_channels, self.kernel_shape, **place) if local else None
        several = math.prod(self.kernel_size) > 1
        self.bands = BandModulation(in_channels, bands, **place) if several and bands else None
        index = frequency_groups(*self._grid, self.kernel_num).to(device)
        self.register_buffer('frequency_group', index, persistent=False)
        self.create_parameters((groups, rows, columns // 2 + 1, 2), device, dtype)
        self.register_parameter('scale', None)  # that of a norm which is folded into the layer

    def reset_parameters(self) -> None:
        """Start from a static kernel (Kaiming normal, fan_out, ReLU), with all factors at 1."""
        super().reset_parameters()
        if not self.weight.is_meta:
            index = frequency_groups(*self._grid, self.kernel_num)
            self.frequency_group = index.to(self.weight.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.frequency_group.is_meta and not self.weight.is_meta:  # with assign=True
            index = frequency_groups(*self._grid, self.kernel_num)
            self.frequency_group = index.to(self.weight.device)

    def from_static(self, kernel: Tensor, name: str) -> Tensor:
        return spectrum_from_kernel(cast(kernel, at_least_float32(kernel.dtype)), self.groups)

    def fold_norm(self, scale: Tensor, shift: Tensor) -> bool:
        self.fold_into_bias(scale, shift)
        before = 1 if self.scale is None else self.scale.detach().double()
        self.scale = self.parameter_like_weight(before * scale)
        return True

    def compensation(self, sgd: bool) -> float:
        entries = math.prod(self._grid)
        scale = spectrum_scale(self.kernel_shape, self.groups)
        # F⁻¹ of a coefficient has entries of 2 / n, so a gradient and the step along it n (2 / n)².
        # A coefficient is √(n / 2) times as large as an entry of the kernel, in both its parts.
        return entries / (2 * scale**2) if sgd else math.sqrt(entries / 2) / scale

    def uncounted_madds(self) -> int:
        rows, columns = self._grid
        # The real transform of n numbers takes 5/2 n log2 n operations, two of them a multiply-add.
        return round(5 / 4 * self.groups * rows * columns * math.log2(max(rows * columns, 2)))

    def forward_batch(self, x: Tensor) -> Tensor:
        x, pooled = self.squeeze(x)
        attentions = self.attention(pooled)
        optional = attentions._asdict()
        if self.local is not None:
            optional |= dict(descriptor=self.local(pooled), local=self.local.weight)
        if self.scale is not None:
            f = optional['filter']
            optional['filter'] = self.scale.expand(len(x), -1) if f is None else f * self.scale
        given = {name: tensor for name, tensor in optional.items() if tensor is not None}

        def make_kernels(spectrum: Tensor, *tensors: Tensor) -> FourierKernels:
            factors = dict(zip(given, tensors, strict=True))
            return fdconv_kernels(
                spectrum, self.frequency_group, self.kernel_shape, self.attention.gain, **factors
            )

        sources = [self.weight, *given.values()]
        if self.bands is None:
            return self.convolve(x, make_kernels, sources)
        modulate = partial(modulate_bands, factors=self.bands.factors)
        return self.convolve(x, make_kernels, sources, modulate, [self.bands(x)])

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, kernel_num={self.kernel_num}'


class GlobalModulation(ODAttention):
    """The attentions of ODConv, computed with StarReLU, s · ReLU(h)² + b, in place of ReLU.

    FDConv takes each of them twice, so it is 1 at the start.

    Args:
        *args, **kwargs: Those of :class:`ODAttention`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        place = dict(device=kwargs.get('device'), dtype=kwargs.get('dtype'))
        self.act_scale = nn.Parameter(torch.ones(1, **place))
        self.act_bias = nn.Parameter(torch.zeros(1, **place))

    @property
    def gain(self) -> float:
        """2 to the power of the number of attentions."""
        return 2.0 ** len(self._heads())

    def _activate(self, h: Tensor) -> Tensor:
        return self.act_scale * torch.relu(h).square() + self.act_bias

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.ones_(self.act_scale)
        nn.init.zeros_(self.act_bias)

    def reset_to_constant(self) -> float:
        nn.init.ones_(self.act_scale)
        nn.init.zeros_(self.act_bias)
        return super().reset_to_constant()


class LocalModulation(nn.Module):
    """What the factor of each entry of a kernel is computed from.

    The average of each channel, normalised over the channels, is convolved along them, with one
    filter for each output channel and position of the kernel. The factor is 2σ of that.

    Args:
        in_channels (int): C_in of the convolution.
        kernel_shape (Sequence[int]): (C_out, C_in / groups, *kernel_size).
        device, dtype: As in ``torch.nn.Conv2d``.
    """

    def __init__(self, in_channels: int, kernel_shape: Sequence[int], **place: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_channels, **place)
        # As published: 5 for 64 to 512 channels, 7 for 1024 and 2048.
        size = 2 * (round(math.log2(in_channels) / 2 + 0.5) // 2) + 1
        filters = kernel_shape[0] * math.prod(kernel_shape[2:])
        self.weight = nn.Parameter(torch.zeros(filters, 1, size, **place))

    def reset_parameters(self) -> None:
        """Let all factors be 1."""
        self.norm.reset_parameters()
        nn.init.zeros_(self.weight)

    def forward(self, pooled: Tensor) -> Tensor:
        """From averages (B, C_in) to normalised ones."""
        with without_autocast(pooled.device.type):
            normalised: Tensor = self.norm(cast(pooled, self.weight.dtype))
        return normalised


class BandModulation(nn.Module):
    """The factor of each frequency band of a map at each place, 2σ of a 3×3 convolution.

    Args:
        in_channels (int): Channels of the map.
        factors (Sequence[int]): The bands end at the frequencies 1 / (2 · f) for these f.
        device, dtype: As in ``torch.nn.Conv2d``.
    """

    def __init__(self, in_channels: int, factors: Sequence[int], **place: Any) -> None:
        super().__init__()
        self.factors = tuple(factors)
        self.weight = nn.Parameter(torch.zeros(len(factors), in_channels, 3, 3, **place))
        self.bias = nn.Parameter(torch.zeros(len(factors), **place))

    def reset_parameters(self) -> None:
        """Let all factors be 1."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """From a map (B, C_in, H, W) to the factors (B, number of bands, H, W)."""
        logits = F.conv2d(x, self.weight, self.bias, padding=1)
        return 2 * torch.sigmoid(cast(logits, at_least_float32(logits.dtype)))
