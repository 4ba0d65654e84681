"""What a key of the configuration allows, kept beside the key; refusals name the key and the
remedy.
"""

import difflib
import math
from collections.abc import Sequence
from dataclasses import field
from typing import Any

from omegaconf import MISSING

from mat.suite.errors import UserError

INF = math.inf


def number(low: float, high: float = INF, default: Any = MISSING, *, above: bool = False) -> Any:
    """A key whose value is within [low, high], or (low, high] with ``above``."""
    return field(default=default, metadata={"bounds": (low, high, above)})


def numbers(
    low: float, high: float = INF, default: Sequence[float] = (), *, above: bool = False
) -> Any:
    """A key whose value is a list of numbers, each within [low, high], or (low, high] with
    ``above``.
    """
    return field(default_factory=lambda: list(default), metadata={"bounds": (low, high, above)})


def choice(*options: str, default: str = MISSING) -> Any:
    """A key whose value is one of the options."""
    return field(default=default, metadata={"options": options})


def one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse a value that is none of those allowed."""
    if value not in allowed:
        near = difflib.get_close_matches(value, allowed, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(allowed)}."
        raise UserError(f"{key}={value} is not known: {hint}")


def between(key: str, value: float, low: float, high: float = INF, above: bool = False) -> None:
    """Refuse a number outside [low, high], or (low, high] with ``above``; infinity always."""
    if not (low < value if above else low <= value) or not value <= high or math.isinf(value):
        left, right = "(" if above else "[", ")" if math.isinf(high) else "]"
        raise UserError(f"{key}={value} is out of range: set it within {left}{low}, {high}{right}.")


def divides(key: str, value: int, whole_key: str, whole: int) -> None:
    """Refuse a number that is no divisor of another."""
    if whole % value:
        raise UserError(f"{key}={value} does not divide {whole_key}={whole}: choose a divisor.")


def one_line(key: str, value: str) -> None:
    """Refuse a path or name that is empty or holds line breaks and the like."""
    if not value.strip() or not value.isprintable():
        raise UserError(f"{key}={value!r} is no name of a folder: give printable characters.")
