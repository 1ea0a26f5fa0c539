"""Recovering the triggers that a trigger vector is made of, from several starting points."""

from __future__ import annotations

from dataclasses import replace

from ..detect.configuration import ScanConfig
from ..detect.search import objective_for
from ..inversion import (
    InversionResult,
    TriggerFamily,
    WarpConfig,
    WarpResult,
    invert,
    invert_warps,
)
from ..rng import child_seed
from ..session import Session


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
