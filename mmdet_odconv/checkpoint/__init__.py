"""Checkpoints: the published ones, and what MMEngine saves, both in PyTorch's safe mode."""

from .official import export_official_checkpoint, load_official_checkpoint
from .reading import (
    Checkpoint,
    CheckpointFileError,
    latest_checkpoint,
    not_finite,
    read_checkpoint,
)
from .safe_globals import register_safe_globals

__all__ = [
    'Checkpoint',
    'CheckpointFileError',
    'export_official_checkpoint',
    'latest_checkpoint',
    'load_official_checkpoint',
    'not_finite',
    'read_checkpoint',
    'register_safe_globals',
]
