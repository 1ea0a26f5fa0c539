"""`ImageSet`: decoded images with their labels, the form in which pydetox passes images around."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import DataError
from ..rng import generator
from .report import ImageReport
from .sampling import sample_order, stratified_order


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one size, with labels if they are known. An image set is never empty.

    Attributes:
        images: uint8 [N, 3, H, W], 0..255, RGB, before any normalisation, on the CPU.
        labels: int64 [N], class indices of at least 0; None if they are not known.
        class_names: The name of each class: label k is class_names[k]. None if there are none.
        name: The name of the set in messages and reports.
        report: The counts of what was left out when the set was read from files; None for other
            sets and for parts of a set.

    Raises:
        DataError: Images, labels and class names do not fit together.
    """

    images: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] | None = None
    name: str = "images"
    report: ImageReport | None = None

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise DataError(
                f"{self.source}: images are {images.dtype} {list(images.shape)}; "
                "expected torch.uint8 [N, 3, H, W]"
            )
        if images.shape[0] == 0:
            raise DataError(f"{self.source}: zero images; expected at least one")
        if images.shape[2] == 0 or images.shape[3] == 0:
            raise DataError(
                f"{self.source}: images are {images.shape[2]}x{images.shape[3]} pixels; "
                "expected a size above 0"
            )
        if isinstance(self.class_names, str):
            raise DataError(
                f"{self.source}: class_names is {self.class_names!r:.60}; expected a tuple of names"
            )
        if self.class_names is not None and len(self.class_names) == 0:
            raise DataError(f"{self.source}: the list of class names is empty")
        if labels is None:
            return
        if labels.dtype != torch.int64 or labels.ndim != 1:
            raise DataError(
                f"{self.source}: labels are {labels.dtype} {list(labels.shape)}; "
                "expected torch.int64 [N]"
            )
        if labels.shape[0] != images.shape[0]:
            raise DataError(f"{self.source}: {images.shape[0]} images but {labels.shape[0]} labels")
        low, high = int(labels.min()), int(labels.max())
        if low < 0:
            raise DataError(f"{self.source}: label {low}; expected class indices from 0")
        if self.class_names is not None and high >= len(self.class_names):
            raise DataError(
                f"{self.source}: label {high}, but there are only {len(self.class_names)} "
                f"class names (labels 0..{len(self.class_names) - 1})"
            )

    def __len__(self) -> int:
        return int(self.images.shape[0])

    @property
    def source(self) -> str:
        """The folder or file that was read, for messages; the name where none was."""
        return self.name if self.report is None else self.report.name

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return int(self.images.shape[2]), int(self.images.shape[3])

    def subset(self, indices: Sequence[int] | Tensor | NDArray[np.int64]) -> ImageSet:
        """Return a copy of the images at `indices` (0..N-1, in that order, repeats allowed)."""
        index = torch.as_tensor(indices)
        if index.dtype == torch.bool:
            raise DataError(f"{self.name}: subset takes indices, not a boolean mask")
        index = index.to(torch.int64).reshape(-1)
        if index.numel() == 0:
            raise DataError(f"{self.name}: a subset of zero images; expected at least one index")
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= len(self):
            wrong = low if low < 0 else high
            raise DataError(f"{self.name}: index {wrong} is outside 0..{len(self) - 1}")
        labels = None if self.labels is None else self.labels[index]
        return ImageSet(self.images[index], labels, self.class_names, self.name)

    def split(self, fractions: Iterable[float], seed: int) -> tuple[ImageSet, ...]:
        """Split into disjoint random parts with the classes in proportion in each.

        Each part is in random order, and every prefix of it holds the classes in proportion, too.
        The same seed gives the same parts on every platform.

        Args:
            fractions: One share in (0, 1] per part. The shares add up to at most 1; the rest of
                the images is left out.
            seed: The seed of the order.

        Raises:
            DataError: A part would be empty.
        """
        shares = [float(fraction) for fraction in fractions]
        if not shares or not all(0 < share <= 1 for share in shares) or sum(shares) > 1 + 1e-9:
            raise DataError(
                f"{self.name}: fractions {shares}; "
                "expected shares in (0, 1] that add up to at most 1"
            )
        labels = None if self.labels is None else self.labels.numpy()
        order = stratified_order(labels, len(self), generator("images.split", seed))
        ends = [
            min(len(self), int(np.floor(total * len(self) + 0.5))) for total in np.cumsum(shares)
        ]
        parts = []
        for share, start, end in zip(shares, [0, *ends[:-1]], ends, strict=True):
            if end <= start:
                raise DataError(
                    f"{self.name}: a share of {share:g} of {len(self)} images is no image at all"
                )
            parts.append(self.subset(order[start:end]))
        return tuple(parts)

    def sample(self, n: int, seed: int) -> ImageSet:
        """Return `n` of the N images in random order, without repeats, classes in proportion."""
        if not 1 <= n <= len(self):
            raise DataError(
                f"{self.name}: a sample of {n} images asked for; expected 1..{len(self)}"
            )
        labels = None if self.labels is None else self.labels.numpy()
        return self.subset(sample_order(labels, len(self), n, seed))

    def at_most(self, n: int, seed: int) -> ImageSet:
        """Return a `sample` of `n` images, or the whole set if it has no more."""
        return self if len(self) <= n else self.sample(n, seed)

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of size and pixels of all images in any order, as 64 hex digits."""
        hasher = hashlib.sha256(repr((len(self), *self.image_size)).encode())
        for one in sorted(self._digests):
            hasher.update(one)
        return hasher.hexdigest()

    def in_content_order(self) -> ImageSet:
        """Return the same images ordered by a hash of their pixels, then by label.

        Two sets of the same images are then equal, whatever the order of their files was. Therefore
        everything that is computed from them is equal, too.
        """
        labels = [0] * len(self) if self.labels is None else self.labels.tolist()
        order = sorted(range(len(self)), key=lambda k: (self._digests[k], labels[k]))
        return self if order == list(range(len(self))) else self.subset(order)

    @cached_property
    def _digests(self) -> list[bytes]:
        return [hashlib.sha256(one.numpy()).digest() for one in self.images.contiguous()]
