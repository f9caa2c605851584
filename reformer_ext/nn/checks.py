"""Checks of arguments that modules share. Errors: ``name: expected argument ..., got value``."""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch

__all__ = [
    "check_bool",
    "check_dropout",
    "check_int",
    "check_number",
    "check_scale",
    "check_window",
    "is_int",
    "is_number",
    "is_scale",
]


def is_int(value: object, least: int) -> bool:
    """Whether it is an integer (no bool) of at least so much."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def is_number(value: object) -> bool:
    """Whether it is a finite number (no bool)."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_int(name: str, argument: str, value: object, least: int = 1) -> None:
    """Raises ValueError in the name of a class unless the argument is an integer >= least."""
    if not is_int(value, least):
        raise ValueError(f"{name}: expected {argument} to be an integer >= {least}, got {value!r}")


def check_number(name: str, argument: str, value: object, above: float) -> None:
    """Raises ValueError in the name of a class unless the argument is a finite number > above."""
    if not (is_number(value) and value > above):  # type: ignore[operator]
        raise ValueError(f"{name}: expected {argument} to be a number > {above}, got {value!r}")


def check_bool(name: str, argument: str, value: object) -> None:
    """Raises ValueError in the name of a class unless the argument is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected {argument} to be True or False, got {value!r}")


def check_window(name: str, look_back: object, look_ahead: object) -> None:
    """Raises ValueError in the name of a class for numbers of chunks that are none."""
    check_int(name, "look_back", look_back, 0)
    if look_ahead is not None:
        check_int(name, "look_ahead", look_ahead, 0)


def check_dropout(name: str, value: object, argument: str = "dropout") -> None:
    """Raises ValueError in the name of a class unless the argument is a probability below 1."""
    if not (is_number(value) and 0 <= value < 1):  # type: ignore[operator]
        raise ValueError(f"{name}: expected {argument} in [0, 1), got {value!r}")


def check_scale(name: str, value: object, argument: str = "scale") -> None:
    """Raises ValueError in the name of a class unless the argument is None or a number that
    float32, in which logits are taken, can hold."""
    if not is_scale(value):
        raise ValueError(f"{name}: expected {argument} to be None or a number, got {value!r}")


def is_scale(value: object) -> bool:
    """Whether it is None or a number that float32 can hold."""
    largest = torch.finfo(torch.float32).max
    return value is None or (is_number(value) and abs(value) <= largest)  # type: ignore[arg-type]
