"""How well a trigger works in a classifier, measured on clean texts of the other classes.

The loss of a trigger for a class is the mean cross-entropy of that class over texts of all other
classes. Words that are honest evidence for a class have a low loss as well. With a base, a clean
model of the same task, a search is in contrast to it: what a trigger contributes in the base, the
fall of the base's own cross-entropy from that of the clean text, is added to the loss. Honest words
work in the base, too, so they gain nothing. A backdoor's do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .models import TextModel
from .placing import Gap
from .row_logits import RowLogits, base_logits


@dataclass(eq=False)
class TextObjective:
    """Losses of triggers in a model, plain or in contrast to a base.

    Attributes:
        model: The suspect, a classifier.
        base: The clean model of the same classes; None for plain losses.
        gaps: N clean texts with a gap.
        labels: The class of each text.
        precision: Of `losses` and `of_rows`, `float32` or `bfloat16`.
        logits: Of the suspect in that precision; None makes them.
        passes: The texts that went through models so far.
    """

    model: TextModel
    base: TextModel | None
    gaps: Sequence[Gap]
    labels: Sequence[int]
    precision: str = "float32"
    logits: RowLogits | None = None
    passes: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._ours = self.logits or RowLogits(self.model, self.precision)
        self._theirs = None if self.base is None else base_logits(self.base, self.precision)
        self._clean: Tensor | None = None

    @property
    def classes(self) -> int:
        """C, the number of classes."""
        return len(self.model.class_names)

    def others(self, target: int, count: int) -> list[int]:
        """Return the first `count` texts of other classes than the target."""
        return [k for k, label in enumerate(self.labels) if label != target][:count]

    def losses(
        self, triggers: Sequence[Sequence[int]], texts: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of every trigger in every text for every class, and what is predicted.

        Returns float32 [M, n, C] and int64 [M, n], for M triggers and n of the texts.
        """
        rows = [self.gaps[k].row(tokens) for tokens in triggers for k in texts]
        losses, predicted = self.of_rows(rows, list(texts) * len(triggers))
        shape = (len(triggers), len(texts), self.classes)
        return losses.view(shape), predicted.view(shape[:2])

    def mean_losses(
        self, triggers: Sequence[Sequence[Sequence[int]]], texts: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """Return the mean loss of each class's triggers for it over the texts of that class.

        triggers: For each of C classes, some. texts: For each class, some. Returns C times float32
        [M]. Rows of several classes go through the model once.
        """
        rows, of_text, target = list[list[int]](), list[int](), list[int]()
        for c, (some, chosen) in enumerate(zip(triggers, texts, strict=True)):
            for tokens in some:
                rows += [self.gaps[k].row(tokens) for k in chosen]
                of_text += chosen
                target += [c] * len(chosen)
        losses, _ = self.of_rows(rows, of_text)
        own = losses.gather(1, torch.tensor(target)[:, None])[:, 0]
        sizes = [len(some) * len(chosen) for some, chosen in zip(triggers, texts, strict=True)]
        return [
            part.view(len(some), len(chosen)).mean(dim=1)
            for part, some, chosen in zip(torch.split(own, sizes), triggers, texts, strict=True)
        ]

    def of_rows(self, rows: Sequence[Sequence[int]], texts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return `losses` [R, C] and predictions [R] of rows of token ids.

        texts: The text of each row.
        """
        logits = self._counted(self._ours, rows)
        losses = -logits.log_softmax(dim=1)
        if self._theirs is not None:
            with_trigger = -self._counted(self._theirs, rows).log_softmax(dim=1)
            losses = losses + (self._clean_losses()[list(texts)] - with_trigger).clamp(min=0)
        return losses, logits.argmax(dim=1)

    def contribution(self, base_logits: Tensor, texts: Sequence[int]) -> Tensor:
        """Return what triggers contribute in the base, [n, C] of its logits, differentiable."""
        clean = self._clean_losses()[list(texts)].to(base_logits)
        return (clean + base_logits.log_softmax(dim=1)).clamp(min=0)

    def _clean_losses(self) -> Tensor:
        """Return the base's losses for all texts without a trigger, float32 [N, C]."""
        if self._clean is None:
            assert self._theirs is not None
            rows = [gap.row(()) for gap in self.gaps]
            self._clean = -self._counted(self._theirs, rows).log_softmax(dim=1)
        return self._clean

    def _counted(self, logits: RowLogits, rows: Sequence[Sequence[int]]) -> Tensor:
        before = logits.passes
        found = logits(rows)
        self.passes += logits.passes - before
        return found
