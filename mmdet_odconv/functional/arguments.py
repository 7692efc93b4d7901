"""Checks of the numbers that users give to a layer or hook, in Python or in a config."""

from numbers import Integral, Real
from typing import Any


class ArgumentError(ValueError):
    """An argument of a layer is of the wrong kind or out of its range; the message names it."""


def check_integer(name: str, value: Any, least: int) -> int:
    """``value`` as an int.

    Raises:
        ArgumentError: It is no integer, or less than ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ArgumentError(f'{name} must be an integer, got {value!r}')
    if value < least:
        raise ArgumentError(f'{name} must be at least {least}, got {value}')
    return int(value)


def check_number(name: str, value: Any) -> float:
    """``value`` as a float.

    Raises:
        ArgumentError: It is no number.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ArgumentError(f'{name} must be a number, got {value!r}')
    return float(value)


def check_positive(name: str, value: Any) -> float:
    """``value`` as a float.

    Raises:
        ArgumentError: It is no number above 0.
    """
    number = check_number(name, value)
    if not number > 0:
        raise ArgumentError(f'{name} must be positive, got {value}')
    return number
