"""Runs that keep what they have: durable checkpoints, exact resuming, checks of what is read.

Nothing here knows of dynamic convolutions, and no module here imports another part of the package
but ``compat.py`` and ``_checks.py``. docs/reliability.md says what each part promises.
"""

from .checkpoint import CheckpointError, SafeCheckpointHook
from .config_errors import config_errors_as_exit
from .dataset_checks import require_datasets
from .non_finite import NonFiniteError, NonFiniteHook
from .preemption import PreemptionHook
from .reading import (
    Checkpoint,
    CheckpointFileError,
    latest_checkpoint,
    not_finite,
    read_checkpoint,
    register_safe_globals,
    require_weights,
    unwrapped,
)

__all__ = [
    'Checkpoint',
    'CheckpointError',
    'CheckpointFileError',
    'NonFiniteError',
    'NonFiniteHook',
    'PreemptionHook',
    'SafeCheckpointHook',
    'config_errors_as_exit',
    'latest_checkpoint',
    'not_finite',
    'read_checkpoint',
    'register_safe_globals',
    'require_datasets',
    'require_weights',
    'unwrapped',
]
