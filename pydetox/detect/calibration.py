"""The sizes of triggers in clean reference models, and how far below them a suspect's are.

With x_c the log P-L1 of class c in the suspect and mu_c its mean over R references, the model of
clean sizes has two ways, classes and models:

    log P-L1 of class c in model m = a_c + b_m + e_mc,   e_mc normal with variance sigma_c^2.

b_m shifts all classes of a model alike. It depends on how far the model was trained and how long it
was searched. There are too few references to learn how large b is, so nothing is assumed about it.
Instead, a class is judged relative to the other classes of its model. Its margin is d_c = mu_c -
x_c, and d_c - median_{j != c} d_j counts. The median ensures that neither a second backdoor nor a
class for which nothing was found changes what the first class is compared with. The contrasts of
the references show how large this difference is in clean models (see `pydetox.detect.scatter`).

A label-free search has one size per model and no other classes. There, b_m and e_mc cannot be
separated, and (mu - x) / (s sqrt(1 + 1/R)) follows Student's t with R - 1 degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri

from ..errors import UsageError
from ..reporting.serialize import rows_from_json, rows_to_json
from .scatter import (
    SMALLEST_DEVIATION,
    SMALLEST_EFFORT_DEVIATION,
    Array,
    Scatter,
    adjusted,
    contrasts,
    distance_factor,
    fit_scatter,
    least_distance,
    log_size,
    median_of_others,
    relative_width,
)

#: A smaller P-L1 is no trigger: it is less than a tenth of one pixel in images of 100 x 100. A
#: search ends there if a model gives the same answer for every image.
EMPTY_TRIGGER = 1e-5

# The number of classes that are searched to the end whatever their score is, so that others can be
# judged beside them. The variance of their median is 0.29, of nine classes 0.17 (median_variance).
_CONTROLS = 5

_LEAST_CHANCE = 1e-300  # smaller chances are reported as this one


@dataclass(frozen=True)
class Calibration:
    """The P-L1 of clean reference models under one search.

    Attributes:
        p_l1: R rows, one per reference model, of C values in (0, 1] or inf; C = 1 without classes.
        key: The key of the search, images and classes. Only scans with an equal key are comparable.
        models: The names of the references.
        recorded_steps: The L steps of the search, ascending, after which sizes were recorded; may
            be empty.
        history: The value of p_l1 after each of these steps: [L, R, C].
        family: The family of triggers that was searched for (see `inversion.FAMILIES`).
        others: The calibrations of the same references for the other families.
        relative: Whether the searches were in contrast to a base. Then no class is dropped.
        digests: A hash of the weights of each reference's image tower; empty if they are not known.
        distance: How far the references have moved from their base, if they were fine-tuned until
            they had moved that far (see `detect.distance`), that of the first set; else None.
        rungs: The calibrations with other distances, for suspects that moved less or more.
        sets: For references of several distances: the number of references of each, in the order
            of the rows, and its weight in `mean`, in all 1. Empty stands for one set.
        screened: Whether `p_l1` holds the efforts of a screening, numbers above 0, instead of sizes
            (see `pydetox.detect.screening`). All that is said of sizes here holds for them.
        tower_passes: The passes of single images through towers that the searches of all
            references for this family took (see `InversionResult.tower_passes`).
    """

    p_l1: tuple[tuple[float, ...], ...]
    key: str
    models: tuple[str, ...]
    recorded_steps: tuple[int, ...] = ()
    history: tuple[tuple[tuple[float, ...], ...], ...] = ()
    family: str = "patch"
    others: tuple[Calibration, ...] = ()
    relative: bool = False
    digests: tuple[str, ...] = ()
    distance: float | None = None
    rungs: tuple[Calibration, ...] = ()
    screened: bool = False
    tower_passes: int = 0
    sets: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        widths = {len(row) for row in self.p_l1}
        if len(self.p_l1) < 2 or len(widths) != 1 or widths == {0}:
            raise UsageError(
                f"{len(self.p_l1)} reference scans of {sorted(widths)} classes; a calibration "
                "needs at least 2 with the same classes"
            )
        shape = {(len(rows), *map(len, rows)) for rows in self.history}
        expected = (len(self.p_l1), *map(len, self.p_l1))
        if len(self.history) != len(self.recorded_steps) or not shape <= {expected}:
            raise UsageError(
                f"{len(self.recorded_steps)} recorded steps, a history of {len(self.history)}; "
                "expected the sizes of every reference and class at every recorded step"
            )
        counts = [count for count, _ in self._sets]
        if sum(counts) != len(self.p_l1) or min(counts) < 1 or len(counts) >= len(self.p_l1):
            raise UsageError(
                f"sets of {counts} references, and {len(self.p_l1)} rows; expected sets that make "
                "up all rows, at least one with 2"
            )

    def reference(self, digest: str) -> str | None:
        """Return the name of the reference with that digest; None for none."""
        return self._name(self.digests.index(digest)) if digest in self.digests else None

    def at(self, step: int) -> Calibration:
        """Return the same references after `step`; UsageError if it was not recorded."""
        if step not in self.recorded_steps:
            raise UsageError(
                f"step {step}; the calibration has sizes at {list(self.recorded_steps)}"
            )
        return Calibration(
            self.history[self.recorded_steps.index(step)],
            self.key,
            self.models,
            family=self.family,
            relative=self.relative,
            distance=self.distance,
            sets=self.sets,
        )

    def of(self, family: str) -> Calibration:
        """Return the sizes of one family; UsageError if it was not searched for."""
        for one in (self, *self.others):
            if one.family == family:
                return one
        raise UsageError(
            f"the calibration has the families {[o.family for o in (self, *self.others)]}; this "
            f"scan needs {family!r}"
        )

    def with_rungs(self, others: Sequence[Calibration]) -> Calibration:
        """Return this calibration together with those of other distances."""
        return replace(self, rungs=tuple(replace(one, rungs=()) for one in others))

    @property
    def classes(self) -> int:
        """C, the number of classes."""
        return len(self.p_l1[0])

    @property
    def mean(self) -> tuple[float, ...]:
        """mu_c, the mean log P-L1 of each class. A search that found nothing counts as 1."""
        return tuple(float(value) for value in np.array(self.weights) @ self._logarithms)

    @cached_property
    def weights(self) -> tuple[float, ...]:
        """The weight of each reference in `mean`; their sum is 1."""
        return tuple(share / count for count, share in self._sets for _ in range(count))

    @cached_property
    def comparable(self) -> tuple[int, ...]:
        """The classes for which all references have a trigger; classes are judged beside these."""
        return tuple(
            c
            for c, column in enumerate(zip(*self.p_l1, strict=True))
            if all(map(math.isfinite, column))
        )

    @property
    def controls(self) -> tuple[int, ...]:
        """The classes that a scan never drops; after others were dropped, it judges beside these.

        They are at most five of the comparable classes, evenly spaced. They are chosen before the
        suspect is seen, so that their median estimates its shift without bias. The classes that are
        left when those with low scores are gone would not.
        """
        few, count = self.comparable, min(_CONTROLS, len(self.comparable))
        return tuple(few[(2 * k + 1) * len(few) // (2 * count)] for k in range(count))

    @cached_property
    def obstacle(self) -> str | None:
        """The reason why these references cannot be compared with, and a remedy; or None."""
        found = [value for row in self.p_l1 for value in row if math.isfinite(value)]
        if not found:
            return (
                "no search in the references found a working trigger: search for more steps, or "
                "give references of the same task as the suspect"
            )
        if min(found) < EMPTY_TRIGGER and not self.screened:
            row = next(k for k, row in enumerate(self.p_l1) if min(row) < EMPTY_TRIGGER)
            return (
                f"the reference {self._name(row)} obeys an empty trigger (P-L1 {min(found):.1g}): "
                "it gives one answer to every image; give references that work, and images of all "
                "classes"
            )
        if len(self.comparable) < min(self.classes, 2):
            return (
                f"all references have a working trigger for {len(self.comparable)} of "
                f"{self.classes} classes, of {min(self.classes, 2)} needed: search for more steps"
            )
        rows = [tuple(row[c] for c in self.comparable) for row in self.p_l1]
        for k, sizes in enumerate(rows):
            if sizes in rows[:k]:
                first, second = self._name(rows.index(sizes)), self._name(k)
                return (
                    f"the references {first} and {second} have the same sizes, as if they were one "
                    "model: give references that were trained separately"
                )
        return None

    def margins(self, p_l1: Sequence[float]) -> tuple[float, ...]:
        """Return mu_c - x_c per class: how far the log size is below that of the references."""
        return tuple(
            centre - log_size(value) for centre, value in zip(self.mean, p_l1, strict=True)
        )

    def shifts(
        self, margins: Sequence[float], p_l1: Sequence[float], among: Sequence[int] | None = None
    ) -> tuple[float, ...]:
        """Return the value that each margin is compared with: the median of the other margins.

        In a label-free search, this is 0. A margin for which nothing was found is only an upper
        bound, so the shift is at least the smallest of the others. If those are less than half, the
        shift is unknown, and the result is NaN. among: The classes to judge beside, some of
        `comparable`, which is the default.
        """
        if self.classes == 1:
            return (0.0,)
        among = self.comparable if among is None else among
        if len(among) < 2:
            return (math.nan,) * self.classes
        beside = np.array([margins[c] for c in among])
        known = np.isfinite([p_l1[c] for c in among])
        shift = np.full(self.classes, np.median(beside))
        shift[list(among)] = median_of_others(beside)
        number = np.full(self.classes, known.sum())
        number[list(among)] -= known
        others = np.full(self.classes, len(among))
        others[list(among)] -= 1
        ranked = np.sort(np.where(known, beside, np.inf))
        least = np.full(self.classes, ranked[0])
        least[list(among)] = np.where(known & (beside == ranked[0]), ranked[1], ranked[0])
        enough = (number > 0) & (2 * number >= others)
        return tuple(float(v) for v in np.where(enough, np.maximum(shift, least), np.nan))

    def score(
        self, p_l1: Sequence[float], *, among: Sequence[int] | None = None
    ) -> tuple[float, ...]:
        """Return the score of each class: the standard normal deviate of its chance.

        A class of a clean model reaches a score with the same chance as a standard normal value.
        The score is NaN if there are too few classes to compare with. among: As in `shifts`.
        """
        margins = self.margins(p_l1)
        return self.scores(margins, self.shifts(margins, p_l1, among), among)

    def scores(
        self,
        margins: Sequence[float],
        shifts: Sequence[float],
        among: Sequence[int] | None = None,
    ) -> tuple[float, ...]:
        """Return `score` from the margins and the values that each is compared with.

        Of a screening, all distances are divided by how much more than expected they scatter in
        this model. All screenings have the same start and images, so that efforts differ by nothing
        but the models, and clean models that were trained differently differ more (docs/method.md).
        """
        distance = np.array(margins) - np.array(shifts)
        if self.screened:
            distance = distance / self._excess(distance, among)
        chance = np.maximum(self._chances(np.abs(distance), among), _LEAST_CHANCE)
        return tuple(float(v) for v in np.copysign(-ndtri(chance), distance))

    def progress(self, step: int, p_l1: Sequence[float]) -> tuple[float, ...]:
        """Return `score` after a step of the search, infinite for classes that must not be dropped.

        These are the `controls`, and classes with too few others to compare with. step: One of
        `recorded_steps`. p_l1: The sizes; for classes that were dropped before, those of that step.
        No class is judged beside dropped classes.
        """
        then = self.at(step)
        if self.obstacle is not None or then.obstacle is not None:
            return (math.inf,) * self.classes
        kept = self.controls
        scores = then.score(p_l1, among=[c for c in kept if c in then.comparable])
        return tuple(
            math.inf if c in kept or math.isnan(value) else value for c, value in enumerate(scores)
        )

    def p_value(self, score: float, judged: int | None = None) -> float:
        """Return the chance that the largest of the scores of a clean model reaches `score`.

        judged: The number of classes that are judged, for Sidak's correction; default: all.
        """
        return adjusted(float(ndtr(-score)), self.classes if judged is None else judged)

    def size_threshold(
        self,
        index: int,
        p_value: float,
        *,
        judged: int | None = None,
        shift: float = 0.0,
        among: Sequence[int] | None = None,
    ) -> float:
        """Return the P-L1 of class `index` at which its p-value is the given one, below 0.5.

        judged: As in `p_value`. shift: The shift of that class in that model. among: As in
        `shifts`.
        """
        count = self.classes if judged is None else judged
        wanted = -math.expm1(math.log1p(-p_value) / count)

        def too_likely(distance: float) -> bool:
            return bool(self._chances(np.array([distance]), among, [index])[0] > wanted)

        return math.exp(self.mean[index] - shift - least_distance(too_likely))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; infinite values are null."""
        return {
            "p_l1": rows_to_json(self.p_l1),
            "key": self.key,
            "models": list(self.models),
            "recorded_steps": list(self.recorded_steps),
            "history": [rows_to_json(rows) for rows in self.history],
            "family": self.family,
            "others": [one.to_dict() for one in self.others],
            "relative": self.relative,
            "digests": list(self.digests),
            "distance": self.distance,
            "rungs": [one.to_dict() for one in self.rungs],
            "screened": self.screened,
            "tower_passes": self.tower_passes,
            "sets": [list(one) for one in self.sets],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Calibration:
        """Read back what `to_dict` wrote; UsageError for anything else."""
        try:
            return cls(
                rows_from_json(content["p_l1"]),
                str(content["key"]),
                tuple(str(name) for name in content["models"]),
                # Earlier versions wrote this key as "looks".
                tuple(int(step) for step in content.get("recorded_steps", content.get("looks"))),
                tuple(rows_from_json(rows) for rows in content["history"]),
                str(content["family"]),
                tuple(cls.from_dict(one) for one in content["others"]),
                bool(content["relative"]),
                tuple(str(digest) for digest in content.get("digests", ())),
                # Earlier versions had no references of a distance.
                None if content.get("distance") is None else float(content["distance"]),
                tuple(cls.from_dict(one) for one in content.get("rungs", ())),
                bool(content.get("screened", False)),
                int(content.get("tower_passes", 0)),
                tuple((int(count), float(share)) for count, share in content.get("sets", ())),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"no calibration: {error!r}") from error

    def _name(self, row: int) -> str:
        return repr(self.models[row]) if row < len(self.models) else f"number {row + 1}"

    @cached_property
    def _logarithms(self) -> Array:
        return np.array([[log_size(value) for value in row] for row in self.p_l1])

    @cached_property
    def _squares(self) -> Array:
        """s_c^2, the variance of each class between references of a set: [C]."""
        values = self._logarithms
        if self.classes > 1:
            which = np.isin(np.arange(self.classes), self.comparable)
            values = contrasts(values, which)
        ends = np.cumsum([count for count, _ in self._sets])[:-1]
        squares: Array = sum(one.var(axis=0) * len(one) for one in np.split(values, ends))
        return squares / self._degrees

    @cached_property
    def _scatter(self) -> Scatter:
        squares = self._squares[list(self.comparable)]
        return fit_scatter(squares[None], self._degrees)

    @property
    def _sets(self) -> tuple[tuple[int, float], ...]:
        return self.sets or ((len(self.p_l1), 1.0),)

    @property
    def _degrees(self) -> int:
        """The degrees of freedom of the variance of a class within the sets."""
        return len(self.p_l1) - len(self._sets)

    def _excess(self, distance: Array, among: Sequence[int] | None) -> float:
        """Return how many times wider than expected a model's distances scatter, at least 1."""
        which = range(self.classes)
        expected = self._scatter.deviation(
            self._squares[None],
            factor=self._factor(among, which),
            own=np.isfinite(np.array(self.p_l1)).any(axis=0),
            least=self._least,
        )[0]
        relative = (distance / expected)[np.isfinite(distance)]
        return 1.0 if len(relative) < 2 else max(1.0, relative_width(relative))

    @property
    def _least(self) -> float:
        return SMALLEST_EFFORT_DEVIATION if self.screened else SMALLEST_DEVIATION

    def _factor(self, among: Sequence[int] | None, which: Sequence[int]) -> Array:
        """Return the variance of the distances of classes over that of their contrasts."""
        references = 1 / sum(weight**2 for weight in self.weights)
        if self.classes == 1:
            return np.full(len(which), 1 + 1 / references)
        among = self.comparable if among is None else among
        inside, outside = (
            distance_factor(references, len(self.comparable), max(count, 1))
            for count in (len(among) - 1, len(among))
        )
        return np.where(np.isin(which, among), inside, outside)

    def _chances(
        self, distance: Array, among: Sequence[int] | None, which: Sequence[int] | None = None
    ) -> Array:
        """Return the chance that a class of a clean model is as far from the others.

        distance: One value of at least 0 per class of `which` (default: all classes).
        """
        which = range(self.classes) if which is None else which
        # If no reference found anything, all sizes are the same bound and do not scatter.
        own = np.isfinite(np.array(self.p_l1)).any(axis=0)
        chances: Array = self._scatter.tail(
            distance[None],
            self._squares[None, list(which)],
            factor=self._factor(among, which),
            own=own[list(which)],
            least=self._least,
        )[0]
        return chances
