"""From the sizes of recovered triggers to a verdict.

A class is suspect if a small trigger sends every image into it. Which size is small depends on the
architecture, the data and the search, so no size is compared with a number from a paper. Instead,
clean reference models are searched in the same way (`Calibration`). A class counts if its trigger,
relative to those of the other classes, is smaller than the scatter of the references explains. The
score of a class is the standard normal deviate of this chance. The p-value of the largest score is
corrected for the number of classes that were judged (Sidak).

After a repair, a class is a finding only if it stands out in both scans, that before the repair and
that after it. Subtracting a trigger vector enlarges triggers into its class, and all other sizes
scatter more than after a clean fine-tuning. A class that was clean may then stand out, but a repair
plants no backdoor. The p-value of a class is therefore the larger one of the two scans (an
intersection-union test). That of the second scan is corrected for the number of classes that are
judged, not for all: the first scan was corrected for all, so that the test keeps its level whatever
a repair does to sizes (see `pydetox.detect.rescan`).

A class that a scan has dropped is compared with the sizes of the references at the same step. It is
never the suspect. Dropping can miss a backdoor but raises no false alarm, because the largest score
of the remaining classes is at most that of all. The remaining classes are then judged beside the
classes that no scan drops (`Calibration.controls`).

If the sizes do not support a verdict, it is `inconclusive`, and the reason says what would help.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from statistics import median

from ..errors import UsageError
from .calibration import EMPTY_TRIGGER, Calibration

__all__ = [
    "FINDINGS",
    "Calibration",
    "Detection",
    "Verdict",
    "anomaly_index",
    "detect",
    "p_values_of_suspects",
]


# The least number of classes to judge beside, so that one of them is judged beside two.
_LEAST_BESIDE = 3


class Verdict(str, Enum):
    """The verdict of a scan."""

    CLEAN = "clean"
    SUSPICIOUS = "suspicious"
    BACKDOORED = "backdoored"
    INCONCLUSIVE = "inconclusive"


#: The verdicts that report a finding.
FINDINGS = (Verdict.SUSPICIOUS, Verdict.BACKDOORED)


@dataclass(frozen=True, kw_only=True)
class Detection:
    """A verdict and the numbers behind it.

    Attributes:
        verdict: The verdict.
        reason: One line that explains the verdict.
        target: The index of the most suspect class; None without classes or without any evidence.
        p_l1: The P-L1 of each class, in [0, 1]. It is inf if the search found nothing, and an upper
            bound for a dropped class.
        smallest_p_l1: The P-L1 of the most suspect class.
        anomaly_index: Neural Cleanse's anomaly index of the most suspect class, |L1 - median| /
            (1.4826 MAD). None if the MAD is 0, if fewer than three classes have a finite size, or
            if a class was dropped, because a median of bounds says nothing.
        score: The largest score of the judged classes; None if the verdict is `inconclusive`.
        threshold: The P-L1 of that class below which the verdict is `backdoored`. None if the
            verdict is `inconclusive`, if no judged class has a trigger and there are too few
            others to compare with, or if no size can bring this verdict because the scan before a
            repair did not.
        p_value: The chance that a clean model's largest score reaches `score`, in a re-scan at
            least that of the class before the repair; None if the verdict is `inconclusive`.
        class_scores: The score of each class (see `Calibration.score`), at the step at which it was
            dropped if it was dropped. Empty if the verdict is `inconclusive`.
        dropped: The step at which each class was dropped; None for a class that was searched to the
            end.
        suspects: The classes that would each be a finding on their own. `target` is one of them if
            the verdict is a finding. A model can hold more than one backdoor.
        cleared: The classes that were not judged because an earlier scan had found them clean.
        backdoored: The suspects that would each be `backdoored` on their own.
        effort: The mean loss of each class in the screening that decided the verdict (see
            `pydetox.detect.screening`); empty where sizes decide it. `class_scores` are then those
            of the efforts, and `dropped` classes were judged all the same.
        p_values: The p-value of each class alone, which `suspects` goes by, corrected for all
            classes that are judged; 1 for a class that is not judged. Empty if the verdict is
            `inconclusive`.
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
    effort: tuple[float, ...] = ()
    p_values: tuple[float, ...] = ()


@dataclass(frozen=True)
class RepairHistory:
    """What a scan before a repair and the repair tell about the classes of the repaired model.

    A verdict that is given one is that of a re-scan (see `detect.rescan`). Classes are indices.

    Attributes:
        cleared: Those that the scan before the repair found clean. They are never the suspect,
            because a repair plants no backdoor.
        p_values: The p-values of single classes in that scan, corrected for all classes and
            families. The p-value of such a class in the re-scan is not smaller.
        unlearned: Those whose triggers repairs have unlearned. They are judged, but no other class
            is judged beside them if three classes are left: their triggers may be larger than those
            of any clean model, which makes all others look small.
    """

    cleared: tuple[int, ...] = ()
    p_values: Mapping[int, float] = field(default_factory=dict)
    unlearned: tuple[int, ...] = ()

    @classmethod
    def clearing(cls, classes: Sequence[int]) -> RepairHistory | None:
        """Return the history of a model of which only the cleared classes are known, if any."""
        return cls(tuple(classes)) if classes else None

    @property
    def narrows(self) -> bool:
        """Whether some classes are not judged, or not by their sizes alone."""
        return bool(self.cleared or self.p_values)


