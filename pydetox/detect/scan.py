"""Search every class of a model and judge what was found."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from ..evaluation import predict
from ..inversion import Elimination
from ..session import Session
from .configuration import ScanConfig
from .references import Comparison
from .result import FamilyScan, ScanResult
from .search import dropped_per_class, search_classes, sizes_per_class
from .statistics import FINDINGS, Calibration, Verdict, detect


def scan_session(
    session: Session,
    comparison: Comparison,
    *,
    cleared: Sequence[int] = (),
    description: str | None = None,
) -> ScanResult:
    """Reconstruct triggers and give a verdict; the arguments are those of `pydetox.scan`.

    session: its base is the comparison's. Raises UsageError, before any search, if the calibration
    is of other searches, images, prompts or models than this.
    """
    config, calibration = comparison.config, comparison.calibration
    comparison.require_fit(session)
    start = time.perf_counter()
    model, images = session.model, session.images
    description = description or f"scan of {model.name}"
    obstacle = _beside_itself(session, calibration)
    if obstacle is None and config.objective == "targeted":
        # A label-free search asks no names, so it does not matter whether they mean anything.
        obstacle = session.plausibility.obstacle
    families = list[FamilyScan]()
    for family in config.searched:
        compared = None if calibration is None else calibration.of(family)
        found = search_classes(
            session,
            config,
            family,
            # Of the classes to judge none may be given up: the highest score may be of another.
            elimination=None if cleared else _elimination(compared, config),
            description=description if len(config.searched) == 1 else f"{description} ({family})",
        )
        detection = detect(
            sizes_per_class(found.p_l1, config),
            compared,
            has_classes=config.objective == "targeted",
            p_backdoored=config.p_backdoored,
            p_suspicious=config.p_suspicious,
            dropped=dropped_per_class(found, config),
            families=len(config.searched),
            cleared=cleared,
            obstacle=obstacle,
        )
        families.append(FamilyScan(family, detection, found, compared))
    chosen = _decisive(families)
    target = chosen.detection.target
    if config.objective == "label-free" and session.optional_head is not None:
        trigger = chosen.inversion.trigger(chosen.inversion.best())
        answers = predict(model, images.images, session.optional_head, stamp=trigger)
        target = int(answers.mode().values)
    return ScanResult(
        name=model.name,
        sha256=model.sha256,
        objective=config.objective,
        class_names=images.class_names,
        detection=chosen.detection,
        target=target,
        inversion=chosen.inversion,
        calibration=chosen.calibration,
        seconds=time.perf_counter() - start,
        family=chosen.family,
        others=tuple(one for one in families if one is not chosen),
        warnings=session.doubts,
    )


def _beside_itself(session: Session, calibration: Calibration | None) -> str | None:
    """Return why there is no verdict if the suspect is compared with itself, else None.

    A backdoored model beside itself and its own copies would be `clean`.
    """
    if session.base is None and (calibration is None or not calibration.digests):
        return None
    digest = session.model.image_tower_digest()
    same = None if calibration is None else calibration.reference(digest)
    if same is None and session.base is not None and session.base.image_tower_digest() == digest:
        same = repr(session.base.name)
    if same is None:
        return None
    return f"it is compared with itself: {same} has the same image tower; give other clean models"


def _decisive(families: Sequence[FamilyScan]) -> FamilyScan:
    """Return the family whose verdict is the model's: the one with the smallest p-value.

    A family without a verdict decides where no other is a finding: a model is clean of what was
    searched for only if every search bears a verdict.
    """

    def p_value(found: FamilyScan) -> float:
        value = found.detection.p_value
        return math.inf if value is None else value

    chosen = min(families, key=p_value)
    if chosen.detection.verdict in FINDINGS:
        return chosen
    undecided = [f for f in families if f.detection.verdict is Verdict.INCONCLUSIVE]
    return undecided[0] if undecided else chosen


def _elimination(calibration: Calibration | None, config: ScanConfig) -> Elimination | None:
    """Return the rule that drops classes, where there is something to compare them with.

    There is none for searches in contrast to a base.
    """
    if calibration is None or not calibration.recorded_steps or config.drop_below is None:
        return None
    if calibration.relative:
        return None
    # The classes that the others are judged beside run to the end, and so does the best of these.
    kept = 1 + len(calibration.controls)
    return Elimination(calibration.progress, config.drop_below, config.restarts, kept=kept)
