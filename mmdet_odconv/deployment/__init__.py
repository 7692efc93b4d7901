"""Detectors as they are used, not trained."""

from .fuse import fuse_odconv_bn

__all__ = ['fuse_odconv_bn']
