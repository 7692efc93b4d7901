"""Hooks of MMEngine's runner."""

from .attention import ODConvAttentionHook
from .calibration import ODConvCalibrationHook
from .checkpoint import CheckpointError, SafeCheckpointHook
from .non_finite import NonFiniteError, NonFiniteHook
from .preemption import PreemptionHook
from .temperature import ODConvTemperatureHook

__all__ = [
    'CheckpointError',
    'NonFiniteError',
    'NonFiniteHook',
    'ODConvAttentionHook',
    'ODConvCalibrationHook',
    'ODConvTemperatureHook',
    'PreemptionHook',
    'SafeCheckpointHook',
]
