"""Image features: how a repair holds them, and how it measures how far they have moved.

A trigger vector that is held only to the zero-shot predictions of a few names on a few images may
destroy other classes and tasks, and the defender does not see it. Therefore a repair also holds the
model's own image features, on the given images and on surrogates made of them (`surrogates`). This
needs neither labels nor names. `DriftProbe` measures how far features have moved on surrogates that
were not held. A repair reports this drift beside CA.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..errors import DataError
from ..models import OpenClipModel
from ..prototypes import image_features
from ..rng import child_seed, generator
from .surrogates import surrogate_images

# The number of surrogates that drift is measured on, and of others whose features are the anchors.
_MEASURED, _ANCHORS = 256, 128


@dataclass(frozen=True)
class FeatureDrift:
    """How far a model's image features have moved.

    Attributes:
        mean_distance: The mean of 1 - cos between an image's features before and after, in [0, 2].
        changed_neighbours: The share of images, in [0, 1], whose nearest anchor has changed.
        images: The number of images.
    """

    mean_distance: float
    changed_neighbours: float
    images: int


def feature_drift(
    before: Tensor, after: Tensor, anchors_before: Tensor, anchors_after: Tensor | None = None
) -> FeatureDrift:
    """Return how far features moved from `before` to `after`, unit rows [N, D] of the same images.

    anchors_before: The features of other images before, unit rows [A, D]. They stay where they
    were, as text features do, unless anchors_after is given.
    Raises DataError for features of different images, and without images or anchors.
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


def nearest_between(features: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return the point nearest to each feature on the arc from `first` to `second`.

    All are unit rows [N, D], like the result. The arc is the shorter way from one row to the other
    on the sphere; where both are the same, it is this point. There is no gradient.
    """
    features, first, second = (one.detach() for one in (features, first, second))
    cosine = (first * second).sum(dim=1, keepdim=True)
    across = normalize(second - cosine * first, dim=1)
    along, aside = ((features * one).sum(dim=1, keepdim=True) for one in (first, across))
    angle = torch.atan2(aside, along)
    inside = (angle >= 0) & (angle <= torch.acos(cosine.clamp(-1, 1)))
    nearer_end = torch.where((features * second).sum(dim=1, keepdim=True) > along, second, first)
    return torch.where(inside, normalize(along * first + aside * across, dim=1), nearer_end)


class DriftProbe:
    """Measures how far models have moved from one of them, on surrogates that no repair holds.

    start: The model before any repair. images: The images that surrogates are made of, uint8
    [N, 3, H, W]. seed: The seed of the surrogates. base: The base that a repair leads to
    (`UnlearnConfig.toward_base`). The distance of an image is then that to the nearest point
    between its features in both models (`nearest_between`): what the base says is nothing that a
    repair may not bring back, in part or in full.
    """

    def __init__(
        self,
        start: OpenClipModel,
        images: Tensor,
        *,
        seed: int,
        base: OpenClipModel | None = None,
    ) -> None:
        measured = surrogate_images(
            images, _MEASURED + _ANCHORS, seed=child_seed("repair.measured", seed)
        )
        features = image_features(start, measured)
        self._images = measured[_ANCHORS:].to(start.device)  # sent once, as bytes
        self._anchors, self._before = features[:_ANCHORS], features[_ANCHORS:]
        self._base = None if base is None else image_features(base, self._images)

    def from_start(self, model: OpenClipModel) -> FeatureDrift:
        """Return the drift from `start` alone, also if there is a base."""
        return feature_drift(self._before, image_features(model, self._images), self._anchors)

    def of(self, model: OpenClipModel) -> FeatureDrift:
        """Return the drift of a model that started as `start`; see above."""
        now, before = image_features(model, self._images), self._before
        if self._base is not None:
            before = nearest_between(now, before, self._base)
        return feature_drift(before, now, self._anchors)


class HeldSurrogates:
    """Surrogates in random order, with the features that a model has of them, and its base.

    model: The model whose features are held. images: As for DriftProbe. count: The number of
    surrogates. seed: The seed of the surrogates and their order. base: As for DriftProbe.
    """

    def __init__(
        self,
        model: OpenClipModel,
        images: Tensor,
        count: int,
        *,
        seed: int,
        base: OpenClipModel | None = None,
    ) -> None:
        surrogates = surrogate_images(images, count, seed=child_seed("repair.held", seed))
        self._images = surrogates.to(model.device)  # sent once, as bytes
        self._features = image_features(model, self._images)
        self._base = None if base is None else image_features(base, self._images)
        self._rng = generator("repair.retaining", seed)

    def draw(self, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return at most `count` different surrogates, uint8 [n, 3, H, W], and features [n, D].

        The last item has the base's features, or is None without a base.
        """
        number = min(count, len(self._images))
        chosen = torch.from_numpy(self._rng.choice(len(self._images), number, replace=False))
        chosen = chosen.to(self._features.device)
        base = None if self._base is None else self._base[chosen]
        return self._images[chosen], self._features[chosen], base

    def choose(self, choices: int, count: int) -> Tensor:
        """Return `count` of 0 .. choices - 1 at random, int64 [count]."""
        return torch.from_numpy(self._rng.integers(choices, size=count))
