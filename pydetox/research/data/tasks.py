"""Four tasks in one form: images at one size, class names, prompts, and disjoint parts by seed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ...atomic import atomic_directory
from ...data import (
    DIGIT_TEMPLATES,
    FASHION_TEMPLATES,
    ImageSet,
    Splits,
    load_digits,
    split_fashion_mnist,
)
from ...errors import DataError, UsageError
from ...rng import generator
from .emoji import EMOJI_TEMPLATES, emoji_pictures
from .packages import FASHION_MNIST, archive_path, open_archive
from .photographs import PHOTOGRAPH_TEMPLATES, photograph_pictures
from .rendering import render_all

#: Of the images and labels that scikit-learn carries, at 8 pixels.
_DIGITS_SHA256 = "979238cd166dcd11466902172be284ed55e8021431af5596c67420b299263ac7"


@dataclass(frozen=True)
class TaskSizes:
    """Images in each part of a task, for rendered tasks rounded up to as many of each class.

    attacker: what base and victims are trained on. defender: the defender's clean images.
    validation: what settings are chosen on. test: what is reported.
    """

    attacker: int
    defender: int = 500
    validation: int = 400
    test: int = 1_600


@dataclass(frozen=True, eq=False)
class Task:
    """One task of a model.

    Attributes:
        name: One of TASKS.
        splits: The four parts of the task; all have labels and class names.
        templates: The prompt templates.
    """

    name: str
    splits: Splits
    templates: tuple[str, ...]

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes."""
        names = self.splits.test.class_names
        assert names is not None
        return names


def load_task(
    name: str,
    *,
    seed: int,
    sizes: TaskSizes | None = None,
    image_size: int = 32,
    classes: int | None = None,
) -> Task:
    """Return a task, its parts drawn with a seed.

    Digits and Fashion-MNIST are real images; every image is in one part alone. Emoji and
    photographs are renderings (see `rendering`): each part has its own, of the same drawings and
    photographs, so that CA is that of unseen places, turns and backgrounds of known pictures.

    Args:
        name: One of TASKS.
        seed: The seed of the parts and the renderings.
        sizes: The number of images in each part; default: DEFAULT_SIZES[name].
        image_size: The height and width in pixels.
        classes: The number of classes of emoji (default 40) and photographs (default 60); the other
            tasks have ten.

    Raises:
        UsageError: an unknown name, or classes for a task that has ten.
        DataError: a package that is missing or damaged, or more images than there are.
    """
    if name not in TASKS:
        raise UsageError(f"task {name!r}; expected one of {', '.join(TASKS)}")
    if classes is not None and name in ("digits", "fashion"):
        raise UsageError(f"{name}: {classes} classes asked for; it has ten")
    sizes = sizes or DEFAULT_SIZES[name]
    if name == "digits":
        return Task(name, _digits(seed, sizes, image_size), DIGIT_TEMPLATES)
    if name == "fashion":
        parts = split_fashion_mnist(
            image_size,
            attacker=sizes.attacker,
            defender=sizes.defender,
            validation=sizes.validation,
            test=sizes.test,
            seed=seed,
            folder=fashion_folder(),
        )
        return Task(name, parts, FASHION_TEMPLATES)
    make, templates, default = _RENDERED[name]
    names, pictures = make(default if classes is None else classes)
    rng = generator("foundation.pictures", seed, name)

    def part(size: int) -> ImageSet:
        per_class = -(-size // len(names))
        images, labels = render_all([list(p) for p in pictures], per_class, image_size, rng)
        # In random order, so that the beginning of a part is a sample of it.
        order = torch.from_numpy(rng.permutation(len(images)))
        return ImageSet(images[order], labels[order], names, name)

    parts = Splits(
        part(sizes.attacker), part(sizes.defender), part(sizes.validation), part(sizes.test)
    )
    return Task(name, parts, templates)


def fashion_folder() -> Path:
    """Return a folder with the files of Fashion-MNIST, unpacked from its archive if need be.

    Raises DataError when the package was not fetched or is damaged.
    """
    folder = archive_path(FASHION_MNIST).with_suffix("")
    if not folder.is_dir():
        with open_archive(FASHION_MNIST) as archive, atomic_directory(folder) as new:
            archive.extractall(new)
    return folder


def _digits(seed: int, sizes: TaskSizes, image_size: int) -> Splits:
    every = load_digits(image_size)
    _check_digits()
    wanted = (sizes.attacker, sizes.defender, sizes.validation, sizes.test)
    if sum(wanted) > len(every):
        raise DataError(f"digits: {sum(wanted):,} images wanted, but there are {len(every):,}")
    parts = every.split([n / len(every) for n in wanted], seed=seed)
    return Splits(parts[0], parts[1], parts[2], parts[3])


@lru_cache(maxsize=1)
def _check_digits() -> None:
    small = load_digits(8)
    assert small.labels is not None
    digest = hashlib.sha256(small.images.numpy().tobytes() + small.labels.numpy().tobytes())
    if digest.hexdigest() != _DIGITS_SHA256:
        raise DataError(
            f"digits: scikit-learn's images have SHA-256 {digest.hexdigest()[:16]}…; expected "
            f"{_DIGITS_SHA256[:16]}…"
        )


_RENDERED: dict[
    str, tuple[Callable[[int], tuple[tuple[str, ...], list[Any]]], tuple[str, ...], int]
] = {
    "emoji": (emoji_pictures, EMOJI_TEMPLATES, 40),
    "photographs": (photograph_pictures, PHOTOGRAPH_TEMPLATES, 60),
}

#: All tasks, in the order of tables.
TASKS: tuple[str, ...] = ("digits", "fashion", "emoji", "photographs")

#: Parts of each task.
DEFAULT_SIZES: dict[str, TaskSizes] = {
    "digits": TaskSizes(700, 500, 200, 397),
    "fashion": TaskSizes(6_000, 500, 400, 2_000),
    "emoji": TaskSizes(6_000, 500, 400, 1_600),
    "photographs": TaskSizes(6_000, 500, 420, 1_620),
}
