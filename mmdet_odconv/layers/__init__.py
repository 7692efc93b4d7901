"""ODConv as layers: modules that own the parameters and call the functions of ``functional``."""

from .attention import ODConvAttention, set_temperature
from .odconv import ODConv1d, ODConv2d, ODConv3d

__all__ = ['ODConv1d', 'ODConv2d', 'ODConv3d', 'ODConvAttention', 'set_temperature']
