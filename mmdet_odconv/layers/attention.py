"""The attention branch of ODConv: a squeeze, and one head for each of the four attentions.

Paper: Omni-Dimensional Dynamic Convolution, section 3.2
(https://openreview.net/forum?id=DmpCfq6Mg39)
"""

import math
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..compat import is_compiling, without_autocast
from ..functional import Attentions, at_least_float32, sigmoid_attention, softmax_attention
from ..functional.attention import cast


class ODConvAttention(nn.Module):
    """From a feature map to the channel, filter, spatial and kernel attention of each sample.

    h = ReLU(norm(W_fc · GAP(x))) with A = max(int(C_in · reduction), min_attention_channels)
    entries. Each head is a 1×1 convolution with bias on h, followed by σ(·/T), or by softmax(·/T)
    for the kernel attention.

    The temperature T is a buffer, so it is saved with the weights and follows them through every
    wrapper. A state dict without it, as all published ones, leaves the temperature as it is.

    Args:
        in_channels (int): C_in of the convolution.
        out_channels (int): C_out of the convolution.
        kernel_size (Sequence[int]): Kernel size; its length is the number of spatial dimensions.
        groups (int): Groups of the convolution. Default: 1.
        kernel_num (int): K, the number of kernels in the bank. Default: 4.
        reduction (float): Width of h relative to C_in. Default: 1/16.
        min_attention_channels (int): The least width of h. Default: 16.
        temperature (float): T, positive. Default: 1.0.
        norm_cfg (dict, optional): Norm of h: BN, SyncBN, LN or GN with their arguments, or None
            for no norm. Default: ``dict(type='BN')``.
        attention_init (str): 'zero' or 'published', see :meth:`reset_parameters`.
            Default: 'zero'.
        attention_bias (float): Bias of the sigmoid heads at the 'zero' start. Default: 2.2.
        device, dtype: As in ``torch.nn.Conv2d``.

    Raises:
        ValueError: An argument is out of its range. The message names it and its value.
    """

    temperature: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        groups: int = 1,
        kernel_num: int = 4,
        reduction: float = 1 / 16,
        min_attention_channels: int = 16,
        temperature: float = 1.0,
        norm_cfg: dict[str, Any] | None = dict(type='BN'),  # noqa: B006  mmdet's idiom
        attention_init: str = 'zero',
        attention_bias: float = 2.2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kernel_num < 1:
            raise ValueError(f'kernel_num must be at least 1, got {kernel_num}')
        if reduction <= 0:
            raise ValueError(f'reduction must be positive, got {reduction}')
        if min_attention_channels < 1:
            raise ValueError(
                f'min_attention_channels must be at least 1, got {min_attention_channels}'
            )
        if attention_init not in ('zero', 'published'):
            raise ValueError(
                f"attention_init must be 'zero' or 'published', got {attention_init!r}"
            )
        self.attention_init = attention_init
        self.attention_bias = attention_bias
        self.initial_temperature = _positive(temperature)

        width = max(int(in_channels * reduction), min_attention_channels)
        positions = math.prod(kernel_size)
        depthwise = groups == in_channels == out_channels
        pointwise = partial(PointwiseConv, ndim=len(kernel_size), device=device, dtype=dtype)
        zero = attention_init == 'zero'
        sigmoid_head = partial(pointwise, width, constant=attention_bias if zero else None)
        # The softmax takes no notice of a constant that its K logits share.
        softmax_head = partial(pointwise, width, constant=0.0 if zero else None)

        self.fc = pointwise(in_channels, width, bias=False)
        self.bn = nn.Identity() if norm_cfg is None else build_norm_layer(norm_cfg, width)[1]
        self.bn.to(device=device, dtype=dtype)
        self.channel_fc = sigmoid_head(in_channels)
        self.filter_fc = None if depthwise else sigmoid_head(out_channels)
        self.spatial_fc = None if positions == 1 else sigmoid_head(positions)
        self.kernel_fc = None if kernel_num == 1 else softmax_head(kernel_num)
        self.register_buffer('temperature', torch.empty((), device=device, dtype=torch.float32))
        self.temperature.fill_(self.initial_temperature)

    def reset_parameters(self) -> None:
        """Initialise the branch as the constructor does.

        - ``attention_init='zero'``: the heads' weights are zero, so that every attention starts
          as a constant, σ(attention_bias / T) or 1/K, and the layer starts as a scaled plain
          convolution.
        - ``attention_init='published'``: Kaiming normal (fan_out, ReLU) for the heads, biases 0.
          The gradients are huge at T = 1, so train it as the paper does, annealed from T = 30
          (:class:`ODConvTemperatureHook`), or from the published weights.
        """
        modules: list[Any] = [self.fc, self.bn, *self._heads()]
        for module in modules:
            if hasattr(module, 'reset_parameters'):
                module.reset_parameters()
        self.temperature.fill_(self.initial_temperature)

    def reset_to_constant(self) -> float:
        """Make every attention a constant, whatever the input, as at the 'zero' start.

        ``fc`` is left as it is: nothing is drawn at random, so that the processes of a
        distributed run stay equal.

        Returns:
            float: The product of the channel, filter and spatial attention, each
            σ(attention_bias / T) where present; the kernel attention is 1/K.
        """
        norm: Any = self.bn
        if hasattr(norm, 'reset_parameters'):
            norm.reset_parameters()
        product = 1.0
        t = self.temperature
        temperature = self.initial_temperature if t.is_meta else t.item()
        for head in self._heads():
            if head is self.kernel_fc:
                head.reset_to_constant(0.0)
            else:
                head.reset_to_constant(self.attention_bias)
                product /= 1 + math.exp(-self.attention_bias / temperature)
        return product

    def set_temperature(self, temperature: float) -> None:
        """Set T, which divides all logits.

        Raises:
            ValueError: The temperature is not positive.
        """
        self.temperature.fill_(_positive(temperature))

    def forward(self, x: Tensor) -> Attentions:
        """The attentions of each sample, float32 or wider.

        Args:
            x (Tensor): Feature maps, shape (B, C_in, *size).
        """
        dtype = self.fc.weight.dtype
        pooled = x.mean(tuple(range(2, x.dim())), dtype=at_least_float32(dtype))
        t = self.temperature
        # The branch is cheap, and the sigmoids' arguments lose too much in half precision.
        with without_autocast(x.device.type):
            h = torch.relu(self._normalise(self.fc(cast(pooled, dtype))))
            return Attentions(
                sigmoid_attention(self.channel_fc(h), t),
                None if self.filter_fc is None else sigmoid_attention(self.filter_fc(h), t),
                None if self.spatial_fc is None else sigmoid_attention(self.spatial_fc(h), t),
                None if self.kernel_fc is None else softmax_attention(self.kernel_fc(h), t),
            )

    def _heads(self) -> list['PointwiseConv']:
        heads = (self.channel_fc, self.filter_fc, self.spatial_fc, self.kernel_fc)
        return [head for head in heads if head is not None]

    def _normalise(self, h: Tensor) -> Tensor:
        """``self.bn`` on h, shape (B, A), also where a BatchNorm has too few values."""
        norm = self.bn
        if isinstance(norm, nn.Identity | nn.LayerNorm):
            return norm(h)
        if isinstance(norm, _BatchNorm) and norm.training and h.shape[0] < 2:
            # One value has no variance: such a step uses the running statistics, untouched.
            mean, var = norm.running_mean, norm.running_var
            if mean is not None and not _is_synchronised(norm):
                if h.shape[0] == 1 and not is_compiling():
                    warnings.warn(_SINGLE_SAMPLE, stacklevel=2)
                return F.batch_norm(h, mean, var, norm.weight, norm.bias, eps=norm.eps)
        return norm(h.view(*h.shape, 1, 1)).flatten(1)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # Published and plain weights have no temperature, and need none.
        state_dict.setdefault(f'{prefix}temperature', self.temperature)
        super()._load_from_state_dict(state_dict, prefix, *args)


