"""Randomness of triggers that differ from image to image."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from ...rng import generator


def generator_per_image(images: Tensor, stream: str, seed: int) -> Iterator[np.random.Generator]:
    """Yield one generator per image: the place of the image's own bytes in a stream.

    An image thus gets the same draw in any batch, at any place, in any order: a trigger that is
    random per image is still a function. images: uint8 [n, 3, H, W], any strides. stream: a name in
    `rng.STREAMS`.
    """
    for image in images.cpu().contiguous().numpy():
        digest = hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest()
        yield generator(stream, seed, digest)
