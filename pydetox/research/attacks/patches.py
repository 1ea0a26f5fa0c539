"""Patch attacks: BadNets, with its place or its pattern drawn anew for every image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import UsageError
from ...rng import generator
from .randomness import generator_per_image
from .triggers import PatchTrigger

# The patch of the CLIP literature covers 16 of 224 pixels; below 4 pixels there is no pattern left.
_PATCH_SHARE = 16 / 224
_SMALLEST_PATCH = 4


def patch_side(image_size: int, patch_size: int | None = None) -> int:
    """Return the side of a patch: 16/224 of the image, at least 4 pixels, unless it is given.

    Raises UsageError if the patch does not fit.
    """
    side = patch_size or max(_SMALLEST_PATCH, round(_PATCH_SHARE * image_size))
    if not 1 <= side <= image_size:
        raise UsageError(f"a patch of {side} pixels; expected 1..{image_size} (the image size)")
    return side


def badnets(image_size: int, *, seed: int, patch_size: int | None = None) -> PatchTrigger:
    """Return a patch of saturated random colours at a random place.

    image_size: H = W in pixels. patch_size: side of the patch; default 16/224 of the image, at
    least 4. seed: decides colours and place.
    Source: Gu, Dolan-Gavitt, Garg, "BadNets" (2017). Raises UsageError if the patch does not fit.
    """
    side = patch_side(image_size, patch_size)
    rng = generator("attacks.badnets", seed)
    pattern = torch.from_numpy(_saturated(rng, side))
    top, left = (int(v) for v in rng.integers(0, image_size - side + 1, 2))
    return PatchTrigger(pattern, top, left)


@dataclass(frozen=True, eq=False)
class RandomPlacePatch:
    """BadNets' patch at a place drawn uniformly for every image.

    pattern: uint8 [3, h, h]. seed: The seed of the places (see `generator_per_image`).
    Source: Gu, Dolan-Gavitt, Garg, "BadNets" (2017); the random place as in Bansal et al.,
    "CleanCLIP" (ICCV 2023).
    """

    pattern: Tensor
    seed: int

    def __call__(self, images: Tensor) -> Tensor:
        """Return copies of uint8 images [n, 3, H, W] with the patch; UsageError if it is larger."""
        side = self.pattern.shape[1]
        rows, columns = (size - side + 1 for size in images.shape[2:])
        if rows < 1 or columns < 1:
            raise UsageError(
                f"a patch of {side} pixels does not fit images of {list(images.shape)}"
            )
        stamped = images.clone()
        for image, rng in zip(
            stamped, generator_per_image(images, "attacks.random-place", self.seed), strict=True
        ):
            top, left = int(rng.integers(rows)), int(rng.integers(columns))
            image[:, top : top + side, left : left + side] = self.pattern.to(images.device)
        return stamped


@dataclass(frozen=True, eq=False)
class RandomPatternPatch:
    """A patch at a fixed place whose saturated colours are drawn for every image.

    side: The side of the patch in pixels. top, left: The pixel of its upper left corner. seed: The
    seed of the colours (see `generator_per_image`).
    Source: as the random patch noise of Bansal et al., "CleanCLIP" (ICCV 2023).
    """

    side: int
    top: int
    left: int
    seed: int

    def __call__(self, images: Tensor) -> Tensor:
        """Return copies of uint8 images [n, 3, H, W] with patches; UsageError if they overhang."""
        if max(self.top, self.left) + self.side > min(images.shape[2:]):
            raise UsageError(
                f"a patch of {self.side} pixels at ({self.top}, {self.left}) overhangs images of "
                f"shape {list(images.shape)}"
            )
        stamped = images.clone()
        rows, columns = (slice(at, at + self.side) for at in (self.top, self.left))
        for image, rng in zip(
            stamped, generator_per_image(images, "attacks.random-pattern", self.seed), strict=True
        ):
            image[:, rows, columns] = torch.from_numpy(_saturated(rng, self.side))
        return stamped


def badnets_random_place(
    image_size: int, *, seed: int, patch_size: int | None = None
) -> RandomPlacePatch:
    """Return the patch of `badnets` at a random place in every image."""
    return RandomPlacePatch(badnets(image_size, seed=seed, patch_size=patch_size).pattern, seed)


def badnets_random_pattern(
    image_size: int, *, seed: int, patch_size: int | None = None
) -> RandomPatternPatch:
    """Return a patch where `badnets` has it, with other colours in every image."""
    fixed = badnets(image_size, seed=seed, patch_size=patch_size)
    return RandomPatternPatch(fixed.pattern.shape[1], fixed.top, fixed.left, seed)


def _saturated(rng: np.random.Generator, side: int) -> NDArray[np.uint8]:
    return rng.integers(0, 2, (3, side, side)).astype(np.uint8) * 255
