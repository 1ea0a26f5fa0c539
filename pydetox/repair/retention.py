"""Holding what the defender does not measure: features on images that belong to none of the names.

A trigger vector that is held to the zero-shot predictions of a few names on a few images may change
everything else: other classes and tasks are destroyed unseen. What is held here is the model's own
image features, on the clean images and on surrogates made of them and of nothing (mixes, shuffled
patches, crops, other colours, noise, dead leaves), which need neither labels nor names. Triggered
surrogates are pushed to the features that the model has of them without the trigger, so that the
trigger is forgotten outside of the defender's task as well.

`feature_drift` says how far features have moved on such images: what a repair reports beside CA.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate, normalize

from ..errors import DataError, UsageError
from ..evaluation import Stamp
from ..models import OpenClipModel
from ..rng import generator
from ..training import optimize
from .configuration import UnlearnConfig
from .task_vectors import TaskVector
from .trigger_vector import (
    image_tower_change,
    one_target_each,
    randomly_shifted,
    stamp_each,
    without_target,
)


@dataclass(frozen=True)
class RetentionConfig:
    """What is held beside the zero-shot predictions. Losses are in units of the class logits.

    Attributes:
        clean: Weight of the clean images' features.
        surrogates: Weight of the surrogates' features.
        triggered: Weight of the triggered surrogates' features.
        names: Weight of the zero-shot predictions of clean and triggered images; 0 pushes triggered
            images to their features without the trigger instead, and asks for no names.
        count: Surrogates in all.
        seed: Of the surrogates and their order.
    """

    clean: float = 1.0
    surrogates: float = 1.0
    triggered: float = 1.0
    names: float = 1.0
    count: int = 2_048
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.clean, self.surrogates, self.triggered, self.names) < 0 or self.count < 2:
            raise UsageError(
                f"weights {self.clean}, {self.surrogates}, {self.triggered}, {self.names} and "
                f"{self.count} surrogates; expected weights of at least 0 and 2 surrogates"
            )


@dataclass(frozen=True)
class FeatureDrift:
    """How far a model's image features have moved.

    mean_distance: mean of 1 - cos between an image's features before and after.
    changed_neighbours: share of images whose nearest of the anchors' features is another one.
    images: how many.
    """

    mean_distance: float
    changed_neighbours: float
    images: int


def image_features(model: OpenClipModel, images: Tensor, batch_size: int = 256) -> Tensor:
    """Return unit embeddings float32 [N, D] of images uint8 [N, 3, H, W]."""
    with torch.inference_mode():
        parts = [
            normalize(model.encode_pixels(batch.to(model.device, torch.float32) / 255), dim=-1)
            for batch in torch.split(images, batch_size)
        ]
    return torch.cat(parts).clone()


def feature_drift(
    before: Tensor, after: Tensor, anchors_before: Tensor, anchors_after: Tensor | None = None
) -> FeatureDrift:
    """Return how far features moved from `before` to `after`, unit rows [N, D] of the same images.

    anchors_before: unit rows [A, D], features of other images before; they stay where they were,
    as text features do, unless anchors_after is given.
    """
    if before.shape != after.shape or not len(before) or not len(anchors_before):
        raise DataError(
            f"features {list(before.shape)} and {list(after.shape)}, "
            f"{len(anchors_before)} anchors; expected the same images, and at least one anchor"
        )
    moved = anchors_before if anchors_after is None else anchors_after
    nearest = (before @ anchors_before.T).argmax(dim=1)
    changed = (after @ moved.T).argmax(dim=1) != nearest
    distance = 1 - (before * after).sum(dim=1)
    return FeatureDrift(float(distance.mean()), float(changed.double().mean()), len(before))


def surrogate_images(images: Tensor, count: int, *, seed: int) -> Tensor:
    """Return images that belong to no class in particular, uint8 [count, 3, H, W].

    A sixth each: mixes of two images; images whose 4 x 4 cells are shuffled; enlarged crops in
    other colours; two images side by side, in other colours; noise with a 1/f spectrum (Field,
    "Relations between the statistics of natural images", JOSA A 4, 1987); dead leaves, discs and
    boxes of random size and colour over each other (Lee, Mumford, Huang, "Occlusion models for
    natural images", IJCV 41, 2001; for training features: Baradad et al., "Learning to See by
    Looking at Noise", NeurIPS 2021).

    images: uint8 [N, 3, H, W], at least one. seed: decides all of it. In random order.
    """
    if not len(images) or count < 1:
        raise DataError(f"{len(images)} images, {count} surrogates; expected at least one of each")
    rng = generator("repair.surrogates", seed)
    makers = (_mixed, _shuffled, _cropped, _side_by_side, _noise, _leaves)
    parts = []
    for k, make in enumerate(makers):
        number = (count + k) // len(makers)
        if number:
            pixels = make(images, number, rng)
            parts.append((pixels.clamp(0, 1) * 255).round().to(torch.uint8))
    order = torch.from_numpy(rng.permutation(count))
    return torch.cat(parts)[order]


def retaining_vector(
    model: OpenClipModel,
    images: Tensor,
    triggers: Sequence[Stamp],
    head: Tensor,
    targets: int | Sequence[int],
    config: UnlearnConfig | None = None,
    retention: RetentionConfig | None = None,
    *,
    others: Tensor | None = None,
    description: str = "trigger vector",
) -> TaskVector:
    """Return a `forget` vector, made while features are held (see `pydetox.repair.trigger_vector`).

    others: further clean images that belong to no name, uint8 [M, 3, H, W], held like surrogates.
    """
    config, retention = config or UnlearnConfig(), retention or RetentionConfig()
    if len(images) < 2:
        raise DataError(f"{len(images)} image; a trigger vector needs at least 2")
    if not triggers:
        raise UsageError("no triggers; a trigger vector needs at least one")
    classes = torch.tensor(one_target_each(triggers, targets))
    held_images = surrogate_images(images, retention.count, seed=retention.seed)
    if others is not None:
        held_images = torch.cat([held_images, others])
    held_features = image_features(model, held_images)
    tuned, scale = model.clone(), model.logit_scale
    rng = generator("repair.retaining", config.seed)
    size = min(config.batch_size, len(images))

    def batches() -> Iterator[Tensor]:
        for _ in range(config.steps):
            chosen = rng.choice(len(images), size, replace=False)
            other = rng.choice(len(held_images), size, replace=False)
            which = rng.integers(len(triggers), size=(2, size))
            yield torch.from_numpy(np.stack([chosen, other, *which]))

    def embed(pictures: Sequence[Tensor]) -> Sequence[Tensor]:
        pixels = torch.cat(list(pictures)).to(head.device, torch.float32) / 255
        units = normalize(tuned.encode_pixels(pixels), dim=-1)
        parts: tuple[Tensor, ...] = torch.split(units, [len(p) for p in pictures])
        return parts

    def loss(batch: Tensor) -> Tensor:
        index, other, which, other_which = batch
        clean, strange = images[index], held_images[other]
        if config.advanced.augment:
            clean = randomly_shifted(clean, rng)
        pictures = [clean, stamp_each(clean, triggers, which)]
        if retention.surrogates:
            pictures.append(strange)
        if retention.triggered:
            pictures.append(stamp_each(strange, triggers, other_which))
        seen = list(embed(pictures))
        with torch.no_grad():
            pixels = clean.to(head.device, torch.float32) / 255
            own = normalize(model.encode_pixels(pixels), dim=-1)
            held = (scale * own @ head.T).softmax(dim=-1)
        total = seen[0].new_zeros(())
        if retention.names:
            target = classes[which].to(head.device)
            wanted = without_target(held, target, config.advanced.certainly_target)
            logits = scale * torch.cat(seen[:2]) @ head.T
            total = total + retention.names * cross_entropy(logits, torch.cat([held, wanted]))
        else:
            total = total + scale * _distance(seen[1], own)
        if retention.clean:
            total = total + retention.clean * scale * _distance(seen[0], own)
        at = 2
        for weight in (retention.surrogates, retention.triggered):
            if weight:
                total = total + weight * scale * _distance(seen[at], held_features[other])
                at += 1
        return total

    optimize(
        list(tuned.visual.parameters()),
        loss,
        batches(),
        steps=config.steps,
        learning_rate=config.learning_rate,
        description=description,
    )
    return -image_tower_change(model, tuned)


def _distance(first: Tensor, second: Tensor) -> Tensor:
    """Return the mean of 1 - cos of unit rows."""
    return 1 - (first * second).sum(dim=-1).mean()


def _pick(images: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    """Return images as floats in [0, 1], drawn with repeats."""
    return images[torch.from_numpy(rng.integers(len(images), size=count))].float() / 255


def _recoloured(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Return each image with a random linear map of its colours, some inverted."""
    count = len(pixels)
    mix = torch.from_numpy(rng.dirichlet((0.5, 0.5, 0.5), (count, 3))).float()
    pixels = torch.einsum("noc,nchw->nohw", mix, pixels)
    low, high = (torch.from_numpy(rng.random((count, 3, 1, 1))).float() for _ in range(2))
    return low + (high - low) * pixels


def _mixed(images: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    share = torch.from_numpy(rng.uniform(0.3, 0.7, (count, 1, 1, 1))).float()
    return share * _pick(images, count, rng) + (1 - share) * _pick(images, count, rng)


def _shuffled(images: Tensor, count: int, rng: np.random.Generator, cells: int = 4) -> Tensor:
    pixels = _pick(images, count, rng)
    height, width = pixels.shape[2] // cells * cells, pixels.shape[3] // cells * cells
    parts = pixels[..., :height, :width].reshape(
        count, 3, cells, height // cells, cells, width // cells
    )
    parts = parts.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    order = torch.from_numpy(np.argsort(rng.random((count, cells * cells)), axis=1))
    parts = torch.unflatten(parts[torch.arange(count)[:, None], order], 1, (cells, cells))
    pixels = pixels.clone()
    pixels[..., :height, :width] = parts.permute(0, 3, 1, 4, 2, 5).reshape(count, 3, height, width)
    return pixels


def _cropped(images: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    pixels = _pick(images, count, rng)
    height, width = pixels.shape[2:]
    out = torch.empty_like(pixels)
    for k in range(count):
        share = rng.uniform(0.4, 0.8)
        rows, columns = max(1, round(share * height)), max(1, round(share * width))
        top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
        part = pixels[k : k + 1, :, top : top + rows, left : left + columns]
        out[k] = interpolate(part, (height, width), mode="bilinear", align_corners=False)[0]
    return _recoloured(out, rng)


def _side_by_side(images: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    one, two = (_recoloured(_pick(images, count, rng), rng) for _ in range(2))
    edge = torch.from_numpy(rng.uniform(0.3, 0.7, count) * images.shape[3])
    left = torch.arange(images.shape[3]) < edge[:, None]
    return torch.where(left[:, None, None, :], one, two)


def _noise(images: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    height, width = images.shape[2:]
    white = torch.from_numpy(rng.normal(size=(count, 3, height, width)))
    rows, columns = torch.fft.fftfreq(height) * height, torch.fft.rfftfreq(width) * width
    radius = (rows[:, None] ** 2 + columns**2).sqrt().clamp(min=1)
    power = torch.from_numpy(rng.uniform(0.5, 2.0, (count, 1, 1, 1)))
    drawn = torch.fft.irfft2(torch.fft.rfft2(white) / radius**power, s=(height, width)).float()
    drawn = drawn / drawn.std(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)
    level = torch.from_numpy(rng.uniform(0.2, 0.8, (count, 3, 1, 1))).float()
    result: Tensor = level + 0.25 * drawn
    return result


def _leaves(images: Tensor, count: int, rng: np.random.Generator, leaves: int = 24) -> Tensor:
    height, width = images.shape[2:]
    pixels = torch.from_numpy(rng.random((count, 3, 1, 1))).float().repeat(1, 1, height, width)
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    for _ in range(leaves):
        # Sizes with a density of 1/r^3, between a thirty-second and half of the image.
        radius = 1 / np.sqrt(rng.uniform(4, 32**2 / 4, (count, 1, 1))) * max(height, width) * 0.5
        size, stretch = (
            torch.from_numpy(radius * 2),
            torch.from_numpy(rng.uniform(0.5, 2, (count, 1, 1))),
        )
        top = torch.from_numpy(rng.uniform(0, height, (count, 1, 1)))
        left = torch.from_numpy(rng.uniform(0, width, (count, 1, 1)))
        down, right = (rows - top).abs() * stretch, (columns - left).abs() / stretch
        disc = torch.from_numpy(rng.random((count, 1, 1)) < 0.6)
        inside = torch.where(disc, down**2 + right**2 < size**2, torch.maximum(down, right) < size)
        colour = torch.from_numpy(rng.random((count, 3, 1, 1))).float()
        shade = 1 - 0.3 * torch.from_numpy(rng.random((count, 1, 1, 1))).float() * (columns / width)
        pixels = torch.where(inside[:, None], colour * shade, pixels)
    return pixels
