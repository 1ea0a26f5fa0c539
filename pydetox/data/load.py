"""`load_images`: one function for all sources of images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import DataError
from .digits import load_digits
from .fashion_mnist import (
    FASHION_TEMPLATES,
    Part,
    find_fashion_mnist,
    has_fashion_mnist,
    load_fashion_mnist,
)
from .folder import load_image_folder
from .image_set import ImageSet
from .labels import index_of_names, labels_mean_nothing
from .names import DEFAULT_TEMPLATES, DIGIT_TEMPLATES, given_names
from .npz import load_npz
from .objects import ImageData, rows_of
from .resize import Resizing
from .rows import Rows, read_rows
from .shards import files_of, rows_of_shards, shards_of
from .tables import PARQUET_SUFFIX, TABLE_SUFFIXES, rows_of_parquet, rows_of_table
from .torchvision_sets import is_name, torchvision_rows

#: The part of Fashion-MNIST that each source names.
FASHION_PARTS: dict[str, Part] = {"fashion-mnist": "train", "fashion-mnist-test": "test"}


def locate_images(spec: str | Path) -> tuple[str, Path | None]:
    """Return the source that `spec` names, and the path that `load_images` reads it from.

    The source is "digits" (which has no path), "fashion-mnist", "fashion-mnist-test", the name of a
    data set of torchvision, or "" for a folder or a file. Raises DataError if Fashion-MNIST is not
    found.
    """
    source, _, root = str(spec).partition("=")
    if spec == "digits":
        return source, None
    if source in FASHION_PARTS:
        return source, find_fashion_mnist(root or None)
    if root and is_name(source):
        return source, Path(root)
    return "", Path(spec)


def require_images(spec: ImageData) -> None:
    """Raise DataError for images whose files are missing, before they are wanted.

    Nothing is decoded. Objects that hold images themselves are not looked at.
    """
    if isinstance(spec, ImageSet) or not isinstance(spec, str | Path):
        return
    root = locate_images(spec)[1]
    if root is not None and not root.exists() and not shards_of(str(spec)):
        raise DataError(f"{spec}: no such file or folder; expected images{_hint(str(spec))}")


def rows_of_files(spec: str | Path, class_names: tuple[str, ...] | None) -> Rows | None:
    """Return the rows of a table, of shards or of a data set of torchvision; None for others."""
    source, _, root = str(spec).partition("=")
    if root and is_name(source):
        return torchvision_rows(source, Path(root))
    shards = shards_of(str(spec))
    if shards is not None:
        return rows_of_shards(shards, class_names)
    parquet = parquet_files(str(spec))
    if parquet is not None:
        return rows_of_parquet(parquet)
    if Path(spec).suffix.lower() in TABLE_SUFFIXES and Path(spec).is_file():
        return rows_of_table(Path(spec), class_names)
    return None


def parquet_files(spec: str) -> list[Path] | None:
    """Return the parquet files that a name means, as `files_of`; None for anything else."""
    return files_of(spec, PARQUET_SUFFIX)


def load_images(
    spec: ImageData,
    *,
    image_size: int | None = None,
    max_images: int | None = None,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    interpolation: str = "bicubic",
    resize_mode: str = "shortest",
    fill_color: int = 0,
    resizing: Resizing | None = None,
    resize: bool = False,
    labels_required: bool = True,
    strict: bool = False,
    workers: int | None = None,
) -> ImageSet:
    """Read an image set as uint8 RGB [N, 3, image_size, image_size].

    Args:
        spec: What to read. An `ImageSet` is returned as it is, if it has the size and nothing is
            asked of it. Otherwise one of

            - `digits`: the UCI digits (see `load_digits`).
            - `fashion-mnist`, `fashion-mnist-test`: the 60,000 training or the 10,000 test images
              of Fashion-MNIST (see `load_fashion_mnist`). They are read from Debian's package or,
              with `=FOLDER` after the name, from a folder with the IDX files or a torchvision
              download.
            - A folder with one sub-folder per class, whose sorted names are the class names, or a
              folder of images without labels. Each image becomes the pixels that open_clip's own
              transform makes of it: transparency is dropped, the EXIF orientation is ignored, and
              grey values above 255 are clipped. Hidden files, folders of the system and files with
              other endings are passed over. Everything else that is left out is counted in
              `ImageSet.report`: files that cannot be read, unknown formats, class folders without
              images, and circular links.
            - A `.npz` file with the array `images` ([N, H, W], [N, H, W, C] or [N, C, H, W] with 1,
              3 or 4 channels; whole numbers in 0..255, or floats in [0, 1]). It may also have
              `labels` (whole numbers or names, [N] or [N, 1], or one-hot [N, C]) and `class_names`
              (text or bytes [C]). The names that Keras and medmnist write are known, too (`x_test`,
              `test_images`, ...); the test part comes first. Other arrays are not read, and
              `ImageSet.report` says so. Pickled content is never loaded.
            - A `.csv` or `.tsv` file whose first line names the columns: one with paths (`filepath`
              as in open_clip's training tables, `path`, ...) and, if known, one with classes
              (`label`, `class`, or `title` with class names). Empty fields and `nan` are missing
              labels.
            - WebDataset shards: a `.tar` file, a folder of them, or a pattern (`test/{0..3}.tar`,
              `test-*.tar`). Nothing is extracted. Compressed archives are refused.
            - A `.parquet` file of Hugging Face's datasets, a folder of them, or a pattern. This
              needs pyarrow. A folder of several parts of a data set (`train-0.parquet`,
              `test-0.parquet`; the same for shards) is refused.
            - A data set of torchvision that lies in a folder: `cifar10=FOLDER` for its training
              part and `cifar10-test=FOLDER` for its test part, and so on.
            - An array or tensor of images as in a `.npz` file, alone or as a pair with labels, or
              a mapping with `images` and `labels`. Images of any size are scaled. An array of three
              dimensions that may be one colour picture is refused.
            - A list of Pillow's images, arrays, encoded bytes or paths of files, alone, in pairs
              with labels, or as a pair with the list of labels. All pictures of a set that are
              floats have one scale, [0, 1] or whole numbers in 0..255.
            - A data set of torch (such as those of torchvision) or of Hugging Face: anything with a
              length whose rows are pictures, pairs of picture and label, or mappings with `image`
              and `label`. It must not normalise its images. Its class names are read from
              `classes`, or from the features of its label column. The labels of its rows count; an
              attribute `targets` or `labels` serves where they have none.
        image_size: The height and width in pixels that the model takes.
        max_images: The size of a stratified random sample; None for all images.
        class_names: The classes, in the order that defines the labels. Class names in the data are
            matched by name, and folders 0, 1, 2, ... (also 00000, 00001, ...) by number. A class
            that is not in the list is an error. None to use the names in the data.
        interpolation: How images are scaled: "nearest", "bilinear", "bicubic" or "lanczos".
        resize_mode: How an image becomes square. "shortest" scales its shorter side and crops,
            "longest" scales its longer side and pads with the grey `fill_color` (0..255), and
            "squash" scales both sides. The configuration of a model says which one it was trained
            with (`OpenClipModel.resizing`).
        fill_color: The grey value of the padding, 0..255.
        resizing: A model's `OpenClipModel.resizing`, instead of image_size, interpolation,
            resize_mode and fill_color.
        resize: Whether .npz images of another size are scaled as in folders. Otherwise they are an
            error.
        labels_required: Whether the caller needs labels. If not, and no class of the data is among
            `class_names`, the images count as unlabelled; otherwise that is an error.
        strict: Whether it is an error if anything is left out that could have been meant.
        seed: The seed of the random sample.
        workers: The number of threads that decode images of a folder; None for one per core, at
            most 8. The result does not depend on it.

    Raises:
        DataError: The images cannot be read or do not fit, there are none, or they are so large
            that they look like decompression bombs. The message names the file.
    """
    if resizing is None:
        if image_size is None:
            raise DataError("no image_size; give it, or resizing= as the model has it")
        resizing = Resizing(image_size, interpolation, resize_mode, fill_color)
    elif image_size not in (None, resizing.image_size):
        raise DataError(f"image_size is {image_size}, and resizing= has {resizing.image_size}")
    image_size = resizing.image_size
    if max_images is not None and max_images < 1:
        raise DataError(f"max_images is {max_images}; expected at least 1, or None for all")
    if workers is not None and workers < 1:
        raise DataError(f"workers is {workers}; expected at least 1")
    names = given_names(class_names)
    if isinstance(spec, ImageSet):
        return _of_image_set(spec, names, image_size, max_images, seed)
    rows = rows_of_files(spec, names) if isinstance(spec, str | Path) else rows_of(spec)
    if rows is not None:
        return read_rows(
            rows,
            resizing=resizing,
            max_images=max_images,
            seed=seed,
            class_names=names,
            labels_required=labels_required,
            strict=strict,
        )
    assert isinstance(spec, str | Path)
    path = Path(spec)
    if spec == "digits":
        image_set = _with_class_names(load_digits(image_size), names, labels_required)
        return (
            image_set
            if max_images is None or max_images >= len(image_set)
            else image_set.sample(max_images, seed)
        )
    source, _, root = str(spec).partition("=")
    if source in FASHION_PARTS:
        fashion = load_fashion_mnist(
            image_size,
            part=FASHION_PARTS[source],
            folder=root or None,
            max_images=max_images,
            seed=seed,
        )
        return _with_class_names(fashion, names, labels_required)
    if path.is_dir() and has_fashion_mnist(path):
        raise DataError(
            f"{path}: holds the files of Fashion-MNIST; name it as fashion-mnist={path} or "
            f"fashion-mnist-test={path}"
        )
    if path.is_dir():
        return load_image_folder(
            path,
            resizing=resizing,
            max_images=max_images,
            seed=seed,
            class_names=names,
            labels_required=labels_required,
            strict=strict,
            workers=workers,
        )
    if not path.exists():
        raise DataError(
            f'{path}: no such file or folder; expected "digits", "fashion-mnist", an image folder, '
            f"{_FILES}{_hint(str(spec))}"
        )
    if path.suffix.lower() != ".npz":
        if path.suffix.lower() == ".npy":
            raise DataError(
                f"{path}: a .npy file is not read; save the array as .npz, with "
                "numpy.savez(file, images=array)"
            )
        packed = " (unpack it, and name the folder)" if _PACKED.search(path.name.lower()) else ""
        raise DataError(
            f'{path}: not an image source; expected "digits", "fashion-mnist", an image folder, '
            f"{_FILES}{packed}"
        )
    return load_npz(
        path,
        resizing=resizing,
        max_images=max_images,
        seed=seed,
        class_names=names,
        labels_required=labels_required,
        resize=resize,
        strict=strict,
    )


def _of_image_set(
    image_set: ImageSet,
    class_names: tuple[str, ...] | None,
    image_size: int,
    max_images: int | None,
    seed: int,
) -> ImageSet:
    if image_set.image_size != (image_size, image_size):
        height, width = image_set.image_size
        raise DataError(
            f"{image_set.name}: images are {height}x{width} pixels; expected "
            f"{image_size}x{image_size}: load them anew for this size"
        )
    if class_names is not None and class_names != image_set.class_names:
        image_set = replace(image_set, class_names=class_names)
    return image_set if max_images is None else image_set.at_most(max_images, seed)


def default_templates(spec: ImageData) -> tuple[str, ...]:
    """Return the prompt templates that suit an image source of `load_images`."""
    source = str(spec).partition("=")[0] if isinstance(spec, str | Path) else ""
    if source == "digits":
        return DIGIT_TEMPLATES
    return FASHION_TEMPLATES if source in FASHION_PARTS else DEFAULT_TEMPLATES


_FILES = "or a .npz, .csv, .tar or .parquet file"

#: Endings of archives that are not read.
_PACKED = re.compile(r"\.(zip|7z|rar|tgz|tbz2?|txz|tar\.\w+)$")

#: Data sets that people name, in small letters without signs.
_NAMED = re.compile(
    r"(cifar10|cifar100|imagenet|imagenet1k|imagenetv2|mnist|svhn|stl10|food101|caltech101|dtd|gtsrb"
    r"|eurosat|resisc45|sun397|cars|flowers|flowers102|pets|oxfordiiitpet|tinyimagenet|coco)"
)


def _hint(spec: str) -> str:
    if _NAMED.fullmatch(re.sub(r"[^a-z0-9]", "", spec.lower())) is None:
        return ""
    name = spec.lower()
    if is_name(name):
        return f" (where torchvision has it on the disk: {name}=FOLDER or {name}-test=FOLDER)"
    return (
        f" (data sets are not fetched by name: save images of {spec} in one folder per class, or "
        "as a .npz file)"
    )


def _with_class_names(
    image_set: ImageSet, class_names: tuple[str, ...] | None, labels_required: bool
) -> ImageSet:
    if class_names is None or image_set.class_names is None or image_set.labels is None:
        return image_set
    if labels_mean_nothing(image_set.class_names, class_names, labels_required=labels_required):
        return replace(image_set, labels=None, class_names=class_names)
    index_of = torch.tensor(index_of_names(image_set.class_names, class_names, image_set.name))
    return replace(image_set, labels=index_of[image_set.labels], class_names=class_names)
