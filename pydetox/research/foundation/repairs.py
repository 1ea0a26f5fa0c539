"""Unlearning that holds what the defender does not measure: research beside `pydetox.unlearn`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...api import recover_triggers, recover_warps
from ...data import ImageSet, Template
from ...detect.configuration import ScanConfig
from ...evaluation import Stamp
from ...models import OpenClipModel
from ...repair.alpha import search_coefficient
from ...repair.configuration import UnlearnConfig
from ...repair.retention import (
    FeatureDrift,
    RetentionConfig,
    feature_drift,
    image_features,
    retaining_vector,
    surrogate_images,
)
from ...repair.subtraction import subtract
from ...rng import child_seed

# Other surrogates than those that are held, so that what was held by heart does not count.
_MEASURED, _ANCHORS = 400, 200


@dataclass(frozen=True)
class RetainedConfig:
    """How to repair and what to keep.

    Attributes:
        unlearning: The vector, its triggers and alpha; its `vector` is always `forget`.
        retention: What is held.
        max_drift: Mean distance (1 - cos) that features of unseen surrogates may move from those of
            the model before the first pass; alpha is lowered to what keeps it.
    """

    unlearning: UnlearnConfig = field(
        default_factory=lambda: UnlearnConfig(
            steps=120,
            batch_size=48,
            min_accuracy_kept=0.98,
            coefficients=tuple(round(0.1 * k, 1) for k in range(0, 21, 2)),
        )
    )
    retention: RetentionConfig = field(
        default_factory=lambda: RetentionConfig(clean=4, surrogates=4, triggered=2)
    )
    max_drift: float = 0.05


@dataclass(frozen=True)
class RepairPass:
    """One vector: its alpha, the recovered triggers' worst ASR, CA on the defender's images, drift.

    reached: whether all limits held.
    """

    coefficient: float
    attack_success_rate: float
    accuracy_kept: float
    drift: FeatureDrift
    reached: bool


def retained_unlearn(
    model: OpenClipModel,
    images: ImageSet,
    target: int,
    *,
    templates: Sequence[Template],
    triggers: Sequence[Stamp] | None = None,
    base: OpenClipModel | None = None,
    scan: ScanConfig | None = None,
    restarts: int = 3,
    config: RetainedConfig | None = None,
) -> tuple[OpenClipModel, list[RepairPass]]:
    """Return a repaired copy of a model, and what each pass did.

    images: the defender's, with the class names that he has; labels are not needed.
    target: index of the class that the triggers lead to.
    triggers: known ones, for one pass; None to recover them, in `UnlearnConfig.passes` passes.
    base: for a search in contrast to it, with a `scan` that asks for that.
    """
    config, scan = config or RetainedConfig(), scan or ScanConfig()
    unlearning = config.unlearning
    head = model.zero_shot_head(images.class_names or (), templates)
    measured = surrogate_images(
        images.images, _MEASURED, seed=child_seed("foundation.measured", unlearning.seed)
    )
    start = image_features(model, measured)
    anchors, others = start[:_ANCHORS], start[_ANCHORS:]

    def drift(candidate: OpenClipModel) -> FeatureDrift:
        after: Tensor = image_features(candidate, measured)[_ANCHORS:]
        return feature_drift(others, after, anchors)

    known, passes = list(triggers or ()), list[RepairPass]()
    accuracy: float | None = None
    forget = images.split(
        (unlearning.advanced.forget_share,), seed=child_seed("foundation.forget", unlearning.seed)
    )[0].images
    for number in range(unlearning.passes if triggers is None else 1):
        if triggers is None:
            known += recovered(
                model,
                images,
                target,
                templates=templates,
                base=base,
                scan=scan,
                number=number,
                restarts=restarts,
                config=unlearning,
            )
        vector = retaining_vector(model, forget, known, head, target, unlearning, config.retention)
        search = search_coefficient(
            model,
            vector,
            images,
            known,
            head,
            target,
            unlearning,
            accuracy_before=accuracy,
            reserve=unlearning.reserve(number) if triggers is None else 0.0,
        )
        accuracy = accuracy or search.accuracy_before
        # Lowered until the drift is within its limit; 0 subtracts nothing and always is.
        for chosen in range(search.chosen, -1, -1):
            repaired = subtract(model, vector, search.coefficients[chosen])
            moved = drift(repaired)
            if moved.mean_distance <= config.max_drift or chosen == 0:
                break
        model = repaired
        passes.append(
            RepairPass(
                search.coefficients[chosen],
                search.attack_success_rate[chosen],
                search.clean_accuracy[chosen] / accuracy,
                moved,
                search.reached and chosen == search.chosen,
            )
        )
    return model, passes


def recovered(
    model: OpenClipModel,
    images: ImageSet,
    target: int,
    *,
    templates: Sequence[Template],
    base: OpenClipModel | None,
    scan: ScanConfig,
    number: int,
    restarts: int,
    config: UnlearnConfig,
) -> list[Stamp]:
    """Return the triggers into a class that one pass recovers, amplified."""
    of_pass = replace(scan, seed=child_seed("foundation.pass", scan.seed, number))
    found = list[Stamp]()
    for family in of_pass.families:
        found += config.amplified(
            recover_triggers(
                model,
                images,
                target,
                restarts=restarts,
                family=family,
                base=base,
                templates=templates,
                config=of_pass,
            )
        )
    if config.warps:
        found += config.amplified(
            recover_warps(
                model,
                images,
                target,
                restarts=config.warps,
                base=base,
                templates=templates,
                config=of_pass,
            )
        )
    return found


def only_named(images: ImageSet, classes: Sequence[int]) -> ImageSet:
    """Return the images of some classes, their labels renumbered in the order given."""
    assert images.labels is not None
    assert images.class_names is not None
    chosen = torch.tensor(list(classes))
    index = torch.isin(images.labels, chosen).nonzero().flatten()
    labels = (images.labels[index][:, None] == chosen).int().argmax(dim=1)
    names = tuple(images.class_names[c] for c in classes)
    return ImageSet(images.images[index], labels, names, f"{images.name}, {len(names)} classes")
