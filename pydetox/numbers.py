"""Checks of the numbers that a caller gives."""

from __future__ import annotations

import math
from numbers import Integral, Real

from .errors import UsageError


def require_whole(what: str, value: object, least: int, meaning: str = "") -> int:
    """Return a whole number of at least `least`; raise UsageError for anything else.

    what: The name of the value in the message. meaning: What the number is, for the message.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise UsageError(
            f"{what} is {value!r}; expected a whole number of at least {least}{meaning}"
        )
    return int(value)


def require_number(
    what: str, value: object, *, above: float = -math.inf, meaning: str = ""
) -> float:
    """Return a finite number above a limit; raise UsageError for anything else.

    value: A number of Python or numpy, or a tensor or an array of one. what, meaning: As above.
    """
    number = _plain(value)
    if (
        isinstance(number, bool)
        or not isinstance(number, Real)
        or not above < float(number) < math.inf
    ):
        limit = f" above {above:g}" if above > -math.inf else ""
        raise UsageError(f"{what} is {value!r}; expected a finite number{limit}{meaning}")
    return float(number)


def _plain(value: object) -> object:
    """Return the number in an array or a tensor without dimensions, or of one element."""
    shape, item = getattr(value, "shape", None), getattr(value, "item", None)
    return item() if shape is not None and callable(item) and math.prod(shape) == 1 else value
