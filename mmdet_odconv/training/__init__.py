"""Training with ODConv: rates of attentions and banks, and hooks of MMEngine's runner."""

from .attention import ODConvAttentionHook
from .calibration import ODConvCalibrationHook
from .optim import ODConvOptimWrapperConstructor
from .temperature import ODConvTemperatureHook, annealed_temperature

__all__ = [
    'ODConvAttentionHook',
    'ODConvCalibrationHook',
    'ODConvOptimWrapperConstructor',
    'ODConvTemperatureHook',
    'annealed_temperature',
]
