"""Detectors as they are used, not trained."""

from .collapse import CollapseReport, collapse_static_layers
from .detections import Detections
from .fuse import fuse_odconv_bn, prepare_for_inference
from .onnx_export import export_dense_network, export_detector
from .onnx_network import disagreement, largest_difference, use_onnx_network
from .preprocessing import describe_preprocessing
from .written_layer import prepare_for_export

__all__ = [
    'CollapseReport',
    'Detections',
    'collapse_static_layers',
    'describe_preprocessing',
    'disagreement',
    'export_dense_network',
    'export_detector',
    'fuse_odconv_bn',
    'largest_difference',
    'prepare_for_export',
    'prepare_for_inference',
    'use_onnx_network',
]