def detect(
    p_l1: Sequence[float],
    calibration: Calibration | None,
    *,
    has_classes: bool,
    p_backdoored: float = 0.01,
    p_suspicious: float = 0.05,
    dropped: Sequence[int | None] | None = None,
    families: int = 1,
    history: RepairHistory | None = None,
    obstacle: str | None = None,
) -> Detection:
    """Judge one model.

    The verdict is `inconclusive` without a calibration, however small the trigger is, because clean
    models have weak classes, too. It is also `inconclusive` if the sizes or the references do not
    support a verdict (see `Calibration.obstacle`). The reason then says what would help.

    Args:
        p_l1: One value per class, in [0, 1]; inf if nothing was found, NaN if the search failed. A
            label-free scan (has_classes=False) has one value in all.
        calibration: The sizes of clean references, or None.
        has_classes: Whether the values belong to classes.
        p_backdoored: The chance of a false alarm per model below which the verdict is `backdoored`.
        p_suspicious: The chance below which it is `suspicious`.
        dropped: The step at which each class was dropped, or None; default: none was dropped. A
            dropped class is compared with the calibration at that step and is never the suspect.
        families: The number of families of triggers that are searched for in the same model, each
            judged by its own call. p-values are corrected for this number (Sidak).
        history: What is known from before the repair if this is a model after its repair, else
            None. After a repair, a model is `clean` if no class has a working trigger, where every
            reference has one for each class that is judged: the search and the images are known to
            be good for triggers, and none was left. The same of any other model is `inconclusive`,
            because a model can be made to be hard to search.
        obstacle: Why there can be no verdict whatever the sizes are; None if there can be one.

    Raises:
        UsageError: A value is out of range, the number of classes is not that of the calibration,
            no class is left to judge, or the calibration has no sizes at a step of `dropped`.
    """
    after_repair, history = history is not None, history or RepairHistory()
    cleared = history.cleared
    values = tuple(float(v) for v in p_l1)
    if not values or any(v < 0 for v in values):
        raise UsageError(f"P-L1 values {list(values)}; expected numbers of at least 0")
    steps = tuple(dropped) if dropped is not None else (None,) * len(values)
    searched = [c for c, step in enumerate(steps) if step is None]
    judged = [c for c in searched if c not in cleared]
    if len(steps) != len(values) or not judged:
        raise UsageError(
            f"{len(values)} classes, {len(steps) - len(searched)} of {len(steps)} dropped, "
            f"{len(cleared)} cleared; expected at least one that was neither"
        )
    if calibration is not None and len(values) != calibration.classes:
        raise UsageError(f"{len(values)} classes, but the calibration has {calibration.classes}")
    failed = [c for c, value in enumerate(values) if math.isnan(value)]
    # What is not a number is no size; JSON has none of them either.
    values = tuple(math.inf if math.isnan(v) else v for v in values)
    weakest = min(judged, key=values.__getitem__)

    def anomaly(c: int) -> float | None:
        return anomaly_index(values, c) if len(searched) == len(values) else None

    def inconclusive(reason: str) -> Detection:
        return Detection(
            verdict=Verdict.INCONCLUSIVE,
            reason=reason,
            target=weakest if has_classes and math.isfinite(values[weakest]) else None,
            p_l1=values,
            smallest_p_l1=values[weakest],
            anomaly_index=anomaly(weakest),
            score=None,
            threshold=None,
            p_value=None,
            class_scores=(),
            dropped=steps,
            cleared=cleared,
        )

    nothing_left = (
        after_repair
        and not failed
        and calibration is not None
        and all(math.isinf(value) for value in values)
        and set(judged) <= set(calibration.comparable)
    )
    if not nothing_left:
        obstacle = obstacle or _obstacle(values, failed, has_classes)
    if calibration is None:
        return inconclusive(
            obstacle
            or "no calibration: give a clean base model (base=) or a calibration to compare with"
        )
    if obstacle or calibration.obstacle:
        return inconclusive(obstacle or calibration.obstacle or "")
    at = {step: calibration if step is None else calibration.at(step) for step in set(steps)}
    by_step = {step: references.margins(values) for step, references in at.items()}
    margins = tuple(by_step[step][c] for c, step in enumerate(steps))
    beside = calibration.comparable
    if len(searched) < len(values):
        beside = tuple(c for c in calibration.controls if steps[c] is None)
    untouched = tuple(c for c in beside if c not in history.unlearned)
    if len(untouched) >= _LEAST_BESIDE:
        beside = untouched
    shifts = calibration.shifts(margins, values, beside)
    if any(math.isnan(shifts[c]) and math.isfinite(values[c]) for c in judged):
        found = sum(math.isfinite(values[c]) for c in beside)
        return inconclusive(
            f"a working trigger was found for {found} of the {len(beside)} classes that the others "
            "are judged beside, too few to compare with: search for more steps, or without "
            "dropping classes"
        )
    scored = {
        step: (0.0,) * len(values) if one.obstacle else one.scores(margins, shifts, beside)
        for step, one in at.items()
    }
    # A class without a trigger is no evidence, whatever the others have.
    # min(0, NaN) is 0.
    scores = tuple(
        scored[step][c] if math.isfinite(values[c]) else min(0.0, scored[step][c])
        for c, step in enumerate(steps)
    )
    tries, first_look = (len(values) - len(cleared)) * families, history.p_values
    p_values = {
        c: max(calibration.p_value(scores[c], tries), first_look.get(c, 0.0))
        if math.isfinite(values[c])
        else 1.0
        for c in judged
    }
    suspect = max(judged, key=lambda c: (math.isfinite(values[c]), -p_values[c], scores[c]))
    p_value = p_values[suspect]
    if p_value < p_backdoored:
        verdict = Verdict.BACKDOORED
    elif p_value < p_suspicious:
        verdict = Verdict.SUSPICIOUS
    else:
        verdict = Verdict.CLEAN
    if math.isfinite(values[suspect]):
        usual = math.exp(calibration.mean[suspect] - shifts[suspect])
        reason = (
            "the smallest trigger relative to clean references has P-L1 "
            f"{values[suspect]:.3g}, and theirs has {usual:.3g} (p = {p_value:.2g})"
        )
    else:
        reason = (
            "no working trigger was found for any class that was judged"
            if has_classes
            else "no working trigger was found, and every clean reference has one"
        )
    if gone := len(values) - len(searched):
        reason += f"; the search stopped early for {gone} of {len(values)} classes"
    if cleared:
        reason += f"; {len(cleared)} of {len(values)} classes had been clean before the repair"
    return Detection(
        verdict=verdict,
        reason=reason,
        target=suspect if has_classes else None,
        p_l1=values,
        smallest_p_l1=values[suspect],
        anomaly_index=anomaly(suspect),
        score=scores[suspect],
        threshold=None
        if math.isnan(shifts[suspect]) or first_look.get(suspect, 0.0) >= p_backdoored
        else calibration.size_threshold(
            suspect, p_backdoored, judged=tries, shift=shifts[suspect], among=beside
        ),
        p_value=p_value,
        class_scores=scores,
        dropped=steps,
        suspects=tuple(c for c in judged if p_values[c] < p_suspicious),
        cleared=cleared,
        backdoored=tuple(c for c in judged if p_values[c] < p_backdoored),
        p_values=tuple(p_values.get(c, 1.0) for c in range(len(values))),
    )


