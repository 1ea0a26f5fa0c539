"""Prototypes: directions that stand for the kinds of images, for models without class names.

A zero-shot head has one direction per class, from texts. An image tower alone has no texts, and a
set of photographs without names has no classes. The groups that image features form take their
place wherever a step needs to say what a model takes an image for: to make clean copies of a base,
and to hold what a model knows while a backdoor is removed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .errors import DataError
from .models import OpenClipModel
from .models.memory import Batching
from .models.products import tf32_products
from .rng import generator

#: The largest number of groups, and the least number of images in one of them on average.
_MOST, _LEAST_IMAGES = 32, 4
_ROUNDS = 20


def image_prototypes(model: OpenClipModel, images: Tensor, *, seed: int = 0) -> Tensor:
    """Return the centres of the groups that a model sees among images, unit rows [K, D].

    They are those of spherical k-means (Dhillon and Modha, "Concept decompositions for large sparse
    text data using clustering", Machine Learning 42 (2001) 143-175), begun as k-means++ is (Arthur
    and Vassilvitskii, SODA 2007). K is at most 32, and at most a quarter of the images. Features
    are compared after their mean is subtracted, because those of CLIP lie in a narrow cone.

    images: uint8 [N, 3, H, W] of the model's size, at least 2. seed: The seed of the beginning.
    Raises DataError for fewer images, and for images that all have one embedding.
    """
    if len(images) < 2:
        raise DataError(f"{len(images)} image; groups of images need at least 2")
    features = image_features(model, images).double()
    centred = features - features.mean(dim=0)
    if float(centred.norm(dim=1).max()) < 1e-6:
        raise DataError(f"{model.name}: gives all images one embedding, which makes no groups")
    units = normalize(centred, dim=1)
    count = max(2, min(_MOST, len(images) // _LEAST_IMAGES))
    centres = units[torch.tensor(_beginning(units, count, seed), device=units.device)]
    group = torch.zeros(len(units), dtype=torch.int64, device=units.device)
    for _ in range(_ROUNDS):
        previous, group = group, (units @ centres.T).argmax(dim=1)
        present = torch.unique(group)
        centres = normalize(torch.stack([units[group == k].sum(dim=0) for k in present]), dim=1)
        if torch.equal(previous, group):
            break
    group = (units @ centres.T).argmax(dim=1)
    rows = [features[group == k].mean(dim=0) for k in torch.unique(group)]
    return normalize(torch.stack(rows), dim=1).float()


def image_features(model: OpenClipModel, images: Tensor, batch_size: int = 256) -> Tensor:
    """Return unit embeddings float32 [N, D] of images uint8 [N, 3, H, W].

    batch_size: The number of images at once, halved if memory runs out. Raises DeviceMemoryError if
    not even one image fits.
    """
    batching = Batching(batch_size, model.device, model.name)

    def features(part: slice) -> Tensor:
        return normalize(model.encode_pixels(model.pixels(images[part])), dim=-1)

    with torch.inference_mode(), tf32_products(model.device):
        parts = list(batching.over(len(images), features))
    return torch.cat(parts).clone()


def _beginning(units: Tensor, count: int, seed: int) -> list[int]:
    """Return images that are far from each other: each is drawn by its distance to the others."""
    rng = generator("prototypes.start", seed)
    chosen = [int(rng.integers(len(units)))]
    nearest = 1 - units @ units[chosen[0]]
    while len(chosen) < count:
        weights = nearest.clamp(min=0).cpu().numpy()
        if weights.sum() <= 0:
            break
        chosen.append(int(rng.choice(len(units), p=weights / weights.sum())))
        nearest = torch.minimum(nearest, 1 - units @ units[chosen[-1]])
    return chosen
