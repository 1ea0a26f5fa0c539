"""One repair: passes that recover triggers, or take known ones, and subtract their vector."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from ..detect.configuration import ScanConfig
from ..detect.result import ScanResult
from ..detect.statistics import Verdict
from ..errors import UsageError
from ..evaluation import Stamp
from ..inversion import InversionResult, WarpResult, WaveResult
from ..models import OpenClipModel
from ..rng import child_seed
from ..session import Session
from .alpha import CoefficientSearch, search_coefficient
from .configuration import UnlearnConfig
from .directions import MOST, head_with_directions, recover_label_free
from .recovery import (
    recover_patches_or_blends,
    recover_smooth_warps,
    recover_waves,
    triggers_of_scan,
)
from .result import UnlearnRound
from .retention import DriftProbe
from .subtraction import subtract
from .trigger_vector import trigger_vector

#: The score below which a class shows no trace of a backdoor. The ten classes of a clean model of
#: the demo had scores of up to 2.1.
ORDINARY_SCORE = 2.0

_LOG = logging.getLogger(__name__)


def subtract_passes(
    session: Session,
    targets: Sequence[int],
    config: ScanConfig,
    unlearning: UnlearnConfig,
    *,
    triggers: Sequence[Stamp] | None = None,
    restarts: int = 3,
    accuracy_before: float | None = None,
    probe: DriftProbe | None = None,
    scan: ScanResult | None = None,
    check: Callable[[OpenClipModel, int], ScanResult] | None = None,
    earlier: Sequence[tuple[Stamp, int | Tensor]] = (),
) -> tuple[OpenClipModel, tuple[UnlearnRound, ...]]:
    """Subtract the vectors of some classes' triggers; the arguments are those of `pydetox.unlearn`.

    targets: Class indices, one for known triggers. None of them unlearns triggers that send all
    images into one direction, for a model without class names (`directions`). probe: Measures the
    drift from the model before any repair; default: from the session's. scan: A scan of the
    session's model; its triggers count among the recovered ones of the first pass. check: Scans the
    model after a pass, given by its number. If a pass reaches all limits, finds no small warp, and
    leaves target classes that look like those of clean models in this scan, no other pass follows.
    The scan is then the last pass's `rescan`; otherwise its triggers count in the next pass.
    earlier: What earlier repairs of this model have unlearned (`UnlearnRound.unlearned`). It is
    unlearned again beside the new triggers, so that it does not come back. Returns the repaired
    model and what each pass did.
    """
    if triggers is not None and len(targets) != 1:
        raise UsageError(f"{len(targets)} target classes; expected one for known triggers")
    if not targets and config.objective != "label-free":
        raise UsageError("no target class; expected one or more, or a label-free configuration")
    forget = session.forget_set(unlearning.advanced.forget_share, unlearning.seed).images
    # A scan with class names finds classes, and one without finds directions: rounds do not mix.
    kind = int if targets else Tensor
    kept = [(stamp, lead) for stamp, lead in earlier if isinstance(lead, kind)]
    stamps = [*(stamp for stamp, _ in kept), *(triggers or ())]
    directions = [lead for _, lead in kept if isinstance(lead, Tensor)]
    target_of_each = [lead for _, lead in kept if isinstance(lead, int)]
    target_of_each += [targets[0]] * (len(stamps) - len(kept)) if targets else []
    base = unlearning.end_of(session)
    probe = probe or DriftProbe(
        session.model, session.images.images, seed=unlearning.seed, base=base
    )
    passes, first = list[UnlearnRound](), accuracy_before is None
    for number in range(unlearning.passes if triggers is None else 1):
        recovered, warps = list[InversionResult](), list[WarpResult]()
        waves = list[WaveResult]()
        reserve = 0.0
        if triggers is None:
            reserve = unlearning.reserve(number) if first else 0.0
            seeded = replace(config, seed=child_seed("repair.pass", config.seed, number))
            # Triggers of earlier passes stay, so that the model does not learn them again.
            for target in targets:
                found = _recover(session, target, seeded, unlearning, restarts, scan)
                recovered += [one for one in found if isinstance(one, InversionResult)]
                warps += [one for one in found if isinstance(one, WarpResult)]
                waves += [one for one in found if isinstance(one, WaveResult)]
                stamps += [stamp for one in found for stamp in unlearning.amplified(one)]
                target_of_each += [target] * (len(stamps) - len(target_of_each))
            if not targets:
                for family in config.families:
                    one = recover_label_free(session, family, seeded, restarts=restarts)
                    recovered.append(one)
                    stamps += unlearning.amplified(one, most=MOST)
                # Without a base, the attacker's wave cannot be told from what a wave does anyway.
                if unlearning.waves and session.base is not None:
                    waves.append(recover_waves(session, None, seeded, count=unlearning.waves))
                    stamps += unlearning.amplified(waves[-1])
        if targets:
            head = session.head
        else:
            # A trigger that was unlearned no longer shows where it led.
            head, target_of_each = head_with_directions(
                session.model,
                session.images,
                session.prototypes,
                stamps,
                known=directions,
                seed=unlearning.seed,
            )
            directions = [head[row] for row in target_of_each]
        seed = child_seed("repair.vector-pass", unlearning.seed, number)
        vector = trigger_vector(
            session.model,
            forget,
            stamps,
            head,
            target_of_each,
            replace(unlearning, seed=seed),
            base=base,
        )
        search = search_coefficient(
            session.model,
            vector,
            session.images if targets else replace(session.images, labels=None),
            stamps,
            head,
            target_of_each,
            unlearning,
            accuracy_before=accuracy_before,
            reserve=reserve,
            probe=probe,
        )
        accuracy_before = search.accuracy_before
        model = subtract(session.model, vector, search.coefficient)
        session = session.with_image_tower_of(model)
        passes.append(
            UnlearnRound(
                tuple(targets),
                tuple(recovered),
                search,
                vector,
                None,
                warps=tuple(warps),
                waves=tuple(waves),
                unlearned=tuple(
                    zip(stamps, target_of_each if targets else directions, strict=True)
                ),
            )
        )
        scan = None
        if check is not None and triggers is None and _may_be_last(passes[-1], number, unlearning):
            scan = check(model, number)
            if looks_clean(scan, targets):
                passes[-1] = replace(passes[-1], rescan=scan)
                break
        if search.hopeless:  # another pass costs as much, and starts from the same weights
            _LOG.warning("%s", _refused(search, unlearning, toward_base=base is not None))
            break
    return session.model, tuple(passes)


def _refused(search: CoefficientSearch, unlearning: UnlearnConfig, *, toward_base: bool) -> str:
    """Return why nothing is subtracted, and what would be with other limits."""
    text = (
        f"no alpha up to {search.coefficients[-1]:g} removes anything while it keeps "
        f"min_accuracy_kept {unlearning.min_accuracy_kept:g} and max_drift "
        f"{unlearning.max_drift:g}: nothing is subtracted in this pass"
    )
    if toward_base:
        text += " (the vector leads to the base; a free one may do more: toward_base)"
    offer = search.compromise
    if offer is None:
        return f"{text}; none removes all triggers, whatever it costs"
    return (
        f"{text}; alpha {search.coefficients[offer.index]:g} would remove the triggers, with "
        f"min_accuracy_kept {offer.min_accuracy_kept:g} and max_drift {offer.max_drift:g}"
    )


def looks_clean(scan: ScanResult, targets: Sequence[int]) -> bool:
    """Whether a scan is clean, and each target class is like those of clean models in each family.

    A verdict asks whether a model is surely backdoored. This asks whether its target classes show
    any trace of it: a score of `ORDINARY_SCORE` is far from a finding, and counts as one.
    """
    every = [scan.detection, *(one.detection for one in scan.others)]
    return scan.verdict is Verdict.CLEAN and all(
        one.class_scores and one.class_scores[target] < ORDINARY_SCORE
        for one in every
        for target in targets
    )


def _may_be_last(one: UnlearnRound, number: int, unlearning: UnlearnConfig) -> bool:
    """Whether a pass may have been enough, and is not the last one anyway."""
    small = any(unlearning.warps_that_count(found) for found in one.warps)
    return number + 1 < unlearning.passes and one.search.reached and not small and bool(one.targets)


def _recover(
    session: Session,
    target: int,
    config: ScanConfig,
    unlearning: UnlearnConfig,
    restarts: int,
    scan: ScanResult | None,
) -> list[InversionResult | WarpResult | WaveResult]:
    """Return the triggers of every family into one class, those of a scan first, waves last."""
    found = list[InversionResult | WarpResult | WaveResult]()
    for family in config.families:
        known = None if scan is None else triggers_of_scan(scan, target, family)
        if known is not None:
            found.append(known)
        more = restarts - (0 if known is None else len(known))
        if more > 0:
            found.append(recover_patches_or_blends(session, target, family, config, restarts=more))
    if unlearning.warps:
        found.append(recover_smooth_warps(session, target, config, restarts=unlearning.warps))
    if unlearning.waves:
        found.append(recover_waves(session, target, config, count=unlearning.waves))
    return found
