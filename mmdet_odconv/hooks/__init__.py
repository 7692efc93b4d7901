"""Hooks of MMEngine's runner."""

from .temperature import ODConvTemperatureHook

__all__ = ['ODConvTemperatureHook']
