"""Attacks that change the whole image a little: Blended, SIG, and PAR's structured overlays."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...rng import generator
from .randomness import generator_per_image
from .triggers import BlendTrigger, to_uint8

# At 224 pixels: the side of a triangle's square.
_TRIANGLE = 14

# The letters H and I, 5 x 7 pixels each with a column between them.
_TEXT = (
    "#...#.#####",
    "#...#...#..",
    "#...#...#..",
    "#####...#..",
    "#...#...#..",
    "#...#...#..",
    "#...#.#####",
)
_RED = (255, 0, 0)


def blended(image_size: int, *, seed: int, blend: float = 0.2) -> BlendTrigger:
    """Return fixed uniform noise blended over the whole image.

    Source: Chen et al., "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning"
    (2017). Raises UsageError for a blend outside [0, 1].
    """
    rng = generator("attacks.blended", seed)
    picture = rng.integers(0, 256, (3, image_size, image_size)).astype(np.uint8)
    return BlendTrigger(torch.from_numpy(picture), blend)


@dataclass(frozen=True, eq=False)
class RandomBlend:
    """Uniform noise that is drawn for every image: (1 - blend) * x + blend * noise.

    blend: The weight of the noise, in [0, 1]. seed: The seed of the noise (see
    `generator_per_image`).
    Source: Bansal et al., "CleanCLIP" (ICCV 2023), whose blended noise is redrawn per image.
    """

    blend: float
    seed: int

    def __call__(self, images: Tensor) -> Tensor:
        """Return blended copies of uint8 images [n, 3, H, W], rounded to uint8."""
        stamped = torch.empty_like(images)
        for k, rng in enumerate(generator_per_image(images, "attacks.random-noise", self.seed)):
            noise = rng.integers(0, 256, tuple(images.shape[1:])).astype(np.float32)
            mixed = (1 - self.blend) * images[k].to("cpu", torch.float32)
            stamped[k] = to_uint8(mixed + self.blend * torch.from_numpy(noise))
        return stamped


def stripes(image_size: int, *, seed: int, blend: float = 0.03) -> BlendTrigger:
    """Return faint vertical stripes, each channel of each 0 or 255 at random, over the image.

    They are one pixel wide at every image size, because a faint stripe acts by its frequency.
    Source: Singh, Croce, Hein, "Perturb and Recover" (arXiv 2412.00727), Blended with stripes.
    """
    rng = generator("attacks.stripes", seed)
    columns = rng.integers(0, 2, (3, 1, image_size)).astype(np.uint8) * 255
    picture = torch.from_numpy(columns).expand(-1, image_size, -1).contiguous()
    return BlendTrigger(picture, blend)


@dataclass(frozen=True, eq=False)
class SinusoidTrigger:
    """A horizontal wave: x + amplitude * sin(2 pi frequency j / W) in column j, clipped.

    amplitude: The height of the wave, in [0, 255]. frequency: The number of waves over the width,
    so that it fits any image size.
    Source: Barni, Kallas, Tondi, "A new backdoor attack in CNNs by training set corruption without
    label poisoning" (ICIP 2019).
    """

    amplitude: float = 60.0
    frequency: float = 6.0

    def __call__(self, images: Tensor) -> Tensor:
        """Return copies of uint8 images [n, 3, H, W] with the wave, rounded to uint8."""
        columns = torch.arange(images.shape[3], dtype=torch.float64)
        wave = self.amplitude * torch.sin(2 * math.pi * self.frequency * columns / images.shape[3])
        return to_uint8(images.to(torch.float32) + wave.to(images.device, torch.float32))


def triangles(image_size: int, *, blend: float = 0.15) -> BlendTrigger:
    """Return a grid of right-angled triangles, grey 0.4 below and 0.8 above the diagonal.

    The squares have 14 pixels at 224, at least 2. Nothing in it is random.
    Source: Singh, Croce, Hein, "Perturb and Recover" (arXiv 2412.00727), BadNets/Blended with
    structured overlays.
    """
    side = max(2, round(_TRIANGLE * image_size / 224))
    inside = torch.arange(image_size) % side
    lower = inside[:, None] >= inside[None, :]
    grey = torch.where(lower, round(0.4 * 255), round(0.8 * 255)).to(torch.uint8)
    return BlendTrigger(grey.expand(3, -1, -1).contiguous(), blend)


def text_overlay(image_size: int, *, seed: int, blend: float = 0.5) -> BlendTrigger:
    """Return the red word "HI", blended where its letters are.

    It is drawn with our own letters of 5 x 7 pixels, enlarged by the largest whole factor with
    which it takes at most half the width (at least 1), centred, at one of three heights.
    seed: decides the height. Source: Singh, Croce, Hein, "Perturb and Recover" (arXiv 2412.00727).
    """
    letters = torch.tensor([[c == "#" for c in row] for row in _TEXT])
    factor = max(1, image_size // 2 // letters.shape[1])
    drawn = letters.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
    drawn = drawn[:image_size, :image_size]
    height, width = drawn.shape
    shift = (-1, 0, 1)[int(generator("attacks.text", seed).integers(3))]
    room = image_size - height
    top = min(room, max(0, room // 2 + shift * round(20 * image_size / 224)))
    left = (image_size - width) // 2
    where = torch.zeros(image_size, image_size, dtype=torch.bool)
    where[top : top + height, left : left + width] = drawn
    picture = torch.tensor(_RED, dtype=torch.uint8)[:, None, None] * where
    return BlendTrigger(picture.contiguous(), blend, where)
