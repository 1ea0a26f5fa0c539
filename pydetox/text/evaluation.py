"""Accuracy of a text classifier and the success of a trigger, as `pydetox.evaluation` has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ArchitectureError, DataError, UsageError
from ..evaluation import Evaluation, wilson_interval
from .models import TextModel
from .texts import TextSet


class TextStamp(Protocol):
    """Puts a trigger into texts."""

    def insert(self, texts: Sequence[str], seed: int) -> list[str]:
        """Return each text with the trigger. seed: Of the places, where they are random."""
        ...


def evaluate_texts(
    model: TextModel,
    texts: TextSet,
    *,
    trigger: TextStamp | None = None,
    target: int | None = None,
    seed: int = 0,
    max_tokens: int = 128,
    batch_size: int = 64,
) -> Evaluation:
    """Measure CA and, with a trigger and its target class, ASR on the texts of the other classes.

    Args:
        model: A classifier.
        texts: Texts with labels, which are indices of the model's classes.
        trigger: The trigger.
        target: The index of the class that the trigger leads to.
        seed: The seed of the trigger's places.
        max_tokens: The number of tokens of a text that count.
        batch_size: Texts per batch.

    Raises:
        DataError: The texts have no labels, or labels outside the model's classes.
        ArchitectureError: The model's outputs are NaN or infinite.
        UsageError: There is a trigger without a target or a target without a trigger, or the target
            is outside the classes.
    """
    labels, classes = texts.labels, len(model.class_names)
    if labels is None:
        raise DataError(f"{texts.source}: no labels; accuracy cannot be measured without them")
    if max(labels) >= classes:
        raise DataError(
            f"{texts.source}: label {max(labels)}, but {model.name} has {classes} classes"
        )
    if (trigger is None) != (target is None):
        raise UsageError("trigger and target class go together; only one of them was given")
    if target is not None and not 0 <= target < classes:
        raise UsageError(f"target class {target}; expected 0..{classes - 1}")

    def classes_of(some: Sequence[str]) -> Tensor:
        found = model.predict(some, batch_size=batch_size, max_tokens=max_tokens)
        broken = int((~torch.isfinite(found)).any(dim=1).sum())
        if broken:
            raise ArchitectureError(
                f"{model.name}: what it says of {broken} of {len(some)} texts is not finite; it "
                "cannot be evaluated"
            )
        return found.argmax(dim=1)

    truth = torch.tensor(labels)
    right = classes_of(texts.texts).eq(truth)
    totals = truth.bincount(minlength=classes).tolist()
    hits = truth[right].bincount(minlength=classes).tolist()
    attacked, sent = 0, 0
    if trigger is not None and target is not None:
        others = [text for text, label in zip(texts.texts, labels, strict=True) if label != target]
        attacked = len(others)
        if others:
            sent = int(classes_of(trigger.insert(others, seed)).eq(target).sum())
    return Evaluation(
        clean_accuracy=int(right.sum()) / len(labels),
        clean_accuracy_ci=wilson_interval(int(right.sum()), len(labels)),
        n_clean=len(labels),
        per_class_accuracy=tuple(
            hit / total if total else None for hit, total in zip(hits, totals, strict=True)
        ),
        target=target,
        attack_success_rate=sent / attacked if attacked else None,
        attack_success_rate_ci=wilson_interval(sent, attacked) if attacked else None,
        n_attack=attacked,
    )
