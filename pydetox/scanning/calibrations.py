"""The calibrations of a run: one for all suspects, or one for each distance from the base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..detect.distance import too_far


class Calibrations:
    """The calibrations that a run has made, as plain data, by the distance of their references.

    The distance is None for references that are not matched to suspects.
    """

    def __init__(self) -> None:
        """Begin without any calibration."""
        self.made: dict[float | None, dict[str, Any]] = {}
        self._unfit: dict[float | None, str] = {}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any] | None) -> Calibrations:
        """Read back what `to_dict` returned; None has no calibration."""
        found = cls()
        if content is not None:
            for one in (content, *content.get("rungs", ())):
                found.made[one.get("distance")] = {**one, "rungs": []}
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return all calibrations as one, as `Calibration.with_rungs` has them."""
        first, *others = (self.made[rung] for rung in sorted(self.made, key=_order))
        return {**first, "rungs": others}

    def missing(self, wanted: Iterable[float | None], *, matched: bool) -> list[float | None]:
        """Return the distances without a calibration, in order.

        wanted: The distances that are needed. matched: Whether references are matched to suspects.
        Suspects without a distance then have no references.
        """
        rungs = {rung for rung in wanted if rung is not None or not matched}
        return sorted(rungs - set(self.made), key=_order)

    def add(self, rung: float | None, result: dict[str, Any]) -> None:
        """Keep what a worker made for a distance: a calibration, or why there is none."""
        if "unfit" in result:
            self._unfit[rung] = result["unfit"]
        else:
            self.made[rung] = result

    def of(
        self, rungs: Mapping[float | None, float], distance: float | None
    ) -> tuple[dict[str, Any] | None, str | None]:
        """Return the calibration for a suspect, or else the reason why there is none.

        rungs: The distances of the references that it needs, each with its weight. distance: Its
        own. Only these references are returned, so that a verdict does not depend on what else is
        scanned.
        """
        if rungs:
            nearest = max(rungs, key=rungs.__getitem__)
            if nearest in self.made:
                first, *others = (self.made[r] for r in sorted(rungs, key=_order) if r in self.made)
                return {**first, "rungs": others}, None
            if nearest in self._unfit:
                return None, self._unfit[nearest]
        if distance is None:
            return None, "the base has other weights than this model"
        if distance == 0:
            return None, None  # the scan says that it is compared with itself
        return None, too_far(distance)


def _order(rung: float | None) -> float:
    return rung or 0.0
