"""Renderings: cut-out pictures placed on backgrounds, many different images of one drawing."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

# Share of the side that a picture covers, its largest turn in degrees and change of brightness.
_COVERED = (0.75, 1.0)
_TURN = 15.0
_BRIGHTNESS = (0.75, 1.2)
# Half the colours of a background are close to grey, as walls and tables are.
_DULL = 0.25


def render(picture: Image.Image, image_size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return one image of a picture: turned, scaled, moved, mirrored or not, on a background.

    picture: RGBA; what is transparent shows the background, a gradient between two random colours
    with coarse noise. rng: decides all of it. Returns uint8 [3, image_size, image_size].
    """
    side = max(2, round(image_size * rng.uniform(*_COVERED)))
    turned = picture.rotate(rng.uniform(-_TURN, _TURN), Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        turned = turned.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # Premultiplied, as PIL resizes RGBA, so that the colour of transparent pixels does not bleed.
    small = np.asarray(turned.resize((side, side), Image.Resampling.BOX), dtype=np.float32) / 255
    top, left = rng.integers(0, image_size - side + 1, 2)
    image = _background(image_size, rng)
    alpha = small[..., 3:]
    region = image[top : top + side, left : left + side]
    region[:] = alpha * small[..., :3] * rng.uniform(*_BRIGHTNESS) + (1 - alpha) * region
    levels = np.rint(image.clip(0, 1) * 255).astype(np.uint8)
    return np.transpose(levels, (2, 0, 1))


def render_all(
    pictures: list[list[Image.Image]], per_class: int, image_size: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Return images uint8 [N, 3, H, W] and labels int64 [N], `per_class` of each class.

    pictures: RGBA, at least one per class; a class's take turns. Images of a class lie together.
    """
    images = np.empty((len(pictures) * per_class, 3, image_size, image_size), dtype=np.uint8)
    for label, drawn in enumerate(pictures):
        for k in range(per_class):
            images[label * per_class + k] = render(drawn[k % len(drawn)], image_size, rng)
    labels = torch.arange(len(pictures)).repeat_interleave(per_class)
    return torch.from_numpy(images), labels


def as_square(picture: Image.Image, side: int) -> Image.Image:
    """Return a picture in RGBA, scaled into a transparent square of that side, in its middle."""
    whole = picture.convert("RGBA")
    box = whole.getchannel("A").getbbox()
    if box is not None:
        whole = whole.crop(box)
    factor = side / max(whole.size)
    size = (max(1, round(whole.width * factor)), max(1, round(whole.height * factor)))
    scaled = whole.resize(size, Image.Resampling.BOX if factor < 1 else Image.Resampling.BICUBIC)
    square = Image.new("RGBA", (side, side))
    square.paste(scaled, ((side - size[0]) // 2, (side - size[1]) // 2))
    return square


def _background(side: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return a gradient with coarse noise, float32 [side, side, 3]."""
    colours = rng.random((2, 3)).astype(np.float32)
    if rng.random() < 0.5:
        colours = colours.mean(axis=1, keepdims=True) + _DULL * (colours - 0.5)
    angle = rng.uniform(0, 2 * np.pi)
    place = np.linspace(-0.5, 0.5, side, dtype=np.float32)
    ramp = np.float32(np.cos(angle)) * place[:, None] + np.float32(np.sin(angle)) * place + 0.5
    coarse = rng.normal(0, 0.15, (5, 5)).astype(np.float32)
    noise = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))
    image = colours[0] + (colours[1] - colours[0]) * ramp[..., None] + noise[..., None]
    return np.asarray(image, dtype=np.float32)
