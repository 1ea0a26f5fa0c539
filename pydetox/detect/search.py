"""The searches of a scan: one or several triggers into every class of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..errors import ArchitectureError
from ..inversion import (
    ContrastObjective,
    DirectionObjective,
    Elimination,
    InversionResult,
    Objective,
    TargetObjective,
    TriggerFamily,
    invert,
)
from ..models import OpenClipModel
from ..prototypes import image_features
from ..session import Session
from .configuration import ScanConfig

# Images that tell whether a model looks at images at all, and how much embeddings that it gives
# them may differ by rounding alone.
_TRIED = 16
_SAME = 1e-6


def search_classes(
    session: Session,
    config: ScanConfig,
    family: TriggerFamily,
    *,
    classes: Sequence[int] | None = None,
    elimination: Elimination | None = None,
    description: str,
) -> InversionResult:
    """Search for triggers of one family, in each class, or in all in a label-free scan.

    config: the search takes its seed, and `ScanConfig.searches_per_class` their number.
    classes: those of a targeted scan to search; None for all.
    elimination: drops classes on the way; None for none. description: shown with the progress bar.
    Raises ArchitectureError for a model whose answers do not depend on what it is shown: any
    trigger works in it, the smallest too, and that would look like a backdoor.
    """
    if config.objective != "targeted":
        _require_images_matter(session.model, session.images.images)
        objective = label_free_objective(session)
    else:
        require_searchable(session)
        classes = range(len(session.class_names)) if classes is None else classes
        targets = [c for c in classes for _ in range(config.restarts)]
        objective = objective_for(session, targets, config.seed)
    return invert(
        session.model,
        session.images.images,
        objective,
        replace(config.search(family), seed=config.seed),
        restarts=config.searches_per_class,
        elimination=elimination,
        contrast=session.base,
        labels=session.images.labels,
        description=description,
    )


def require_searchable(session: Session) -> None:
    """Raise ArchitectureError if the model's answers depend on neither images nor class names."""
    _require_images_matter(session.model, session.images.images)
    _require_names_matter(session.model, session.class_names, session.head)


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


def label_free_objective(session: Session) -> Objective:
    """Return what triggers into no class must do, in contrast to the session's base if any."""
    model, base, images = session.model, session.base, session.images.images
    return DirectionObjective(
        image_features(model, images),
        model.logit_scale,
        base_features=None if base is None else image_features(base, images),
    )


def sizes_per_class(p_l1: Tensor, config: ScanConfig) -> tuple[float, ...]:
    """Return the smallest P-L1 of each class over its restarts, of all triggers [K]."""
    per_class = p_l1.view(-1, config.searches_per_class).min(dim=1).values
    return tuple(float(v) for v in per_class)


def dropped_per_class(found: InversionResult, config: ScanConfig) -> tuple[int | None, ...]:
    """Return the step at which each class was dropped, None for one that was not."""
    steps = found.trigger_steps.tolist()
    per_class = []
    for first in range(0, len(found), config.searches_per_class):
        which = range(first, first + config.searches_per_class)
        at = [steps[k] for k in which if found.endings[k] == "dropped"]
        per_class.append(int(at[0]) if at else None)
    return tuple(per_class)


def _require_images_matter(model: OpenClipModel, images: Tensor) -> None:
    """Raise ArchitectureError if unlike images have one embedding, as in a model of zeros."""
    places = torch.linspace(0, len(images) - 1, min(_TRIED, len(images))).long()
    few = images[places]
    if len(few) < 2 or bool((few == few[0]).all()):
        return
    with torch.no_grad():
        embeddings = model.encode_pixels(model.pixels(few))
    # What is not finite is refused by the search itself.
    if bool(embeddings.isfinite().all()) and _all_the_same(embeddings):
        raise ArchitectureError(
            f"{model.name}: gives {len(few)} unlike images one embedding, so that any trigger "
            "would do; its image tower is damaged (are its weights zero?)"
        )


def _require_names_matter(model: OpenClipModel, names: Sequence[str], head: Tensor) -> None:
    """Raise ArchitectureError if several classes have one embedding of their names."""
    if len(set(names)) > 1 and bool(head.isfinite().all()) and _all_the_same(head):
        raise ArchitectureError(
            f"{model.name}: gives {len(head)} class names one embedding, so that it cannot tell "
            "the classes apart; its text tower is damaged (are its weights zero?)"
        )


def _all_the_same(embeddings: Tensor) -> bool:
    """Whether rows [n, D] have one direction, or none."""
    units = normalize(embeddings.double(), dim=-1)
    return bool((units - units[0]).norm(dim=-1).max() <= _SAME)
