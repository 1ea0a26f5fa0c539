"""Recovering the triggers that a trigger vector is made of, from several starting points."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..detect.configuration import ScanConfig
from ..detect.result import ScanResult
from ..detect.search import label_free_objective, objective_for
from ..inversion import (
    InversionResult,
    TriggerFamily,
    WarpConfig,
    WarpResult,
    WaveConfig,
    WaveResult,
    invert,
    invert_warps,
    search_waves,
)
from ..rng import child_seed
from ..session import Session

#: The success at which a wave without a target works. A faint wave moves some images of the base
#: towards the direction, too, which counts against it. docs/method.md has measurements.
_ONE_DIRECTION = 0.6


def recover_patches_or_blends(
    session: Session, target: int, family: TriggerFamily, config: ScanConfig, *, restarts: int
) -> InversionResult:
    """Search for triggers of one family into class `target`: see `pydetox.recover_triggers`."""
    seed = child_seed("repair.triggers", config.seed, target)
    return invert(
        session.model,
        session.images.images,
        objective_for(session, [target] * restarts, seed),
        replace(config.search(family), seed=seed),
        contrast=session.base,
        labels=session.images.labels,
        description=f"{restarts} restarts ({family})",
    )


def recover_smooth_warps(
    session: Session, target: int, config: ScanConfig, *, restarts: int
) -> WarpResult:
    """Search for warps into class `target`: see `pydetox.recover_warps`."""
    search = config.inversion
    seed = child_seed("repair.warps", config.seed, target)
    return invert_warps(
        session.model,
        session.images.images,
        objective_for(session, [target] * restarts, seed),
        WarpConfig(
            steps=search.steps,
            batch_size=search.batch_size,
            precision=search.precision,
            max_batch=search.max_batch,
            check_images=search.advanced.check_images,
            seed=seed,
        ),
        contrast=session.base,
        labels=session.images.labels,
        description=f"{restarts} restarts (warp)",
    )


def recover_waves(
    session: Session, target: int | None, config: ScanConfig, *, count: int
) -> WaveResult:
    """Search for waves into class `target`, of different frequencies: see `search_waves`.

    Without a target, waves have to send all images into one direction.
    """
    search, threshold = config.inversion, WaveConfig.success_threshold
    if target is None:
        threshold = _ONE_DIRECTION
        seed = child_seed("repair.label-free-waves", config.seed)
        objective = label_free_objective(session)
    else:
        seed = child_seed("repair.waves", config.seed, target)
        objective = objective_for(session, [target], seed)
    return search_waves(
        session.model,
        session.images.images,
        objective,
        WaveConfig(
            count=count,
            success_threshold=threshold,
            precision=search.precision,
            max_batch=search.max_batch,
            check_images=search.advanced.check_images,
            seed=seed,
        ),
        contrast=session.base,
        labels=session.images.labels,
        description="frequencies and phases (wave)",
    )


def triggers_of_scan(
    scan: ScanResult, target: int, family: TriggerFamily
) -> InversionResult | None:
    """Return the working triggers of one family that a scan found into class `target`, if any.

    Those of a search that was dropped, and those of a label-free scan, do not count.
    """
    searches = {scan.family: scan.inversion} | {one.family: one.inversion for one in scan.others}
    found = searches.get(family)
    if found is None or found.targets is None:
        return None
    return _some(
        found,
        [
            k
            for k, own in enumerate(found.targets)
            if own == target and found.endings[k] != "dropped" and math.isfinite(found.p_l1[k])
        ],
    )


def _some(found: InversionResult, chosen: list[int]) -> InversionResult | None:
    """Return the searches of some triggers; None for none. They took no time of their own."""
    if not chosen:
        return None
    at = torch.tensor(chosen)

    def rows(tensor: Tensor) -> Tensor:
        return tensor[at.to(tensor.device)]

    return replace(
        found,
        mask_logits=rows(found.mask_logits),
        pattern_logits=rows(found.pattern_logits),
        p_l1=rows(found.p_l1),
        success=rows(found.success),
        targets=None if found.targets is None else tuple(found.targets[k] for k in chosen),
        cost=rows(found.cost),
        trigger_steps=rows(found.trigger_steps),
        endings=tuple(found.endings[k] for k in chosen),
        history=found.history[:, at],
        seconds=0.0,
        tower_passes=0,
    )
