"""Stratified, seeded orderings. Every prefix of such an ordering is a fair sample."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..rng import generator


def stratified_order(
    labels: NDArray[np.int64] | None, count: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return a random order of `count` items in which every prefix holds the classes in proportion.

    Consecutive pieces of the order are therefore stratified, too, and have exactly the sizes that
    they are cut to. In each piece, the number of items of a class is off its share by a few at
    most.

    The same stream gives the same order on every platform. The function uses only the raw doubles
    of PCG64, IEEE divisions and stable sorts. It does not use numpy's shuffling routines, whose
    streams may change between releases.

    Args:
        count: The number of items.
        labels: int64 [count]; None to treat all items as one class.
        rng: A stream of `pydetox.rng`.

    Returns:
        int64 [count], a permutation of 0..count-1.
    """
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


def stratified_sample(
    labels: NDArray[np.int64] | None, count: int, size: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return `size` of `count` items, or all of them if there are fewer, in random order.

    Classes are held in proportion, see `stratified_order`. Returns int64 [min(size, count)].
    """
    return stratified_order(labels, count, rng)[:size]


def sample_order(
    labels: NDArray[np.int64] | None, count: int, size: int | None, seed: int
) -> NDArray[np.int64]:
    """Return the order of the sample with this seed, for a file, a folder or an image set alike."""
    return stratified_sample(
        labels, count, count if size is None else size, generator("images.sample", seed)
    )
