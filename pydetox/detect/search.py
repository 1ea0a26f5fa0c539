"""The searches of a scan: one or several triggers into every class of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ..inversion import (
    CollapseObjective,
    ContrastObjective,
    Elimination,
    InversionResult,
    Objective,
    TargetObjective,
    TriggerFamily,
    invert,
)
from ..session import Session
from .configuration import ScanConfig


def search_classes(
    session: Session,
    config: ScanConfig,
    family: TriggerFamily,
    *,
    elimination: Elimination | None = None,
    description: str,
) -> InversionResult:
    """Search for triggers of one family: `restarts` per class, or in all in a label-free scan.

    config: the search takes its seed. elimination: drops classes on the way; None for none.
    description: shown with the progress bar.
    """
    objective: Objective = CollapseObjective()
    if config.objective == "targeted":
        classes = range(len(session.class_names))
        targets = [c for c in classes for _ in range(config.restarts)]
        objective = objective_for(session, targets, config.seed)
    return invert(
        session.model,
        session.images.images,
        objective,
        replace(config.search(family), seed=config.seed),
        restarts=config.restarts,
        elimination=elimination,
        contrast=session.base,
        labels=session.images.labels,
        description=description,
    )


def objective_for(session: Session, targets: Sequence[int], seed: int) -> Objective:
    """Return what triggers into those classes must do, in contrast to the session's base if any.

    targets: Class index of each trigger. seed: Of the sample of images that the base is asked of.
    """
    model, base = session.model, session.base
    if base is None:
        return TargetObjective(session.head, targets, model.logit_scale)
    return ContrastObjective(
        session.head,
        session.base_head,
        targets,
        logit_scale=model.logit_scale,
        base_logit_scale=base.logit_scale,
        base_shares=session.base_shares(seed),
    )


def sizes_per_class(p_l1: Tensor, config: ScanConfig) -> tuple[float, ...]:
    """Return the smallest P-L1 of each class over its restarts, of all triggers [K]."""
    per_class = p_l1.view(-1, config.restarts).min(dim=1).values
    return tuple(float(v) for v in per_class)


def dropped_per_class(found: InversionResult, config: ScanConfig) -> tuple[int | None, ...]:
    """Return the step at which each class was dropped, None for one that was not."""
    steps = found.trigger_steps.tolist()
    per_class = []
    for first in range(0, len(found), config.restarts):
        which = range(first, first + config.restarts)
        at = [steps[k] for k in which if found.endings[k] == "dropped"]
        per_class.append(int(at[0]) if at else None)
    return tuple(per_class)
