"""Clean accuracy (CA) and attack success rate (ASR), each with a 95% confidence interval.

ASR is the share of *non-target-class* images that the trigger sends to the target class. Images of
the target class are left out: they go there without a backdoor, and counting them flatters the
attack.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from .data import ImageSet
from .errors import ArchitectureError, DataError, UsageError
from .models.memory import Batching
from .models.products import tf32_products
from .progress import Progress

#: Puts a trigger on images: uint8 [n, 3, H, W] to uint8 [n, 3, H, W].
Stamp: TypeAlias = Callable[[Tensor], Tensor]

# The 97.5% point of the normal distribution.
_Z95 = 1.959963984540054


class ImageEncoder(Protocol):
    """What is evaluated: anything with an image tower."""

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Return embeddings [N, D] of float images [N, 3, H, W] in [0, 1], before normalisation."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """Accuracy on clean images and, if there is a trigger, its success on triggered ones.

    Attributes:
        clean_accuracy: The share, in [0, 1], of the clean images that get their label.
        clean_accuracy_ci: The 95% Wilson interval (low, high) of `clean_accuracy`.
        n_clean: The number of clean images.
        per_class_accuracy: The accuracy of each class; None for a class without images.
        target: The target class; None when no trigger was evaluated.
        attack_success_rate: The share, in [0, 1], of the images of other classes that the trigger
            sends to the target class; None without a trigger or without such images.
        attack_success_rate_ci: The 95% Wilson interval of `attack_success_rate`, or None.
        n_attack: The number of images of other classes.
    """

    clean_accuracy: float
    clean_accuracy_ci: tuple[float, float]
    n_clean: int
    per_class_accuracy: tuple[float | None, ...]
    target: int | None = None
    attack_success_rate: float | None = None
    attack_success_rate_ci: tuple[float, float] | None = None
    n_attack: int = 0


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95% Wilson score interval (low, high) of a proportion.

    successes: 0..trials; trials: at least 1. Unlike the normal approximation it stays within [0, 1]
    and has a width above zero at 0 and at 100%. Source: E. B. Wilson, "Probable inference, the law
    of succession, and statistical inference", JASA 22 (1927) 209-212. Raises UsageError for counts
    outside these ranges.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise UsageError(
            f"{successes} successes in {trials} trials; expected 0..trials of at least 1"
        )
    share = successes / trials
    z2n = _Z95 * _Z95 / trials
    centre = (share + z2n / 2) / (1 + z2n)
    half = _Z95 / (1 + z2n) * math.sqrt(share * (1 - share) / trials + z2n / (4 * trials))
    # At the ends the bound is exactly 0 or 1; rounding must not say otherwise.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return low, high


def predict(
    model: ImageEncoder,
    images: Tensor,
    head: Tensor,
    *,
    batch_size: int = 256,
    stamp: Stamp | None = None,
    description: str | None = None,
) -> Tensor:
    """Return the zero-shot class of each image: int64 [N], 0..C-1, on the CPU.

    Args:
        model: A model in evaluation mode. Its `encode_pixels` is called without gradients on
            batches, on the device of `head`.
        images: uint8 [N, 3, H, W], at least one.
        head: [C, D], one direction per class. The class with the largest inner product wins.
        stamp: A function that is applied to each batch first (uint8 to uint8), such as a trigger.
        batch_size: Images per batch, halved if memory runs out.
        description: A text that is shown with a progress bar; None for no bar.

    Raises:
        DataError: The images are not uint8 [N, 3, H, W], or the stamp changes that.
        ArchitectureError: The embeddings do not fit the head or are not finite.
        DeviceMemoryError: Not even one image fits into the memory.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise DataError(
            f"images are {images.dtype} {list(images.shape)}; "
            "expected torch.uint8 [N, 3, H, W] with at least one image"
        )
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}; expected at least 1")
    if head.ndim != 2 or head.shape[0] < 1:
        raise DataError(f"the head has shape {list(head.shape)}; expected [C, D]")
    directions = head.to(torch.float32).T

    def classes(part: slice) -> Tensor:
        batch = images[part]
        stamped = batch if stamp is None else _checked_stamp(stamp, batch)
        pixels = stamped.to(head.device).to(torch.float32) / 255  # bytes are sent, not floats
        embeddings = model.encode_pixels(pixels)
        if embeddings.shape != (len(batch), head.shape[1]):
            raise ArchitectureError(
                f"embeddings have shape {list(embeddings.shape)}; the head "
                f"{list(head.shape)} expects [{len(batch)}, {head.shape[1]}]"
            )
        scores = embeddings.to(torch.float32) @ directions
        if not bool(torch.isfinite(scores).all()):
            # argmax would quietly send such images to some class.
            raise ArchitectureError(
                "the model's class scores are not finite; expected weights without NaN"
            )
        return scores.argmax(dim=1).cpu()

    predictions = []
    batching = Batching(batch_size, head.device, getattr(model, "name", "model"))
    bar = nullcontext() if description is None else Progress(description, len(images))
    with torch.inference_mode(), tf32_products(head.device), bar as progress:
        for found in batching.over(len(images), classes):
            predictions.append(found)
            if progress is not None:
                progress.update(len(found))
    # Cloned outside inference mode: an ordinary tensor, which callers may use in autograd.
    return torch.cat(predictions).clone()


