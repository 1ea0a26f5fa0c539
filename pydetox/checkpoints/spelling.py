"""Suggestions for names that nobody knows."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def close_matches(name: str, known: Sequence[str]) -> str:
    """``"; did you mean …?"`` for a mistyped name, or an empty string."""
    lower = {candidate.lower(): candidate for candidate in known}
    found = difflib.get_close_matches(name.lower(), list(lower), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(lower[match] for match in found)}?" if found else ""
