"""Conversion of built models: their plain convolutions become ODConv layers."""

from .builder import build_odconv_model
from .convert import convert_to_odconv
from .report import ConversionReport

__all__ = ['ConversionReport', 'build_odconv_model', 'convert_to_odconv']
