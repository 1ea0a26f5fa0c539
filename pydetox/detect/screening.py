"""Screening of many classes: a short search of every class decides, few are searched to the end.

A search of every class to the end costs classes x steps x images. Screening searches every class
for a few steps, on a few images per step. The *effort* of a class is the mean loss over the later
of these steps: how hard it was to send images there. References are screened in the same way, so
that efforts take the place of sizes in the verdict (`pydetox.detect.calibration`): all classes of a
suspect are judged, with the statistics of C classes, and none is selected before it is judged.

The classes that stand out most are then searched to the end. This recovers their triggers, and a
class for which it finds no working trigger is no finding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..inversion import InversionConfig, InversionResult, InversionSearch, TriggerFamily
from ..progress import Progress
from ..rng import child_seed
from ..session import Session
from .calibration import EMPTY_TRIGGER
from .configuration import ScanConfig
from .search import objective_for, require_searchable
from .statistics import FINDINGS, Detection, Verdict

# By family, the learning rate, and the steps and images, in units of those for patches. A blend
# moves all pixels at once: a longer search gets so close to a loss of zero that log efforts of
# clean models have heavy tails.
_SHORTER: dict[TriggerFamily, tuple[float, float]] = {"patch": (1.0, 1.0), "blend": (0.3, 0.5)}

# A smaller loss is that of a trigger that always works, and tells nothing more.
_LEAST_EFFORT = 1e-4


@dataclass(frozen=True, eq=False)
class Screening:
    """The short searches of one family of triggers in one model.

    Attributes:
        effort: C numbers above 0, the mean loss of each class over the counted steps.
        inversion: What the short searches found, one trigger per class.
    """

    effort: tuple[float, ...]
    inversion: InversionResult


def screens(config: ScanConfig, session: Session) -> bool:
    """Return whether a scan of this session screens its classes."""
    limit = config.advanced.screen_above
    if config.objective != "targeted" or limit is None:
        return False
    return len(session.class_names) > limit


def screening_search(config: ScanConfig, family: TriggerFamily) -> InversionConfig:
    """Return the short search of a screening."""
    search, advanced = config.search(family), config.advanced
    rate, share = _SHORTER[family]
    steps = max(1, round(share * advanced.screening_steps))
    images = max(2, round(share * advanced.screening_images))
    return replace(
        search,
        steps=steps,
        batch_size=images,
        learning_rate=rate * advanced.screening_rate,
        patience=steps + 1,  # all take the same steps
        seed=child_seed("screening.start", 0),
        advanced=replace(search.advanced, shared_start=True, check_images=images),
    )


def screen_classes(
    session: Session, config: ScanConfig, family: TriggerFamily, *, description: str
) -> Screening:
    """Screen all classes of a model for one family of triggers.

    config: Its seed decides nothing here: all screenings start from one trigger and see the same
    images in the same order. What start and images do to a class is then the same in suspects and
    references, and does not count as scatter. description: A text that is shown with the progress
    bar. Raises what `search_classes` raises.
    """
    require_searchable(session)
    classes = range(len(session.class_names))
    short = screening_search(config, family)
    search = InversionSearch(
        session.model,
        session.images.images,
        objective_for(session, classes, short.seed),
        short,
        contrast=session.base,
        labels=session.images.labels,
    )
    effort = effort_of(search, short.steps, description=description)
    return Screening(tuple(float(v) for v in effort.clamp(min=_LEAST_EFFORT)), search.result())


def effort_of(search: InversionSearch, steps: int, *, description: str) -> Tensor:
    """Run a search and return the mean loss over its later two thirds of steps, float64 [K]."""
    first = steps // 3
    total: Tensor | None = None
    with Progress(description, steps) as progress:
        for step in range(steps):
            search.step()
            if step >= first:
                loss = search.loss.double()
                total = loss if total is None else total + loss
            progress.update(1)
    assert total is not None
    return (total / (steps - first)).cpu()


def chosen_classes(
    effort: Sequence[float],
    scores: Sequence[float],
    count: int,
    *,
    cleared: Sequence[int] = (),
) -> tuple[int, ...]:
    """Return the classes to search to the end, those that stand out most first.

    scores: As in `Detection.class_scores`; empty without references, where the least effort counts.
    cleared: Classes that are not judged.
    """
    judged = [c for c in range(len(effort)) if c not in set(cleared)]
    rank = [-value for value in effort] if not scores else list(scores)
    rank = [-math.inf if math.isnan(value) else value for value in rank]
    return tuple(sorted(judged, key=lambda c: (-rank[c], effort[c], c))[:count])


def merged(
    screening: InversionResult, full: InversionResult, chosen: Sequence[int], restarts: int
) -> InversionResult:
    """Return the triggers of all classes, `restarts` each: of those chosen, the complete searches.

    The trigger of another class is that of its short search, which counts as dropped.
    """
    count = len(screening)
    every = torch.arange(count).repeat_interleave(restarts)
    # Of each trigger, its place among the complete searches.
    places = {c: k for k, c in enumerate(chosen)}
    at = torch.tensor([c * restarts + r for c in chosen for r in range(restarts)])

    def combined(short: Tensor, complete: Tensor) -> Tensor:
        both = short[every.to(short.device)]
        both[at.to(short.device)] = complete
        return both

    history = screening.p_l1[every].expand(len(full.recorded_steps), -1).clone()
    history[:, at] = full.history
    endings = tuple(
        full.endings[places[c] * restarts + r] if c in places else "dropped"
        for c in range(count)
        for r in range(restarts)
    )
    return replace(
        full,
        mask_logits=combined(screening.mask_logits, full.mask_logits),
        pattern_logits=combined(screening.pattern_logits, full.pattern_logits),
        p_l1=combined(screening.p_l1, full.p_l1),
        success=combined(screening.success, full.success),
        targets=tuple(c for c in range(count) for _ in range(restarts)),
        cost=combined(screening.cost, full.cost),
        trigger_steps=combined(screening.trigger_steps, full.trigger_steps),
        endings=endings,
        history=history,
        seconds=screening.seconds + full.seconds,
        tower_passes=screening.tower_passes + full.tower_passes,
    )


def screened_detection(
    screened: Detection,
    confirmed: Detection,
    effort: Sequence[float],
    sizes: Sequence[float],
    chosen: Sequence[int],
    found: InversionResult,
) -> Detection:
    """Return the verdict of a scan that screened its classes.

    screened: The verdict on the efforts. confirmed: The same without the classes for which the
    complete search found no trigger. effort, sizes: The effort and the P-L1 of each class. chosen:
    The classes that were searched to the end. found: The triggers of all classes.
    """
    count, restarts = len(effort), len(found) // len(effort)
    steps = found.trigger_steps.view(count, restarts).max(dim=1).values.tolist()
    dropped = tuple(None if c in chosen else int(steps[c]) for c in range(count))
    suspects = tuple(c for c in confirmed.suspects if c in chosen)
    backdoored = tuple(c for c in confirmed.backdoored if c in chosen)
    target = chosen[0]
    if confirmed.target is not None and confirmed.target in chosen:
        target = confirmed.target
    common: dict[str, Any] = {
        "p_l1": tuple(sizes),
        "effort": tuple(effort),
        "dropped": dropped,
        "anomaly_index": None,  # of bounds, there is none
        "threshold": None,
        "target": target if math.isfinite(sizes[target]) else None,
        "smallest_p_l1": sizes[target],
        "suspects": suspects,
        "backdoored": backdoored,
    }
    if screened.verdict is Verdict.INCONCLUSIVE:
        return replace(screened, **common)
    smallest = min(sizes)
    if smallest < EMPTY_TRIGGER:
        return replace(
            confirmed,
            **common,
            verdict=Verdict.INCONCLUSIVE,
            reason=f"an empty trigger works for class {sizes.index(smallest)} (P-L1 "
            f"{smallest:.1g}): the model gives one answer to every image; check its weights, and "
            "give images of all classes",
            score=None,
            p_value=None,
            class_scores=(),
            p_values=(),
        )
    if screened.verdict in FINDINGS and not suspects:
        worst = max(screened.suspects, key=lambda c: screened.class_scores[c])
        return replace(
            confirmed,
            **common,
            verdict=Verdict.INCONCLUSIVE,
            reason=f"the screening of class {worst} stood out, but the complete searches of "
            f"{len(chosen)} classes found no working trigger: search for more steps",
            score=None,
            p_value=None,
            class_scores=(),
            p_values=(),
        )
    p_value = confirmed.p_value
    shown = "none" if p_value is None else f"{p_value:.2g}"
    return replace(
        confirmed,
        **common,
        reason=f"screening of {count} classes: the one that stands out most from clean references "
        f"took a loss of {effort[target]:.3g}, and its trigger has P-L1 {sizes[target]:.3g} "
        f"(p = {shown}); {len(chosen)} classes were searched to the end",
    )
