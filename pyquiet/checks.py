"""Checks of arguments that every system makes, and their words."""

import math
from numbers import Real
from typing import Any, TypeVar, get_args

T = TypeVar("T")


def check_count(name: str, value: int, *, least: int) -> int:
    """`value`, if it is an int of at least `least`; else a TypeError or ValueError that names it."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def some_of(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_number(name: str, value: float) -> float:
    """`value`, if it is a real number, numpy's among them; else a TypeError that names it."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    return value


def check_fraction(name: str, value: float) -> float:
    """`value`, if it lies in [0, 1]; else a TypeError or ValueError that names it."""
    if not 0 <= check_number(name, value) <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return value


def check_positive(name: str, value: float) -> float:
    """`value`, if it is a finite number above 0; else a TypeError or ValueError that names it."""
    if not 0 < check_number(name, value) < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {value}")
    return value


def check_weight(name: str, value: float) -> float:
    """`value`, if it is a finite number of at least 0; else a TypeError or ValueError that names it."""
    if not 0 <= check_number(name, value) < math.inf:
        raise ValueError(f"{name} must be a finite number of at least 0, got {value}")
    return value


def check_word(name: str, value: T, words: Any) -> T:
    """`value`, if it is one of `words`, a `Literal` or the words themselves; else a ValueError that names it."""
    known = get_args(words) or tuple(words)
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    return value


def check_text(name: str, text: str) -> str:
    """`text`, if it can be written in UTF-8; else a ValueError that names it."""
    if any("\ud800" <= character <= "\udfff" for character in text):  # so Python hands on bytes it cannot decode
        raise ValueError(f"{name}: not UTF-8 text")
    return text


def can_think(model: object) -> bool:
    """Whether it is a thinking model and no plain one."""
    return hasattr(model, "think_at_every_token")
