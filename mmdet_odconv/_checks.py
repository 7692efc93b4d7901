"""Checks of the numbers that users give to a layer or hook, in Python or in a config."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any


class ArgumentError(ValueError):
    """An argument of a layer or hook is of the wrong kind or out of range; the message names it.

    Attributes:
        key (str, optional): The key under which a config has what is refused, if it is always one.
    """

    key: str | None = None


def check_integer(name: str, value: Any, least: int) -> int:
    """``value`` as an int.

    Raises:
        ArgumentError: It is no integer, or less than ``least``.
    """
    if not _is_integer(value):
        raise ArgumentError(f'{name} must be an integer, got {value!r}')
    if value < least:
        raise ArgumentError(f'{name} must be at least {least}, got {value}')
    return int(value)


def check_sizes(name: str, value: Any, ndim: int, least: int) -> tuple[int, ...]:
    """``value``, an int for all dimensions or one for each, as ``ndim`` ints.

    Raises:
        ArgumentError: It is neither of the two, or one of the ints is less than ``least``.
    """
    sizes = tuple(value) if isinstance(value, Sequence) else (value,) * ndim
    if len(sizes) != ndim or not all(_is_integer(size) and size >= least for size in sizes):
        raise ArgumentError(
            f'{name} must be an int or {ndim} ints, each at least {least}, got {value!r}'
        )
    return sizes


def check_number(name: str, value: Any) -> float:
    """``value`` as a float.

    Raises:
        ArgumentError: It is no number, or not a finite one.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ArgumentError(f'{name} must be a number, got {value!r}')
    if not math.isfinite(value):
        raise ArgumentError(f'{name} must be finite, got {value}')
    return float(value)


def check_positive(name: str, value: Any) -> float:
    """``value`` as a float.

    Raises:
        ArgumentError: It is no number above 0.
    """
    number = check_number(name, value)
    if number <= 0:
        raise ArgumentError(f'{name} must be positive, got {value}')
    return number


def _is_integer(value: Any) -> bool:
    # By the exact type first, which is much faster: each call of the operator asks.
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))