class PointwiseConv(nn.Module):
    """A 1×1 convolution on pooled features, which is a matrix product.

    Its weight has the shape of a convolution's, (out_channels, in_channels, 1, ...), as in the
    published state dicts. It is not an ``nn.Conv2d``, because a model's ``init_cfg`` for all
    Conv2d layers must not undo ODConv's own initialisation.

    Args:
        in_channels (int): Input channels.
        out_channels (int): Output channels.
        bias (bool): Whether there is a bias. Default: True.
        constant (float, optional): If given, the layer starts with a weight of 0 and this bias;
            else with Kaiming normal (fan_out, ReLU) and a bias of 0. Default: None.
        ndim (int): Number of trailing dimensions of size 1 in the weight. Default: 2.
        device, dtype: As in ``torch.nn.Conv2d``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bias: bool = True,
        constant: float | None = None,
        ndim: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.constant = constant
        shape = (out_channels, in_channels, *(1,) * ndim)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter('bias', None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the layer as the constructor does."""
        if self.constant is not None:
            self.reset_to_constant(self.constant)
            return
        nn.init.kaiming_normal_(self.weight, mode='fan_out', nonlinearity='relu')
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def reset_to_constant(self, value: float) -> None:
        """Let the outputs be ``value``, whatever the input."""
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, value)

    def forward(self, x: Tensor) -> Tensor:
        """From pooled features (B, in_channels) to (B, out_channels)."""
        return F.linear(x, self.weight.flatten(1), self.bias)

    def extra_repr(self) -> str:
        out_channels, in_channels = self.weight.shape[:2]
        return f'{in_channels}, {out_channels}, bias={self.bias is not None}'


def set_temperature(model: nn.Module, temperature: float) -> int:
    """Set the temperature of every ODConv layer in ``model``.

    Args:
        model (nn.Module): Any module; wrapped ones (DDP) too.
        temperature (float): T, positive.

    Returns:
        int: The number of layers that were set.

    Raises:
        ValueError: The temperature is not positive.
    """
    layers = [m for m in model.modules() if isinstance(m, ODConvAttention)]
    for layer in layers:
        layer.set_temperature(temperature)
    return len(layers)


_SINGLE_SAMPLE = (
    "The BatchNorm in an ODConv layer's attention was given a single sample in training. One value "
    'has no variance, so this step uses the running statistics and does not update them. If all '
    "batches are like this, use norm_cfg=dict(type='LN') for the ODConv layers, and note that "
    'update_bn and precise BatchNorm need batches of at least two samples.'
)


def _positive(temperature: float) -> float:
    if not temperature > 0:
        raise ValueError(f'temperature must be positive, got {temperature}')
    return float(temperature)


def _is_synchronised(norm: _BatchNorm) -> bool:
    """Whether ``norm`` takes its statistics over several processes."""
    return (
        isinstance(norm, nn.SyncBatchNorm)
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size(norm.process_group) > 1
    )
