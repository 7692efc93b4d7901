"""Plain models and published checkpoints, made into models with ODConv."""

from .builder import build_odconv_model
from .convert import ConversionReport, convert_to_odconv
from .methods import patch_fuse_methods
from .published import export_published_checkpoint, load_published_checkpoint
from .rules import ConversionError

__all__ = [
    'ConversionError',
    'ConversionReport',
    'build_odconv_model',
    'convert_to_odconv',
    'export_published_checkpoint',
    'load_published_checkpoint',
    'patch_fuse_methods',
]
