"""The results of a repair, as plain data; `pydetox.reporting.documents` writes them as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..detect.result import ScanResult
from ..detect.statistics import Verdict
from ..evaluation import Evaluation, Stamp
from ..inversion import InversionResult, WarpResult, WaveResult
from ..models import OpenClipModel
from .alpha import CoefficientSearch
from .retention import FeatureDrift
from .task_vectors import TaskVector


@dataclass(frozen=True, eq=False)
class UnlearnRound:
    """One trigger vector that was subtracted.

    Several vectors may be subtracted before the model is scanned again.

    Attributes:
        targets: The indices of the target classes, the most suspect one first; empty for triggers
            that lead to no named class.
        triggers: The triggers that were recovered for each target, by family; empty for known
            triggers.
        search: CA, ASR and drift over alpha.
        vector: The trigger vector.
        rescan: The scan of the model afterwards; None if it was not scanned again.
        warps: The warps that were found for each target; empty without searches for warps.
        waves: The waves that were found for each target; empty without searches for waves.
        unlearned: All triggers that the vector is made of, also those of earlier passes and
            repairs; each with its target class, or with the unit direction [D] that it led to if
            that is no named class.
    """

    targets: tuple[int, ...]
    triggers: tuple[InversionResult, ...]
    search: CoefficientSearch
    vector: TaskVector
    rescan: ScanResult | None
    warps: tuple[WarpResult, ...] = ()
    waves: tuple[WaveResult, ...] = ()
    unlearned: tuple[tuple[Stamp, int | Tensor], ...] = field(default=(), repr=False)

    @property
    def target(self) -> int | None:
        """The most suspect class; None for triggers that lead to no named class."""
        return self.targets[0] if self.targets else None


@dataclass(frozen=True)
class WrittenAdapter:
    """What a LoRA adapter of a repair leaves out.

    Attributes:
        rank: The rank of every B A.
        error: The Frobenius norm of what it leaves out, as a share of that of the change.
        feature_distance: The mean 1 - cos of the image features with the adapter to those of the
            model that was scanned again, on the given images.
    """

    rank: int
    error: float
    feature_distance: float


@dataclass(frozen=True, eq=False)
class DetoxResult:
    """Everything that `detox` did to one checkpoint.

    Attributes:
        before: The first scan.
        rounds: The vectors that were subtracted, in order; empty if the model was not changed.
        after: The last re-scan; None if nothing was subtracted.
        model: The repaired model; the given model if nothing was subtracted.
        evaluation_before, evaluation_after: CA on the given images; None without labels.
        drift: The distance of the returned model's image features from those of the given model, on
            images that belong to no class; None if no repair was tried.
        path: The folder of the repaired checkpoint, or of its adapter; None if it was not written.
        seconds: The wall time of each step, in seconds.
        adapter: What the adapter leaves out; None if a whole checkpoint or nothing was written.
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
    adapter: WrittenAdapter | None = None

    @property
    def verdict(self) -> Verdict:
        """The verdict of the first scan."""
        return self.before.verdict

    @property
    def repaired(self) -> bool:
        """Whether something was subtracted and the re-scan is clean.

        A re-scan is a search of its own. It can miss a trigger that is known to work still, because
        no alpha removes it within the limits: see `CoefficientSearch.reached` of the last round.
        """
        return self.after is not None and self.after.verdict is Verdict.CLEAN
