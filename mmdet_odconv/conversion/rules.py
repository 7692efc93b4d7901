"""Which convolutions stay as they are, and why."""

from typing import NamedTuple

from mmcv.cnn import ConvModule
from mmcv.cnn.bricks import ContextBlock
from mmcv.cnn.bricks.wrappers import Conv2d as WrappedConv2d
from mmcv.cnn.bricks.wrappers import Conv3d as WrappedConv3d
from mmdet.models.backbones.resnest import SplitAttentionConv2d
from mmdet.models.dense_heads import YOLOV3Head, YOLOXHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.dense_heads.tood_head import TaskDecomposition
from mmdet.models.layers import ChannelAttention, DyReLU, PatchEmbed, SELayer
from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized

from ..layers import DynamicConvNd
from .site import CONV_TYPES, DEFORMABLE_TYPES, Site

# Plain convolutions that can be replaced, with their numbers of dimensions.
REPLACEABLE: dict[type[nn.Module], int] = {
    nn.Conv1d: 1,
    nn.Conv2d: 2,
    nn.Conv3d: 3,
    WrappedConv2d: 2,
    WrappedConv3d: 3,
}

# Methods by which blocks like RepVGG's merge their branches: OpenMMLab's, Ultralytics', YOLOv7's.
_MERGING_METHODS = ('switch_to_deploy', 'fuse_convs', 'fuse_repvgg_block')

_SHORTCUTS = ('downsample', 'shortcut', 'identity', 'skip')
# Modules, or those of their children whose names start so, that see a mean over all positions.
_POOLED = (
    (SELayer, ''),
    (ChannelAttention, ''),
    (DyReLU, ''),
    (ContextBlock, ''),
    (SplitAttentionConv2d, 'fc'),
    (TaskDecomposition, 'layer_attention'),
)


def blocking_reason(site: Site, elsewhere: str | None) -> str | None:
    """Why this convolution cannot be replaced; None where it can.

    Args:
        site (Site): The place of a convolution.
        elsewhere (str, optional): What it or its weight is used for past its places.
    """
    conv = site.conv
    if not site.path:
        return 'the model itself'
    if isinstance(conv, DynamicConvNd):
        return f'{type(conv).__name__} already'
    if any(isinstance(module, DEFORMABLE_TYPES) for module in (*site.path, conv)):
        return 'deformable convolution'
    if isinstance(conv, _ConvTransposeNd):
        return 'transposed convolution'
    if is_parametrized(conv) or 'weight' not in conv._parameters:
        return 'spectral norm, weight norm or another form of its weight'
    if type(conv) not in REPLACEABLE:
        return f'{type(conv).__name__}, a subclass with behaviour of its own'
    if 'forward' in vars(conv):
        return 'forward pass of its own'
    if any(_has_hooks(parameter) for parameter in conv.parameters()):
        return 'hook on its weight or bias'
    if elsewhere is not None:
        return elsewhere
    if _weight_is_read(site):
        return 'weight read by its parent'
    return None


def _has_hooks(parameter: nn.Parameter) -> bool:
    return bool(
        parameter._backward_hooks or getattr(parameter, '_post_accumulate_grad_hooks', None)
    )


def serves_several_levels(site: Site) -> bool:
    """Whether the convolution is in a head that mmdet applies to each level of a pyramid."""
    return any(
        isinstance(module, BaseDenseHead) and not isinstance(module, YOLOV3Head | YOLOXHead)
        for module in site.path
    )


class DefaultExclusion(NamedTuple):
    """Why a convolution stays unless it is asked for by its own name.

    Attributes:
        reason (str): In a few words.
        scope (str): Name of the part of the model within which it is special. A pattern that
            matches this alone has not asked for it.
    """

    reason: str
    scope: str