def evaluate(
    model: ImageEncoder,
    image_set: ImageSet,
    head: Tensor,
    *,
    trigger: Stamp | None = None,
    target: int | None = None,
    batch_size: int = 256,
    description: str | None = None,
) -> Evaluation:
    """Measure CA and, with a trigger and its target class, ASR on the images of the other classes.

    Args:
        model: As in `predict`.
        image_set: Images with labels. The classes are the rows of `head`.
        head: As in `predict`.
        trigger: A function from uint8 [n, 3, H, W] to uint8 [n, 3, H, W].
        target: The index of the class that the trigger leads to.
        batch_size: As in `predict`.
        description: As in `predict`.

    Raises:
        DataError: The set has no labels, or labels outside the head's classes.
        UsageError: There is a trigger without a target or a target without a trigger, or the
            target is outside the classes.
        PydetoxError: All that `predict` raises.
    """
    labels, classes = image_set.labels, head.shape[0]
    if labels is None:
        raise DataError(f"{image_set.name}: no labels; accuracy cannot be measured without them")
    if image_set.class_names is not None and len(image_set.class_names) != classes:
        raise DataError(
            f"{image_set.name}: {len(image_set.class_names)} class names, "
            f"but the head has {classes} classes"
        )
    if int(labels.max()) >= classes:
        raise DataError(
            f"{image_set.name}: label {int(labels.max())}, but the head has {classes} classes"
        )
    if (trigger is None) != (target is None):
        raise UsageError("trigger and target class go together; only one of them was given")
    if target is not None and not 0 <= target < classes:
        raise UsageError(f"target class {target}; expected 0..{classes - 1}")

    images = image_set.images
    predicted = predict(model, images, head, batch_size=batch_size, description=description)
    right = predicted.eq(labels)
    totals = labels.bincount(minlength=classes).tolist()
    hits = labels[right].bincount(minlength=classes).tolist()
    n_right = int(right.sum())
    n_attack, n_sent = 0, 0
    eligible = labels != target if target is not None else torch.zeros_like(right)
    if trigger is not None and target is not None and bool(eligible.any()):
        sent = predict(
            model,
            images[eligible],
            head,
            batch_size=batch_size,
            stamp=trigger,
            description=None if description is None else f"{description}, triggered",
        )
        n_attack, n_sent = len(sent), int(sent.eq(target).sum())
    return Evaluation(
        clean_accuracy=n_right / len(labels),
        clean_accuracy_ci=wilson_interval(n_right, len(labels)),
        n_clean=len(labels),
        per_class_accuracy=tuple(
            hit / total if total else None for hit, total in zip(hits, totals, strict=True)
        ),
        target=target,
        attack_success_rate=n_sent / n_attack if n_attack else None,
        attack_success_rate_ci=wilson_interval(n_sent, n_attack) if n_attack else None,
        n_attack=n_attack,
    )


def _checked_stamp(stamp: Stamp, batch: Tensor) -> Tensor:
    stamped = stamp(batch)
    if stamped.dtype != torch.uint8 or stamped.shape != batch.shape:
        raise DataError(
            f"the trigger made {stamped.dtype} {list(stamped.shape)} of uint8 {list(batch.shape)}; "
            "expected the same type and shape"
        )
    return stamped
