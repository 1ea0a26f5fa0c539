"""What the defender is given: images of some classes and their names alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...data import ImageSet


def only_named(images: ImageSet, classes: Sequence[int]) -> ImageSet:
    """Return the images of some classes, their labels renumbered in the order given."""
    assert images.labels is not None
    assert images.class_names is not None
    chosen = torch.tensor(list(classes))
    index = torch.isin(images.labels, chosen).nonzero().flatten()
    labels = (images.labels[index][:, None] == chosen).int().argmax(dim=1)
    names = tuple(images.class_names[c] for c in classes)
    return ImageSet(images.images[index], labels, names, f"{images.name}, {len(names)} classes")
