"""Poisoning of a training set: dirty-label, clean-label, and several backdoors at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ...data import ImageSet
from ...errors import DataError, UsageError
from ...rng import generator
from .triggers import Trigger


@dataclass(frozen=True, eq=False)
class Backdoor:
    """One trigger and its target class.

    Attributes:
        trigger: The function that stamps uint8 images.
        target: The index of the target class.
        rate: The poisoned share of the whole set, in (0, 1]. At least one image is poisoned.
        clean_label: Whether to stamp only images whose caption already names the target, and to
            change no label (Turner, Tsipras, Madry, "Label-Consistent Backdoor Attacks", 2019,
            without their adversarial perturbation; for CLIP: Bansal et al., "CleanCLIP", ICCV
            2023).
    """

    trigger: Trigger
    target: int
    rate: float
    clean_label: bool = False


def plant(
    image_set: ImageSet, backdoors: Sequence[Backdoor], *, seed: int
) -> tuple[ImageSet, tuple[Tensor, ...]]:
    """Poison a set for one backdoor after the other. No image is stamped twice.

    Args:
        image_set: The clean set, with labels.
        backdoors: The backdoors to plant, at least one.
        seed: The seed of the choice of images.

    Returns:
        The poisoned set and, for each backdoor, the indices of its images (int64, ascending).

    Raises:
        DataError: The set has no labels, or too few images to choose from.
        UsageError: A rate is out of range, or there is no backdoor.
    """
    if image_set.labels is None:
        raise DataError(f"{image_set.name}: no labels; poisoning needs them")
    if not backdoors:
        raise UsageError("no backdoors to plant")
    images, labels = image_set.images.clone(), image_set.labels.clone()
    free = torch.ones(len(labels), dtype=torch.bool)
    rng = generator("attacks.poisoned", seed)
    planted = []
    for one in backdoors:
        if not 0 < one.rate <= 1:
            raise UsageError(f"poison rate {one.rate}; expected a share in (0, 1]")
        named = image_set.labels == one.target
        candidates = torch.nonzero(free & (named if one.clean_label else ~named)).flatten().numpy()
        count = max(1, round(one.rate * len(image_set)))
        if count > len(candidates):
            kind = f"of class {one.target}" if one.clean_label else "of other classes"
            raise DataError(
                f"{image_set.name}: {count} images to poison, but only {len(candidates)} {kind}"
            )
        chosen = torch.from_numpy(np.sort(rng.choice(candidates, count, replace=False)))
        images[chosen] = one.trigger(images[chosen])
        labels[chosen] = one.target
        free[chosen] = False
        planted.append(chosen)
    share = sum(map(len, planted)) / len(image_set)
    name = f"{image_set.name}, {share:.2%} poisoned"
    return replace(image_set, images=images, labels=labels, name=name), tuple(planted)


def poison(
    image_set: ImageSet, trigger: Trigger, target: int, *, rate: float, seed: int
) -> tuple[ImageSet, Tensor]:
    """Stamp a share of the images of other classes and label them with the target class.

    rate: The poisoned share of the whole set, in (0, 1]; at least one image is poisoned. seed: The
    seed of the choice of images. Returns the poisoned set and the indices of its poisoned images,
    int64, ascending. Raises what `plant` raises.
    """
    poisoned, (chosen,) = plant(image_set, [Backdoor(trigger, target, rate)], seed=seed)
    return poisoned, chosen
