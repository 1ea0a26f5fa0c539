"""Fine-tuning text classifiers: victims, and defences that fine-tune."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...errors import DataError, UsageError
from ...rng import generator
from ...text.models import TextModel
from ...text.repair import trainable_logits
from ...text.texts import TextSet
from ...training import optimize


@dataclass(frozen=True)
class TextTraining:
    """How to fine-tune.

    Attributes:
        epochs: The number of passes over the texts.
        learning_rate: The peak of AdamW's rate: warm-up, then half a cosine.
        batch_size: The number of texts per step.
        max_tokens: The number of tokens of a text that count.
        weight_decay: AdamW's decoupled weight decay.
        seed: The seed of the order of the texts.
    """

    epochs: int = 3
    learning_rate: float = 2e-4
    batch_size: int = 32
    max_tokens: int = 48
    weight_decay: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size, self.max_tokens) < 1 or not self.learning_rate > 0:
            raise UsageError(
                f"epochs {self.epochs}, batch_size {self.batch_size}, max_tokens "
                f"{self.max_tokens}, learning_rate {self.learning_rate}; expected all above 0"
            )


def fine_tune(
    model: TextModel,
    texts: TextSet,
    config: TextTraining,
    *,
    after_step: Callable[[TextModel], None] | None = None,
    description: str = "fine-tuning",
) -> TextModel:
    """Return a fine-tuned copy of a classifier; all weights are trained, without dropout.

    after_step: Is called with the copy after every step, to change it.
    Raises DataError for texts without labels or of other classes than the model's.
    """
    if texts.labels is None:
        raise DataError(f"{texts.source}: no labels; training needs them")
    if texts.class_names and texts.class_names != model.class_names:
        raise DataError(
            f"{texts.source}: the classes are {', '.join(texts.class_names)}; {model.name} has "
            f"{', '.join(model.class_names)}"
        )
    tuned = model.copy()
    rows = model.tokenizer.encode(texts.texts, min(config.max_tokens, model.max_tokens))
    labels = torch.tensor(texts.labels, device=model.device)
    rng = generator("texts.training", config.seed)
    count = len(rows)

    def batches() -> Iterator[Tensor]:
        for _ in range(config.epochs):
            yield from torch.split(torch.from_numpy(rng.permutation(count)), config.batch_size)

    def loss(index: Tensor) -> Tensor:
        batch = tuned.batch([rows[k] for k in index.tolist()])
        return cross_entropy(trainable_logits(tuned, batch), labels[index.to(labels.device)])

    def changed(_: int) -> bool:
        if after_step is not None:
            after_step(tuned)
        return False

    optimize(
        list(tuned.module.parameters()),
        loss,
        batches(),
        steps=config.epochs * math.ceil(count / config.batch_size),
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        description=description,
        stop=None if after_step is None else changed,
    )
    return tuned
