"""ODConv as layers: modules that own the parameters and call the functions of ``functional``."""

from .attention import ODAttention, set_temperature
from .calibrated_norm import CalibratedNorm, calibrate
from .dynamic_conv import DynamicConvNd
from .fdconv import FDConv2d
from .kernel_attention import CondConv2d, DyConv2d
from .odconv import ODConv1d, ODConv2d, ODConv3d
from .valid_pooling import use_valid_pooling

__all__ = [
    'CalibratedNorm',
    'CondConv2d',
    'DyConv2d',
    'DynamicConvNd',
    'FDConv2d',
    'ODAttention',
    'ODConv1d',
    'ODConv2d',
    'ODConv3d',
    'calibrate',
    'set_temperature',
    'use_valid_pooling',
]
