"""Checkpoints: loading what MMEngine saves without leaving PyTorch's safe mode."""

from .safe_globals import register_safe_globals

__all__ = ['register_safe_globals']
