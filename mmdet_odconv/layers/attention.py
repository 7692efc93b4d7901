"""The attention branch of ODConv: a squeeze, and one head for each of the four attentions.

Paper: Omni-Dimensional Dynamic Convolution, section 3.2
(https://openreview.net/forum?id=DmpCfq6Mg39)
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..functional import (
    Attentions,
    JoinedHeads,
    attentions_from_logits,
    global_average_pool,
    linear_heads,
    sigmoid_attention,
)
from ..functional.precision import as_type, without_autocast


class ODConvAttention(nn.Module):
    """From a feature map to the channel, filter, spatial and kernel attention of each sample.

    h = ReLU(norm(W_fc · GAP(x))) with A = max(int(C_in · reduction), min_attention_channels)
    entries; each head is a 1×1 convolution with bias on h, followed by σ(·/T), or by
    softmax(·/T) for the kernel attention.

    The temperature travels with the weights: ``state_dict()`` keeps it in its metadata (where
    PyTorch keeps each module's version), not as an entry, and loading such a state dict sets it.
    One without it, as all published ones, leaves the temperature as it is.

    Args:
        in_channels (int): C_in of the convolution.
        out_channels (int): C_out of the convolution.
        kernel_size (Sequence[int]): Kernel size; its length is the number of spatial dimensions.
        groups (int): Groups of the convolution. Default: 1.
        kernel_num (int): K, kernels in the bank. Default: 4.
        reduction (float): Width of h relative to C_in. Default: 1/16.
        min_attention_channels (int): Least width of h. Default: 16.
        temperature (float): T, positive. Default: 1.0.
        norm_cfg (dict, optional): Norm of h: BN, SyncBN, LN or GN with their arguments, or None
            for no norm. Default: ``dict(type='BN')``.
        attention_init (str): 'zero' or 'published', see :meth:`reset_parameters`.
            Default: 'zero'.
        attention_bias (float): Bias of the sigmoid heads at the 'zero' init. Default: 2.2.
        device, dtype: As in ``torch.nn.Conv2d``.

    Raises:
        ValueError: An argument is out of its range; the message names it and its value.
    """

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
        self.temperature = temperature

        width = max(int(in_channels * reduction), min_attention_channels)
        positions = math.prod(kernel_size)
        depthwise = groups == in_channels == out_channels
        pointwise = partial(PointwiseParameters, ndim=len(kernel_size), device=device, dtype=dtype)

        self.fc = pointwise(in_channels, width, bias=False)
        self.bn = nn.Identity() if norm_cfg is None else build_norm_layer(norm_cfg, width)[1]
        self.bn.to(device=device, dtype=dtype)
        self.channel_fc = pointwise(width, in_channels)
        self.filter_fc = None if depthwise else pointwise(width, out_channels)
        self.spatial_fc = None if positions == 1 else pointwise(width, positions)
        self.kernel_fc = None if kernel_num == 1 else pointwise(width, kernel_num)
        heads = (self.channel_fc, self.filter_fc, self.spatial_fc, self.kernel_fc)
        self._sizes = [0 if head is None else len(head.weight) for head in heads]
        self._joined = JoinedHeads(*self._head_parameters())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the branch in one of two ways.

        - 'published': Kaiming normal (fan_out, ReLU) for ``fc`` and the heads, biases 0. Gradients
          are huge at T = 1, so train it as the paper does: annealed from T = 30
          (:class:`ODConvTemperatureHook`), or from the published weights.
        - 'zero': the heads' weights are zero, so that every attention starts as a constant,
          σ(attention_bias / T) or 1/K, and the layer starts as a scaled plain convolution.
        """
        self.fc.reset_parameters()
        if not isinstance(self.bn, nn.Identity):
            self.bn.reset_parameters()
        for head in self._heads():
            head.reset_parameters()
        if self.attention_init == 'zero':
            self.reset_to_constant()

    def reset_to_constant(self) -> float:
        """Make every attention a constant, whatever the input, as at the 'zero' init.

        ``fc`` is left as it is: nothing is drawn at random, so that the processes of a
        distributed run stay equal.

        Returns:
            float: The product of the channel, filter and spatial attention, each
            σ(attention_bias / T) where present; the kernel attention is 1/K.
        """
        if not isinstance(self.bn, nn.Identity):
            self.bn.reset_parameters()
        heads = self._sigmoid_heads()
        for head in heads:
            nn.init.zeros_(head.weight)
            nn.init.constant_(head.bias, self.attention_bias)
        if self.kernel_fc is not None:
            nn.init.zeros_(self.kernel_fc.weight)
            # The softmax takes no notice of a bias that its K logits share.
            nn.init.zeros_(self.kernel_fc.bias)
        bias = torch.tensor(self.attention_bias, dtype=torch.float64, device='cpu')
        return sigmoid_attention(bias, self.temperature).item() ** len(heads)

    @property
    def temperature(self) -> float:
        """T, which divides all logits."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        if not value > 0:
            raise ValueError(f'temperature must be positive, got {value}')
        self._temperature = float(value)

    def forward(self, x: Tensor) -> Attentions:
        """The attentions of each sample, float32 or wider.

        Args:
            x (Tensor): Feature maps, shape (B, C_in, *size), or their averages, (B, C_in).
        """
        with without_autocast(x.device.type):
            fc = self.fc
            weight = fc.weight.flatten(1)
            pooled = as_type(global_average_pool(x) if x.dim() > 2 else x, weight.dtype)
            h = torch.relu(self._normalise(F.linear(pooled, weight, fc.bias)))
            logits = linear_heads(h, *self._head_parameters(), self._joined)
            return attentions_from_logits(logits, self._sizes, self.temperature)

    def _apply(self, *args: Any, **kwargs: Any) -> 'ODConvAttention':
        # ``to()`` and its kin give each parameter new memory.
        super()._apply(*args, **kwargs)
        parameters = self._head_parameters()
        if not self._joined.hold(*parameters):
            self._joined = JoinedHeads(*parameters)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy has memory of its own.
        super().__setstate__(state)
        self._joined = JoinedHeads(*self._head_parameters())

    def _head_parameters(self) -> tuple[list[Any], list[Any]]:
        """The weights and the biases of the heads that there are."""
        heads = self._heads()
        return [head.weight for head in heads], [head.bias for head in heads]

    def _heads(self) -> list['PointwiseParameters']:
        heads = (self.channel_fc, self.filter_fc, self.spatial_fc, self.kernel_fc)
        return [head for head in heads if head is not None]

    def _sigmoid_heads(self) -> list['PointwiseParameters']:
        return [head for head in self._heads() if head is not self.kernel_fc]

    def _normalise(self, h: Tensor) -> Tensor:
        """``self.bn`` on h, shape (B, A), also where a BatchNorm has too few values."""
        norm = self.bn
        if not isinstance(norm, _BatchNorm):
            return norm(h)
        mean, var = norm.running_mean, norm.running_var
        # One value has no variance: such a step uses the running statistics, untouched.
        running = not norm.training or (h.shape[0] < 2 and not _synchronised(norm))
        if running and mean is not None:
            return F.batch_norm(h, mean, var, norm.weight, norm.bias, eps=norm.eps)
        return norm(h[..., None, None]).flatten(1)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, '_metadata', None)
        if metadata is not None:
            # FSDP takes the names of its wrappers off the entries, not off the metadata.
            for name in {prefix[:-1], prefix[:-1].replace('_fsdp_wrapped_module.', '')}:
                metadata.setdefault(name, {})['temperature'] = self.temperature

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if 'temperature' in local_metadata:
            self.temperature = local_metadata['temperature']


class PointwiseParameters(nn.Module):
    """The parameters of a 1×1 convolution on pooled features, which is a matrix product.

    Its weight has the shape of a convolution's, (out_channels, in_channels, 1, ...), as in the
    published state dicts. It is no ``nn.Conv2d``: a model's ``init_cfg`` for all Conv2d layers
    must not undo ODConv's own initialisation.

    Args:
        in_channels (int): Input channels.
        out_channels (int): Output channels.
        bias (bool): Whether there is a bias. Default: True.
        ndim (int): Number of trailing dimensions of size 1 in the weight. Default: 2.
        device, dtype: As in ``torch.nn.Conv2d``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bias: bool = True,
        ndim: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = (out_channels, in_channels, *(1,) * ndim)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter('bias', None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming normal (fan_out, ReLU) for the weight, 0 for the bias."""
        nn.init.kaiming_normal_(self.weight, mode='fan_out', nonlinearity='relu')
        if self.bias is not None:
            nn.init.zeros_(self.bias)

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
        layer.temperature = temperature
    return len(layers)


def _synchronised(norm: _BatchNorm) -> bool:
    """Whether ``norm`` takes its statistics over several processes."""
    return (
        isinstance(norm, nn.SyncBatchNorm)
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size(norm.process_group) > 1
    )
