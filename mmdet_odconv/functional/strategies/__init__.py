"""Equivalent ways to compute an omni-dimensional dynamic convolution, one a file."""

from . import columns, formula, kernels, shared

__all__ = ['columns', 'formula', 'kernels', 'shared']