def p_values_of_suspects(every: Sequence[Detection]) -> dict[int, float]:
    """Return the p-value of each class that stands out in a scan, the smallest of all families."""
    suspects = sorted({c for one in every for c in one.suspects})
    return {c: min(one.p_values[c] for one in every if c in one.suspects) for c in suspects}


def _obstacle(values: Sequence[float], failed: Sequence[int], has_classes: bool) -> str | None:
    """Return why the sizes of a suspect support no verdict and what would help, or None."""
    finite = [v for v in values if math.isfinite(v)]
    if failed:
        return (
            f"the search for class {failed[0]} has no number for a size ({len(failed)} of "
            f"{len(values)} classes): the model's outputs are not finite; check its weights, or "
            "search in float32"
        )
    if not finite:
        return (
            "no search found a working trigger: search for more steps, and check that the model "
            "works on the images"
        )
    if min(finite) < EMPTY_TRIGGER:
        which = f" for class {values.index(min(finite))}" if has_classes else ""
        return (
            f"an empty trigger works{which} (P-L1 {min(finite):.1g}): the model gives one answer "
            "to every image; check its weights, and give images of all classes"
        )
    if has_classes and len(values) == 1:
        return (
            "one class, and nothing to judge it beside: give at least 2 class names, or scan "
            "label-free"
        )
    if len(finite) > 1 and len(set(finite)) == 1:
        return (
            f"all searches ended with the same size ({finite[0]:.3g}), as if none had moved: "
            "search for more steps, and check the model's weights"
        )
    return None


def anomaly_index(sizes: Sequence[float], index: int) -> float | None:
    """Return |L1 - median| / (1.4826 MAD) of one class among all (Neural Cleanse, section IV).

    sizes: Mask norms in any unit; infinite ones (nothing was found) are left out. Returns None if
    the index is not defined: the class itself is infinite, fewer than three sizes are finite, or
    their MAD is 0.
    """
    finite = [v for v in sizes if math.isfinite(v)]
    if len(finite) < 3 or not math.isfinite(sizes[index]):
        return None
    centre = median(finite)
    spread = 1.4826 * median(abs(v - centre) for v in finite)
    return abs(sizes[index] - centre) / spread if spread > 0 else None
