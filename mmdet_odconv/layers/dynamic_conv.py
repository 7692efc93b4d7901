"""What every dynamic convolution shares: a convolution whose kernel is made for each sample."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..functional import convolution_dtype, squeeze
from ..functional.arguments import ArgumentError, check_integer, check_sizes
from ..functional.attention import cast
from ..functional.dynamic_conv import dynamic_conv
from ..functional.implementation import resolve_geometry
from .valid_pooling import ValidSizes


class DynamicConvNd(nn.Module):
    """The base of all dynamic convolutions, with the arguments of ``nn.Conv1d/2d/3d``.

    A subclass sets ``ndim``, and its constructor calls this one, :meth:`create_parameters` and, in
    the end, :meth:`reset_parameters`. Its children are what makes the attentions; each has a
    method ``reset_parameters``. It defines :meth:`forward_batch`, and as far as the defaults do not
    fit, :meth:`reset_weight`, :meth:`from_static`, :meth:`fold_norm` and :meth:`mixture_madds`.
    With that it can be converted, loaded from static weights, exported, fused, trained by
    :class:`ODConvOptimWrapperConstructor` and counted like ODConv.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode: As in ``torch.nn.Conv2d``.

    Raises:
        ValueError: An argument is out of its range. The message names it and its value.
    """

    ndim: ClassVar[int]
    padding: tuple[int, ...] | str
    weight: nn.Parameter
    bias: nn.Parameter | None
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
        self.has_bias = bias
        self.padding_mode = padding_mode
        for name in ('in_channels', 'out_channels', 'groups'):
            check_integer(name, getattr(self, name), least=1)
        for name in ('in_channels', 'out_channels'):
            if getattr(self, name) % groups:
                raise ArgumentError(
                    f'{name} must be divisible by groups, '
                    f'got {name}={getattr(self, name)} and groups={groups}'
                )
        # Refuses a padding that does not exist, or does not go with the stride.
        resolve_geometry(self.kernel_size, self.stride, self.padding, self.dilation, groups)
        modes = ('zeros', 'reflect', 'replicate', 'circular')
        if padding_mode not in modes:
            raise ArgumentError(f'padding_mode must be one of {modes}, got {padding_mode!r}')

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """The shape of a static kernel: (C_out, C_in / groups, *kernel_size)."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @classmethod
    def like(cls, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, **own_args: Any) -> 'DynamicConvNd':
        """A new layer with the geometry, device and type of the plain ``conv``.

        Args:
            conv (nn.Module): An ``nn.Conv1d/2d/3d`` of this class's dimensions.
            **own_args: The arguments that the class has besides those of a plain convolution.
        """
        kind: Any = cls
        layer: DynamicConvNd = kind(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
            **own_args,
        )
        return layer

    def create_parameters(
        self,
        weight_shape: Sequence[int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Register ``weight``, of this shape, and ``bias``, both without values."""
        self.weight = nn.Parameter(torch.empty(tuple(weight_shape), device=device, dtype=dtype))
        bias = torch.empty(self.out_channels, device=device, dtype=dtype) if self.has_bias else None
        self.register_parameter('bias', None if bias is None else nn.Parameter(bias))

    def reset_parameters(self) -> None:
        """Initialise the layer as the constructor does."""
        with torch.no_grad():
            self.reset_weight()
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.reset_attention()

    def reset_weight(self) -> None:
        """Draw a static kernel (Kaiming normal, fan_out, ReLU) and start from it."""
        kernel = self.weight.new_empty(self.kernel_shape)
        nn.init.kaiming_normal_(kernel, mode='fan_out', nonlinearity='relu')
        if not kernel.is_meta:
            self.weight.copy_(self.from_static(kernel, ''))

    def reset_attention(self) -> None:
        """Initialise the children."""
        for child in self.children():
            child.reset_parameters()  # type: ignore[operator]

    def attention_parameters(self) -> list[nn.Parameter]:
        """The parameters that make the attentions: all but ``weight`` and ``bias``."""
        return [p for child in self.children() for p in child.parameters()]

    def init_weights(self) -> None:
        """The name under which mmcv and mmengine look for a layer's own initialisation."""
        self.reset_parameters()

    def from_static(self, kernel: Tensor, name: str) -> Tensor:
        """The ``weight`` with which the layer, as it starts, computes what ``kernel`` does.

        Args:
            kernel (Tensor): Shape :attr:`kernel_shape`.
            name (str): Name of the weight in its model: the seed of whatever is drawn, so that
                the processes of a distributed run draw the same.
        """
        return kernel

    def fold_norm(self, scale: Tensor, shift: Tensor) -> bool:
        """Change the layer so that it gives y · scale + shift in place of y.

        Args:
            scale, shift (Tensor): Shape (C_out,), float64.

        Returns:
            bool: False if the layer cannot do that, and is unchanged.
        """
        return False

    def mixture_madds(self) -> int:
        """How many multiply-adds it takes to make the kernel of a sample."""
        return 0

    def forward(self, x: Tensor) -> Tensor:
        """From (B, C_in, *size) or (C_in, *size) to the output of the plain convolution's shape."""
        if isinstance(x, fx.Proxy):
            # Like torch's own layers, this one is a leaf of a symbolic trace.
            return x.tracer.create_proxy('call_module', x.tracer.path_of_module(self), (x,), {})
        if x.dim() == self.ndim + 1:
            return self.forward(x[None])[0]
        if x.dim() != self.ndim + 2:
            raise ValueError(
                f'{type(self).__name__} expects an input of {self.ndim + 2} dimensions '
                f'(or {self.ndim + 1}, without the batch), got shape {tuple(x.shape)}'
            )
        if x.shape[1] != self.in_channels:
            raise ValueError(
                f'{type(self).__name__} expects {self.in_channels} input channels, '
                f'got {x.shape[1]} (shape {tuple(x.shape)})'
            )
        # Refuses a wrong type before a norm sees the batch.
        return self.forward_batch(cast(x, convolution_dtype(x, self.weight)))

    def forward_batch(self, x: Tensor) -> Tensor:
        """The output for a batch, shape (B, C_in, *size), of the convolution's type; B may be 0."""
        raise NotImplementedError

    def squeeze(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x``, and its average over each image, shape (B, C_in), float32 or wider."""
        average = None if self.valid_sizes is None else self.valid_sizes.average(x)
        return squeeze(x) if average is None else (x, average)

    def convolve(
        self,
        x: Tensor,
        make_kernels: Callable[..., Tensor],
        sources: Sequence[Tensor],
        modulate: Callable[..., Tensor] | None = None,
        modulators: Sequence[Tensor] = (),
    ) -> Tensor:
        """:func:`~mmdet_odconv.functional.dynamic_conv` with the geometry and bias of the layer."""
        padding, modulated = self.padding, modulate
        if self.padding_mode != 'zeros':
            padding, modulated = (0,) * self.ndim, self._padded(modulate)
        return dynamic_conv(
            x,
            make_kernels,
            sources,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            modulated,
            modulators,
        )

    def _padded(self, modulate: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
        widths: list[int] = []  # in F.pad's order: last dimension first, before and after
        for i in reversed(range(self.ndim)):
            if isinstance(self.padding, str):
                same = self.padding == 'same'
                total = self.dilation[i] * (self.kernel_size[i] - 1) if same else 0
                widths += [total // 2, total - total // 2]
            else:
                widths += [self.padding[i]] * 2

        def pad(x: Tensor, *modulators: Tensor) -> Tensor:
            modulated = x if modulate is None else modulate(x, *modulators)
            return F.pad(modulated, widths, mode=self.padding_mode)

        return pad

    def __setattr__(self, name: str, value: Any) -> None:
        function = getattr(value, 'func', None)
        if name == 'forward' and getattr(function, '__name__', '').startswith('efficient_conv_bn'):
            raise RuntimeError(
                "mmcv's efficient_conv_bn_eval computes with the one weight of a convolution, but "
                f'an {type(self).__name__} has another kernel for each sample; turn that option '
                'of the ConvModule off'
            )
        own = self.__dict__.get('_parameters', {}).get('weight')
        if (
            name == 'weight'
            and own is not None
            and isinstance(value, Tensor)
            and value.dim() == own.dim()  # a shard has fewer
            and value.shape != own.shape
        ):
            raise RuntimeError(
                self._fused_as_plain(
                    f'has a weight of shape {tuple(own.shape)} and would get {tuple(value.shape)}'
                )
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

        def keeping_the_weight_contiguous(tensor: Tensor) -> Tensor:
            # `to(memory_format=...)` takes the weight for that of a plain convolution, or refuses
            # its dimensions. The same goes for its gradient.
            if tensor.shape == shape and type(tensor) in (Tensor, nn.Parameter):
                return fn(tensor.flatten()).view(shape)
            return fn(tensor)

        super()._apply(keeping_the_weight_contiguous, *args, **kwargs)
        # What `to_empty` gives holds anything, and static weights have nothing for the attention.
        if had_no_memory and not self.weight.is_meta:
            self.reset_parameters()
        return self

    def extra_repr(self) -> str:
        return ', '.join(
            [f'{self.in_channels}, {self.out_channels}']
            + [f'{name}={getattr(self, name)}' for name in _GEOMETRY]
            + [f'bias={self.bias is not None}', f'padding_mode={self.padding_mode}']
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        if self._is_static(state_dict, prefix):
            if self.weight.is_meta and local_metadata.get('assign_to_params_buffers'):
                # The file has nothing for the children, which must leave the meta device too.
                for child in self.children():
                    child.to_empty(device=state_dict[f'{prefix}weight'].device)
            # `state_dict` is the loader's own copy, and it goes on to the children: what is put
            # in here is neither missing nor left over there.
            self.reset_to_constant()
            for name, value in self.state_dict().items():
                if name not in ('weight', 'bias'):
                    state_dict[f'{prefix}{name}'] = value
            key = f'{prefix}weight'
            kernel = state_dict[key].detach()
            state_dict[key] = self.from_static(kernel, key).to(self.weight.dtype)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def reset_to_constant(self) -> None:
        """Let the children give constants, as at the start of :meth:`from_static`."""
        child: Any
        for child in self.children():
            # Where it can be, without numbers that are drawn, so that processes stay equal.
            getattr(child, 'reset_to_constant', child.reset_parameters)()

    def _is_static(self, state_dict: dict[str, Any], prefix: str) -> bool:
        """Whether the entries under ``prefix`` are those of the plain convolution."""
        weight = state_dict.get(f'{prefix}weight')
        if not isinstance(weight, Tensor) or weight.shape != self.kernel_shape:
            return False
        plain = {f'{prefix}weight', f'{prefix}bias'}
        return not any(n.startswith(prefix) and n not in plain for n in state_dict)


_GEOMETRY = ('kernel_size', 'stride', 'padding', 'dilation', 'groups')
