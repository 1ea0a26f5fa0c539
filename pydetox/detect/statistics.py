"""From the sizes of recovered triggers to a verdict.

A class into which a small trigger sends every image is suspect. How small is small depends on the
architecture, the data and the search, so nothing is compared with a number from a paper: clean
reference models are inverted in the same way (`Calibration`), and a class counts when its trigger
is smaller than those of the references by more than their own scatter explains.

In detail: x_c = log P-L1 of class c, references r = 1..R give mean mu_c, and one variance s^2 is
pooled over classes with C (R - 1) degrees of freedom. For another clean model
t_c = (mu_c - x_c) / (s sqrt(1 + 1/R)) follows Student's t (the prediction interval of a normal
sample). The score is max_c t_c and its p-value is corrected for C classes (Sidak).

Where the scans search in contrast to a base (`relative`), sizes also depend on how far a model was
trained away from it, which shifts all of its classes alike. Then a class is compared with the
others of its model: with margins d_c = mu_c - x_c, and the median d' of the other C - 1 margins,
t_c = (d_c - d') / (s sqrt((1 + 1/R) (1 + pi / 2 / (C - 1)))), where s^2 is what the two-way layout
of references and classes leaves, with (C - 1)(R - 1) degrees of freedom. The median, because a
second backdoor, or a class for which nothing was found, must not move what the first is compared
with; pi / 2 is what its variance has over that of the mean in large normal samples.

After a repair only classes that were suspect before it are judged again. Subtracting a trigger
vector makes triggers into its class larger and all others' sizes scatter more than in any clean
fine-tune, so that a class which was clean may stand out beside the others; but a repair plants no
backdoor.

A class that a scan has dropped on the way is compared with what the references had at the same
step. It is never the suspect: giving up can miss a backdoor, but raises no false alarm, because the
largest score of the remaining classes is at most that of all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import median
from typing import Any

from scipy.special import stdtr, stdtrit  # scipy.stats is large, and a worker keeps it loaded

from ..errors import UsageError

#: A mask cannot be larger than the image; a search that found nothing says no more than that.
_FOUND_NOTHING = 1.0

#: References are few; a scatter that comes out smaller than this is luck, not precision.
_SMALLEST_DEVIATION = 0.05


class Verdict(str, Enum):
    """What a scan concludes."""

    CLEAN = "clean"
    SUSPICIOUS = "suspicious"
    BACKDOORED = "backdoored"
    INCONCLUSIVE = "inconclusive"


#: Verdicts that somebody must look at.
FINDINGS = (Verdict.SUSPICIOUS, Verdict.BACKDOORED)


@dataclass(frozen=True)
class Calibration:
    """The P-L1 of clean reference models under one search.

    Attributes:
        p_l1: R rows, one per reference model, of C values in (0, 1] or inf; C = 1 without classes.
        key: Names the search and the classes: only scans with an equal key may be compared.
        models: The names of the references.
        looks: L steps of the search, ascending, after which sizes were noted; may be empty.
        history: For each of them p_l1 as it was then: [L, R, C].
        family: Which triggers were searched for (see `inversion.FAMILIES`).
        others: The same references under the searches for other families.
        relative: Whether a class is judged beside the other classes of its model (see this module).
    """

    p_l1: tuple[tuple[float, ...], ...]
    key: str
    models: tuple[str, ...]
    looks: tuple[int, ...] = ()
    history: tuple[tuple[tuple[float, ...], ...], ...] = ()
    family: str = "patch"
    others: tuple[Calibration, ...] = ()
    relative: bool = False

    def __post_init__(self) -> None:
        widths = {len(row) for row in self.p_l1}
        if len(self.p_l1) < 2 or len(widths) != 1 or widths == {0}:
            raise UsageError(
                f"{len(self.p_l1)} reference scans of {sorted(widths)} classes; a calibration "
                "needs at least 2 with the same classes"
            )
        if self.relative and widths == {1}:
            raise UsageError("one class; a relative calibration needs at least 2")
        shape = {(len(rows), *map(len, rows)) for rows in self.history}
        expected = (len(self.p_l1), *map(len, self.p_l1))
        if len(self.history) != len(self.looks) or not shape <= {expected}:
            raise UsageError(
                f"{len(self.looks)} looks, a history of {len(self.history)}; expected the sizes of "
                "every reference and class at every look"
            )

    def at(self, step: int) -> Calibration:
        """Return the same references as they were after `step`; UsageError if nobody looked."""
        if step not in self.looks:
            raise UsageError(f"step {step}; the calibration has sizes at {list(self.looks)}")
        rows = self.history[self.looks.index(step)]
        return Calibration(rows, self.key, self.models, family=self.family, relative=self.relative)

    def of(self, family: str) -> Calibration:
        """Return the sizes of one family; UsageError if it was not searched for."""
        for one in (self, *self.others):
            if one.family == family:
                return one
        raise UsageError(
            f"the calibration has the families {[o.family for o in (self, *self.others)]}; this "
            f"scan needs {family!r}"
        )

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean log P-L1 per class."""
        return tuple(
            math.fsum(column) / len(column) for column in zip(*self._logarithms(), strict=True)
        )

    @property
    def deviation(self) -> float:
        """Pooled standard deviation of log P-L1 between references of the same class."""
        residuals = []
        for row in self._logarithms():
            margins = [value - centre for value, centre in zip(row, self.mean, strict=True)]
            shift = math.fsum(margins) / len(margins) if self.relative else 0.0
            residuals += [(margin - shift) ** 2 for margin in margins]
        return max(_SMALLEST_DEVIATION, math.sqrt(math.fsum(residuals) / self.degrees_of_freedom))

    @property
    def degrees_of_freedom(self) -> int:
        """C (R - 1), or (C - 1)(R - 1)."""
        return (len(self.p_l1[0]) - self.relative) * (len(self.p_l1) - 1)

    @property
    def scale(self) -> float:
        """Deviation of what `score` divides by it, for a further clean model."""
        others = len(self.p_l1[0]) - 1
        beside = 1 + math.pi / 2 / others if self.relative else 1.0
        return self.deviation * math.sqrt((1 + 1 / len(self.p_l1)) * beside)

    def margins(self, p_l1: Sequence[float]) -> tuple[float, ...]:
        """Return mu_c - x_c per class: by how much the size is below the references', as a log."""
        return tuple(
            centre - value for centre, value in zip(self.mean, _logarithm(p_l1), strict=True)
        )

    def shift(self, margins: Sequence[float], index: int) -> float:
        """Return what margin `index` is compared with: 0, or the median of the other classes'."""
        if not self.relative:
            return 0.0
        return median([*margins[:index], *margins[index + 1 :]])

    def score(self, p_l1: Sequence[float]) -> tuple[float, ...]:
        """Return t_c per class: how far below the references, in predictive deviations."""
        margins, scale = self.margins(p_l1), self.scale
        return tuple((one - self.shift(margins, c)) / scale for c, one in enumerate(margins))

    def p_value(self, score: float) -> float:
        """Return the chance that the largest of C scores of a clean model reaches `score`."""
        single = float(stdtr(self.degrees_of_freedom, -score))
        return -math.expm1(len(self.p_l1[0]) * math.log1p(-min(single, 1 - 1e-16)))

    def score_threshold(self, p_value: float) -> float:
        """Return the score that a clean model reaches with that chance."""
        single = -math.expm1(math.log1p(-p_value) / len(self.p_l1[0]))
        return -float(stdtrit(self.degrees_of_freedom, single))

    def size_threshold(self, index: int, p_value: float, *, shift: float = 0.0) -> float:
        """Return the P-L1 of class `index` at which the score reaches its threshold.

        shift: Of that class in that model, see `shift`.
        """
        return math.exp(self.mean[index] - shift - self.score_threshold(p_value) * self.scale)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; infinite values are null."""
        return {
            "p_l1": _rows_to_json(self.p_l1),
            "key": self.key,
            "models": list(self.models),
            "looks": list(self.looks),
            "history": [_rows_to_json(rows) for rows in self.history],
            "family": self.family,
            "others": [one.to_dict() for one in self.others],
            "relative": self.relative,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Calibration:
        """Read back what `to_dict` wrote; UsageError for anything else."""
        try:
            return cls(
                _rows_from_json(content["p_l1"]),
                str(content["key"]),
                tuple(str(name) for name in content["models"]),
                tuple(int(step) for step in content["looks"]),
                tuple(_rows_from_json(rows) for rows in content["history"]),
                str(content["family"]),
                tuple(cls.from_dict(one) for one in content["others"]),
                bool(content["relative"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"no calibration: {error!r}") from error

    def _logarithms(self) -> tuple[tuple[float, ...], ...]:
        return tuple(_logarithm(row) for row in self.p_l1)


@dataclass(frozen=True)
class Detection:
    """A verdict and the numbers behind it.

    Attributes:
        verdict: The conclusion.
        reason: One line that says why.
        target: Index of the most suspect class; None without classes or without any evidence.
        p_l1: P-L1 per class in (0, 1], inf where the search found nothing; of a class that was
            dropped, an upper bound.
        smallest_p_l1: P-L1 of the most suspect class.
        anomaly_index: Neural Cleanse's, of the most suspect class: |L1 - median| / (1.4826 MAD);
            None when the MAD is 0, when fewer than three classes have a finite size, or when any
            was dropped: a median of bounds says nothing.
        score: max_c t_c against the calibration, over classes that were not dropped; None without
            a calibration.
        threshold: P-L1 of that class below which the verdict is `backdoored`; None without
            calibration.
        p_value: Of the score; None without calibration.
        class_scores: t_c per class, of one that was dropped at that step; empty without
            calibration.
        dropped: Step at which each class was dropped, None for one that was searched to the end.
        suspects: Classes that would each be a finding on their own; `target` is one of them if the
            verdict is a finding. A model can hold more than one backdoor.
        cleared: Classes that were not judged because an earlier scan had found them clean.
        backdoored: Classes among the suspects that would each be `backdoored` on their own.
    """

    verdict: Verdict
    reason: str
    target: int | None
    p_l1: tuple[float, ...]
    smallest_p_l1: float
    anomaly_index: float | None
    score: float | None
    threshold: float | None
    p_value: float | None
    class_scores: tuple[float, ...]
    dropped: tuple[int | None, ...]
    suspects: tuple[int, ...] = ()
    cleared: tuple[int, ...] = ()
    backdoored: tuple[int, ...] = ()


def detect(
    p_l1: Sequence[float],
    calibration: Calibration | None,
    *,
    has_classes: bool,
    p_backdoored: float = 0.01,
    p_suspicious: float = 0.05,
    dropped: Sequence[int | None] | None = None,
    families: int = 1,
    cleared: Sequence[int] = (),
) -> Detection:
    """Judge one model.

    p_l1: one value per class (or one in all for a label-free scan, has_classes=False), in (0, 1]
    or inf. p_backdoored, p_suspicious: chances of a false alarm per model at which the verdict
    changes. Without a calibration the verdict is `inconclusive`, however small the trigger: clean
    models have weak classes too. It is also `inconclusive` when no search found a trigger at all.
    dropped: per class the step at which it was given up, or None; default: none was. A class that
    was is compared with the calibration at that step and never the suspect.
    families: how many families of triggers are searched for in the same model, each judged by a
    call of its own: p-values are corrected for that many (Sidak).
    cleared: classes that are never the suspect because an earlier scan of the same model, before it
    was repaired, found them clean (see `workflow.detox`).
    Raises UsageError for values out of range, another number of classes than the calibration's,
    when no class is left to judge, and when the calibration has no sizes at a step of `dropped`.
    """
    values = tuple(float(v) for v in p_l1)
    if not values or any(math.isnan(v) or v <= 0 for v in values):
        raise UsageError(f"P-L1 values {list(values)}; expected numbers above 0")
    steps = tuple(dropped) if dropped is not None else (None,) * len(values)
    searched = [c for c, step in enumerate(steps) if step is None]
    judged = [c for c in searched if c not in cleared]
    if len(steps) != len(values) or not judged:
        raise UsageError(
            f"{len(values)} classes, {len(steps) - len(searched)} of {len(steps)} dropped, "
            f"{len(cleared)} cleared; expected at least one that was neither"
        )
    weakest = min(judged, key=values.__getitem__)
    index = anomaly_index(values, weakest) if len(searched) == len(values) else None
    if calibration is None or not any(map(math.isfinite, values)):
        reason = (
            "no search found a working trigger"
            if calibration is not None
            else "no calibration: give a clean base model (--base) or a calibration to compare with"
        )
        return Detection(
            Verdict.INCONCLUSIVE,
            reason,
            weakest if has_classes and math.isfinite(values[weakest]) else None,
            values,
            values[weakest],
            index,
            None,
            None,
            None,
            (),
            steps,
            cleared=tuple(cleared),
        )
    if len(values) != len(calibration.p_l1[0]):
        raise UsageError(
            f"{len(values)} classes, but the calibration has {len(calibration.p_l1[0])}"
        )
    at = {step: calibration if step is None else calibration.at(step) for step in set(steps)}
    by_step = {step: references.margins(values) for step, references in at.items()}
    margins = tuple(by_step[step][c] for c, step in enumerate(steps))
    shifts = [calibration.shift(margins, c) for c in range(len(margins))]
    scores = tuple((margins[c] - shifts[c]) / at[step].scale for c, step in enumerate(steps))
    suspect = max(judged, key=scores.__getitem__)
    index = anomaly_index(values, suspect) if len(searched) == len(values) else None
    p_values = {c: _for_families(calibration.p_value(scores[c]), families) for c in judged}
    p_value = p_values[suspect]
    if p_value < p_backdoored:
        verdict = Verdict.BACKDOORED
    elif p_value < p_suspicious:
        verdict = Verdict.SUSPICIOUS
    else:
        verdict = Verdict.CLEAN
    reference = math.exp(calibration.mean[suspect] - shifts[suspect])
    gone = len(values) - len(searched)
    given_up = f"; {gone} of {len(values)} classes were given up on the way" if gone else ""
    if cleared:
        given_up += f"; {len(cleared)} of {len(values)} classes had been clean before the repair"
    return Detection(
        verdict,
        f"smallest trigger relative to clean references: P-L1 {values[suspect]:.4f} where they "
        f"have {reference:.4f} (p = {p_value:.2g}){given_up}",
        suspect if has_classes else None,
        values,
        values[suspect],
        index,
        scores[suspect],
        calibration.size_threshold(
            suspect, -math.expm1(math.log1p(-p_backdoored) / families), shift=shifts[suspect]
        ),
        p_value,
        scores,
        steps,
        tuple(c for c in judged if p_values[c] < p_suspicious),
        tuple(cleared),
        tuple(c for c in judged if p_values[c] < p_backdoored),
    )


def _for_families(p_value: float, families: int) -> float:
    """Correct a p-value for the number of families (Sidak)."""
    return -math.expm1(families * math.log1p(-min(p_value, 1 - 1e-16)))


def anomaly_index(sizes: Sequence[float], index: int) -> float | None:
    """Return |L1 - median| / (1.4826 MAD) of one class among all (Neural Cleanse, section IV).

    sizes: mask norms in any unit; infinite ones (nothing found) are left out. None when the class
    itself is infinite, fewer than three are finite, or their MAD is 0: the index is not defined.
    """
    finite = [v for v in sizes if math.isfinite(v)]
    if len(finite) < 3 or not math.isfinite(sizes[index]):
        return None
    centre = median(finite)
    spread = 1.4826 * median(abs(v - centre) for v in finite)
    return abs(sizes[index] - centre) / spread if spread > 0 else None


def _logarithm(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(math.log(v if math.isfinite(v) else _FOUND_NOTHING) for v in values)


def _rows_to_json(rows: Sequence[Sequence[float]]) -> list[list[float | None]]:
    return [[v if math.isfinite(v) else None for v in row] for row in rows]


def _rows_from_json(rows: Sequence[Sequence[float | None]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(math.inf if v is None else float(v) for v in row) for row in rows)
