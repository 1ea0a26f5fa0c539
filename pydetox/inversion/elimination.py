"""Classes that can no longer be the outlier are given up before the search ends.

A search for every class of a model is a contest: only the class whose trigger stands out in the end
decides. Long before that, most classes show that it will not be theirs. At each look (see
`InversionConfig.interval`) every class gets a score; those below a floor are dropped. In sequential
testing this is stopping for futility: a class that is dropped is never flagged, so that dropping
can hide an outlier, but never make one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import UsageError

#: (step, P-L1 of the C classes after it, inf where nothing was found) -> C scores, larger for a
#: class that stands out more.
Score = Callable[[int, Sequence[float]], Sequence[float]]


def relative_to_smallest(step: int, sizes: Sequence[float]) -> tuple[float, ...]:
    """Return log(smallest / size) per class, at most 0: a score without reference models.

    It fits a search that flags the class with the smallest mask, as Neural Cleanse does. A class
    for which nothing was found gets -inf, unless that holds for all of them.
    """
    smallest = min(sizes)
    if math.isinf(smallest):
        return (0.0,) * len(sizes)
    return tuple(math.log(smallest / size) if math.isfinite(size) else -math.inf for size in sizes)


@dataclass(frozen=True)
class Elimination:
    """Which classes to drop.

    Attributes:
        score: How much each class stands out.
        floor: Classes with a lower score are dropped.
        restarts: Triggers per class, next to each other; a class has the size of its smallest one.
        first: No class is dropped before that many steps: sizes say nothing until the weight of the
            mask's size has grown. docs/method.md has the measurements.
        kept: That many classes, those with the highest scores, run to the end whatever they score.
    """

    score: Score
    floor: float
    restarts: int = 1
    first: int = 60
    kept: int = 1

    def __post_init__(self) -> None:
        if self.restarts < 1 or self.kept < 1 or math.isnan(self.floor):
            raise UsageError(
                f"restarts {self.restarts}, kept {self.kept}, floor {self.floor}; expected at "
                "least 1 each and a number"
            )

    def drop(
        self, step: int, sizes: Sequence[float], contenders: Sequence[bool]
    ) -> tuple[bool, ...]:
        """Return which of the K triggers to drop after a step.

        sizes: P-L1 of the smallest working trigger of each of the K searches so far, inf if none.
        contenders: bool [K], those that have not been dropped.
        """
        count = self.restarts
        if len(sizes) % count:
            raise UsageError(f"{len(sizes)} triggers; expected a multiple of {count} restarts")
        nothing = (False,) * len(sizes)
        if step < self.first:
            return nothing
        scores = self.score(step, [min(sizes[k : k + count]) for k in range(0, len(sizes), count)])
        running = [c for c in range(len(scores)) if contenders[c * count]]
        ranked = sorted(running, key=lambda c: -scores[c])
        out = {c for c in ranked[self.kept :] if scores[c] < self.floor}
        return tuple(k // count in out for k in range(len(sizes)))
