"""What every dynamic convolution shares: a convolution whose kernel is made for each sample."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .._checks import ArgumentError, check_integer, check_sizes
from ..functional import Attentions, at_least_float32, dynamic_conv, squeeze
from ..functional.attention import cast
from ..functional.dynamic_conv import FactoredKernels
from ..functional.implementation import resolve_geometry
from ..functional.operator import convolution_dtype, needs_plain_operations
from .valid_pooling import ValidSizes

# Of values and not of a layer, whose stride and padding may be changed.
resolved = lru_cache(maxsize=4096)(resolve_geometry)


class DynamicConvNd(nn.Module):
    """The base of all dynamic convolutions, with the arguments of ``nn.Conv1d/2d/3d``.

    docs/own_layer.md shows how to write one. Its constructor calls this one, makes the children
    that compute the attentions, and calls :meth:`create_parameters`. :meth:`forward_batch` computes
    the output. What else a subclass may have to define, with the default in brackets:

    - :meth:`from_static` (the weight is a static kernel, and the children start neutral)
    - :meth:`reset_weight` (from a random static kernel), :meth:`fold_norm` (it cannot)
    - :meth:`compensation` (1), :meth:`uncounted_madds` (0)
    - :meth:`kernel_bank` and :meth:`at_attentions` (None)

    Conversion, checkpoints, the folding of norms, learning rates, counts and analysis go by these
    methods.

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
    # Class attribute: older pickles lack it; see use_valid_pooling.
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

    def plain_convolution(self) -> nn.Module:
        """A plain convolution with the geometry, device and type of this layer, and new weights."""
        kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[self.ndim - 1]
        conv: nn.Module = kind(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            self.padding_mode,
            self.weight.device,
            self.weight.dtype,
        )
        return conv

    def create_parameters(
        self,
        weight_shape: Sequence[int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Register ``weight``, of this shape, and ``bias``, and initialise them."""
        self.weight = nn.Parameter(torch.empty(tuple(weight_shape), device=device, dtype=dtype))
        bias = torch.empty(self.out_channels, device=device, dtype=dtype) if self.has_bias else None
        self.register_parameter('bias', None if bias is None else nn.Parameter(bias))
        self._reset_own()

    def _reset_own(self) -> None:
        with torch.no_grad():
            self.reset_weight()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def reset_parameters(self) -> None:
        """Initialise the layer as the constructor does."""
        self._reset_own()
        self.reset_attention()

    def reset_weight(self) -> None:
        """Draw a static kernel (Kaiming normal, fan_out, ReLU), and start from it."""
        kernel = self.weight.new_empty(self.kernel_shape)
        nn.init.kaiming_normal_(kernel, mode='fan_out', nonlinearity='relu')
        if not kernel.is_meta:
            self.weight.copy_(self.from_static(kernel, ''))

    def reset_attention(self) -> None:
        """Initialise the children."""
        child: Any
        for child in self.children():
            child.reset_parameters()

    def reset_to_constant(self) -> None:
        """Let the attentions be constants, as :meth:`from_static` takes them to be."""
        child: Any
        for child in self.children():
            # Where it can be, without numbers that are drawn, so that processes stay equal.
            getattr(child, 'reset_to_constant', child.reset_parameters)()

    def init_weights(self) -> None:
        """The name under which mmcv and mmengine look for a layer's own initialisation."""
        self.reset_parameters()

    def from_static(self, kernel: Tensor, name: str) -> Tensor:
        """The ``weight`` with which the layer computes what ``kernel`` does.

        The attentions are those after :meth:`reset_to_constant`.

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

    def fold_into_bias(self, scale: Tensor, shift: Tensor) -> None:
        """What :meth:`fold_norm` does to the bias."""
        bias = shift if self.bias is None else self.bias.detach().double() * scale + shift
        self.has_bias = True
        self.bias = self.parameter_like_weight(bias)

    def parameter_like_weight(self, value: Tensor) -> nn.Parameter:
        """``value`` as a parameter that has the type of ``weight`` and is as frozen as it."""
        return nn.Parameter(value.to(self.weight.dtype), self.weight.requires_grad)

    def attention_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the children, which make the attentions, by their names."""
        return {name: p for name, p in self.named_parameters() if '.' in name}

    def attention_sizes(self) -> dict[str, int]:
        """How many values each attention has that a child ``attention`` gives as `Attentions`."""
        sizes = getattr(getattr(self, 'attention', None), 'sizes', ())
        return {name: n for name, n in zip(Attentions._fields, sizes, strict=False) if n}

    def compensation(self, sgd: bool) -> float:
        """The factor for the learning rate of ``weight`` after static weights were loaded.

        With it, a step changes the function as much as a step of the plain convolution does.

        Args:
            sgd (bool): Whether the optimizer is SGD. Others normalise their steps.
        """
        return 1.0

    def uncounted_madds(self) -> int:
        """Multiply-adds for the kernel of a sample that a trace does not count."""
        return 0

    def at_attentions(self, means: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None] | None:
        """The kernel and bias of the plain convolution that the layer is with fixed attentions.

        Args:
            means (Mapping[str, Tensor]): Each attention of :meth:`attention_sizes`, shape (n,).

        Returns:
            tuple | None: None if something else depends on the image, too.
        """
        return None

    def kernel_bank(self) -> Tensor | None:
        """Kernels that are mixed, shape (K, ...), or None if there are none to compare."""
        return None

    @property
    def temperature(self) -> float:
        """T of the attentions; see also :func:`set_temperature`."""
        attention: Any = getattr(self, 'attention', None)
        return attention.temperature.item() if hasattr(attention, 'temperature') else 1.0

    @temperature.setter
    def temperature(self, value: float) -> None:
        attention: Any = self.attention
        attention.set_temperature(value)

    def forward(self, x: Tensor) -> Tensor:
        """From (B, C_in, *size) or (C_in, *size) to the output of the plain convolution's shape."""
        if isinstance(x, fx.Proxy):
            # Like torch's own layers, this one is a leaf of a symbolic trace.
            return x.tracer.create_proxy('call_module', x.tracer.path_of_module(self), (x,), {})
        if x.dim() != self.ndim + 2 or x.shape[1] != self.in_channels:
            return self._forward_unbatched(x)
        return self.forward_batch(x)

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

    def forward_batch(self, x: Tensor) -> Tensor:
        """The output for a batch, shape (B, C_in, *size); B may be 0."""
        raise NotImplementedError

    def squeeze(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` in the type of the convolution, and its averages over the images, (B, C_in)."""
        x = cast(x, convolution_dtype(x, self.weight))
        pooled = None if self.valid_sizes is None else self.valid_sizes.average(x)
        return squeeze(x, needs_plain_operations(x, self.weight)) if pooled is None else (x, pooled)

    def convolve(
        self,
        x: Tensor,
        make_kernels: Callable[..., Tensor | FactoredKernels],
        sources: Sequence[Tensor],
        modulate: Callable[..., Tensor] | None = None,
        modulators: Sequence[Tensor] = (),
    ) -> Tensor:
        """:func:`~mmdet_odconv.functional.dynamic_conv` with the geometry and bias of the layer."""
        padding, modulated = self.padding, modulate
        if self.padding_mode != 'zeros':
            widths = resolve_geometry(
                self.kernel_size, self.stride, self.padding, self.dilation, self.groups, True
            )[1]

            def modulated(x: Tensor, *modulators: Tensor) -> Tensor:
                x = x if modulate is None else modulate(x, *modulators)
                return F.pad(x, widths, self.padding_mode) if widths else x

            padding = (0,) * self.ndim
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

    def __setattr__(self, name: str, value: Any) -> None:
        # With this, libraries end that fold a norm into a plain convolution's weight and bias.
        own = self.__dict__.get('_parameters', {}).get('weight')
        if (name == 'bias' and value is not None and not self.has_bias) or (
            name == 'weight'
            and own is not None
            and isinstance(value, Tensor)
            and value.dim() == own.dim()  # a shard has fewer
            and value.shape != own.shape
        ):
            raise RuntimeError(
                f'the {name} of this {type(self).__name__} would get another shape: fusing a norm '
                'into it as into a plain convolution changes what it computes; use '
                'mmdet_odconv.fuse_odconv_bn'
            )
        super().__setattr__(name, value)

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
            kernel = state_dict[key].detach().to(at_least_float32(self.weight.dtype))
            state_dict[key] = self.from_static(kernel, key).to(self.weight.dtype)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _is_static(self, state_dict: dict[str, Any], prefix: str) -> bool:
        """Whether the entries under ``prefix`` are those of the plain convolution."""
        weight = state_dict.get(f'{prefix}weight')
        if not isinstance(weight, Tensor) or weight.shape != self.kernel_shape:
            return False
        own = tuple(f'{prefix}{name}.' for name, _ in self.named_children())
        return not any(name.startswith(own) for name in state_dict)


_GEOMETRY = ('kernel_size', 'stride', 'padding', 'dilation', 'groups')
