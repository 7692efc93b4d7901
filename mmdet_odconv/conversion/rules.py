"""Where the convolutions of a model are, which of them are asked for, and which stay, and why."""

import difflib
import re
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Set
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

from mmcv.cnn import ConvModule
from mmcv.cnn.bricks import ContextBlock
from mmcv.cnn.bricks.wrappers import Conv2d as WrappedConv2d
from mmcv.cnn.bricks.wrappers import Conv3d as WrappedConv3d
from mmcv.ops import DeformConv2d, ModulatedDeformConv2d
from mmdet.models.backbones.resnest import SplitAttentionConv2d
from mmdet.models.dense_heads import YOLOV3Head, YOLOXHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.dense_heads.tood_head import TaskDecomposition
from mmdet.models.layers import ChannelAttention, DyReLU, PatchEmbed, SELayer
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized

from .._checks import ArgumentError
from ..layers import DynamicConvNd

Patterns = str | Sequence[str]

DEFORMABLE_TYPES = (DeformConv2d, ModulatedDeformConv2d)
CONV_TYPES = (_ConvNd, *DEFORMABLE_TYPES, DynamicConvNd)

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


class ConversionError(ArgumentError):
    """An argument of the conversion is unknown, out of its range, or matches nothing."""

    key = 'model.odconv'


class Site(NamedTuple):
    """A place in a model where a convolution is.

    Attributes:
        name (str): Its dotted name, for example ``backbone.layer1.0.conv1``; '' where the model
            is itself the convolution.
        conv (nn.Module): The convolution, of one of ``CONV_TYPES``.
        path (tuple[nn.Module, ...]): The modules that contain it, the model first, its parent
            last: ``path[i]`` has the name made of the first i parts of ``name``.
    """

    name: str
    conv: Any
    path: tuple[nn.Module, ...]

    @property
    def parts(self) -> list[str]:
        """The parts of the dotted name."""
        return self.name.split('.')


def find_convolutions(model: nn.Module) -> dict[nn.Module, list[Site]]:
    """The convolutions of ``model`` in its own order, each with all the places where it is."""
    sites: dict[nn.Module, list[Site]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, CONV_TYPES):
            sites.setdefault(module, []).append(Site(name, module, _path(model, name)))
    return sites


def held_outside_the_tree(
    model: nn.Module, convolutions: Iterable[nn.Module]
) -> Iterator[nn.Module]:
    """The convolutions that a module of ``model`` may compute with past their places.

    That is, it keeps them or their weights in a list, a dict, a partial, a function or an object.
    """
    places = {id(module) for module in model.modules()}
    own = ('_modules', '_parameters')
    values = [v for m in model.modules() for name, v in vars(m).items() if name not in own]
    seen: dict[int, Any] = {}
    while values:
        value = values.pop()
        if id(value) not in seen:
            seen[id(value)] = value
            if id(value) not in places:
                values += _contents(value)
    for conv in convolutions:
        if any(id(item) in seen for item in (conv, *conv.parameters())):
            yield conv


def _contents(value: Any) -> list[Any]:
    """What ``value`` refers to, as far as somebody may keep a module there."""
    if isinstance(value, dict):
        return list(dict.values(value))
    if isinstance(value, (list, tuple, Set, deque)):
        return list(value)
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, FunctionType):
        return [value.__closure__, value.__defaults__, value.__kwdefaults__]
    if isinstance(value, CellType):
        return [] if value == CellType() else [value.cell_contents]
    if isinstance(value, weakref.ref):
        return [value()]
    # Of classes and Python modules, everything can be reached.
    plain = not isinstance(value, (type, ModuleType))
    return list(getattr(value, '__dict__', {}).values()) if plain else []


def _path(model: nn.Module, name: str) -> tuple[nn.Module, ...]:
    if not name:
        return ()
    path = [model]
    for part in name.split('.')[:-1]:
        path.append(path[-1].get_submodule(part))
    return tuple(path)


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


class Selection:
    """Some regular expressions, any of which may be found (``re.search``) in a name.

    Args:
        argument (str): What the patterns are called in error messages.
        patterns (str | Sequence[str]): One or several regular expressions.
        convolutions (Iterable[str]): The names of all convolutions.
        modules (Iterable[str]): The names of all modules, for error messages.

    Raises:
        ConversionError: A pattern is no regular expression, or is found in the name of no
            convolution; the message has near names.
    """

    def __init__(
        self,
        argument: str,
        patterns: Patterns,
        convolutions: Iterable[str],
        modules: Iterable[str],
    ) -> None:
        names = list(convolutions)
        self.patterns = []
        given: Iterable[Any] = patterns if isinstance(patterns, (list, tuple)) else [patterns]
        for text in given:
            try:
                pattern = re.compile(text)
            except (re.error, TypeError) as error:
                raise ConversionError(
                    f'{argument} {text!r} is not a regular expression: {error}'
                ) from error
            if not any(pattern.search(name) for name in names):
                raise ConversionError(
                    f'{argument} {text!r} matches the name of no convolution in the model; '
                    + _near(text, modules)
                )
            self.patterns.append(pattern)

    def matches(self, name: str) -> bool:
        """Whether a pattern is found in ``name``."""
        return any(pattern.search(name) for pattern in self.patterns)

    def asks_for(self, name: str, exclusion: DefaultExclusion) -> bool:
        """Whether a pattern is found in ``name`` but not in the exclusion's scope alone."""
        scope = f'{exclusion.scope}.' if exclusion.scope else ''
        return any(p.search(name) and not p.search(scope) for p in self.patterns)


def _near(pattern: str, modules: Iterable[str]) -> str:
    """What the user may have meant: names near the pattern, else the model's top-level names."""
    modules = [name for name in modules if name]
    last_parts = {name.rpartition('.')[2] for name in modules}
    near = difflib.get_close_matches(pattern, sorted({*modules, *last_parts}), n=5, cutoff=0.5)
    if near:
        return f'near names: {", ".join(near)}'
    top = [name for name in modules if '.' not in name]
    return f'the model consists of: {", ".join(top)}'
