"""Reading checkpoints of a training: any file, also a broken one or a stranger's.

Since PyTorch 2.6 ``torch.load`` refuses all classes but those known to be harmless. MMEngine
0.10.7 calls it that way on files that hold :class:`mmengine.logging.HistoryBuffer` objects (the
log), and so cannot test or resume from what it saved. Safe mode stays on: exactly the classes of
those objects are registered.
"""

import io
import json
import logging
import os
import pickle
import re
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, cast
from urllib.parse import urlparse

import mmengine
import numpy as np
import torch
from mmengine import fileio
from mmengine.logging import HistoryBuffer, print_log
from mmengine.model import is_model_wrapper
from mmengine.runner.checkpoint import (
    get_deprecated_model_names,
    get_external_models,
    get_mmcls_models,
)
from torch import Tensor, nn

from ..compat import add_safe_globals, load_weights

_STATISTICS = ('mean', 'max', 'min', 'current')
_SCALAR_TYPES = (np.float64, np.float32, np.float16, np.int64, np.int32, np.uint8, np.bool_)


class CheckpointFileError(ValueError):
    """A file cannot be used as a checkpoint; the message names it and says why."""


class Checkpoint(NamedTuple):
    """A checkpoint that has been read.

    MMEngine reads the file again for itself, so keep this no longer than it is needed.

    Args:
        path (str): The file.
        content (dict): What is in it.
    """

    path: str
    content: dict[str, Any]

    @property
    def meta(self) -> dict[str, Any]:
        """What the checkpoint says of itself: seed, classes and so on; empty for mere weights."""
        return self.content.get('meta') or {}


def read_checkpoint(path: str) -> Checkpoint:
    """Read a checkpoint in ``torch.load``'s safe mode, with every version of torch.

    Args:
        path (str): As MMEngine takes it.

    Raises:
        CheckpointFileError: The file is truncated or damaged, has something else than weights and
            plain values in it, or is not a checkpoint.
    """
    try:
        content = load_weights(_local(path), map_location='cpu')
    except Exception as error:  # bytes that are no checkpoint can raise anything
        raise CheckpointFileError(
            f'{path} cannot be read as a checkpoint: {_reason(error)}'
        ) from error
    if not isinstance(content, dict):
        raise CheckpointFileError(f'{path} has no state dict, but a {type(content).__name__}')
    return Checkpoint(path, content)


def _local(path: str) -> Path | io.BytesIO:
    """The file of a checkpoint; one from the web is where MMEngine, too, will look for it."""
    if '://' not in path:
        return Path(path).expanduser()
    if path.startswith(('torchvision://', 'modelzoo://')):
        import_module('torchvision')  # without which MMEngine does not know their addresses
    address = web_address(path)
    if address is None:
        return io.BytesIO(fileio.get(path))
    file = Path(torch.hub.get_dir(), 'checkpoints', Path(urlparse(address).path).name)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(address, str(file))
    return file


def web_address(path: str) -> str | None:
    """Where on the web the checkpoint is that MMEngine means by ``path``; None if nowhere."""
    scheme, _, name = path.partition('://')
    name = get_deprecated_model_names().get(name, name)
    if scheme in ('http', 'https'):
        return path
    if scheme in ('torchvision', 'modelzoo'):
        addresses = Path(mmengine.__path__[0]) / 'hub/torchvision_0.12.json'
        known = json.loads(addresses.read_text(encoding='utf-8'))
        return known.get(name.lower())
    if scheme in ('open-mmlab', 'openmmlab'):
        return get_external_models().get(name)
    return get_mmcls_models().get(name) if scheme == 'mmcls' else None


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        # Its own text says how to run such a file all the same.
        found = re.search(r'GLOBAL (\S+)', str(error))
        if found is None:
            return 'it is not a file of weights; nothing of it was run'
        return f'it asks for {found[1]}, which no weights need; nothing of it was run'
    return str(error).strip().partition('\n')[0] or type(error).__name__


