"""Stratified, seeded orderings, of which every beginning is a fair sample."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..rng import generator


def stratified_order(
    labels: NDArray[np.int64] | None, count: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return a random order of `count` items in which every prefix holds the classes in proportion.

    labels: int64 [count], or None to treat all items as one class. rng: a stream of `pydetox.rng`.
    Returns int64 [count], a permutation of 0..count-1. Cutting it into consecutive pieces therefore
    gives stratified pieces of exactly the wanted sizes: in each piece, a class is off its share by
    a few items at most.

    The same stream gives the same order on every platform: only the raw doubles of PCG64, IEEE
    divisions and stable sorts are used, not numpy's shuffling routines, whose streams may change
    between releases.
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
    """Return the sample that a seed stands for: the same for a file, a folder and an image set."""
    return stratified_sample(
        labels, count, count if size is None else size, generator("images.sample", seed)
    )
