"""The attention branch of ODConv: a squeeze, and one head for each of the four attentions.

Paper: Omni-Dimensional Dynamic Convolution, section 3.2
(https://openreview.net/forum?id=DmpCfq6Mg39)
"""

import copy
import math
import warnings
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from .._checks import ArgumentError, check_integer, check_number, check_positive
from ..compat import autocast_is_on, is_compiling
from ..functional import Attentions, activate
from ..functional.attention import cast
from ..functional.squeeze import average
from .calibrated_norm import CalibratedNorm

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_HEADS = tuple(f'{name}_fc' for name in Attentions._fields)
# Entries of all heads above which one product is no faster than four: they would be copied first.
_MOST_JOINED = 1 << 16


class ODAttention(nn.Module):
    """Computes the channel, filter, spatial and kernel attention of each sample of a feature map.

    h = ReLU(norm(W_fc · GAP(x))) with A = max(int(C_in · reduction), min_attention_channels)
    entries. Each head is a 1×1 convolution with bias on h, followed by σ(·/T), or by softmax(·/T)
    for the kernel attention.

    If you leave out some of the four attentions, you get the attention of other dynamic
    convolutions: CondConv and DyConv have only the kernel attention.

    The temperature T is a buffer, so it is saved with the weights and follows them through every
    wrapper. A state dict without it, like all published ones, does not change the temperature.

    Args:
        in_channels (int): C_in of the convolution.
        out_channels (int): C_out of the convolution.
        kernel_size (Sequence[int]): Kernel size; its length is the number of spatial dimensions.
        groups (int): Groups of the convolution. Default: 1.
        kernel_num (int): K, the number of kernels in the bank. Default: 4.
        reduction (float, optional): Width of h relative to C_in. With None there is no h, and the
            heads read the average GAP(x) itself. Default: 1/16.
        min_attention_channels (int): The least width of h. Default: 16.
        temperature (float): T, positive. Default: 1.0.
        norm_cfg (dict, optional): Norm of h: BN, SyncBN, CalibratedNorm, LN or GN with their
            arguments, or None for no norm. Default: ``dict(type='BN')``.
        attention_init (str): 'zero' or 'published', see :meth:`reset_parameters`.
            Default: 'zero'.
        attention_bias (float): Bias of the channel, filter and spatial head at the 'zero' start.
            Default: 2.2.
        attentions (Sequence[str]): Which attentions there are; the others are 1 everywhere. A bank
            of several kernels needs 'kernel'. Default: all, in the order of :class:`Attentions`.
        kernel_activation (str): 'softmax', or 'sigmoid' for a kernel attention that need not sum
            to 1. Default: 'softmax'.
        device, dtype: As in ``torch.nn.Conv2d``.

    Raises:
        ValueError: An argument is out of its range. The message names it and its value.
    """

    temperature: Tensor
    # Whether there is a temperature, which is set for a whole model; else it is 1.
    is_annealed = True
    channel_fc: 'Pointwise | None'
    filter_fc: 'Pointwise | None'
    spatial_fc: 'Pointwise | None'
    kernel_fc: 'Pointwise | None'

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        groups: int = 1,
        kernel_num: int = 4,
        reduction: float | None = 1 / 16,
        min_attention_channels: int = 16,
        temperature: float = 1.0,
        norm_cfg: dict[str, Any] | None = dict(type='BN'),  # noqa: B006  mmdet's idiom
        attention_init: str = 'zero',
        attention_bias: float = 2.2,
        attentions: Sequence[str] = Attentions._fields,
        kernel_activation: str = 'softmax',
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_integer('kernel_num', kernel_num, least=1)
        check_integer('min_attention_channels', min_attention_channels, least=1)
        if reduction is not None:
            check_positive('reduction', reduction)
        if attention_init not in ('zero', 'published'):
            raise ArgumentError(
                f"attention_init must be 'zero' or 'published', got {attention_init!r}"
            )
        if kernel_activation not in ('softmax', 'sigmoid'):
            raise ArgumentError(
                f"kernel_activation must be 'softmax' or 'sigmoid', got {kernel_activation!r}"
            )
        _check_attentions(attentions, kernel_num)
        self.kernel_activation = kernel_activation
        self.attention_init = attention_init
        self.attention_bias = check_number('attention_bias', attention_bias)
        self.initial_temperature = check_positive('temperature', temperature)

        positions = math.prod(kernel_size)
        # Depthwise, c already scales each filter.
        depthwise = groups == in_channels == out_channels
        sizes = {'channel': in_channels}
        if not depthwise:
            sizes['filter'] = out_channels
        if positions > 1:
            sizes['spatial'] = positions
        if kernel_num > 1:
            sizes['kernel'] = kernel_num
        sizes = {name: size for name, size in sizes.items() if name in attentions}
        self.sizes = tuple(sizes.get(name, 0) for name in Attentions._fields)

        width = in_channels
        if reduction is not None:
            width = max(int(in_channels * reduction), min_attention_channels)
        pointwise = partial(Pointwise, ndim=len(kernel_size), device=device, dtype=dtype)
        zero = attention_init == 'zero'
        sigmoid_head = partial(pointwise, width, constant=attention_bias if zero else None)
        # The softmax takes no notice of a constant that its K logits share.
        softmax_head = partial(pointwise, width, constant=0.0 if zero else None)

        squeeze = reduction is not None and bool(sizes)
        self.fc = pointwise(in_channels, width, bias=False) if squeeze else None
        self.bn = nn.Identity()
        if squeeze and norm_cfg is not None:
            # Not `.to`, which cannot move a layer under FakeTensorMode.
            place = {k: v for k, v in dict(device=device, dtype=dtype).items() if v is not None}
            self.bn = build_norm_layer({**norm_cfg, **place}, width)[1]
        for name in Attentions._fields:
            head = softmax_head if name == 'kernel' else sigmoid_head
            self.add_module(f'{name}_fc', head(sizes[name]) if name in sizes else None)
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
            if module is not None and hasattr(module, 'reset_parameters'):
                module.reset_parameters()
        self.temperature.fill_(self.initial_temperature)

    def reset_to_constant(self) -> float:
        """Make every attention a constant, whatever the input, as at the 'zero' start.

        ``fc`` is left as it is: nothing is drawn at random, so that the processes of a
        distributed run stay equal.

        Returns:
            float: The product of the channel, filter and spatial attention, each
            σ(attention_bias / T) where present, and of the sum of the kernel attention, which is 1
            for a softmax and K/2 for sigmoids.
        """
        t = self.temperature
        norm: Any = self.bn
        if not t.is_meta and not t.item() > 0:  # left over by `to_empty`
            self.reset_parameters()
        if hasattr(norm, 'reset_parameters'):
            norm.reset_parameters()
        for head in self._heads():
            head.reset_to_constant(0.0 if head is self.kernel_fc else self.attention_bias)
        return self.constant_product()

    def constant_product(self) -> float:
        """What :meth:`reset_to_constant` returns, without a change of anything."""
        t = self.temperature
        temperature = self.initial_temperature if t.is_meta else t.item()
        product = 1.0
        for head in self._heads():
            if head is self.kernel_fc:
                # A softmax sums to 1, and each of K sigmoids of a 0 is 1/2.
                product *= 1.0 if self.kernel_activation == 'softmax' else self.sizes[3] / 2
            else:
                product /= 1 + math.exp(-self.attention_bias / temperature)
        return product

    def set_temperature(self, temperature: float) -> None:
        """Set T, which divides all logits.

        Raises:
            ValueError: The temperature is not positive, or not 1 where there is none.
        """
        if not self.is_annealed and temperature != 1:
            raise ArgumentError(
                f'this attention has no temperature, so T must be 1, got {temperature}'
            )
        self.temperature.fill_(check_positive('temperature', temperature))

    def forward(self, x: Tensor) -> Attentions:
        """The attentions of each sample, float32 or wider.

        Args:
            x (Tensor): Feature maps, shape (B, C_in, *size), or their averages, shape (B, C_in).
        """
        if not any(self.sizes):
            return Attentions()
        pooled = x if x.dim() == 2 else average(x)
        # The branch is cheap, and the sigmoids' arguments lose too much in half precision.
        if not x.is_meta and autocast_is_on(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                logits = self._logits(pooled)
        else:
            logits = self._logits(pooled)
        temperature = self.temperature if self.is_annealed else None
        return activate(logits, self.sizes, temperature, self.kernel_activation)

    def _activate(self, h: Tensor) -> Tensor:
        return torch.relu(h)

    def _heads(self) -> list[Any]:
        modules = self._modules
        return [modules[name] for name in _HEADS if modules[name] is not None]

    def _logits(self, pooled: Tensor) -> Tensor:
        """The logits of all heads side by side, from averages (B, C_in)."""
        heads, fc = self._heads(), self.fc
        joined = _parameters_to_join(heads)
        weight = heads[0].weight if joined is None else joined[0][0]
        h = cast(pooled, weight.dtype)
        if fc is not None:
            h = self._activate(self._normalise(fc(h)))
        if joined is None:
            return torch.cat([head(h) for head in heads], 1)
        weights, biases = joined
        if len(heads) == 1:
            return F.linear(h, weights[0].flatten(1), biases[0])
        return F.linear(h, torch.cat(weights).flatten(1), torch.cat(biases))

    def _normalise(self, h: Tensor) -> Tensor:
        """``self.bn`` on h, shape (B, A), also where a BatchNorm has too few values."""
        norm: Any = self._modules['bn']
        if type(norm) is nn.Identity and is_bare(norm):
            return h
        if isinstance(norm, nn.Identity | nn.LayerNorm):
            return norm(h)
        if isinstance(norm, _BatchNorm):
            few = norm.training and h.shape[0] < 4 and not _is_synchronised(norm)
            if few and h.shape[0] > 1 and not is_compiling():
                warnings.warn(_FEW_SAMPLES, stacklevel=2)
            constant = not norm.training and type(norm) in _BATCH_NORMS and is_bare(norm)
            mean, var = norm._buffers['running_mean'], norm._buffers['running_var']
            if mean is not None and (constant or (few and h.shape[0] < 2)):
                # One value has no variance: such a step uses the statistics, untouched.
                if not constant and h.shape[0] == 1 and not is_compiling():
                    warnings.warn(_SINGLE_SAMPLE, stacklevel=2)
                weight, bias = norm._parameters['weight'], norm._parameters['bias']
                return F.batch_norm(h, mean, var, weight, bias, eps=norm.eps)
        return norm(h.view(*h.shape, 1, 1)).flatten(1)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        had_no_memory = self.temperature.is_meta
        super()._apply(fn, *args, **kwargs)
        # What `to_empty` gives holds anything, and static weights have nothing for the attention.
        if had_no_memory and not self.temperature.is_meta:
            self.reset_parameters()
        return self

    def norm_can_be_folded(self) -> bool:
        """Whether the norm of h is a constant that ``fc`` can take, and nothing else reads them."""
        parts: tuple[Any, ...] = (self.fc, self.bn)
        return (
            type(self.fc) is Pointwise
            and type(self.bn) is not nn.Identity
            and all(is_bare(part) for part in parts)
            and constant_affine(self.bn) is not None
        )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # Published and plain weights have no temperature, and need none.
        t = self.temperature
        if t.is_meta:  # with assign=True, it must leave the meta device like the rest
            t = torch.tensor(self.initial_temperature, dtype=torch.float32, device='cpu')
        state_dict.setdefault(f'{prefix}temperature', t)
        super()._load_from_state_dict(state_dict, prefix, *args)


class PreparedAttention(nn.Module):
    """What an :class:`ODAttention` in evaluation mode computes, in the fewest operations.

    The norm, unless it is a LayerNorm, and the temperature are in the weights, and one product
    takes the place of the heads. :func:`~mmdet_odconv.prepare_for_inference` puts it into a model.

    Args:
        attention (ODAttention): One for which :meth:`can_replace` holds. It is not changed.
    """

    head_weight: nn.Parameter
    head_bias: nn.Parameter

    def __init__(self, attention: ODAttention) -> None:
        super().__init__()
        self.sizes, self.kernel_activation = attention.sizes, attention.kernel_activation
        heads, t = attention._heads(), attention.temperature.double()
        weight = torch.cat([head.weight for head in heads]).flatten(1).double() / t
        bias = torch.cat([head.bias for head in heads]).double() / t
        fc: Any = attention.fc
        values: dict[str, Any] = dict(
            head_weight=weight, head_bias=bias, fc_weight=None, fc_bias=None
        )
        affine = constant_affine(attention.bn)
        self.register_module('norm', None)
        if fc is not None and affine is not None:
            scale, shift = affine
            values['fc_weight'] = fc.weight.flatten(1).double() * scale[:, None]
            values['fc_bias'] = shift.expand(fc.weight.shape[0])
        elif fc is not None:
            values['fc_weight'], self.norm = fc.weight.flatten(1).double(), attention.bn
        like = heads[0].weight
        for name, value in values.items():
            if value is not None:
                # As a product takes them: from the inputs (rows) to the outputs.
                value = nn.Parameter(value.detach().t().to(like.dtype).contiguous())
                value.requires_grad_(like.requires_grad)
            self.register_parameter(name, value)

    @staticmethod
    def can_replace(attention: ODAttention) -> bool:
        """Whether nothing else reads the parts of ``attention``, and it has the same form for all
        inputs: its norm is a constant or a LayerNorm."""
        parts = [*attention._heads(), *([] if attention.fc is None else [attention.fc])]
        return (
            type(attention) is ODAttention
            and not attention.training
            and bool(parts)
            and all(type(part) is Pointwise and is_bare(part) for part in parts)
            and is_bare(attention)
            and is_bare(attention.bn)
            and (
                attention.fc is None
                or type(attention.bn) is nn.LayerNorm
                or constant_affine(attention.bn) is not None
            )
        )

    def rearranged(self, places: Sequence[Tensor]) -> 'PreparedAttention':
        """A copy whose attentions have other entries.

        Args:
            places (Sequence[Tensor]): For the channel, filter, spatial and kernel attention, which
                logits of this one its entries are.
        """
        other = copy.deepcopy(self)
        other.sizes = tuple(len(part) for part in places)
        for name in ('head_weight', 'head_bias'):
            values = getattr(self, name)
            rearranged = nn.Parameter(values.detach()[..., torch.cat(list(places))])
            setattr(other, name, rearranged.requires_grad_(values.requires_grad))
        return other

    @property
    def temperature(self) -> Tensor:
        """T, which is in the weights: 1."""
        return torch.ones((), device=self.head_weight.device)

    def set_temperature(self, temperature: float) -> None:
        """Refused.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError('a layer that was prepared for inference has its temperature inside')

    def forward(self, x: Tensor) -> Attentions:
        """As in :class:`ODAttention`."""
        parameters, h = self._parameters, x if x.dim() == 2 else average(x)
        weight: Any = parameters['head_weight']
        if h.dtype != weight.dtype:
            h = h.to(weight.dtype)
        if not x.is_meta and autocast_is_on(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                logits = self.logits(h)
        else:
            logits = self.logits(h)
        return activate(logits, self.sizes, None, self.kernel_activation)

    def logits(self, pooled: Tensor) -> Tensor:
        """The logits of all heads side by side, from averages (B, C_in) in the weights' type."""
        parameters, h, norm = self._parameters, pooled, self._modules['norm']
        head_bias: Any = parameters['head_bias']
        head_weight: Any = parameters['head_weight']
        fc_bias, fc_weight = parameters['fc_bias'], parameters['fc_weight']
        if norm is not None and fc_weight is not None:
            h = norm(h @ fc_weight).relu()
        elif fc_bias is not None and fc_weight is not None:
            h = torch.addmm(fc_bias, h, fc_weight).relu()
        return torch.addmm(head_bias, h, head_weight)


def constant_affine(norm: Any) -> tuple[Tensor, Tensor] | None:
    """The scale and the shift of each channel, in float64, that a norm in evaluation mode is.

    None for one that is no constant: in training mode, without running statistics, or of another
    kind than a BatchNorm, a :class:`CalibratedNorm` and no norm at all.
    """
    if type(norm) is nn.Identity:
        return torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    statistics = isinstance(norm, _BatchNorm) and (
        type(norm).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
        and norm.running_mean is not None
    )
    if norm.training or not (statistics or type(norm) is CalibratedNorm):
        return None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale, shift


class Pointwise(nn.Module):
    """A 1×1 convolution on pooled features, which is a matrix product.

    Its weight has the shape of a convolution's, (out_channels, in_channels, 1, ...), as in the
    published state dicts. It is not an ``nn.Conv2d``, and has neither "Conv" nor "Linear" in its
    name, because initialisers that go by types or names must not undo ODConv's own initialisation.

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
    """Set the temperature of every layer in ``model`` that has one; a CondConv2d has none.

    Args:
        model (nn.Module): Any module; wrapped ones (DDP) too.
        temperature (float): T, positive.

    Returns:
        int: The number of layers that were set.

    Raises:
        ValueError: The temperature is not positive.
    """
    layers = [m for m in model.modules() if isinstance(m, ODAttention) and m.is_annealed]
    for layer in layers:
        layer.set_temperature(temperature)
    return len(layers)


_FEW_SAMPLES = (
    "The BatchNorm in an ODConv layer's attention normalises over two or three samples in "
    'training. What it gives then hardly depends on the images: two values always become +1 and '
    "-1. Use norm_cfg=dict(type='LN') or dict(type='CalibratedNorm') for the ODConv layers, or "
    'SyncBN with several processes.'
)
_SINGLE_SAMPLE = (
    "The BatchNorm in an ODConv layer's attention was given a single sample in training. One value "
    'has no variance, so this step uses the running statistics and does not update them. If all '
    "batches are like this, use norm_cfg=dict(type='LN') or dict(type='CalibratedNorm') for "
    'the ODConv layers, and note that update_bn and precise BatchNorm need batches of at least two '
    'samples.'
)


def _check_attentions(attentions: Sequence[str], kernel_num: int) -> None:
    known = Attentions._fields
    listed = isinstance(attentions, Collection) and not isinstance(attentions, str)
    if not listed or not set(attentions) <= set(known):
        raise ArgumentError(f'attentions must be some of {known}, got {attentions!r}')
    if kernel_num > 1 and 'kernel' not in attentions:
        raise ArgumentError(
            f"a bank of several kernels needs the 'kernel' attention, got kernel_num={kernel_num} "
            f'and attentions={attentions!r}'
        )


def is_bare(module: nn.Module) -> bool:
    """Whether a call of ``module`` is nothing but the ``forward`` of its class."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or 'forward' in module.__dict__
    )


def _parameters_to_join(heads: list[Any]) -> tuple[list[Tensor], list[Tensor]] | None:
    """The weights and biases for one product in place of the heads' calls.

    None where a call may do more than the product (hooks, pruning, parametrizations, wrappers), or
    where the copy that puts the weights together takes as long as the calls.
    """
    weights: list[Any] = []
    biases: list[Any] = []
    entries = 0
    for head in heads:
        if type(head) is not Pointwise or not is_bare(head):
            return None
        weights.append(head._parameters['weight'])
        biases.append(head._parameters['bias'])
        entries += weights[-1].numel()
    joined = entries <= _MOST_JOINED and not _has_any_global_hook()
    return (weights, biases) if joined else None


def _is_synchronised(norm: _BatchNorm) -> bool:
    """Whether ``norm`` takes its statistics over several processes."""
    return (
        isinstance(norm, nn.SyncBatchNorm)
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size(norm.process_group) > 1
    )
