"""Surrogates: images made of the given ones and of nothing, which belong to no class in particular.

They stand for the images that the defender does not have. A repair holds and measures the model's
features on them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..errors import DataError
from ..rng import generator


def surrogate_images(images: Tensor, count: int, *, seed: int) -> Tensor:
    """Return images that belong to no class in particular, uint8 [count, 3, H, W].

    There are six kinds, equally many of each, in random order:

    * mixes of two images;
    * images whose 4 x 4 cells are shuffled;
    * enlarged crops in other colours;
    * two images side by side, in other colours;
    * noise with a 1/f spectrum (Field, "Relations between the statistics of natural images", JOSA A
      4, 1987);
    * dead leaves: discs and boxes of random size and colour over each other (Lee, Mumford, Huang,
      "Occlusion models for natural images", IJCV 41, 2001; for training features: Baradad et al.,
      "Learning to See by Looking at Noise", NeurIPS 2021).

    images: uint8 [N, 3, H, W], at least one. seed: The seed of everything random.
    Raises DataError without images, and for a count below 1.
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
