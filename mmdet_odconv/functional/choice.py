"""Which strategy computes a convolution fastest: a table of rules, or a measurement."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from .geometry import Geometry

STRATEGIES = ('formula', 'kernels', 'columns', 'shared')

# Memory of the per-sample kernels that are made at a time; larger ones leave the cache, and from
# 32 MiB on the C library's allocator takes fresh pages from the system at every call.
BLOCK_BYTES = {'kernels': 24 << 20, 'columns': 4 << 20, 'shared': 0}


def block_bytes(strategy: str, batch: int) -> int:
    """``BLOCK_BYTES``, but for a single sample, which reads its kernels once in any case."""
    return BLOCK_BYTES['kernels' if batch == 1 else strategy]


class Work(NamedTuple):
    """What a rule looks at.

    Attributes:
        device (str): Type of the device.
        training (bool): Whether a backward pass follows.
        kernel_num (int): K.
        depthwise (bool): Whether each group reads a single channel.
        positions (int): Output positions of a sample.
        kernel_bytes (int): Size of all per-sample kernels.
    """

    device: str
    training: bool
    kernel_num: int
    depthwise: bool
    positions: int
    kernel_bytes: int


class Rule(NamedTuple):
    """A strategy, and the work for which it is the fastest."""

    strategy: str
    applies: Callable[[Work], bool]


# The first that applies. Measured layer by layer on the shapes of a ResNet-50 at 224² and 640²,
# batch 1, 2 and 8, K = 1 and 4, forward and backward, on two cores of an AMD EPYC (Zen 3); times
# are those of a plain convolution of the same shape.
RULES = (
    # Not measured on an accelerator: the form with the fewest calls. 'benchmark' finds out.
    Rule('kernels', lambda work: work.device != 'cpu'),
    # A group's kernel is one row: any other form would make a call for each channel.
    Rule('kernels', lambda work: work.depthwise),
    # K = 1. 512→512 3×3 at 7×7, batch 8: training shared 1.4, kernels 3.8; 512→2048 1×1 there:
    # 1.3 and 2.7. 256→1024 1×1 at 14×14: inference shared 1.1, kernels 1.2; training 1.4 and 1.3.
    Rule(
        'shared',
        lambda work: work.kernel_num == 1 and work.positions <= (64 if work.training else 256),
    ),
    # 512→2048 1×1 at 7×7, batch 8, K = 4: inference columns 1.9, kernels 2.3; training 2.3 and 3.0.
    # 512→512 3×3 at 7×7: inference 2.2 and 2.4; training 2.8 and 3.8; one image 2.1 and 2.2.
    # 256→256 3×3 at 14×14: inference columns 1.7, kernels 1.4; training 2.4 and 1.6.
    Rule('columns', lambda work: work.positions <= 64 and work.kernel_bytes >= 4 << 20),
    # 56×56: inference 0.9 to 1.1, as the products for 1×1 are faster than plain convolutions.
    Rule('kernels', lambda work: True),
)

_measured: dict[tuple[object, ...], str] = {}


class Choice(NamedTuple):
    """A convolution and how it was computed.

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


_records: list[list[Choice]] = []


@contextmanager
def record_strategies() -> Iterator[list[Choice]]:
    """A list that gets the strategy of every convolution computed inside the ``with`` block.

    Example::

        with record_strategies() as choices:
            model(x)
        print(*choices, sep='\\n')
    """
    record: list[Choice] = []
    _records.append(record)
    try:
        yield record
    finally:
        _records[:] = [other for other in _records if other is not record]


def record(x: Tensor, bank: Tensor, training: bool, strategy: str) -> None:
    """Enter a choice into the lists of :func:`record_strategies`."""
    for choices in _records:
        choices.append(Choice(tuple(x.shape), tuple(bank.shape), training, strategy))


def check_strategy(strategy: str, kernel_num: int) -> None:
    """Raise ValueError where there is no such strategy, or none for a bank of K kernels."""
    if strategy not in (*STRATEGIES, 'auto', 'benchmark'):
        raise ValueError(
            f"strategy must be 'auto', 'benchmark' or one of {STRATEGIES}, got {strategy!r}"
        )
    if strategy == 'shared' and kernel_num > 1:
        raise ValueError(
            f"strategy 'shared' needs a bank of one kernel, got kernel_num={kernel_num}"
        )


def choose(strategy: str, x: Tensor, bank: Tensor, geometry: Geometry, training: bool) -> str:
    """The name of the strategy for a call that leaves it open.

    Args:
        strategy (str): 'auto', 'benchmark' or one of ``STRATEGIES``.
        x, bank, geometry: Of the call.
        training (bool): Whether a backward pass follows.

    Returns:
        str: One of ``STRATEGIES``, or 'benchmark', which is left to :func:`fastest`.

    Raises:
        ValueError: There is no such strategy, or it cannot compute this.
    """
    if strategy != 'auto':
        check_strategy(strategy, len(bank))
    # No samples have no kernels, and what follows the operations must be able to follow these.
    if x.shape[0] == 0 or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return 'formula'
    if strategy != 'auto':
        return strategy
    return _by_rules(x.device.type, x.shape, bank.shape, bank.element_size(), geometry, training)


@lru_cache(maxsize=4096)
def _by_rules(
    device: str,
    x_shape: torch.Size,
    bank_shape: torch.Size,
    element_size: int,
    geometry: Geometry,
    training: bool,
) -> str:
    """The strategy of the first rule that applies; remembered, as it takes time to work out."""
    kernel_num, *kernel_shape = bank_shape
    work = Work(
        device=device,
        training=training,
        kernel_num=kernel_num,
        depthwise=kernel_shape[1] == 1,
        positions=math.prod(geometry.output_size(x_shape[2:], bank_shape[3:])),
        kernel_bytes=x_shape[0] * math.prod(kernel_shape) * element_size,
    )
    return next(rule.strategy for rule in RULES if rule.applies(work))


def fastest(
    candidates: Sequence[str], run: Callable[[str], object], key: tuple[object, ...], device: str
) -> str:
    """The candidate whose ``run`` takes the least time, measured once for each ``key``.

    Args:
        candidates (Sequence[str]): Names of strategies.
        run (Callable[[str], object]): Does the work by the strategy of that name.
        key (tuple): What the time depends on.
        device (str): Type of the device, to wait for its end.
    """
    if key not in _measured:
        times = {name: _time(partial(run, name), device) for name in candidates}
        _measured[key] = min(times, key=lambda name: times[name])
    return _measured[key]


def _time(run: Callable[[], object], device: str, repeats: int = 3) -> float:
    """Least seconds of several runs after a first one that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _wait(device: str) -> None:
    if device != 'cpu':
        getattr(torch, device).synchronize()
