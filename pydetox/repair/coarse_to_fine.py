"""Which values of alpha are measured: a few first, then those between them that still decide.

The ASR of a trigger falls along a trigger vector, and CA falls and drift grows along it. So most of
the candidates decide nothing: those far below the smallest alpha within the limits, and those above
the safety factor times it. Every `stride`-th candidate is measured first, from the smallest on,
until one is within the limits. Then those between it and the one before it are measured, and the
last one within the safety factor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .configuration import UnlearnConfig

#: The number of images that each trigger is tried on for every alpha, for any number of triggers.
#: One of them is 2%, the smallest success that can be distinguished from none.
LEAST_ATTACKED = 50


@dataclass(frozen=True)
class Measured:
    """What is known of one alpha.

    Attributes:
        accuracy: The clean accuracy, in [0, 1].
        success: The ASR of each trigger, in [0, 1].
        drift: The drift; 0 if it is not limited.
    """

    accuracy: float
    success: tuple[float, ...]
    drift: float = 0.0

    @property
    def mean_success(self) -> float:
        """The mean ASR of all triggers."""
        return sum(self.success) / len(self.success)


@dataclass(frozen=True)
class Limits:
    """What an alpha has to keep and to remove.

    Attributes:
        config: The limits of a repair.
        accuracy_before: The clean accuracy that CA is compared with.
        reserve: The share of the accuracy and drift to spend that is left to later passes if no
            alpha finishes.
    """

    config: UnlearnConfig
    accuracy_before: float
    reserve: float = 0.0

    def keeps(self, one: Measured, reserve: float = 0.0) -> bool:
        """Whether an alpha keeps accuracy and drift, and this share of what may be spent."""
        kept = self.config.min_accuracy_kept
        least = (kept + reserve * (1 - kept)) * self.accuracy_before
        return one.accuracy >= least and one.drift <= (1 - reserve) * self.config.max_drift

    def removes(self, one: Measured) -> bool:
        """Whether every trigger is removed."""
        return max(one.success) <= self.config.max_attack_success

    def good(self, one: Measured) -> bool:
        """Whether all limits hold."""
        return self.keeps(one) and self.removes(one)

    def safest(self, coefficients: Sequence[float], first: int) -> float:
        """Return the largest alpha that the smallest good one, number `first`, is raised to."""
        return self.config.safety_factor * coefficients[first] + 1e-9


def measure_alphas(
    measure: Callable[[int], Measured],
    coefficients: Sequence[float],
    limits: Limits,
    *,
    stride: int,
) -> dict[int, Measured]:
    """Return what was measured, by the index of the alpha, ascending; alpha 0 always is.

    measure: Measures the alpha of an index. coefficients: The candidates, ascending, the first of
    them 0. stride: 1 measures all candidates.

    If no alpha is good, those around the end of what keeps accuracy and drift are measured, with
    and without the reserve, and the smallest that removes the triggers, whatever it costs.
    """
    known: dict[int, Measured] = {}

    def at(index: int) -> Measured:
        if index not in known:
            known[index] = measure(index)
        return known[index]

    def smallest(holds: Callable[[Measured], bool]) -> int | None:
        """Return the smallest such alpha, also among those after the measured one before it."""
        found = next((k for k in sorted(known) if holds(known[k])), None)
        if found is None:
            return None
        below = max((k for k in known if k < found), default=found)
        return next(k for k in range(below, found + 1) if holds(at(k)))

    count = len(coefficients)
    if stride == 1:
        return {k: at(k) for k in range(count)}
    for k in sorted({*range(0, count, stride), count - 1}):
        # Where the triggers are removed at too high a price, a larger alpha only costs more.
        if limits.removes(at(k)):
            break
    for reserve in dict.fromkeys((0.0, limits.reserve)):
        if any(map(limits.good, known.values())):
            break
        for low, high in pairwise(sorted(known)):
            if limits.keeps(at(low), reserve) and not limits.keeps(at(high), reserve):
                for k in range(low + 1, high):
                    at(k)
    first = smallest(limits.good)
    if first is None:
        smallest(limits.removes)
    else:
        within = limits.safest(coefficients, first)
        for k in range(count - 1, first, -1):
            if coefficients[k] <= within and limits.good(at(k)):
                break
    return dict(sorted(known.items()))
