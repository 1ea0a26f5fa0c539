"""From the sizes of recovered triggers to a verdict.

A class into which a small trigger sends every image is suspect. How small is small depends on the
architecture, the data and the search, so nothing is compared with a number from a paper: clean
reference models are inverted in the same way (`Calibration`), and a class counts when its trigger,
beside those of the other classes, is smaller than the references' scatter explains. The score of a
class is the standard normal deviate of that chance; the p-value of the largest score is corrected
for the number of classes that were judged (Sidak).

After a repair only classes that were suspect before it are judged again. Subtracting a trigger
vector makes triggers into its class larger and all others' sizes scatter more than in any clean
fine-tune, so that a class which was clean may stand out beside the others; but a repair plants no
backdoor. The p-value is then corrected for the classes that are left to judge, not for all.

A class that a scan has dropped on the way is compared with what the references had at the same
step. It is never the suspect: giving up can miss a backdoor, but raises no false alarm, because the
largest score of the remaining classes is at most that of all. What the remaining ones are judged
beside are then the classes that no scan drops (`Calibration.controls`).

Where the sizes do not bear a verdict it is `inconclusive`, and the reason says what would help.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import median

from ..errors import UsageError
from .calibration import EMPTY_TRIGGER, Calibration

__all__ = ["FINDINGS", "Calibration", "Detection", "Verdict", "anomaly_index", "detect"]


class Verdict(str, Enum):
    """What a scan concludes."""

    CLEAN = "clean"
    SUSPICIOUS = "suspicious"
    BACKDOORED = "backdoored"
    INCONCLUSIVE = "inconclusive"


#: Verdicts that somebody must look at.
FINDINGS = (Verdict.SUSPICIOUS, Verdict.BACKDOORED)


@dataclass(frozen=True, kw_only=True)
class Detection:
    """A verdict and the numbers behind it.

    Attributes:
        verdict: The conclusion.
        reason: One line that says why.
        target: Index of the most suspect class; None without classes or without any evidence.
        p_l1: P-L1 per class in [0, 1], inf where the search found nothing; of a class that was
            dropped, an upper bound.
        smallest_p_l1: P-L1 of the most suspect class.
        anomaly_index: Neural Cleanse's, of the most suspect class: |L1 - median| / (1.4826 MAD);
            None when the MAD is 0, when fewer than three classes have a finite size, or when any
            was dropped: a median of bounds says nothing.
        score: The largest of the class scores, over classes that were judged; None if the verdict
            is `inconclusive`, like the three that follow.
        threshold: P-L1 of that class below which the verdict is `backdoored`; None too where no
            class that was judged has a trigger, and too few others to compare with.
        p_value: The chance that a clean model's largest score reaches that one.
        class_scores: Per class, how far it stands out (see `Calibration.score`); of one that was
            dropped at that step. Empty if the verdict is `inconclusive`.
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

    p_l1: one value per class (or one in all for a label-free scan, has_classes=False), in [0, 1],
    inf where nothing was found, NaN where the search failed. p_backdoored, p_suspicious: chances of
    a false alarm per model at which the verdict changes.
    dropped: per class the step at which it was given up, or None; default: none was. A class that
    was is compared with the calibration at that step and never the suspect.
    families: how many families of triggers are searched for in the same model, each judged by a
    call of its own: p-values are corrected for that many (Sidak).
    cleared: classes that are never the suspect because an earlier scan of the same model, before it
    was repaired, found them clean (see `pydetox.detox`).
    The verdict is `inconclusive` without a calibration, however small the trigger, because clean
    models have weak classes too; and where the sizes or the references bear none (see
    `Calibration.obstacle`): the reason says which of them, and what would help.
    Raises UsageError for values out of range, another number of classes than the calibration's,
    when no class is left to judge, and when the calibration has no sizes at a step of `dropped`.
    """
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
            cleared=tuple(cleared),
        )

    obstacle = _obstacle(values, failed, has_classes)
    if calibration is None:
        return inconclusive(
            obstacle
            or "no calibration: give a clean base model (--base) or a calibration to compare with"
        )
    if obstacle or calibration.obstacle:
        return inconclusive(obstacle or calibration.obstacle or "")
    at = {step: calibration if step is None else calibration.at(step) for step in set(steps)}
    by_step = {step: references.margins(values) for step, references in at.items()}
    margins = tuple(by_step[step][c] for c, step in enumerate(steps))
    beside = calibration.comparable
    if len(searched) < len(values):
        beside = tuple(c for c in calibration.controls if steps[c] is None)
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
    tries = (len(values) - len(cleared)) * families
    p_values = {
        c: calibration.p_value(scores[c], tries) if math.isfinite(values[c]) else 1.0
        for c in judged
    }
    suspect = max(judged, key=lambda c: (math.isfinite(values[c]), scores[c]))
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
            f"smallest trigger relative to clean references: P-L1 {values[suspect]:.3g} where they "
            f"have {usual:.3g} (p = {p_value:.2g})"
        )
    else:
        reason = "no working trigger was found for any class that was judged"
    if gone := len(values) - len(searched):
        reason += f"; {gone} of {len(values)} classes were given up on the way"
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
        if math.isnan(shifts[suspect])
        else calibration.size_threshold(
            suspect, p_backdoored, judged=tries, shift=shifts[suspect], among=beside
        ),
        p_value=p_value,
        class_scores=scores,
        dropped=steps,
        suspects=tuple(c for c in judged if p_values[c] < p_suspicious),
        cleared=tuple(cleared),
        backdoored=tuple(c for c in judged if p_values[c] < p_backdoored),
    )


def _obstacle(values: Sequence[float], failed: Sequence[int], has_classes: bool) -> str | None:
    """Return why the sizes of a suspect bear no verdict and what would help, or None."""
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

    sizes: mask norms in any unit; infinite ones (nothing found) are left out. None when the class
    itself is infinite, fewer than three are finite, or their MAD is 0: the index is not defined.
    """
    finite = [v for v in sizes if math.isfinite(v)]
    if len(finite) < 3 or not math.isfinite(sizes[index]):
        return None
    centre = median(finite)
    spread = 1.4826 * median(abs(v - centre) for v in finite)
    return abs(sizes[index] - centre) / spread if spread > 0 else None
