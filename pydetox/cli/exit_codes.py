"""What the exit code of a command says."""

from __future__ import annotations

from collections.abc import Iterable

CLEAN = 0  # nothing found, or the work is done
FOUND = 1  # a backdoor, or a suspicion of one
ERROR = 2  # something could not be done or judged; it outranks a finding
NOTHING = 3  # there is nothing to scan
USAGE = 4  # the command line makes no sense; nothing was done
INTERRUPTED = 130  # Ctrl-C, as shells report it: 128 + SIGINT

_OF_VERDICT = {"clean": CLEAN, "suspicious": FOUND, "backdoored": FOUND}


def of_verdict(verdict: str) -> int:
    """Return the exit code of one verdict; `inconclusive` counts as an error."""
    return _OF_VERDICT.get(verdict, ERROR)


def combine(codes: Iterable[int]) -> int:
    """Return the code of several results: the one that outranks the others."""
    return max(codes, default=CLEAN)
