"""The versions that this package works with, and everything that differs between them."""

import codecs
import pickle
from _compat_pickle import IMPORT_MAPPING
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import _weights_only_unpickler

_Function = TypeVar('_Function', bound=Callable[..., Any])

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

# Whether the exporter of ONNX files can leave height and width free (from torch 2.6 on).
ONNX_EXPORT = hasattr(getattr(getattr(torch, 'export', None), 'Dim', None), 'DYNAMIC')

# Its name before torch 2.2.
is_compiling = getattr(torch.compiler, 'is_compiling', None) or torch._utils.is_compiling

# Whether a tensor is one of autograd's older vmap; old versions have no function that says so.
is_legacy_batched: Callable[[Any], bool] = getattr(
    torch._C._functorch,
    'is_legacy_batchedtensor',
    lambda tensor: 'Batched' in str(torch._C._dispatch_keys(tensor)),
)

# From torch 2.6 on its safe mode can be told of classes, and of functions under other names.
_SAFE_MODE_TAKES_NAMES = hasattr(torch.serialization, 'get_unsafe_globals_in_checkpoint')
_torch_load = torch.load
# NumPy's numbers ask for the function that turns text into bytes.
_allowed: dict[str, Any] = {'_codecs.encode': codecs.encode}

# Before torch 2.4 each device had functions of its own.
_AUTOCAST_BY_DEVICE = hasattr(torch, 'get_autocast_dtype')


def autocast_is_on(device_type: str) -> bool:
    """Whether there is automatic mixed precision on a device, which is not 'meta'."""
    return autocast_dtype(device_type) is not None


if _AUTOCAST_BY_DEVICE:
    autocast_is_on = torch.is_autocast_enabled


def not_compiled(function: _Function) -> _Function:
    """A decorator: where older compilers come to ``function``, they call it as it is.

    torch.compile of torch 2.1 cannot follow a whole layer. It makes graphs of some parts, and fails
    at what writes into given memory or asks for shapes that change.
    """
    return function if COMPILED_OPERATOR else torch.compiler.disable(function)


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


def skip_batches(batches: Any, number: int) -> None:
    """Let a loop by iterations of the onedl line go on after so many batches, without reading them.

    Its MMEngine asks the iterator of the batches for that, where the other takes them one by one.
    The new iterator is made at once: that draws from the random generators, which are set after.
    """
    batches.skip_iter(number)
    batches._ensure_iterator()


def batches_to_skip(loop: Any) -> int:
    """How many batches a resumed loop by iterations skips; none, if told so (onedl line)."""
    return 0 if getattr(loop, 'fast_forward_on_resume', False) else loop.iter


@contextmanager
def files_read_as_tools_do() -> Iterator[None]:
    """Let MMEngine and pycocotools read files in the ``with`` block as the tools do.

    pycocotools names no encoding. Under another one than JSON's UTF-8 it fails at the first class
    name that is not ASCII, or reads a name that no class has. And the MMEngine of the onedl line
    reads a checkpoint that the safe mode refuses once more without it, and so runs the code in it.
    """
    from mmengine.runner import checkpoint
    from pycocotools import coco

    with mock.patch.object(coco, 'open', partial(open, encoding='utf-8'), create=True):
        if not hasattr(checkpoint, '_safe_torch_load'):
            yield
            return
        with mock.patch.object(checkpoint, '_safe_torch_load', load_weights):
            yield


def add_safe_globals(allowed: Sequence[Any]) -> None:
    """Let :func:`load_weights` read these classes and functions.

    Args:
        allowed (Sequence): Classes and functions, or pairs of one and the name by which a file
            asks for it.
    """
    for entry in allowed:
        found, name = entry if isinstance(entry, tuple) else (entry, _full_name(entry))
        _allowed[name] = found
    if _SAFE_MODE_TAKES_NAMES:
        torch.serialization.add_safe_globals(list(allowed))


def _full_name(found: Any) -> str:
    return f'{found.__module__}.{found.__qualname__}'


def load_weights(file: Any, map_location: Any = None, **_: Any) -> Any:
    """``torch.load`` in its safe mode, with every version of torch, whatever else is asked for.

    Before torch 2.6 that mode cannot be told of the classes in MMEngine's checkpoints; there the
    unpickler is one of our own that gives out what both allow.

    Args:
        file: As ``torch.load`` takes it.
        map_location: As ``torch.load`` takes it. Default: None.

    Raises:
        pickle.UnpicklingError: The file asks for anything else; nothing of it was run.
    """
    if _SAFE_MODE_TAKES_NAMES:
        return _torch_load(file, map_location=map_location, weights_only=True)
    return _torch_load(file, map_location=map_location, pickle_module=_WeightsPickle)


class _WeightsPickle:
    """What ``torch.load`` takes as its ``pickle_module``."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            allowed = {**_weights_only_unpickler._get_allowed_globals(), **_allowed}
            # Pickles of PyTorch's protocol have Python 2's names of modules.
            full_name = f'{IMPORT_MAPPING.get(module, module)}.{name}'
            if full_name not in allowed:
                raise pickle.UnpicklingError(f'GLOBAL {full_name} is none of the weights')
            return allowed[full_name]

    @classmethod
    def load(cls, file: Any, **kwargs: Any) -> Any:
        return cls.Unpickler(file, **kwargs).load()
