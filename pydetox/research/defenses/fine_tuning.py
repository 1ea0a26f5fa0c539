"""Defences that fine-tune on clean labelled images: plain, CleanCLIP, PAR."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from ...data import fill_template
from ...errors import UsageError
from ...models import OpenClipModel
from ...rng import generator
from ...training import TrainConfig, fine_tuning_mode, optimize, train_on_prompts
from .augmentation import random_views
from .base import DefenderData, Outcome, Stopwatch


@dataclass(frozen=True)
class FineTuning:
    """Clean fine-tuning (FT): CLIP's loss on clean images and their prompts, image tower only."""

    name: str = "fine-tuning"
    needs_trigger: bool = False
    grid: tuple[TrainConfig, ...] = tuple(
        TrainConfig(epochs=10, learning_rate=rate, batch_size=64)
        for rate in (3e-4, 1e-4, 1e-3, 3e-3)
    )

    def defend(self, model: OpenClipModel, data: DefenderData, config: TrainConfig) -> Outcome:
        """Return the fine-tuned model."""
        watch = Stopwatch(len(data.images), len(data.labels()))
        tuned = train_on_prompts(model, data.images, data.templates, config, description=self.name)
        return Outcome(tuned, watch.stop())


@dataclass(frozen=True)
class TowersConfig:
    """How to fine-tune both towers with a further term.

    Attributes:
        learning_rate: Peak rate of AdamW (see `training.optimize`).
        weight: The weight of the further term.
        threshold: The squared distance at which PAR's perturbation ends; CleanCLIP ignores it.
        epochs: Passes over the images.
        batch_size: Images per step.
        seed: The seed of batches, prompts and views.
    """

    learning_rate: float
    weight: float = 1.0
    threshold: float = 2.0
    epochs: int = 10
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2 or not self.learning_rate > 0:
            raise UsageError(
                f"epochs {self.epochs}, batch_size {self.batch_size}, learning_rate "
                f"{self.learning_rate}; expected at least 1, at least 2, above 0"
            )


@dataclass(frozen=True, eq=False)
class _Batch:
    """One step's material.

    pixels: float [n, 3, H, W]. images: unit embeddings of them [n, D]. tokens, texts: one prompt
    per class and their unit embeddings [C, D]. other_tokens: prompts from another template, if
    there are several. scale: factor of cosines.
    """

    tuned: OpenClipModel
    pixels: Tensor
    images: Tensor
    tokens: Tensor
    texts: Tensor
    other_tokens: Tensor
    scale: Tensor
    rng: np.random.Generator


def info_nce(first: Tensor, second: Tensor, scale: Tensor) -> Tensor:
    """Return the symmetric InfoNCE loss of unit rows [n, D] whose n pairs belong together."""
    logits = scale * first @ second.T
    own = torch.arange(len(first), device=first.device)
    return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2


@dataclass(frozen=True)
class CleanClip:
    """CleanCLIP: the cross-modal loss plus self-supervision within each modality.

    L = L_CLIP + weight (InfoNCE(images, their random views) + InfoNCE(prompts, other prompts of the
    same classes)). Both towers are trained, the token embedding stays fixed. Source: Bansal et al.,
    "CleanCLIP" (ICCV 2023), equations 2-4; scaled to class prompts: the text views are the other
    templates, and a batch holds one prompt per class, so that none is its own negative.
    """

    name: str = "CleanCLIP"
    needs_trigger: bool = False
    grid: tuple[TowersConfig, ...] = tuple(
        TowersConfig(rate, weight) for rate in (3e-4, 1e-3) for weight in (1.0, 0.25)
    )

    def defend(self, model: OpenClipModel, data: DefenderData, config: TowersConfig) -> Outcome:
        """Return the fine-tuned model."""

        def further(batch: _Batch) -> Tensor:
            views = random_views(batch.pixels, batch.rng)
            other_images = normalize(batch.tuned.encode_pixels(views), dim=-1)
            other_texts = normalize(batch.tuned.encode_tokens(batch.other_tokens), dim=-1)
            return info_nce(batch.images, other_images, batch.scale) + info_nce(
                batch.texts, other_texts, batch.scale
            )

        return _tune_towers(self.name, model, data, config, further)


