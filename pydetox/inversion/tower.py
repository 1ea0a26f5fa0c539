"""The frozen tower of a search, the images it is given, and how many fit into memory at once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..data.sampling import stratified_sample
from ..errors import ArchitectureError, DataError
from ..models import OpenClipModel
from ..models.frozen import FrozenTower, TowerPair, freeze

# Bytes that the activations of one pass through the tower may take. A GPU wants large batches; on
# a CPU they gain nothing, and a worker of a scan has to do with two checkpoints and a gigabyte.
_ACTIVATIONS, _ACTIVATIONS_CPU = 2 << 30, 1 << 29


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
    tower = freeze(model.visual, precision, name=model.name)
    if contrast is None:
        return tower
    other = freeze(contrast.visual, precision, name=contrast.name)
    mine = (model.image_size, tower.patch_size, model.mean, model.std)
    theirs = (contrast.image_size, other.patch_size, contrast.mean, contrast.std)
    if mine != theirs:
        raise ArchitectureError(
            f"{contrast.name}: takes images of size, patch size, mean and std {theirs}; expected "
            f"those of {model.name}, {mine}"
        )
    return TowerPair(tower, other)


def images_at_once(tower: FrozenTower, device: torch.device) -> int:
    """Return how many images the memory for activations holds."""
    activations = _ACTIVATIONS_CPU if device.type == "cpu" else _ACTIVATIONS
    return max(1, activations // tower.bytes_per_image)


def chunks(count: int, size: int) -> list[slice]:
    """Return slices of `size` that cover 0..count-1; the last one may be shorter."""
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]
