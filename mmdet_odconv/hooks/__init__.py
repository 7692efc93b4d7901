"""Hooks of MMEngine's runner."""

from .checkpoint import CheckpointError, SafeCheckpointHook
from .non_finite import NonFiniteError, NonFiniteHook
from .preemption import PreemptionHook
from .temperature import ODConvTemperatureHook

__all__ = [
    'CheckpointError',
    'NonFiniteError',
    'NonFiniteHook',
    'ODConvTemperatureHook',
    'PreemptionHook',
    'SafeCheckpointHook',
]
