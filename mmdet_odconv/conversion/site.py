"""Where the convolutions of a model are."""

from typing import Any, NamedTuple

from mmcv.ops import DeformConv2d, ModulatedDeformConv2d
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..layers import DYNAMIC_TYPES

DEFORMABLE_TYPES = (DeformConv2d, ModulatedDeformConv2d)
CONV_TYPES = (_ConvNd, *DEFORMABLE_TYPES, *DYNAMIC_TYPES)


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


def _path(model: nn.Module, name: str) -> tuple[nn.Module, ...]:
    if not name:
        return ()
    path = [model]
    for part in name.split('.')[:-1]:
        path.append(path[-1].get_submodule(part))
    return tuple(path)