@dataclass(frozen=True)
class Par:
    """PAR: perturb the embeddings away from the suspect's, recover with the cross-modal loss.

    L = L_CLIP - weight/2 (h(d_image) + h(d_text)), d the mean squared distance of unit embeddings
    to those of the model given, h(d) = d below the threshold and 0 beyond it. Source: Singh, Croce,
    Hein, "Perturb and Recover" (arXiv 2412.00727), section 4.
    """

    name: str = "PAR"
    needs_trigger: bool = False
    grid: tuple[TowersConfig, ...] = tuple(
        TowersConfig(rate, weight=1.0, threshold=threshold)
        for rate in (3e-4, 1e-3)
        for threshold in (2.0, 1.0)
    )

    def defend(self, model: OpenClipModel, data: DefenderData, config: TowersConfig) -> Outcome:
        """Return the fine-tuned model."""

        def further(batch: _Batch) -> Tensor:
            with torch.no_grad():
                images = normalize(model.encode_pixels(batch.pixels), dim=-1)
                texts = normalize(model.encode_tokens(batch.tokens), dim=-1)
            total = batch.scale.new_zeros(())
            for now, start in ((batch.images, images), (batch.texts, texts)):
                distance = (now - start).square().sum(dim=-1).mean()
                total = total + torch.where(distance > config.threshold, 0.0, distance)
            return -0.5 * total

        return _tune_towers(self.name, model, data, config, further)


def _tune_towers(
    name: str,
    model: OpenClipModel,
    data: DefenderData,
    config: TowersConfig,
    further: Callable[[_Batch], Tensor],
) -> Outcome:
    """Minimise the cross-modal loss plus `weight` times `further` over both towers."""
    labels, images = data.labels(), data.images.images
    watch = Stopwatch(len(images), len(labels))
    tuned = model.clone()
    names = data.images.class_names or ()
    tokens = [tuned.tokenize([fill_template(t, c) for c in names]) for t in data.templates]
    rng = generator("defenses.towers", config.seed)
    scale = torch.tensor(model.logit_scale, device=model.device)
    steps = config.epochs * (len(images) // config.batch_size or 1)

    def batches() -> Iterator[Tensor]:
        size = min(config.batch_size, len(images))
        for _ in range(config.epochs):
            order = torch.from_numpy(rng.permutation(len(images)))
            # The last, smaller batch is left out: it would be a harder or easier InfoNCE task.
            yield from (order[k * size : (k + 1) * size] for k in range(len(images) // size))

    def loss(index: Tensor) -> Tensor:
        pixels = tuned.pixels(images[index])
        which = rng.permutation(len(tokens))[:2]
        prompts, others = tokens[which[0]], tokens[which[-1]]
        batch = _Batch(
            tuned,
            pixels,
            normalize(tuned.encode_pixels(pixels), dim=-1),
            prompts,
            normalize(tuned.encode_tokens(prompts), dim=-1),
            others,
            scale,
            rng,
        )
        logits = scale * batch.images @ batch.texts.T
        cross_modal = cross_entropy(logits, labels[index].to(tuned.device))
        return cross_modal + config.weight * further(batch)

    trained = [
        p
        for n, p in tuned.clip.named_parameters()
        if "token_embedding" not in n and n != "logit_scale"
    ]
    fine_tuning_mode(tuned)
    optimize(
        trained,
        loss,
        batches(),
        steps=steps,
        learning_rate=config.learning_rate,
        weight_decay=1e-4,
        separable=False,
        description=name,
    )
    tuned.clip.eval()
    return Outcome(tuned, watch.stop())
