"""Brings a trained model to its leanest form: norms, temperatures and heads folded together."""

import logging
from typing import Any

from mmcv.cnn.bricks import wrappers
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..conversion.methods import fuse_blocks
from ..layers import DynamicConvNd, ODAttention
from ..layers.attention import PreparedAttention, constant_affine
from .execution import directly_following

_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, wrappers.Conv2d, wrappers.Conv3d)


def prepare_for_inference(model: nn.Module) -> nn.Module:
    """Fold into each other what is constant in inference.

    A norm after an ODConv layer is folded into its bank and a static bias, a norm after a plain
    convolution into its weight and bias. In an attention, the norm goes into ``fc``, the
    temperature into the heads, and the heads into one product (:class:`PreparedAttention`).
    An ``nn.Identity`` takes the place of each norm. A block with a method ``forward_fuse``, such
    as Ultralytics' ``Conv``, loses its norm instead and uses that method for its forward pass. The
    outputs stay the same up to rounding.

    The function does not touch norms in training mode and norms without running statistics. It
    also leaves alone what something else may read: convolutions and norms that are used at several
    places or have hooks, and those whose order of execution cannot be followed. The log says how
    many norms were folded; a warning in it names those that stay.

    Args:
        model (nn.Module): Any module, in evaluation mode.

    Returns:
        nn.Module: ``model`` itself, which is changed in place. Its state dict has other entries
        afterwards.
    """
    before = _batch_norms(model)
    pairs = list(directly_following(model, (DynamicConvNd, *_PLAIN), _BatchNorm))
    for parent, conv_name, norm_name in pairs:
        conv: Any = parent.get_submodule(conv_name)
        norm = parent.get_submodule(norm_name)
        if not _is_constant(norm, conv.out_channels):
            continue
        if isinstance(conv, DynamicConvNd):
            folded = conv.fold_norm(*_scale_and_shift(norm))
        else:
            folded = type(conv) in _PLAIN
            if folded:
                _fold(norm, conv)
        if folded:
            _replace(parent, norm_name)
    attentions = prepared = 0
    for parent in model.modules():
        for name, child in parent._modules.items():
            if not isinstance(child, ODAttention):
                continue
            attentions += 1
            if PreparedAttention.can_replace(child):
                prepared += 1
                parent._modules[name] = PreparedAttention(child)
            elif child.norm_can_be_folded():
                _fold(child.bn, child.fc)
                child.bn = nn.Identity()
    fuse_blocks(model)
    kept = _batch_norms(model)
    named = f' and kept {len(kept)}: {", ".join(kept)}' if kept else ''
    print_log(
        f'prepare_for_inference folded {len(before) - len(kept)} BatchNorms{named}; it made two '
        f'products of {prepared} of {attentions} attentions',
        logger='current',
        level=logging.WARNING if kept else logging.INFO,
    )
    return model


# The name that it had when it folded norms alone.
fuse_odconv_bn = prepare_for_inference


def _batch_norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


def _is_constant(norm: Any, channels: int) -> bool:
    """Whether ``norm`` only scales and shifts so many channels."""
    mean = getattr(norm, 'running_mean', None)
    return mean is not None and len(mean) == channels and constant_affine(norm) is not None


def _scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    affine = constant_affine(norm)
    assert affine is not None  # as `_is_constant` found
    return affine


def _fold(norm: Any, layer: Any) -> None:
    """Put ``norm`` into a plain layer's weight and bias."""
    scale, shift = _scale_and_shift(norm)
    weight = layer.weight
    bias = shift if layer.bias is None else layer.bias.detach().double() * scale + shift
    scale = scale.reshape(-1, *(1,) * (weight.dim() - 1))
    layer.weight = _parameter(weight.detach().double() * scale, weight)
    layer.bias = _parameter(bias, weight)


def _parameter(value: Tensor, like: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(value.to(like.dtype), requires_grad=like.requires_grad)


def _replace(parent: nn.Module, name: str) -> None:
    holder, _, leaf = name.rpartition('.')
    parent.get_submodule(holder)._modules[leaf] = nn.Identity()