def not_finite(model: nn.Module, state_dict: dict[str, Any]) -> list[str]:
    """The names of the weights and running statistics that have a NaN or an infinity.

    Args:
        model (nn.Module): The model; its other buffers may be infinite, as masks are.
        state_dict (dict): A state dict of it.
    """
    weights = {name for name, _ in model.named_parameters()}
    return [
        name
        for name, value in state_dict.items()
        if name in weights or name.endswith(('running_mean', 'running_var'))
        if isinstance(value, Tensor) and not value.isfinite().all()
    ]


def latest_checkpoint(work_dir: str) -> Checkpoint | None:
    """The checkpoint from which a training in a work folder goes on.

    This is the one that ``last_checkpoint`` names. If that one is missing or damaged, it is the
    youngest of the others that can be read, and the log says which ones were passed over. A kill
    or a full disk leaves damaged checkpoints behind, but not with
    :class:`~mmdet_odconv.SafeCheckpointHook`.

    Args:
        work_dir (str): The work folder.

    Returns:
        Checkpoint, optional: None if the folder has no checkpoint.

    Raises:
        CheckpointFileError: There are checkpoints, but none can be read.
    """
    folder = Path(work_dir)
    files = [  # without broken links
        path
        for path in folder.glob('*.pth')
        if path.is_file() and not path.name.startswith('best_')
    ]
    files.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    record = folder / 'last_checkpoint'
    named = Path(os.fsdecode(record.read_bytes()).strip()) if record.is_file() else None
    if named is not None and named.name:
        # The folder may have been moved since.
        files = [named, folder / named.name, *files]
    complaints: dict[Path, str] = {}
    for path in files:
        if path in complaints or not path.is_file():
            continue
        try:
            checkpoint = read_checkpoint(str(path))
            if 'optimizer' in checkpoint.content:
                return checkpoint
            complaints[path] = f'{path} has no state of the optimizer'
        except CheckpointFileError as error:
            complaints[path] = str(error)
        print_log(
            f'{complaints[path]}; looking for an earlier one',
            logger='current',
            level=logging.WARNING,
        )
    if complaints:
        raise CheckpointFileError(
            f'{work_dir} has no checkpoint to go on from: {next(iter(complaints.values()))}'
        )
    return None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of distributed runs."""
    while is_model_wrapper(model):
        model = cast(nn.Module, model.module)
    return model


def register_safe_globals() -> None:
    """Let ``torch.load``'s safe mode read the log in MMEngine's checkpoints.

    Importing this package calls the function. It registers ``HistoryBuffer``, NumPy's arrays,
    scalars and plain number types. In place of ``builtins.getattr`` it registers a function that
    returns the four statistics of ``HistoryBuffer`` and nothing else.
    """
    reconstruct = np.empty(0).__reduce__()[0]
    scalar = np.float64(0).__reduce__()[0]
    safe: list[Any] = [
        HistoryBuffer,
        np.ndarray,
        np.dtype,
        *(type(np.dtype(scalar_type)) for scalar_type in _SCALAR_TYPES),
        (_statistic_of_history_buffer, 'builtins.getattr'),
    ]
    # NumPy 2 renamed the module; files written under either version are to be read.
    for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
        safe += [(reconstruct, f'{module}._reconstruct'), (scalar, f'{module}.scalar')]
    add_safe_globals(safe)


def _statistic_of_history_buffer(obj: object, name: str) -> Any:
    """``getattr`` for pickles, open for ``HistoryBuffer``'s statistics only."""
    if obj is HistoryBuffer and name in _STATISTICS:
        return getattr(HistoryBuffer, name)
    raise pickle.UnpicklingError(
        f'the checkpoint asks for getattr({obj!r}, {name!r}), which is not safe to load; '
        f'only the statistics {_STATISTICS} of HistoryBuffer are'
    )
