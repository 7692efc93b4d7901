"""Hooks of MMEngine's runner."""

from .attention import ODConvAttentionHook
from .temperature import ODConvTemperatureHook

__all__ = ['ODConvAttentionHook', 'ODConvTemperatureHook']
