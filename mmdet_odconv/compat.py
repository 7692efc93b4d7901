"""The versions that this package works with, and everything that differs between them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

# Each package with the least version supported and the first that is not.
_SUPPORTED = {
    'mmengine': ('0.8.0', '1.0.0'),
    'torch': ('2.1.0', None),
    'mmcv': ('2.0.0rc4', '3.0.0'),
    'mmdet': ('3.0.0', '4.0.0'),
}


# Whether torch.compile can be given the operator as one call (from torch 2.7 on). Without it, a
# compiled layer is made of the formula's operations and keeps more memory for its backward pass.
COMPILED_OPERATOR = hasattr(torch.library, 'custom_op') and hasattr(torch.compiler, 'is_exporting')

# Its name before torch 2.2.
is_compiling = getattr(torch.compiler, 'is_compiling', None) or torch._utils.is_compiling

# Before torch 2.4 each device had functions of its own.
_AUTOCAST_BY_DEVICE = hasattr(torch, 'get_autocast_dtype')


def check_versions() -> None:
    """Import mmengine, torch, mmcv and mmdet.

    Raises:
        ImportError: One of them is missing, cannot be imported, lacks its compiled operators, or
            has a version that is not supported. The message names the package, the version found
            and the versions supported.
    """
    for name, (least, below) in _SUPPORTED.items():
        supported = f'mmdet_odconv supports {name}>={least}' + (f',<{below}' if below else '')
        try:
            module = import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise ImportError(f'{name} is not installed; {supported}') from error
        except AssertionError as error:
            # mmdet asserts the versions of mmcv and mmengine that it goes with.
            raise ImportError(f'{name} cannot be imported ({error}); {supported}') from error
        found = module.__version__
        if not _is_within(found, least, below):
            raise ImportError(f'{name} {found} is installed; {supported}')
        if name == 'mmcv' and find_spec('mmcv._ext') is None:
            raise ImportError(
                f'mmcv {found} is installed without its compiled operators (mmcv-lite?), which '
                f'mmdet needs; {supported}'
            )


def _is_within(version: str, least: str, below: str | None) -> bool:
    from mmengine.utils import digit_version

    found = digit_version(version)
    return found >= digit_version(least) and (below is None or found < digit_version(below))


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The type of automatic mixed precision on a device; None where it is off."""
    if _AUTOCAST_BY_DEVICE:
        if device_type == 'meta' or not torch.is_autocast_enabled(device_type):
            return None
        return torch.get_autocast_dtype(device_type)
    if device_type == 'cpu':
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A context without automatic mixed precision, which costs nothing where it is off."""
    if autocast_dtype(device_type) is None:
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def register_config_scope() -> None:
    """Let ``mmdet_odconv::odconv/...`` be the base of a config, once this package is imported.

    MMEngine knows the packages of OpenMMLab alone, and looks for an installed one beside its
    metadata, where an editable install is not. For a name that no distribution has, it asks Python
    where the module is, which is right for both.
    """
    from mmengine.config.utils import MODULE2PACKAGE

    MODULE2PACKAGE.setdefault('mmdet_odconv', 'mmdet_odconv.version')


def read_annotations_as_utf8() -> None:
    """Let pycocotools read annotation files as UTF-8, as JSON is, whatever the locale.

    It names no encoding. Under another one it fails at the first class name that is not ASCII,
    or reads a name that no class has.
    """
    from pycocotools import coco

    coco.open = partial(open, encoding='utf-8')


def pass_over(batches: Any, number: int) -> None:
    """Let a loop by iterations of the onedl line go on after so many batches, without reading them.

    Its MMEngine asks the iterator of the batches for that, where the other takes them one by one.
    The new iterator is made at once: that draws from the random generators, which are set after.
    """
    batches.skip_iter(number)
    batches._ensure_iterator()


def batches_passed_over(loop: Any) -> int:
    """How many batches a resumed loop by iterations passes over; none, if told so (onedl line)."""
    return 0 if getattr(loop, 'fast_forward_on_resume', False) else loop.iter


def keep_safe_mode() -> None:
    """Let MMEngine read checkpoints in ``torch.load``'s safe mode or not at all.

    The one of the onedl line reads a file that the safe mode refuses once more without it, and so
    runs the code in it.
    """
    from mmengine.runner import checkpoint

    if hasattr(checkpoint, '_safe_torch_load'):
        checkpoint._safe_torch_load = torch.load


def add_safe_globals(allowed: Sequence[Any]) -> None:
    """Let ``torch.load``'s safe mode read these classes and functions.

    Before torch 2.6, where safe mode became the default and took functions under another name,
    there is nothing to do.
    """
    if hasattr(torch.serialization, 'get_unsafe_globals_in_checkpoint'):
        torch.serialization.add_safe_globals(list(allowed))
