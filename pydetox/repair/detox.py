"""The repair of one model: scan, subtract, scan again, for known and unknown triggers alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..detect.references import ReferencePlan
from ..detect.rescan import Rescans
from ..detect.result import ScanResult
from ..detect.scan import scan_session
from ..evaluation import Stamp
from ..models import OpenClipModel
from ..progress import Laps
from ..rng import child_seed
from ..session import ModelLike, Session, as_model
from .configuration import UnlearnConfig
from .passes import subtract_passes
from .provenance import save_repair_adapter, save_repaired
from .result import DetoxResult, UnlearnRound
from .retention import DriftProbe


@dataclass(frozen=True, eq=False)
class KnownTarget:
    """A class to unlearn whatever a scan says.

    Attributes:
        index: The index of the class.
        triggers: Known triggers into the class; empty to recover them.
    """

    index: int
    triggers: tuple[Stamp, ...] = ()


def repair_session(
    session: Session,
    plan: ReferencePlan,
    unlearning: UnlearnConfig,
    *,
    known: KnownTarget | None = None,
    max_rounds: int = 3,
    output: str | Path | None = None,
    overwrite: bool = False,
    read: Callable[[ModelLike], OpenClipModel] = as_model,
    seconds: dict[str, float] | None = None,
    lora_rank: int | None = None,
) -> DetoxResult:
    """Repair a session's model; the arguments are those of `pydetox.detox`.

    known: A class to repair once, whatever the verdict is. read: The function that reads the plan's
    models. seconds: The wall time of earlier steps, which the result then contains. lora_rank: The
    rank of a LoRA adapter that is written instead of the whole checkpoint; None for the checkpoint.
    """
    clock = Laps(seconds)
    comparison = plan.prepare(
        session.images,
        templates=session.templates,
        read=read,
        suspect=session.model,
        repair=unlearning.leads_to_base,
    )
    session = session.with_base(comparison.base, start=comparison.start)
    if plan.makes_calibration:
        clock.lap("calibrate")
    before = scan_session(session, comparison)
    clock.lap("scan")
    stamp = known.triggers[0] if known is not None and known.triggers else None
    attacked = None if stamp is None or known is None else known.index
    evaluation_before = session.evaluate(trigger=stamp, target=attacked)
    rescans = Rescans(session, comparison, before, known=None if known is None else known.index)
    if known is not None:
        max_rounds = 1
    repaired, current = session, before
    rounds, accuracy, probe = list[UnlearnRound](), None, None
    aimed = tuple[int, ...]()
    for number in range(max_rounds):
        targets = current.targets() if known is None else (known.index,)
        seed = child_seed("repair.round", comparison.config.seed, number)
        passes = list[UnlearnRound]()
        earlier = rounds[-1].unlearned if rounds else ()
        aimed = (*aimed, *targets)

        def rescan(
            model: OpenClipModel,
            *place: int,
            number: int = number,
            tuned: Session = repaired,
            aimed: tuple[int, ...] = aimed,
        ) -> ScanResult:
            """Scan a model of this round; place: the number of its pass, if it may not be last."""
            clock.lap("unlearn")
            seed = child_seed("repair.rescan", comparison.config.seed, number, *place)
            seeded = replace(comparison.config, seed=seed)
            found = rescans.scan(tuned.with_image_tower_of(model), seeded, unlearned=aimed)
            clock.lap("rescan")
            return found

        reuses = unlearning.advanced.reuse_scans
        attempts = list(dict.fromkeys([targets, targets[:1]])) if targets else []
        if not targets and current.unnamed():
            attempts = [()]
        if attempts and probe is None:
            probe = DriftProbe(
                session.model,
                session.images.images,
                seed=unlearning.seed,
                base=unlearning.end_of(session),
            )
        # Unlearn all classes at once. If no alpha does so within the accuracy to keep, try the
        # first.
        for attempt in attempts:
            model, passes_of_attempt = subtract_passes(
                repaired,
                attempt,
                replace(comparison.config, seed=seed),
                unlearning,
                triggers=known.triggers or None if known is not None else None,
                accuracy_before=accuracy,
                probe=probe,
                scan=current if reuses else None,
                check=rescan if reuses else None,
                earlier=earlier,
            )
            passes += passes_of_attempt
            accuracy = passes[0].search.accuracy_before if accuracy is None else accuracy
            clock.lap("unlearn")
            if _subtracted(passes_of_attempt):
                repaired = repaired.with_image_tower_of(model)
                break
        rounds += passes
        if not _subtracted(passes):
            break
        # The last pass may have been scanned already, and found to be enough.
        current = rounds[-1].rescan or rescan(repaired.model)
        rounds[-1] = replace(rounds[-1], rescan=current)
    result = DetoxResult(
        before=before,
        rounds=tuple(rounds),
        after=current if rounds else None,
        model=repaired.model,
        evaluation_before=evaluation_before,
        evaluation_after=(repaired.evaluate(trigger=stamp, target=attacked) if rounds else None),
        drift=None if probe is None else probe.from_start(repaired.model),
        path=None,
        seconds=clock.seconds,
    )
    if output is not None and _subtracted(rounds):
        given: dict[str, Any] = {
            "overwrite": overwrite,
            "trigger": "unknown trigger" if stamp is None else "known trigger",
            "config": comparison.config,
            "unlearning": unlearning,
        }
        adapter = None
        if lora_rank is None:
            path = save_repaired(result, output, **given)
        else:
            images = session.images.images
            path, adapter = save_repair_adapter(
                result, session.model, images, output, rank=lora_rank, **given
            )
        clock.lap("write")
        result = replace(result, path=path, adapter=adapter)
    return result


def _subtracted(passes: Sequence[UnlearnRound]) -> bool:
    return any(one.search.coefficient for one in passes)
