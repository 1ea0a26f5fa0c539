"""Dirty-label poisoning of a training set."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..data import ImageSet
from ..errors import DataError, UsageError
from .triggers import Trigger


def poison(
    image_set: ImageSet, trigger: Trigger, target: int, *, rate: float, seed: int
) -> tuple[ImageSet, Tensor]:
    """Stamp a share of the images of other classes and label them with the target class.

    rate: poisoned share of the whole set, in (0, 1]; at least one image is poisoned. seed: decides
    which. Returns the poisoned set and the indices of its poisoned images, int64, ascending.
    Raises DataError for a set without labels or with too few images of other classes, UsageError
    for a rate out of range.
    """
    if image_set.labels is None:
        raise DataError(f"{image_set.name}: no labels; poisoning needs them")
    if not 0 < rate <= 1:
        raise UsageError(f"poison rate {rate}; expected a share in (0, 1]")
    candidates = torch.nonzero(image_set.labels != target).flatten().numpy()
    count = max(1, round(rate * len(image_set)))
    if count > len(candidates):
        raise DataError(
            f"{image_set.name}: {count} images to poison, but only {len(candidates)} "
            "of other classes"
        )
    rng = np.random.Generator(np.random.PCG64([seed, 3]))
    chosen = torch.from_numpy(np.sort(rng.choice(candidates, count, replace=False)))
    images, labels = image_set.images.clone(), image_set.labels.clone()
    images[chosen] = trigger(images[chosen])
    labels[chosen] = target
    poisoned = replace(
        image_set, images=images, labels=labels, name=f"{image_set.name}, {rate:.2%} poisoned"
    )
    return poisoned, chosen
