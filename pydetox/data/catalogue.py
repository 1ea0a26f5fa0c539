"""The data sets and lists of names that are known by name."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from .fashion_mnist import DEBIAN_FOLDER, FASHION_NAMES, has_fashion_mnist
from .named_lists import IMAGENET, named_class_names, other_lists
from .torchvision_sets import class_of, names


@dataclass(frozen=True)
class ListedSet:
    """A data set or a list of class names.

    Attributes:
        name: How --images, or --class-names, takes it.
        kind: `images` or `class names`.
        classes: The number of classes; None if only the data tell.
        source: Where it comes from.
        obstacle: The reason why it is not there now; None if it is, or if only the folder that is
            named with it can tell.
    """

    name: str
    kind: str
    classes: int | None
    source: str
    obstacle: str | None = None


def listed_sets() -> list[ListedSet]:
    """Return all data sets and lists of class names that are known; no data are read."""
    digits = None if find_spec("sklearn") else 'pip install "pydetox[digits]"'
    fashion = None if has_fashion_mnist(DEBIAN_FOLDER) else "apt-get install dataset-fashion-mnist"
    found = [ListedSet("digits", "images", 10, "scikit-learn", digits)]
    for name in ("fashion-mnist", "fashion-mnist-test"):
        count, package = len(FASHION_NAMES), f"Debian's package, in {DEBIAN_FOLDER}"
        found.append(ListedSet(name, "images", count, package, fashion))
        files = "a folder with its IDX files or torchvision's"
        found.append(ListedSet(f"{name}=FOLDER", "images", count, files))
    found += [
        ListedSet(f"{name}=FOLDER", "images", None, f"torchvision's {class_of(name)} in a folder")
        for name in names()
    ]
    for name in IMAGENET[:1]:
        listed = named_class_names(name)
        assert listed is not None
        found.append(ListedSet(name, "class names", len(listed), "open_clip"))
    for name in other_lists():
        listed = named_class_names(name)
        if listed is not None:
            found.append(ListedSet(name, "class names", len(listed), "CLIP_benchmark"))
    return found
