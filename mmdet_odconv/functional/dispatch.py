"""The one place that picks an implementation for a call of the operator.

Each says itself when it is the fastest; docs/performance.md has the measurements.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch

from .._checks import ArgumentError
from .cpu_grouped_conv import CpuGroupedConv
from .cpu_im2col import CpuIm2col
from .cpu_im2col_single_kernel import CpuIm2colSingleKernel
from .grouped_conv import GroupedConv
from .implementation import Geometry, Implementation, Problem

# The first that supports a problem, and says that it is the fastest for it, is picked.
PRIORITY: tuple[type[Implementation], ...] = (
    CpuIm2colSingleKernel,
    CpuIm2col,
    CpuGroupedConv,
    GroupedConv,
)
IMPLEMENTATIONS = {implementation.name: implementation for implementation in PRIORITY}
# 'reference' is the formula itself.
STRATEGIES = ('reference', *IMPLEMENTATIONS)


class Choice(NamedTuple):
    """A call of the operator and how it was computed.

    Attributes:
        input_shape (tuple[int, ...]): (B, C_in, *size).
        bank_shape (tuple[int, ...]): (K, C_out, C_in / groups, *kernel_size).
        training (bool): Whether a backward pass followed.
        strategy (str): One of ``STRATEGIES``.
    """

    input_shape: tuple[int, ...]
    bank_shape: tuple[int, ...]
    training: bool
    strategy: str


# The lists of all `record_strategies` that are open.
RECORDS: list[list[Choice]] = []


@contextmanager
def record_strategies() -> Iterator[list[Choice]]:
    """Record how each convolution inside the ``with`` block is computed.

    What becomes plain operations without a choice is left out: traces, transforms of functions and
    empty batches.

    Example::

        with record_strategies() as choices:
            model(x)
        print(*choices, sep='\\n')
    """
    record: list[Choice] = []
    RECORDS.append(record)
    try:
        yield record
    finally:
        RECORDS[:] = [other for other in RECORDS if other is not record]


def record(input_shape: torch.Size, bank_shape: torch.Size, training: bool, strategy: str) -> None:
    """Add a choice to the lists of :func:`record_strategies`."""
    for choices in RECORDS:
        choices.append(Choice(tuple(input_shape), tuple(bank_shape), training, strategy))


def check_strategy(strategy: str, kernel_num: int) -> None:
    """Refuse a strategy that does not exist or that cannot take a bank of K kernels.

    Raises:
        ArgumentError: A ValueError. The message names the strategy and what is possible.
    """
    if strategy not in (*STRATEGIES, 'auto'):
        raise ArgumentError(f"strategy must be 'auto' or one of {STRATEGIES}, got {strategy!r}")
    if strategy == CpuIm2colSingleKernel.name:
        # On whatever device the layer will be used.
        problem = Problem('cpu', False, kernel_num, False, False, 1, 1, 1)
        _require_support(CpuIm2colSingleKernel, problem)


@lru_cache(maxsize=4096)
def pick(
    strategy: str,
    device: str,
    x_shape: torch.Size,
    bank_shape: torch.Size,
    element_size: int,
    geometry: Geometry,
    training: bool,
) -> type[Implementation] | None:
    """The implementation for a call; the answers are remembered, because this takes time.

    Args:
        strategy (str): 'auto' or one of ``STRATEGIES``.
        device (str): Type of the device.
        x_shape, bank_shape (torch.Size): Shapes of the input and of the bank.
        element_size (int): Bytes of an entry of the bank.
        geometry (Geometry): Geometry of the convolution.
        training (bool): Whether a backward pass will follow.

    Returns:
        type[Implementation], optional: None stands for the formula.

    Raises:
        ValueError: The strategy is unknown, or does not support this call; the message says why.
    """
    check_strategy(strategy, bank_shape[0])
    if strategy == 'reference' or _is_empty(x_shape, bank_shape, geometry):
        return None
    problem = _problem(device, x_shape, bank_shape, element_size, geometry, training)
    if strategy == 'auto':
        return next(
            implementation
            for implementation in PRIORITY
            if implementation.unsupported_reason(problem) is None
            and implementation.is_fastest(problem)
        )
    _require_support(IMPLEMENTATIONS[strategy], problem)
    return IMPLEMENTATIONS[strategy]


def _is_empty(x_shape: torch.Size, bank_shape: torch.Size, geometry: Geometry) -> bool:
    """Whether there is no sample, or no output position (PyTorch's convolution words the error)."""
    size = geometry.output_size(x_shape[2:], bank_shape[3:])
    return x_shape[0] == 0 or any(length < 1 for length in size)


def _problem(
    device: str,
    x_shape: torch.Size,
    bank_shape: torch.Size,
    element_size: int,
    geometry: Geometry,
    training: bool,
) -> Problem:
    kernel_num, *kernel_shape = bank_shape
    return Problem(
        device=device,
        training=training,
        kernel_num=kernel_num,
        depthwise=kernel_shape[1] == 1,
        pointwise=math.prod(kernel_shape[2:]) == 1,
        rows=kernel_shape[0] // geometry.groups,
        positions=math.prod(geometry.output_size(x_shape[2:], bank_shape[3:])),
        kernel_bytes=x_shape[0] * math.prod(kernel_shape) * element_size,
    )


def _require_support(implementation: type[Implementation], problem: Problem) -> None:
    reason = implementation.unsupported_reason(problem)
    if reason is not None:
        raise ArgumentError(f'strategy {implementation.name!r} cannot be used: {reason}')
