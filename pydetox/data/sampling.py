"""Stratified, seeded orderings: the one source of randomness of `pydetox.data`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..rng import generator


def stratified_order(
    labels: NDArray[np.int64] | None, count: int, seed: int, *, stream: str = "images.sample"
) -> NDArray[np.int64]:
    """Return a random order of `count` items in which every prefix holds the classes in proportion.

    labels: int64 [count], or None to treat all items as one class. seed: non-negative integer.
    stream: What the order is for, a name in `rng.STREAMS`.
    Returns int64 [count], a permutation of 0..count-1. Cutting it into consecutive pieces therefore
    gives stratified pieces of exactly the wanted sizes: in each piece, a class is off its share by
    a few items at most.

    The same seed gives the same order on every platform: only the raw doubles of PCG64, IEEE
    divisions and stable sorts are used, not numpy's shuffling routines, whose streams may change
    between releases.
    """
    if seed < 0:
        raise DataError(f"seed is {seed}; expected a non-negative integer")
    rng = generator(stream, seed)
    shuffled = np.argsort(rng.random(count), kind="stable").astype(np.int64)
    if labels is None:
        return shuffled
    # The k-th of the n items of a class gets the position (k + 1/2)/n in (0, 1): sorting by it
    # interleaves the classes evenly, and the shuffled start breaks ties at random.
    position = np.empty(count, dtype=np.float64)
    shuffled_labels = labels[shuffled]
    for label in np.unique(labels):
        members = np.flatnonzero(shuffled_labels == label)
        position[members] = (np.arange(members.size) + 0.5) / members.size
    order: NDArray[np.int64] = shuffled[np.argsort(position, kind="stable")]
    return order
