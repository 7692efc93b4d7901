"""Detectors as they are used, not trained."""

from .collapse import CollapseReport, collapse_static_layers
from .dense_network import export_dense_network
from .fuse import fuse_odconv_bn, keep_fuse_methods_right
from .onnx_network import largest_difference, use_onnx_network

__all__ = [
    'CollapseReport',
    'collapse_static_layers',
    'export_dense_network',
    'fuse_odconv_bn',
    'keep_fuse_methods_right',
    'largest_difference',
    'use_onnx_network',
]
