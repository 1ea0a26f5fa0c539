"""Randomness of triggers that differ from image to image."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from torch import Tensor


def generator_per_image(images: Tensor, seed: int) -> Iterator[np.random.Generator]:
    """Yield one generator per image, seeded by `seed` and the image's own bytes.

    An image thus gets the same draw in any batch, at any place, in any order: a trigger that is
    random per image is still a function. images: uint8 [n, 3, H, W], any strides.
    """
    key = seed.to_bytes(8, "little")
    for image in images.cpu().contiguous().numpy():
        digest = hashlib.blake2b(image.tobytes(), digest_size=16, key=key).digest()
        yield np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))
