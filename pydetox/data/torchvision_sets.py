"""Data sets of torchvision by name, from a folder where they lie already."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError
from .objects import rows_of
from .rows import Rows

# Each name: the class of torchvision, its argument for a part, and that of training and test.
_SETS: Mapping[str, tuple[str, str | None, Any, Any]] = {
    "caltech101": ("Caltech101", None, None, None),
    "cifar10": ("CIFAR10", "train", True, False),
    "cifar100": ("CIFAR100", "train", True, False),
    "country211": ("Country211", "split", "train", "test"),
    "dtd": ("DTD", "split", "train", "test"),
    "eurosat": ("EuroSAT", None, None, None),
    "fgvc-aircraft": ("FGVCAircraft", "split", "train", "test"),
    "flowers102": ("Flowers102", "split", "train", "test"),
    "food101": ("Food101", "split", "train", "test"),
    "gtsrb": ("GTSRB", "split", "train", "test"),
    "imagenet": ("ImageNet", "split", "train", "val"),
    "kmnist": ("KMNIST", "train", True, False),
    "mnist": ("MNIST", "train", True, False),
    "oxford-pets": ("OxfordIIITPet", "split", "trainval", "test"),
    "pcam": ("PCAM", "split", "train", "test"),
    "stl10": ("STL10", "split", "train", "test"),
    "sun397": ("SUN397", None, None, None),
    "svhn": ("SVHN", "split", "train", "test"),
}

_TEST = "-test"


def names() -> tuple[str, ...]:
    """Return the names that are known, those of test parts included."""
    found = []
    for name, (_, part, *_others) in _SETS.items():
        found += [name] if part is None else [name, f"{name}{_TEST}"]
    return tuple(found)


def class_of(name: str) -> str:
    """Return the class of torchvision that a known name means."""
    return _SETS[name.removesuffix(_TEST)][0]


def is_name(name: str) -> bool:
    """Return whether a text names one of these sets."""
    return name in names()


def torchvision_rows(name: str, folder: Path) -> Rows:
    """Return the rows of a data set that torchvision finds below a folder.

    Nothing is downloaded. torchvision checks the known hashes of CIFAR's files, which are pickles,
    before it reads them.

    name: One of `names`, with `-test` for the test part. Raises DataError if it is not there.
    """
    import torchvision.datasets  # takes a second to import

    kind, argument, train, test = _SETS[name.removesuffix(_TEST)]
    if not folder.is_dir():
        raise DataError(f"{name}: {folder}: no such folder")
    part = {} if argument is None else {argument: test if name.endswith(_TEST) else train}
    call = f"torchvision.datasets.{kind}({str(folder)!r}"
    call += "".join(f", {key}={value!r}" for key, value in part.items())
    make = getattr(torchvision.datasets, kind)
    try:
        data = make(str(folder), **part)
    except (ImportError, ModuleNotFoundError) as error:
        raise DataError(f"{name}: torchvision needs more for it: {error}") from error
    except (RuntimeError, OSError, ValueError) as error:
        reason = re.split(r"[.;\n]", str(error))[0]
        raise DataError(
            f"{name}: torchvision does not find it in {folder} ({reason}); fetch it with "
            f"{call}, download=True)"
        ) from error
    rows = rows_of(data)
    rows.name = name
    return rows
