"""Search every class of a model and judge what was found."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from ..evaluation import predict
from ..inversion import Elimination, TriggerFamily
from ..session import Session
from .configuration import ScanConfig
from .control import positive_control
from .references import Comparison
from .result import FamilyScan, ScanResult
from .screening import chosen_classes, merged, screen_classes, screened_detection, screens
from .search import dropped_per_class, search_classes, sizes_per_class
from .statistics import FINDINGS, Calibration, Detection, RepairHistory, Verdict, detect

# Of a model in which very many classes stand out, as many are searched to the end: a repair of
# some, and a scan after it, tell about the others.
_MOST_SUSPECTS = 12


def scan_session(
    session: Session,
    comparison: Comparison,
    *,
    history: RepairHistory | None = None,
    description: str | None = None,
) -> ScanResult:
    """Reconstruct triggers and give a verdict; the arguments are those of `pydetox.scan`.

    With `ScanConfig.positive_control`, a clean model gets one (see `detect.control`).

    history: As in `statistics.detect`.

    session: its base is the comparison's. Raises UsageError, before any search, if the calibration
    is of other searches, images, prompts or models than this.
    """
    config, calibration = comparison.config, comparison.calibration
    comparison.require_fit(session)
    start = time.perf_counter()
    model, images = session.model, session.images
    description = description or f"scan of {model.name}"
    obstacle = comparison.unfit or _beside_itself(session, calibration)
    if obstacle is None and config.objective == "targeted":
        # A label-free search asks no names, so it does not matter whether they mean anything.
        obstacle = session.plausibility.obstacle
    families, screened = list[FamilyScan](), screens(config, session)
    for family in config.families:
        compared = None if calibration is None else calibration.of(family)
        if screened:
            families.append(
                _scan_screened(
                    session,
                    config,
                    family,
                    compared,
                    f"{description} ({family})",
                    history=history,
                    obstacle=obstacle,
                )
            )
            continue
        found = search_classes(
            session,
            config,
            family,
            # Of the classes to judge none may be given up: the highest score may be of another.
            elimination=None
            if history is not None and history.narrows
            else _elimination(compared, config),
            description=description if len(config.families) == 1 else f"{description} ({family})",
        )
        detection = detect(
            sizes_per_class(found.p_l1, config),
            compared,
            has_classes=config.objective == "targeted",
            p_backdoored=config.p_backdoored,
            p_suspicious=config.p_suspicious,
            dropped=dropped_per_class(found, config),
            families=len(config.families),
            history=history,
            obstacle=obstacle,
        )
        families.append(FamilyScan(family, detection, found, compared))
    chosen = decisive(families)
    target = chosen.detection.target
    if config.objective == "label-free" and session.optional_head is not None:
        trigger = chosen.inversion.trigger(chosen.inversion.best())
        answers = predict(model, images.images, session.optional_head, stamp=trigger)
        target = int(answers.mode().values)
    result = ScanResult(
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
    wanted = config.positive_control and config.objective == "targeted"
    wanted = wanted and history is None
    if not wanted or result.verdict is not Verdict.CLEAN:
        return result
    once = replace(comparison, config=replace(config, positive_control=False))
    control = positive_control(
        session, once, partial(scan_session, description="positive control: scan")
    )
    return replace(result, control=control, seconds=time.perf_counter() - start)


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


def _scan_screened(
    session: Session,
    config: ScanConfig,
    family: TriggerFamily,
    calibration: Calibration | None,
    description: str,
    *,
    history: RepairHistory | None,
    obstacle: str | None,
) -> FamilyScan:
    """Screen all classes for one family, judge them, and search those that stand out to the end."""
    screening = screen_classes(
        session, config, family, description=f"{description}: screening of all classes"
    )

    def judge(effort: Sequence[float]) -> Detection:
        return detect(
            effort,
            calibration,
            has_classes=True,
            p_backdoored=config.p_backdoored,
            p_suspicious=config.p_suspicious,
            families=len(config.families),
            history=history,
            obstacle=obstacle,
        )

    first = judge(screening.effort)
    chosen = chosen_classes(
        screening.effort,
        first.class_scores,
        # All that would be a finding get a search, within a bound.
        min(max(config.advanced.searched_classes, len(first.suspects)), _MOST_SUSPECTS),
        cleared=() if history is None else history.cleared,
    )
    full = search_classes(session, config, family, classes=chosen, description=description)
    found = merged(screening.inversion, full, chosen, config.restarts)
    sizes = sizes_per_class(found.p_l1, config)
    # A class for which the complete search finds no working trigger is no finding.
    confirmed = judge(
        [
            math.inf if c in chosen and not math.isfinite(sizes[c]) else value
            for c, value in enumerate(screening.effort)
        ]
    )
    detection = screened_detection(first, confirmed, screening.effort, sizes, chosen, found)
    return FamilyScan(family, detection, found, calibration)


def decisive(families: Sequence[FamilyScan]) -> FamilyScan:
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
