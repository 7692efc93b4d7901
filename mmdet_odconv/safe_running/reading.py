"""Reading checkpoints of a training: any file, also a broken one or a stranger's.

PyTorch's safe mode stays on with every version. It refuses all classes but those known to be
harmless, and so the log in the checkpoints that MMEngine 0.10.7 itself saves; exactly the classes
of that log are registered.
"""

import logging
import os
import pickle
import re
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest import mock

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import CheckpointLoader
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
        path (str): As MMEngine takes it: a file, or an address such as ``torchvision://resnet50``.

    Raises:
        CheckpointFileError: The file is missing, truncated or damaged, has something else than
            weights and plain values in it, or is not a checkpoint.
    """
    try:
        if '://' not in path:
            content = load_weights(Path(path).expanduser(), 'cpu')
        else:  # MMEngine finds it, but neither it nor torch.hub always asks for the safe mode
            with mock.patch.object(torch, 'load', load_weights):
                content = CheckpointLoader.load_checkpoint(path, 'cpu', logger='silent')
    except Exception as error:  # bytes that are no checkpoint can raise anything
        raise CheckpointFileError(
            f'{path} cannot be read as a checkpoint: {_reason(error)}'
        ) from error
    if not isinstance(content, dict):
        raise CheckpointFileError(f'{path} has no state dict, but a {type(content).__name__}')
    return Checkpoint(path, content)


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        # Its own text says how to run such a file all the same.
        found = re.search(r'GLOBAL (\S+)', str(error))
        if found is None:
            return 'it is not a file of weights; nothing of it was run'
        return f'it asks for {found[1]}, which no weights need; nothing of it was run'
    return str(error).strip().partition('\n')[0] or type(error).__name__


def latest_checkpoint(work_dir: str) -> Checkpoint | None:
    """The checkpoint from which a training in a work folder goes on.

    This is the one that ``last_checkpoint`` names. If that one is missing or damaged, it is the
    youngest of the others that can be read, and the log says which ones were skipped.

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


def require_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Load the weights of a checkpoint, and end the program unless the model has got them all.

    MMEngine itself only logs what does not fit, and a model with random weights in some of its
    layers then has an AP of 0, or draws nothing. What the checkpoint has beyond the model's
    weights does not matter.

    Args:
        model (nn.Module): The detector, without wrappers.
        checkpoint (Checkpoint): The checkpoint.

    Raises:
        SystemExit: Entries are missing, have other shapes, values that are not finite or are those
            of a BatchNorm where the model has another norm. The message names the first of them.
    """
    state_dict = checkpoint.content.get('state_dict', checkpoint.content)
    own: Any = type(state_dict)((k.removeprefix('module.'), v) for k, v in state_dict.items())
    if hasattr(state_dict, '_metadata'):
        own._metadata = state_dict._metadata
    known = model.state_dict()
    other_norms = [
        f'{name} is a BatchNorm in the file, but not in the config'
        for name, module in model.named_modules()
        if hasattr(module, 'eps')
        and f'{name}.running_mean' in own
        and f'{name}.running_mean' not in known
    ]
    broken = [f'{name} has values that are not finite' for name in not_finite(model, own)]
    complaints = other_norms + broken
    if not complaints:
        try:
            missing = model.load_state_dict(own, strict=False).missing_keys
            complaints = [f'{name} is not in the file' for name in missing]
        except RuntimeError as error:  # with a line for each
            complaints = [line.strip().rstrip('.') for line in str(error).splitlines()[1:]]
    if complaints:
        more = f' (and {len(complaints) - 1} more like it)' if len(complaints) > 1 else ''
        raise SystemExit(f'{checkpoint.path} does not fit the config: {complaints[0]}{more}')


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
