"""Early elimination: the search gives up classes that can no longer be the outlier.

Only the class whose trigger stands out most in the end decides a verdict. Most classes show long
before the end that they will not be this class. At each recorded step (see
`AdvancedInversionConfig.interval`), every class gets a score, and classes below a floor are
dropped. In sequential testing, this is called stopping for futility. A dropped class is never
flagged, so dropping can hide an outlier but cannot create one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import UsageError

#: A function from a step and the P-L1 of the C classes after it (inf if nothing was found) to C
#: scores. A class that stands out more has a larger score.
Score = Callable[[int, Sequence[float]], Sequence[float]]


def relative_to_smallest(step: int, sizes: Sequence[float]) -> tuple[float, ...]:
    """Return log(smallest / size) per class, at most 0. This score needs no reference models.

    It suits a search that flags the class with the smallest mask, as Neural Cleanse does. A class
    for which nothing was found gets -inf, unless nothing was found for any class.
    """
    smallest = min(sizes)
    if math.isinf(smallest):
        return (0.0,) * len(sizes)
    return tuple(math.log(smallest / size) if math.isfinite(size) else -math.inf for size in sizes)


@dataclass(frozen=True)
class Elimination:
    """The rule that decides which classes to drop.

    Attributes:
        score: The function that measures how much each class stands out.
        floor: The score below which a class is dropped.
        restarts: The number of triggers per class; they are adjacent. The size of a class is that
            of its smallest trigger.
        first: The number of steps before which no class is dropped. Sizes carry no information
            until the weight of the mask's size has grown; docs/method.md has the measurements.
        kept: The number of classes, those with the highest scores, that are never dropped.
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

        sizes: The P-L1 of the smallest working trigger of each of the K searches so far; inf if
            there is none.
        contenders: bool [K], the searches that have not been dropped.
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
