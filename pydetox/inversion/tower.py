"""The frozen tower of a search, the images it is given, and how they are split."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..data.sampling import stratified_sample
from ..errors import ArchitectureError, DataError
from ..models import OpenClipModel
from ..models.frozen import FrozenTower, TowerPair, freeze, resolve_precision
from ..models.memory import Batching, images_at_once
from ..ops.reference import to_patch_rows


def check_images(model: OpenClipModel, images: Tensor) -> None:
    """Raise DataError unless there are at least two uint8 images [N, 3, H, W] of a model's size."""
    size = model.image_size
    if images.dtype != torch.uint8 or tuple(images.shape[1:]) != (3, size, size):
        raise DataError(
            f"images are {images.dtype} {list(images.shape)}; {model.name} expects torch.uint8 "
            f"[N, 3, {size}, {size}]"
        )
    if len(images) < 2:
        raise DataError(f"{len(images)} image; trigger inversion needs at least 2")


def check_sample(labels: Tensor | None, count: int, size: int, rng: np.random.Generator) -> Tensor:
    """Return the indices int64 [min(size, count)] of the images for the check after a search."""
    classes = None if labels is None else labels.numpy()
    return torch.from_numpy(stratified_sample(classes, count, size, rng))


def tower_of(model: OpenClipModel, contrast: OpenClipModel | None, precision: str) -> FrozenTower:
    """Return the frozen tower, paired with that of `contrast`, which must take the same inputs."""
    towers = [model.visual] if contrast is None else [model.visual, contrast.visual]
    precision = resolve_precision(precision, model.device, towers)
    size = model.image_size
    tower = freeze(model.visual, precision, name=model.name, image_size=size)
    if contrast is None:
        return tower
    other = freeze(contrast.visual, precision, name=contrast.name, image_size=size)
    mine = (model.image_size, tower.patch_size, model.mean, model.std)
    theirs = (contrast.image_size, other.patch_size, contrast.mean, contrast.std)
    if mine != theirs:
        raise ArchitectureError(
            f"{contrast.name}: takes images of size, patch size, mean and std {theirs}; expected "
            f"those of {model.name}, {mine}"
        )
    return TowerPair(tower, other)


def batching_of(
    model: OpenClipModel, tower: FrozenTower, max_batch: int | None, device: torch.device
) -> Batching:
    """Return how many images go through a tower at once: `max_batch`, or what memory holds."""
    return Batching(max_batch or images_at_once(tower.bytes_per_image, device), device, model.name)


def chunks(count: int, size: int) -> list[slice]:
    """Return slices of at most `size` that cover 0..count-1: as few, and as equal, as possible."""
    parts = max(1, -(-count // size))
    ends = [count * part // parts for part in range(parts + 1)]
    return [slice(first, last) for first, last in itertools.pairwise(ends) if last > first]


def pixel_embedder(
    tower: FrozenTower | TowerPair, model: OpenClipModel
) -> Callable[[Tensor], Tensor]:
    """Return the function from float32 images [N, 3, H, W] in [0, 1] to embeddings [N, D].

    model: Whose mean and standard deviation normalise the images. They are sent to its device once.
    """
    mean, std = (
        torch.tensor(values, device=model.device).view(3, 1, 1)
        for values in (model.mean, model.std)
    )

    def embed(pixels: Tensor) -> Tensor:
        inputs = ((pixels - mean) / std).to(tower.dtype)
        if tower.patch_size is not None:
            inputs = to_patch_rows(inputs, tower.patch_size)
        return tower(inputs)

    return embed
