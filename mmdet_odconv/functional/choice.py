"""Which strategy computes a convolution fastest: a table of rules, or a measurement."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import Attentions
from .geometry import Geometry

STRATEGIES = ('formula', 'kernels', 'columns', 'shared')

# Memory of the per-sample kernels that are made at a time; larger ones leave the cache.
BLOCK_BYTES = {'kernels': 16 << 20, 'columns': 4 << 20, 'shared': 0}


def choose(
    strategy: str, x: Tensor, bank: Tensor, attentions: Attentions, geometry: Geometry
) -> str:
    """The name of the strategy for this call, one of ``STRATEGIES``."""
    if strategy not in (*STRATEGIES, 'auto', 'benchmark'):
        raise ValueError(
            f"strategy must be 'auto', 'benchmark' or one of {STRATEGIES}, got {strategy!r}"
        )
    if strategy=='auto': raise NotImplementedError
    return strategy
