"""Checkpoints: the published ones, and what MMEngine saves, both in PyTorch's safe mode."""

from .official import export_official_checkpoint, load_official_checkpoint
from .safe_globals import register_safe_globals

__all__ = ['export_official_checkpoint', 'load_official_checkpoint', 'register_safe_globals']
