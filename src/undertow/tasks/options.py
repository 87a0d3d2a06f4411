"""Checks of a task's options, and options that are a number or a range of numbers with both ends included."""

from __future__ import annotations

import random
from collections.abc import Sequence

Range = int | tuple[int, int]


def check_whole(task: object, name: str, least: int, most: int | None = None) -> None:
    """Check an option. Raises ValueError (one line) unless it is a whole number from `least` to `most`."""
    value = getattr(task, name)
    if not _whole(value) or value < least or (most is not None and value > most):
        allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{type(task).__name__} {name}={value!r}: must be a whole number {allowed}")


def check_choice(task: object, name: str, allowed: Sequence) -> None:
    """Check an option. Raises ValueError (one line) unless it is one of `allowed`."""
    value = getattr(task, name)
    if value not in allowed:
        raise ValueError(f"{type(task).__name__} {name}={value!r}: allowed: {', '.join(map(str, allowed))}")


def check_range(task: object, name: str, least: int) -> None:
    """Check an option. Raises ValueError (one line) unless it is a whole number or an ordered pair of them.

    A pair that is written as a list (JSON, YAML) becomes a tuple, so that equal options are equal.
    """
    value = getattr(task, name)
    ends = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(ends) != 2 or not all(map(_whole, ends)) or not least <= ends[0] <= ends[1]:
        raise ValueError(
            f"{type(task).__name__} {name}={value!r}: must be a whole number of at least {least}, "
            "or a pair of them, the smaller first"
        )
    if isinstance(value, list):
        object.__setattr__(task, name, ends)  # tasks are frozen; this runs while one is made


def highest(value: Range) -> int:
    """The upper end of a range."""
    return value if isinstance(value, int) else value[1]


def pick(rng: random.Random, value: Range) -> int:
    """A number of the range, each equally likely."""
    return value if isinstance(value, int) else rng.randint(*value)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
