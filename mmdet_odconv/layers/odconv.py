"""ODConv layers: drop-in replacements of ``nn.Conv1d/2d/3d``.

Paper: Omni-Dimensional Dynamic Convolution (https://openreview.net/forum?id=DmpCfq6Mg39)
"""

import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, fx, nn

from ..functional import (
    DEFAULT_SPREAD,
    Attentions,
    at_least_float32,
    bank_from_static_weight,
    check_strategy,
    squeeze,
)
from ..functional.arguments import ArgumentError, check_integer, check_number, check_sizes
from ..functional.implementation import resolve_geometry
from ..functional.operator import convolution_dtype, needs_plain_operations, odconv_unchecked
from .attention import ODAttention
from .valid_pooling import ValidSizes

# Of values and not of a layer, whose stride and padding may be changed.
_resolved = lru_cache(maxsize=4096)(resolve_geometry)


class _ODConvNd(nn.Module):
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

    ndim: ClassVar[int]
    padding: tuple[int, ...] | str
    # Of the class, so that modules that were pickled without it load; see use_valid_pooling.
    valid_sizes: ValidSizes | None = None

    # Attributes of every nn.ConvNd that mmcv's ConvModule reads.
    transposed = False
    output_padding = 0

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
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = check_sizes('kernel_size', kernel_size, self.ndim, least=1)
        self.stride = check_sizes('stride', stride, self.ndim, least=1)
        self.dilation = check_sizes('dilation', dilation, self.ndim, least=1)
        self.padding = (
            padding if isinstance(padding, str) else check_sizes('padding', padding, self.ndim, 0)
        )
        self.groups = groups
        self.padding_mode = padding_mode
        self.kernel_num = kernel_num
        self.spread = check_number('spread', spread)
        self.strategy = strategy
        self._check_arguments()

        # Before the bank, whose size it checks.
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
        shape = (kernel_num, out_channels, in_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.has_bias = bias
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter('bias', None)
        self.attention = attention
        self._reset_bank()

    @classmethod
    def like(cls, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, **odconv_args: Any) -> '_ODConvNd':
        """A new ODConv layer with the geometry, device and type of the plain ``conv``.

        Args:
            conv (nn.Module): An ``nn.Conv1d/2d/3d`` of this class's dimensions.
            **odconv_args: ``kernel_num``, ``reduction`` and ODConv's other arguments.
        """
        return cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            conv.weight.device,
            conv.weight.dtype,
            **odconv_args,
        )

    def reset_parameters(self) -> None:
        """Kaiming normal (fan_out, ReLU) for each kernel of the bank, bias 0, and the attention."""
        self._reset_bank()
        self.attention.reset_parameters()

    def attention_parameters(self) -> list[nn.Parameter]:
        """The parameters that make the attentions."""
        return list(self.attention.parameters())

    def init_weights(self) -> None:
        """The name under which mmcv and mmengine look for a layer's own initialisation."""
        self.reset_parameters()

    @property
    def temperature(self) -> float:
        """T of the attentions; see also :func:`set_temperature`."""
        return self.attention.temperature.item()

    @temperature.setter
    def temperature(self, value: float) -> None:
        self.attention.set_temperature(value)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, fx.Proxy):
            # Like torch's own layers, this one is a leaf of a symbolic trace.
            return x.tracer.create_proxy('call_module', x.tracer.path_of_module(self), (x,), {})
        if x.dim() != self.ndim + 2 or x.shape[1] != self.in_channels:
            return self._forward_unbatched(x)
        bank, pad_first = self.weight, self.padding_mode != 'zeros'
        dtype = convolution_dtype(x, bank)  # refuses a wrong type before a norm sees the batch
        plain = needs_plain_operations(x, bank)
        pooled = None if self.valid_sizes is None else self.valid_sizes.average(x)
        if pooled is None:
            x, pooled = squeeze(x, plain)
        attentions = self.attention(pooled)
        geometry, widths = (resolve_geometry if plain else _resolved)(
            self.kernel_size, self.stride, self.padding, self.dilation, self.groups, pad_first
        )
        if widths:
            x = F.pad(x, widths, self.padding_mode if pad_first else 'constant')
        if x.dtype != dtype:
            x = x.to(dtype)
        return odconv_unchecked(x, bank, attentions, self.bias, geometry, self.strategy, plain)

    def _forward_unbatched(self, x: Tensor) -> Tensor:
        """The output for a single sample; the words for what is neither that nor a batch."""
        if x.dim() == self.ndim + 1 and x.shape[0] == self.in_channels:
            return self.forward(x[None])[0]
        dims = (self.ndim + 1, self.ndim + 2)
        if x.dim() in dims:
            raise ValueError(
                f'{type(self).__name__} expects {self.in_channels} input channels, '
                f'got {x.shape[-1 - self.ndim]} (shape {tuple(x.shape)})'
            )
        raise ValueError(
            f'{type(self).__name__} expects an input of {dims[1]} dimensions '
            f'(or {dims[0]}, without the batch), got shape {tuple(x.shape)}'
        )

    def __setattr__(self, name: str, value: Any) -> None:
        function = getattr(value, 'func', None)
        if name == 'forward' and getattr(function, '__name__', '').startswith('efficient_conv_bn'):
            raise RuntimeError(
                "mmcv's efficient_conv_bn_eval computes with the one weight of a convolution, but "
                f'an {type(self).__name__} has another kernel for each sample; turn that option '
                'of the ConvModule off'
            )
        if (
            name == 'weight'
            and isinstance(value, Tensor)
            and value.dim() == self.ndim + 3  # a shard has fewer
            and len(value) != self.kernel_num
        ):
            raise RuntimeError(
                self._fused_as_plain(f'has K={self.kernel_num} and would get {len(value)} kernels')
            )
        if name == 'bias' and value is not None and not self.has_bias:
            raise RuntimeError(self._fused_as_plain('was built without a bias and would get one'))
        super().__setattr__(name, value)

    def _fused_as_plain(self, what: str) -> str:
        return (
            f'this {type(self).__name__} {what}: fusing a norm into it as into a plain convolution '
            'changes what it computes; use mmdet_odconv.fuse_odconv_bn'
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        shape, had_no_memory = self.weight.shape, self.weight.is_meta

        def keeping_the_bank_contiguous(tensor: Tensor) -> Tensor:
            # `to(memory_format=...)` takes the bank, which has a dimension more than the kernel
            # of a plain convolution, for one of another kind. The same goes for its gradient.
            if tensor.shape == shape and type(tensor) in (Tensor, nn.Parameter):
                return fn(tensor.flatten()).view(shape)
            return fn(tensor)

        super()._apply(keeping_the_bank_contiguous, *args, **kwargs)
        if had_no_memory and not self.weight.is_meta:  # as in the attention
            self._reset_bank()
        return self

    def extra_repr(self) -> str:
        temperature = self.attention.temperature
        parts = [
            f'{self.in_channels}, {self.out_channels}',
            f'kernel_size={self.kernel_size}',
            f'stride={self.stride}',
            f'padding={self.padding}',
            f'dilation={self.dilation}',
            f'groups={self.groups}',
            f'bias={self.bias is not None}',
            f'padding_mode={self.padding_mode}',
            f'kernel_num={self.kernel_num}',
        ]
        if not temperature.is_meta:
            parts.append(f'temperature={temperature.item():g}')
        return ', '.join(parts)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        if self._is_static(state_dict, prefix):
            if self.weight.is_meta and local_metadata.get('assign_to_params_buffers'):
                # The file has nothing for the attention, which must leave the meta device too.
                self.attention.to_empty(device=state_dict[f'{prefix}weight'].device)
            temperature = self.attention.temperature
            if not temperature.is_meta and not temperature.item() > 0:  # left over by `to_empty`
                self.attention.reset_parameters()
            # `state_dict` is the loader's own copy, and it goes on to the children: what is put
            # in here is neither missing nor left over there.
            attention = self.attention.reset_to_constant()
            for name, value in self.attention.state_dict().items():
                state_dict[f'{prefix}attention.{name}'] = value
            key = f'{prefix}weight'
            state_dict[key] = self._bank_like(state_dict[key], attention, key)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _is_static(self, state_dict: dict[str, Any], prefix: str) -> bool:
        """Whether the entries under ``prefix`` are those of the plain convolution."""
        weight = state_dict.get(f'{prefix}weight')
        if not isinstance(weight, Tensor) or weight.shape != self.weight.shape[1:]:
            return False
        return not any(name.startswith(f'{prefix}attention.') for name in state_dict)

    def _bank_like(self, weight: Tensor, attention: float, name: str) -> Tensor:
        """The bank that computes what the static ``weight`` does, in this layer's type.

        Each process of a distributed run loads for itself and must draw what the others do,
        whatever the states of their generators. So the seed is the name and the bank so far, which
        is random in each run and equal in its processes.
        """
        has_values = type(self.weight) is nn.Parameter and not self.weight.is_meta
        values = self.weight.detach().flatten()[:16].tolist() if has_values else None
        generator = torch.Generator().manual_seed(zlib.crc32(f'{name} {values}'.encode()))
        wide = weight.detach().to(at_least_float32(self.weight.dtype))
        bank = bank_from_static_weight(wide, self.kernel_num, attention, self.spread, generator)
        return bank.to(self.weight.dtype)

    def _reset_bank(self) -> None:
        for kernel in self.weight:
            nn.init.kaiming_normal_(kernel, mode='fan_out', nonlinearity='relu')
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _check_arguments(self) -> None:
        for name in ('in_channels', 'out_channels', 'groups'):
            check_integer(name, getattr(self, name), least=1)
        for name in ('in_channels', 'out_channels'):
            if getattr(self, name) % self.groups:
                raise ArgumentError(
                    f'{name} must be divisible by groups, '
                    f'got {name}={getattr(self, name)} and groups={self.groups}'
                )
        # Refuses a padding that does not exist, or does not go with the stride.
        resolve_geometry(self.kernel_size, self.stride, self.padding, self.dilation, self.groups)
        if self.spread < 0:
            raise ArgumentError(f'spread must not be negative, got {self.spread}')
        check_strategy(self.strategy, self.kernel_num)
        modes = ('zeros', 'reflect', 'replicate', 'circular')
        if self.padding_mode not in modes:
            raise ArgumentError(f'padding_mode must be one of {modes}, got {self.padding_mode!r}')


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
