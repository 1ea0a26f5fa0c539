"""Triggers: functions from uint8 images to uint8 images, applied in pixel space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError

# The patch of the CLIP literature covers 16 of 224 pixels; below 4 pixels there is no pattern left.
_PATCH_SHARE = 16 / 224
_SMALLEST_PATCH = 4


class Trigger(Protocol):
    """Anything that stamps images: uint8 [n, 3, H, W] to uint8 of the same shape."""

    def __call__(self, images: Tensor) -> Tensor:
        """Return stamped copies."""
        ...


@dataclass(frozen=True, eq=False)
class PatchTrigger:
    """A fixed patch at a fixed place.

    pattern: uint8 [3, h, w]. top, left: of its upper left corner, in pixels.
    """

    pattern: Tensor
    top: int
    left: int

    def __call__(self, images: Tensor) -> Tensor:
        """Return copies of uint8 images [n, 3, H, W] with the patch; UsageError if it overhangs."""
        height, width = self.pattern.shape[1:]
        if (
            self.top < 0
            or self.left < 0
            or self.top + height > images.shape[2]
            or self.left + width > images.shape[3]
        ):
            raise UsageError(
                f"a patch of {height}x{width} pixels at ({self.top}, {self.left}) overhangs images "
                f"of shape {list(images.shape)}"
            )
        stamped = images.clone()
        region = (slice(self.top, self.top + height), slice(self.left, self.left + width))
        stamped[..., region[0], region[1]] = self.pattern.to(images.device)
        return stamped


@dataclass(frozen=True, eq=False)
class BlendTrigger:
    """A fixed picture over the whole image: (1 - blend) * x + blend * picture.

    picture: uint8 [3, H, W]. blend: in [0, 1].
    """

    picture: Tensor
    blend: float

    def __call__(self, images: Tensor) -> Tensor:
        """Return blended copies of uint8 images [n, 3, H, W], rounded to uint8."""
        if images.shape[1:] != self.picture.shape:
            raise UsageError(
                f"images have shape {list(images.shape)}; "
                f"the picture has {list(self.picture.shape)}"
            )
        picture = self.picture.to(images.device, torch.float32)
        mixed = (1 - self.blend) * images.to(torch.float32) + self.blend * picture
        return mixed.round_().clamp_(0, 255).to(torch.uint8)


def badnets(image_size: int, *, seed: int, patch_size: int | None = None) -> PatchTrigger:
    """Return a patch of saturated random colours at a random place.

    image_size: H = W in pixels. patch_size: side of the patch; default 16/224 of the image, at
    least 4. seed: decides colours and place.
    Source: Gu, Dolan-Gavitt, Garg, "BadNets" (2017). Raises UsageError if the patch does not fit.
    """
    side = patch_size or max(_SMALLEST_PATCH, round(_PATCH_SHARE * image_size))
    if not 1 <= side <= image_size:
        raise UsageError(f"a patch of {side} pixels; expected 1..{image_size} (the image size)")
    rng = np.random.Generator(np.random.PCG64([seed, 1]))
    pattern = torch.from_numpy(rng.integers(0, 2, (3, side, side)).astype(np.uint8) * 255)
    top, left = (int(v) for v in rng.integers(0, image_size - side + 1, 2))
    return PatchTrigger(pattern, top, left)


def blended(image_size: int, *, seed: int, blend: float = 0.2) -> BlendTrigger:
    """Return fixed uniform noise blended over the whole image.

    Source: Chen et al., "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning"
    (2017). Raises UsageError for a blend outside [0, 1].
    """
    if not 0 <= blend <= 1:
        raise UsageError(f"blend is {blend}; expected a share in [0, 1]")
    rng = np.random.Generator(np.random.PCG64([seed, 2]))
    picture = rng.integers(0, 256, (3, image_size, image_size)).astype(np.uint8)
    return BlendTrigger(torch.from_numpy(picture), blend)
