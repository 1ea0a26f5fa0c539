"""What a scan found, as plain data; `pydetox.reporting.documents` writes it as JSON."""

from __future__ import annotations

from dataclasses import dataclass

from ..inversion import InversionResult, TriggerFamily
from .configuration import ObjectiveName
from .statistics import FINDINGS, Calibration, Detection, Verdict


@dataclass(frozen=True, eq=False)
class FamilyScan:
    """What the search for one family of triggers found.

    Attributes:
        family: Of the triggers (see `inversion.FAMILIES`).
        detection: Verdict and numbers.
        inversion: The recovered triggers: `restarts` per class, classes in order.
        calibration: What the sizes were compared with, or None.
    """

    family: TriggerFamily
    detection: Detection
    inversion: InversionResult
    calibration: Calibration | None


@dataclass(frozen=True, eq=False)
class ScanResult:
    """What a scan found.

    Attributes:
        name: Of the checkpoint.
        sha256: Of its weights file; None for a model that came from no file.
        objective: As in ScanConfig.
        class_names: The classes, or None in a label-free scan without class names.
        detection: Verdict and numbers.
        target: The class that the smallest trigger leads to; None when that is unknown.
        inversion: The recovered triggers: `restarts` per class, classes in order.
        calibration: What the sizes were compared with, or None.
        seconds: Wall time of the scan without the calibration.
        family: Which family of triggers these are: of all that were searched for the one with the
            smallest p-value. If that is no finding, the first family without a verdict.
        others: What the searches for the other families found.
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

    @property
    def verdict(self) -> Verdict:
        """The conclusion."""
        return self.detection.verdict

    @property
    def target_name(self) -> str | None:
        """Name of the target class."""
        if self.target is None or self.class_names is None:
            return None
        return self.class_names[self.target]

    def cleared(self) -> tuple[int, ...]:
        """Return the classes that are no finding, of any family, and were all searched to the end.

        Empty without a verdict on classes.
        """
        every = [self.detection, *(one.detection for one in self.others)]
        if self.objective != "targeted" or not all(one.class_scores for one in every):
            return ()
        return tuple(
            c
            for c in range(len(self.detection.p_l1))
            if all(one.dropped[c] is None and c not in one.suspects for one in every)
        )

    def targets(self) -> tuple[int, ...]:
        """Return the classes to unlearn: the target, then all others that are surely backdoored.

        Of any family. Empty without a finding. A model can hold more than one backdoor, and the
        repair of one weakens the others' triggers enough to hide them from a re-scan, not enough
        to disarm them.
        """
        if self.detection.verdict not in FINDINGS or self.target is None:
            return ()
        if self.objective != "targeted":
            return (self.target,)
        every = [self.detection, *(one.detection for one in self.others)]
        return tuple(dict.fromkeys([self.target, *(c for one in every for c in one.backdoored)]))

    def class_steps(self) -> list[int]:
        """Return the steps that each class was searched for, of its longest restart."""
        steps = self.inversion.trigger_steps.view(len(self.detection.p_l1), -1)
        return [int(n) for n in steps.max(dim=1).values]

    def reference_sizes(self) -> list[float]:
        """Return the references' mean P-L1 per class, at the step where the class was dropped."""
        if self.calibration is None:
            return []
        sizes = []
        for c, step in enumerate(self.detection.dropped):
            rows = (self.calibration if step is None else self.calibration.at(step)).p_l1
            sizes.append(sum(row[c] for row in rows) / len(rows))
        return sizes
