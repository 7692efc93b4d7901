"""Folds the BatchNorms of a model in evaluation mode into what comes before them."""

from typing import Any

from mmcv.cnn.bricks import wrappers
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..conversion.site import DYNAMIC_TYPES
from ..layers import ODConvAttention
from .execution import directly_following

_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, wrappers.Conv2d, wrappers.Conv3d)


def fuse_odconv_bn(model: nn.Module) -> nn.Module:
    """Fold BatchNorms into the convolutions before them, ODConv and plain, for inference.

    A norm that follows an ODConv goes into its bank and a static bias, one that follows a plain
    convolution into its weight and bias, and the attentions' own norms into their ``fc``. In the
    place of each is then an ``nn.Identity``. The outputs stay the same up to rounding.

    Left alone are norms in training mode, norms without running statistics, and whatever may
    have another reader: convolutions and norms that stand at several places or have hooks, and
    those whose order of execution cannot be followed.

    Args:
        model (nn.Module): Any module, in evaluation mode.

    Returns:
        nn.Module: ``model`` itself, changed in place; its state dict now has other entries.
    """
    pairs = list(directly_following(model, (*DYNAMIC_TYPES, *_PLAIN), _BatchNorm))
    for parent, conv_name, norm_name in pairs:
        conv: Any = parent.get_submodule(conv_name)
        norm = parent.get_submodule(norm_name)
        if type(conv) in (*DYNAMIC_TYPES, *_PLAIN) and _is_constant(norm, conv.out_channels):
            _fold(norm, conv, dim=1 if isinstance(conv, DYNAMIC_TYPES) else 0)
            if isinstance(conv, DYNAMIC_TYPES):
                conv.has_bias = True
            _replace(parent, norm_name)
    for module in model.modules():
        if (
            isinstance(module, ODConvAttention)
            and module.fc is not None
            and _is_constant(module.bn, module.fc.weight.shape[0])
        ):
            _fold(module.bn, module.fc, 0)
            module.bn = nn.Identity()
    return model


def _is_constant(norm: Any, channels: int) -> bool:
    """Whether ``norm`` is a BatchNorm of so many channels that only scales and shifts them."""
    return (
        isinstance(norm, _BatchNorm)
        and type(norm).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
        and not norm.training
        and norm.running_mean is not None
        and norm.num_features == channels
    )


def _fold(norm: Any, layer: Any, dim: int) -> None:
    """Put ``norm`` into the weight, whose outputs lie in dimension ``dim``, and the bias."""
    scale, shift = _scale_and_shift(norm)
    weight = layer.weight
    shape = [-1 if i == dim else 1 for i in range(weight.dim())]
    bias = shift if layer.bias is None else layer.bias.detach().double() * scale + shift
    layer.weight = _parameter(weight.detach().double() * scale.reshape(shape), weight)
    layer.bias = _parameter(bias, weight)


def _scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """What a BatchNorm in evaluation mode does to each channel, in float64."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale, shift


def _parameter(value: Tensor, like: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(value.to(like.dtype), requires_grad=like.requires_grad)


def _replace(parent: nn.Module, name: str) -> None:
    holder, _, leaf = name.rpartition('.')
    parent.get_submodule(holder)._modules[leaf] = nn.Identity()
