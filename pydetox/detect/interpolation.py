"""References for one suspect, made of the two sets that lie around its distance.

Class effects depend on how far a model has moved, and not in proportion: on Fashion-MNIST, the log
size of a class changed by up to two deviations from one rung to the next (docs/foundation.md).
References at the nearest rung would be off by up to half of that. Therefore the location of each
class is interpolated between the two rungs around the suspect. Its scatter is that within the
rungs, so that the change from rung to rung is no part of it. With R references in each, it has
2 (R - 1) degrees of freedom instead of R - 1, and the location has a variance of 1/R at a rung and
1/(2R) halfway.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

from ..errors import UsageError
from .calibration import Calibration


def around(calibration: Calibration, weights: Mapping[float, float]) -> Calibration | None:
    """Return the references at some rungs as one calibration, or None if the nearest is missing.

    calibration: With all its `rungs`. weights: Of each rung, as `distance.rungs_around` returns
    them. If one rung is missing that is not the nearest, the nearest one stands alone.
    """
    found = {
        one.distance: replace(one, rungs=())
        for one in (calibration, *calibration.rungs)
        if one.distance in weights
    }
    nearest = max(weights, key=weights.__getitem__)
    if nearest not in found:
        return None
    if len(found) == 1:
        return found[nearest]
    rungs = sorted(weights)
    return _joined([found[rung] for rung in rungs], [weights[rung] for rung in rungs])


def _joined(sets: list[Calibration], weights: list[float]) -> Calibration:
    first = sets[0]
    if len({_without_distance(one.key) for one in sets}) > 1:
        raise UsageError(
            "the references of the calibration at two distances are of different searches: "
            "calibrate again"
        )
    return replace(
        first,
        p_l1=tuple(row for one in sets for row in one.p_l1),
        models=tuple(name for one in sets for name in one.models),
        history=tuple(
            tuple(row for rows in same_step for row in rows)
            for same_step in zip(*(one.history for one in sets), strict=True)
        ),
        others=tuple(
            _joined([one.of(other.family) for one in sets], weights) for other in first.others
        ),
        digests=tuple(digest for one in sets for digest in one.digests),
        tower_passes=sum(one.tower_passes for one in sets),
        sets=tuple((len(one.p_l1), weight) for one, weight in zip(sets, weights, strict=True)),
    )


def _without_distance(key: str) -> str:
    try:
        content = json.loads(key)
    except ValueError:
        return key
    if isinstance(content, dict):
        content.pop("distance", None)
    return json.dumps(content, sort_keys=True)
