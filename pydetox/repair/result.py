"""The results of a repair, as plain data; `pydetox.reporting.documents` writes them as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..detect.result import ScanResult
from ..detect.statistics import Verdict
from ..evaluation import Evaluation
from ..inversion import InversionResult, WarpResult
from ..models import OpenClipModel
from .alpha import CoefficientSearch
from .retention import FeatureDrift
from .task_vectors import TaskVector


@dataclass(frozen=True, eq=False)
class UnlearnRound:
    """One trigger vector that was subtracted.

    Several vectors may be subtracted before the model is scanned again.

    targets: Class indices, the most suspect one first. triggers: What was recovered for each of
    them, by family; empty for known triggers. search: CA, ASR and drift over alpha. vector: The
    trigger vector. rescan: The model afterwards; None when it was not scanned again. warps: What
    searches for a warp found for each of the targets; empty without such searches.
    """

    targets: tuple[int, ...]
    triggers: tuple[InversionResult, ...]
    search: CoefficientSearch
    vector: TaskVector
    rescan: ScanResult | None
    warps: tuple[WarpResult, ...] = ()

    @property
    def target(self) -> int:
        """The most suspect class."""
        return self.targets[0]


@dataclass(frozen=True, eq=False)
class DetoxResult:
    """Everything that `detox` did to one checkpoint.

    Attributes:
        before: The first scan.
        rounds: What was subtracted, in order; empty when the model was left as it is.
        after: The last re-scan, None when nothing was subtracted.
        model: The repaired model, or the given one.
        evaluation_before, evaluation_after: CA on the given images, None without labels.
        drift: How far the returned model's image features have moved from the given one's on images
            that belong to no name; None where no repair was tried.
        path: Where the repaired checkpoint was written, or None.
        seconds: Wall time by step.
    """

    before: ScanResult
    rounds: tuple[UnlearnRound, ...]
    after: ScanResult | None
    model: OpenClipModel
    evaluation_before: Evaluation | None
    evaluation_after: Evaluation | None
    drift: FeatureDrift | None
    path: Path | None
    seconds: dict[str, float]

    @property
    def verdict(self) -> Verdict:
        """The verdict of the first scan."""
        return self.before.verdict

    @property
    def repaired(self) -> bool:
        """Whether something was subtracted and the re-scan is clean."""
        return self.after is not None and self.after.verdict is Verdict.CLEAN