def default_exclusion(site: Site) -> DefaultExclusion | None:
    """Why this convolution stays by default; None for an ordinary one.

    - Patch embedding: below a module called ``patch_embed``, or one of mmdet's ``PatchEmbed``.
    - Stem: in the backbone, what reads the three channels of the image; what lies in a child
      called ``stem``; and the single convolutions before the first stage, that is, before the
      first child with several. The backbone is what the model calls so, else the model.
    - 1×1 shortcut: of kernel size 1, below a module called downsample, shortcut, identity or skip.
    - Channel attention: its input is a mean over all positions.
    - Prediction layer: in a module with 'head' in its name, a convolution that changes the number
      of channels, has no norm or activation in its ``ConvModule``, and nothing after it in its
      ``nn.Sequential``.
    """
    for reason, depth in (
        ('patch embedding', _patch_embedding(site)),
        ('stem', _stem(site)),
        ('1×1 shortcut', _shortcut(site)),
        ('channel attention', _channel_attention(site)),
        ('prediction layer', _prediction(site)),
    ):
        if depth is not None:
            return DefaultExclusion(reason, '.'.join(site.parts[:depth]))
    return None


def _weight_is_read(site: Site) -> bool:
    """Whether a module above computes with the weight, past the convolution's forward."""
    if any(
        isinstance(module, ConvModule) and module.efficient_conv_bn_eval_forward is not None
        for module in site.path
    ):
        return True
    if any(_merges_branches(module) for module in site.path):
        return True
    return any(
        isinstance(module, TaskDecomposition) and part == 'reduction_conv'
        for module, part in zip(site.path, site.parts, strict=True)
    )


def _merges_branches(module: nn.Module) -> bool:
    """Whether a block merges its own convolutions into one for deployment, as RepVGG's does.

    The backbones of such blocks may have a method of the same name, which calls those of the
    blocks. A block of which both the whole (`fuse`) and the forward pass after it
    (`forward_fuse`) are methods merges its branches too; Ultralytics' RepVGGDW is one.
    """
    if hasattr(module, 'fuse') and hasattr(module, 'forward_fuse'):
        return True
    below = [child for child in module.modules() if child is not module]
    return any(
        hasattr(module, method) and not any(hasattr(child, method) for child in below)
        for method in _MERGING_METHODS
    )


# Each of the following gives the number of leading parts of the name that make the exclusion's
# scope, None where there is no such exclusion.


def _patch_embedding(site: Site) -> int | None:
    for depth, (module, part) in enumerate(zip(site.path, site.parts, strict=True)):
        if part == 'patch_embed':
            return depth
        if isinstance(module, PatchEmbed):
            return depth - 1
    return None


def _stem(site: Site) -> int | None:
    parts = site.parts
    if 'backbone' in parts[:-1]:
        depth = parts.index('backbone') + 1
    elif hasattr(site.path[0], 'backbone'):
        return None
    else:
        depth = 0
    reads_image = getattr(site.conv, 'in_channels', None) == 3
    if reads_image or parts[depth] in _stem_children(site.path[depth]):
        return depth
    return None


def _stem_children(backbone: nn.Module) -> list[str]:
    """The children of the backbone before its first stage."""
    children: list[str] = []
    for name, child in backbone.named_children():
        convs = sum(isinstance(module, CONV_TYPES) for module in child.modules())
        if convs > 1 and name != 'stem':
            return children
        children.append(name)
    # A backbone that is a chain of single convolutions has no stages to tell a stem from.
    return ['stem']


def _shortcut(site: Site) -> int | None:
    if set(getattr(site.conv, 'kernel_size', ())) == {1}:
        for depth, part in enumerate(site.parts):
            if part in _SHORTCUTS:
                return depth
    return None


def _channel_attention(site: Site) -> int | None:
    for depth, (module, part) in enumerate(zip(site.path, site.parts, strict=True)):
        for kind, child in _POOLED:
            if isinstance(module, kind) and part.startswith(child):
                return depth if child else depth - 1
    return None


def _prediction(site: Site) -> int | None:
    depths = [i for i, part in enumerate(site.parts[:-1], 1) if 'head' in part]
    conv, parent = site.conv, site.path[-1]
    if not depths or getattr(conv, 'in_channels', 0) == getattr(conv, 'out_channels', 0):
        return None
    if isinstance(parent, ConvModule) and (parent.with_norm or parent.with_activation):
        return None
    if isinstance(parent, nn.Sequential) and conv is not parent[-1]:
        return None
    return depths[-1]
