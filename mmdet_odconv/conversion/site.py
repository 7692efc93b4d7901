"""Where the convolutions of a model are."""

import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Set
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

from mmcv.ops import DeformConv2d, ModulatedDeformConv2d
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..layers import DynamicConvNd

DEFORMABLE_TYPES = (DeformConv2d, ModulatedDeformConv2d)
CONV_TYPES = (_ConvNd, *DEFORMABLE_TYPES, DynamicConvNd)


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
