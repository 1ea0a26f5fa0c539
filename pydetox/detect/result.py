"""The results of a scan, as plain data; `pydetox.reporting.documents` writes them as JSON."""

from __future__ import annotations

from dataclasses import dataclass

from ..inversion import InversionResult, TriggerFamily
from .configuration import ObjectiveName
from .control import PositiveControl
from .statistics import FINDINGS, Calibration, Detection, Verdict


@dataclass(frozen=True, eq=False)
class FamilyScan:
    """The result of the search for one family of triggers.

    Attributes:
        family: The family of the triggers (see `inversion.FAMILIES`).
        detection: The verdict and its numbers.
        inversion: The recovered triggers: `restarts` per class, with the classes in order.
        calibration: The sizes of the clean references, or None.
    """

    family: TriggerFamily
    detection: Detection
    inversion: InversionResult
    calibration: Calibration | None


@dataclass(frozen=True, eq=False)
class ScanResult:
    """The result of a scan.

    Attributes:
        name: The name of the checkpoint.
        sha256: The SHA-256 of its weights file; None for a model that came from no file.
        objective: The objective of the search, as in ScanConfig.
        class_names: The class names; None in a label-free scan without class names.
        detection: The verdict and its numbers.
        target: The index of the class that the smallest trigger leads to; None if it is unknown.
        inversion: The recovered triggers: `restarts` per class, with the classes in order.
        calibration: The sizes of the clean references, or None.
        seconds: The wall time of the scan in seconds, without the calibration.
        family: The family of triggers that these results belong to: the one with the smallest
            p-value. If that is no finding, it is the first family without a verdict.
        others: The results of the searches for the other families.
        warnings: One line for each doubt about the verdict: what of the checkpoint or the images
            was guessed or left out, and reasons why images, class names and model may not belong
            together (see `plausibility.examine`).
        control: The positive control of a clean model; None without one.
    """

    name: str
    sha256: str | None
    objective: ObjectiveName
    class_names: tuple[str, ...] | None
    detection: Detection
    target: int | None
    inversion: InversionResult
    calibration: Calibration | None
    seconds: float
    family: TriggerFamily = "patch"
    others: tuple[FamilyScan, ...] = ()
    warnings: tuple[str, ...] = ()
    control: PositiveControl | None = None

    @property
    def verdict(self) -> Verdict:
        """The verdict of the scan."""
        return self.detection.verdict

    @property
    def target_name(self) -> str | None:
        """The name of the target class; None if it is unknown."""
        if self.target is None or self.class_names is None:
            return None
        return self.class_names[self.target]

    def cleared(self) -> tuple[int, ...]:
        """Return the classes that no family flags and that were searched to the end for all.

        A screening judges all classes, so that those which it did not flag are cleared as well.
        The result is empty without a verdict on classes.
        """
        every = [self.detection, *(one.detection for one in self.others)]
        if self.objective != "targeted" or not all(one.class_scores for one in every):
            return ()
        return tuple(
            c
            for c in range(len(self.detection.p_l1))
            if all(
                (one.dropped[c] is None or one.effort) and c not in one.suspects for one in every
            )
        )

    @property
    def tower_passes(self) -> int:
        """The passes of single images through towers, of all families.

        See `InversionResult.tower_passes`.
        """
        every = [self.inversion, *(one.inversion for one in self.others)]
        return sum(one.tower_passes for one in every)

    def targets(self) -> tuple[int, ...]:
        """Return the classes to unlearn: the target, then all others that are surely backdoored.

        All families count. The result is empty without a finding. A model can hold more than one
        backdoor. The repair of one weakens the triggers of the others enough to hide them from a
        re-scan, but not enough to disarm them.
        """
        if self.detection.verdict not in FINDINGS or self.target is None:
            return ()
        if self.objective != "targeted":
            return (self.target,)
        every = [self.detection, *(one.detection for one in self.others)]
        return tuple(dict.fromkeys([self.target, *(c for one in every for c in one.backdoored)]))

    def unnamed(self) -> bool:
        """Return whether a finding leads to no class: that of a label-free search without names."""
        return (
            self.detection.verdict in FINDINGS
            and self.objective == "label-free"
            and self.target is None
        )

    def class_steps(self) -> list[int]:
        """Return the number of steps of each class, that of its longest restart."""
        steps = self.inversion.trigger_steps.view(len(self.detection.p_l1), -1)
        return [int(n) for n in steps.max(dim=1).values]

    def reference_sizes(self) -> list[float]:
        """Return the references' mean P-L1 per class, at the step where the class was dropped.

        References that were screened have no sizes, and the result is empty.
        """
        if self.calibration is None or self.calibration.screened:
            return []
        sizes = []
        for c, step in enumerate(self.detection.dropped):
            rows = (self.calibration if step is None else self.calibration.at(step)).p_l1
            weights = self.calibration.weights
            sizes.append(sum(w * row[c] for w, row in zip(weights, rows, strict=True) if w))
        return sizes
