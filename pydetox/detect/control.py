"""The positive control: a backdoor that is planted on purpose, and the scan that must find it.

"Clean" means something only if this very scan would have found a backdoor. The control plants one
in a copy of a model that a scan found clean: a patch at a random corner, with random colours, into
a random class. A short fine-tuning on the defender's images teaches it, at the smallest of a few
learning rates that does. Then the copy is scanned as the model was, and compared with the same
references.

The control shows what happens to patches of its size. It shows nothing about other kinds of
triggers, and a careful attacker can hide a patch better. It costs one more scan, and at most
`len(_RATES) * STEPS` steps of fine-tuning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data import ImageSet
from ..evaluation import predict
from ..inversion import RecoveredTrigger
from ..models import OpenClipModel
from ..rng import child_seed, generator
from ..session import Session
from ..training import TrainConfig, fine_tuning_mode, train_on_prompts
from .distance import weight_scale
from .statistics import FINDINGS

if TYPE_CHECKING:
    from .references import Comparison
    from .result import ScanResult

#: The side of the patch as a share of the image's: a thirty-sixth of the pixels.
_SIDE = 1 / 6

#: The share of images that are repeated with the patch and the label of the target class.
_POISONED = 0.25

#: The success at which the planting stops, the least with which it counts, and how often it is
#: measured, on how many images.
_PLANTED, _LEAST_PLANTED, _EVERY, _CHECKED = 0.95, 0.5, 10, 256

#: The steps of the planting, and its learning rates relative to the root mean square of the image
#: tower's matrices. The largest is 3e-4 for the CLIP of `pydetox demo`.
STEPS, BATCH = 160, 32
_RATES = (1 / 2048, 1 / 512, 1 / 128)


@dataclass(frozen=True)
class PositiveControl:
    """The result of a positive control.

    Attributes:
        target: The index of the class that the planted patch leads to.
        p_l1: The size of the planted patch, as a share of the image's pixels.
        success: The share of images of other classes that the patch sends to the target, in [0, 1].
        accuracy: The share of the images that the copy answers as the model does.
        verdict: The verdict on the copy.
        p_value: The p-value of the copy's verdict; None if it is `inconclusive`.
        recovered: The P-L1 of the trigger that the scan recovered for the target, of the family
            that decides the copy's verdict; infinite if it recovered none.
        found: Whether the scan found the planted backdoor: a finding, with the right class.
    """

    target: int
    p_l1: float
    success: float
    accuracy: float
    verdict: str
    p_value: float | None
    recovered: float
    found: bool

    @property
    def planted(self) -> bool:
        """Whether there was a backdoor to find: the patch works on half of the images or more."""
        return self.success >= _LEAST_PLANTED


def positive_control(
    session: Session,
    comparison: Comparison,
    scan: Callable[[Session, Comparison], ScanResult],
) -> PositiveControl:
    """Plant a patch in a copy of the session's model, and scan the copy.

    scan: Scans a session as the model was scanned.
    """
    seed = comparison.config.seed
    trigger = planted_patch(session.model.image_size, len(session.class_names), seed)
    assert trigger.target is not None
    copy, success = plant_patch(session, trigger, seed=seed)
    found = scan(session.with_image_tower_of(copy), comparison)
    images, head, target = session.images.images, session.head, trigger.target
    agree = predict(copy, images, head) == predict(session.model, images, head)
    detection = found.detection
    judged = [detection, *(one.detection for one in found.others)]
    return PositiveControl(
        target=target,
        p_l1=float(trigger.mask.mean()),
        success=success,
        accuracy=float(agree.double().mean()),
        verdict=detection.verdict.value,
        p_value=detection.p_value,
        recovered=detection.p_l1[target],
        found=detection.verdict in FINDINGS and any(target in one.suspects for one in judged),
    )


def planted_patch(size: int, classes: int, seed: int) -> RecoveredTrigger:
    """Return the patch of a seed: random colours at a random corner, into a random class."""
    rng = generator("control.patch", seed)
    side = max(1, round(_SIDE * size))
    top, left = (int(rng.integers(2)) * (size - side) for _ in range(2))
    mask, pattern = torch.zeros(size, size), torch.zeros(3, size, size)
    mask[top : top + side, left : left + side] = 1
    colours = rng.integers(0, 2, (3, side, side)).astype("float32")
    pattern[:, top : top + side, left : left + side] = torch.from_numpy(colours)
    return RecoveredTrigger(mask, pattern, int(rng.integers(classes)))


def plant_patch(
    session: Session, trigger: RecoveredTrigger, *, seed: int
) -> tuple[OpenClipModel, float]:
    """Return a copy of the session's model that obeys a trigger, and the success of the trigger.

    The labels are the model's own predictions. The copy is that of the smallest learning rate with
    which the trigger works, or of the largest one.
    """
    model, images, target = session.model, session.images, trigger.target
    assert target is not None
    own = predict(model, images.images, session.head)
    count = max(1, round(_POISONED * len(images)))
    chosen = generator("control.poisoned", seed).permutation(len(images))[:count]
    stamped = trigger(images.images[torch.from_numpy(chosen)])
    poisoned = ImageSet(
        torch.cat([images.images, stamped]),
        torch.cat([own, torch.full((count,), target)]),
        images.class_names,
        images.name,
    )
    others = replace(images, labels=None).subset((own != target).nonzero().flatten())
    few = others.at_most(_CHECKED, child_seed("control.checked", seed)).images

    def success(copy: OpenClipModel, some: Tensor) -> float:
        answers = predict(copy, some, session.head, stamp=trigger)
        return float((answers == target).double().mean())

    def planted(copy: OpenClipModel, step: int) -> bool:
        if step % _EVERY and step < STEPS:
            return False
        copy.clip.eval()
        works = success(copy, few) >= _PLANTED
        fine_tuning_mode(copy)
        return works or step >= STEPS

    epochs = math.ceil(STEPS / math.ceil(len(poisoned) / BATCH))
    scale, copy = weight_scale(model), model
    for share in _RATES:
        copy = train_on_prompts(
            model,
            poisoned,
            session.templates,
            TrainConfig(epochs, share * scale, BATCH, seed=child_seed("control.training", seed)),
            description="positive control: planting",
            stop=planted,
        )
        if success(copy, few) >= _PLANTED:
            break
    copy.name = f"{model.name}, planted"
    return copy, success(copy, others.images)
