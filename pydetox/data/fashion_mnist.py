"""Fashion-MNIST: 60,000 training and 10,000 test images of ten kinds of clothes.

Source: Xiao, Rasul, Vollgraf, "Fashion-MNIST" (arXiv 1708.07747). Nothing is downloaded here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from ..errors import DataError
from .idx import read_idx
from .image_set import ImageSet
from .sampling import sample_order
from .splits import Splits

Part = Literal["train", "test"]

FASHION_NAMES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)

FASHION_TEMPLATES: tuple[str, ...] = (
    "a photo of a {c}.",
    "a grey picture of a {c}.",
    "a product photo of one {c}.",
    "a blurry photo of a {c}.",
)

#: Where Debian's package puts the files.
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")

_SIDE = 28
_STEMS: dict[Part, str] = {"train": "train", "test": "t10k"}
_HOW_TO_GET_IT = (
    "install Debian's package (apt-get install dataset-fashion-mnist), download it with "
    "torchvision.datasets.FashionMNIST(root, download=True) and give that root, or give a folder "
    "with the four IDX files of https://github.com/zalandoresearch/fashion-mnist"
)


def find_fashion_mnist(folder: str | Path | None = None) -> Path:
    """Return the folder that holds the files: the given one, torchvision's below it, or Debian's.

    Raises DataError, with a hint how to get the data, if there is none.
    """
    root = DEBIAN_FOLDER if folder is None else Path(folder)
    for place in (root, root / "FashionMNIST" / "raw", root / "raw"):
        if has_fashion_mnist(place):
            return place
    raise DataError(
        f"{root}: no Fashion-MNIST there (train-images-idx3-ubyte, plain or .gz); {_HOW_TO_GET_IT}"
    )


def fashion_mnist_files(part: Part, folder: Path) -> tuple[Path, Path]:
    """Return the files of a part, images and labels; DataError if one is missing."""
    stem = _STEMS[part]
    return _file(folder, f"{stem}-images-idx3-ubyte"), _file(folder, f"{stem}-labels-idx1-ubyte")


def has_fashion_mnist(folder: Path) -> bool:
    """Return whether the folder holds IDX files of the MNIST family."""
    return any((folder / f"train-images-idx3-ubyte{end}").is_file() for end in ("", ".gz"))


def load_fashion_mnist(
    image_size: int = 32,
    *,
    part: Part = "train",
    folder: str | Path | None = None,
    max_images: int | None = None,
    seed: int = 0,
) -> ImageSet:
    """Return Fashion-MNIST, light on black, as RGB images uint8 [N, 3, image_size, image_size].

    The 28x28 grey images are enlarged bicubically.

    Args:
        image_size: The height and width of the result in pixels.
        part: "train" for the 60,000 training images, "test" for the 10,000 test images.
        folder: The folder with the files, see `find_fashion_mnist`.
        max_images: The size of a stratified sample in random order; None for all images, in the
            order of the file.
        seed: The seed of the sample.

    Raises:
        DataError: A file is missing or damaged, or the files do not fit together.
    """
    if image_size < 1:
        raise DataError(f"fashion-mnist: image_size is {image_size}; expected at least 1")
    if part not in _STEMS:
        raise DataError(f"fashion-mnist: part {part!r}; expected train or test")
    if max_images is not None and max_images < 1:
        raise DataError(f"fashion-mnist: max_images is {max_images}; expected at least 1")
    place = find_fashion_mnist(folder)
    grey = read_idx(_file(place, f"{_STEMS[part]}-images-idx3-ubyte"), (_SIDE, _SIDE))
    path = _file(place, f"{_STEMS[part]}-labels-idx1-ubyte")
    labels = read_idx(path, ()).astype(np.int64)
    if len(labels) != len(grey):
        raise DataError(f"{path}: {len(labels):,} labels for {len(grey):,} images")
    if int(labels.max()) >= len(FASHION_NAMES):
        raise DataError(f"{path}: label {labels.max()}; expected 0..{len(FASHION_NAMES) - 1}")
    if max_images is not None and max_images < len(labels):
        chosen = sample_order(labels, len(labels), max_images, seed)
        grey, labels = grey[chosen], labels[chosen]
    drawn = np.empty((len(grey), image_size, image_size), dtype=np.uint8)
    for index, image in enumerate(grey):
        picture = Image.fromarray(image)
        drawn[index] = np.asarray(
            picture.resize((image_size, image_size), Image.Resampling.BICUBIC)
        )
    images = torch.from_numpy(drawn)[:, None].expand(-1, 3, -1, -1).contiguous()
    return ImageSet(images, torch.from_numpy(labels), FASHION_NAMES, f"fashion-mnist, {part}")


def split_fashion_mnist(
    image_size: int = 32,
    *,
    attacker: int,
    defender: int,
    validation: int,
    test: int,
    seed: int,
    folder: str | Path | None = None,
) -> Splits:
    """Draw the disjoint parts of a benchmark, each of the given number of images.

    Raises DataError if there are not enough images, and what `load_fashion_mnist` raises.
    """
    wanted = attacker + defender + validation
    if min(attacker, defender, validation, test) < 1:
        raise DataError("fashion-mnist: every part of a split needs at least one image")
    drawn = load_fashion_mnist(
        image_size, part="train", folder=folder, max_images=wanted, seed=seed
    )
    tested = load_fashion_mnist(image_size, part="test", folder=folder, max_images=test, seed=seed)
    for part, count in ((drawn, wanted), (tested, test)):
        if len(part) < count:
            raise DataError(f"{part.name}: {count:,} images wanted, but there are {len(part):,}")
    shares = [n / wanted for n in (attacker, defender, validation)]
    parts = drawn.split(shares, seed=seed)
    return Splits(parts[0], parts[1], parts[2], tested)


def _file(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(f"{folder}: {name} is missing, plain or .gz; {_HOW_TO_GET_IT}")
