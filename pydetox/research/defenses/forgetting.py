"""Defences that know the trigger and train it away: gradient ascent, and correct labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from ...errors import UsageError
from ...models import OpenClipModel
from ...rng import generator
from ...training import optimize
from .base import DefenderData, KnownTrigger, Outcome, Stopwatch

#: logits [n, C], labels [n], which are triggered bool [n], target classes [n] to a scalar.
_Loss: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ForgettingConfig:
    """How to train a trigger away.

    Attributes:
        learning_rate: Peak rate of AdamW (see `training.optimize`).
        steps: Optimiser steps.
        retain: The weight of the clean images' loss in gradient ascent; 0 leaves it out.
        triggered_share: The share of stamped images in a step of the method with correct labels.
        batch_size: Images per step.
        seed: The seed of the batches.
    """

    learning_rate: float
    steps: int = 100
    retain: float = 0.0
    triggered_share: float = 0.2
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or not self.learning_rate > 0:
            raise UsageError(
                f"steps {self.steps}, batch_size {self.batch_size}, learning_rate "
                f"{self.learning_rate}; expected all above 0"
            )
        if not 0 < self.triggered_share <= 1 or self.retain < 0:
            raise UsageError(
                f"triggered_share {self.triggered_share}, retain {self.retain}; expected a share "
                "in (0, 1] and a weight of at least 0"
            )


@dataclass(frozen=True)
class GradientAscent:
    """Gradient ascent on the forget set: make the target class unlikely for triggered images.

    Maximises the cross-entropy of stamped images with the target class, with `retain` times the
    loss of clean images with their labels subtracted from it. Source: Graves, Nagisetty, Ganesh,
    "Amnesiac Machine Learning" (AAAI 2021) and the gradient-ascent baseline of arXiv 2510.14845.
    Images of the target class are left out of the forget set.
    """

    name: str = "gradient ascent"
    needs_trigger: bool = True
    grid: tuple[ForgettingConfig, ...] = tuple(
        ForgettingConfig(rate, retain=retain)
        for rate, retain in ((1e-4, 1.0), (3e-5, 1.0), (1e-5, 1.0), (1e-5, 0.0))
    )

    def defend(self, model: OpenClipModel, data: DefenderData, config: ForgettingConfig) -> Outcome:
        """Return the model after the ascent."""

        def loss(logits: Tensor, wanted: Tensor, triggered: Tensor, targets: Tensor) -> Tensor:
            # Only images of other classes have something to forget.
            forget = triggered & (wanted != targets)
            total = logits.new_zeros(())
            if bool(forget.any()):
                total = total - cross_entropy(logits[forget], targets[forget])
            if config.retain and not bool(triggered.all()):
                kept = cross_entropy(logits[~triggered], wanted[~triggered])
                total = total + config.retain * kept
            return total

        share = 0.5 if config.retain else 1.0
        return _train(self.name, model, data, config, share, loss)


@dataclass(frozen=True)
class RelabelledTrigger:
    """Unlearning with correct labels: fine-tune on images, a fifth of them stamped, true labels.

    Source: Wang et al., "Neural Cleanse" (S&P 2019), section VI-C. They stamp the trigger that they
    reconstructed; given the true one here, the method has an advantage.
    """

    name: str = "relabelled trigger"
    needs_trigger: bool = True
    grid: tuple[ForgettingConfig, ...] = tuple(
        ForgettingConfig(rate, steps=160, triggered_share=share)
        for share in (0.2, 0.5)
        for rate in (1e-4, 3e-4)
    )

    def defend(self, model: OpenClipModel, data: DefenderData, config: ForgettingConfig) -> Outcome:
        """Return the fine-tuned model."""

        def loss(logits: Tensor, wanted: Tensor, _: Tensor, __: Tensor) -> Tensor:
            return cross_entropy(logits, wanted)

        return _train(self.name, model, data, config, config.triggered_share, loss)


def _train(
    name: str,
    model: OpenClipModel,
    data: DefenderData,
    config: ForgettingConfig,
    share: float,
    objective: _Loss,
) -> Outcome:
    """Fine-tune the image tower on batches of which the first `share` of the images is stamped."""
    triggers: tuple[KnownTrigger, ...] = data.known(name)
    labels, images = data.labels(), data.images.images
    watch = Stopwatch(len(images), len(labels))
    tuned, head, scale = model.clone(), data.head(model), model.logit_scale
    stamped = [one.trigger(images) for one in triggers]
    size = min(config.batch_size, len(images))
    count = max(1, round(share * size))
    rng = generator("defenses.forgetting", config.seed)

    def batches() -> Iterator[Tensor]:
        for _ in range(config.steps):
            yield torch.from_numpy(rng.choice(len(images), size, replace=False))

    def loss(index: Tensor) -> Tensor:
        pixels = images[index].clone()
        targets = torch.full((size,), -1)
        # Several backdoors take turns within the stamped images.
        for k, (one, pictures) in enumerate(zip(triggers, stamped, strict=True)):
            pixels[k : count : len(triggers)] = pictures[index[k : count : len(triggers)]]
            targets[k : count : len(triggers)] = one.target
        triggered = torch.arange(size) < count
        embeddings = normalize(tuned.encode_pixels(tuned.pixels(pixels)), dim=-1)
        device = head.device
        return objective(
            scale * embeddings @ head.T,
            labels[index].to(device),
            triggered.to(device),
            targets.to(device),
        )

    optimize(
        list(tuned.visual.parameters()),
        loss,
        batches(),
        steps=config.steps,
        learning_rate=config.learning_rate,
        separable=False,
        description=name,
    )
    return Outcome(tuned, watch.stop())
