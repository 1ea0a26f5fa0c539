"""`Trigger`, and two simple kinds: a patch, and a picture that is blended over the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...errors import UsageError


class Trigger(Protocol):
    """A function that stamps images: from uint8 [n, 3, H, W] to uint8 of the same shape."""

    def __call__(self, images: Tensor) -> Tensor:
        """Return stamped copies."""
        ...


@dataclass(frozen=True, eq=False)
class PatchTrigger:
    """A fixed patch at a fixed place.

    pattern: uint8 [3, h, w]. top, left: The pixel of its upper left corner.
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
    """A fixed picture over the whole image, (1 - blend) * x + blend * picture, or over a part.

    picture: uint8 [3, H, W]. blend: The weight of the picture, in [0, 1]. where: bool [H, W], the
    pixels that are blended; None for all.
    """

    picture: Tensor
    blend: float
    where: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.blend <= 1:
            raise UsageError(f"blend is {self.blend}; expected a share in [0, 1]")

    def __call__(self, images: Tensor) -> Tensor:
        """Return blended copies of uint8 images [n, 3, H, W], rounded to uint8."""
        if images.shape[1:] != self.picture.shape:
            raise UsageError(
                f"images have shape {list(images.shape)}; "
                f"the picture has {list(self.picture.shape)}"
            )
        picture = self.picture.to(images.device, torch.float32)
        mixed = to_uint8((1 - self.blend) * images.to(torch.float32) + self.blend * picture)
        return mixed if self.where is None else torch.where(self.where, mixed, images)


def to_uint8(values: Tensor) -> Tensor:
    """Round floats in units of 1/255 to uint8, clipped at 0 and 255; the input is overwritten."""
    return values.round_().clamp_(0, 255).to(torch.uint8)
