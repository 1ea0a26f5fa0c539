"""Reading an ImageFolder: one sub-folder per class, or one folder of unlabelled images."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..errors import DataError
from ..progress import track
from .image_set import ImageSet
from .labels import index_of_names, labels_mean_nothing
from .resize import Resizing, refuse_too_large
from .sampling import sample_order

#: Files with other endings are not images for us and are passed over.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def load_image_folder(
    directory: Path,
    *,
    resizing: Resizing,
    max_images: int | None,
    seed: int,
    class_names: tuple[str, ...] | None,
    labels_required: bool,
    workers: int | None,
) -> ImageSet:
    """Read `directory`; see `pydetox.data.load_images` for the arguments and the errors.

    Images are ordered by class and by relative path (by code point, whatever the file system says),
    whatever the number of workers.
    """
    paths, labels, names = choose_images(
        directory,
        max_images=max_images,
        seed=seed,
        class_names=class_names,
        labels_required=labels_required,
    )
    images = torch.empty(
        (len(paths), 3, resizing.image_size, resizing.image_size), dtype=torch.uint8
    )
    pixels = images.numpy()

    def decode(index: int) -> None:
        pixels[index] = _decode(paths[index], resizing)

    executor = ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1))
    try:
        # map() hands results back in order, so the first bad file by name is the one reported.
        for _ in track(
            executor.map(decode, range(len(paths))), "Decoding images", total=len(paths)
        ):
            pass
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
    return ImageSet(
        images, None if labels is None else torch.from_numpy(labels), names, directory.name
    )


def choose_images(
    directory: Path,
    *,
    max_images: int | None,
    seed: int,
    class_names: tuple[str, ...] | None,
    labels_required: bool,
) -> tuple[list[Path], NDArray[np.int64] | None, tuple[str, ...] | None]:
    """Return the paths of the images that are read, their labels and the class names.

    Nothing but folders is opened. Raises DataError for a folder that is no image set.
    """
    paths, labels, names = _list_images(directory, class_names, labels_required=labels_required)
    if max_images is not None and max_images < len(paths):
        # Chosen before decoding: the rest of the folder is never opened.
        chosen = sample_order(labels, len(paths), max_images, seed)
        paths = [paths[index] for index in chosen]
        labels = None if labels is None else labels[chosen]
    return paths, labels, names


def _list_images(
    directory: Path, class_names: tuple[str, ...] | None, *, labels_required: bool
) -> tuple[list[Path], NDArray[np.int64] | None, tuple[str, ...] | None]:
    try:
        entries = sorted(
            (entry for entry in directory.iterdir() if not entry.name.startswith(".")),
            key=lambda p: p.name,
        )
    except OSError as error:
        raise DataError(
            f"{directory}: cannot list the folder: {error.strerror or error}"
        ) from error
    folders = [entry for entry in entries if entry.is_dir()]
    flat = [entry for entry in entries if _is_image(entry)]
    if flat and folders:
        raise DataError(
            f"{directory}: holds both images ({flat[0].name}) and folders ({folders[0].name}); "
            "expected one folder per class, or images only"
        )
    if not folders:
        if not flat:
            raise DataError(
                f"{directory}: zero images; expected one folder per class, or files ending in "
                + ", ".join(IMAGE_SUFFIXES)
            )
        return flat, None, class_names

    found = tuple(folder.name for folder in folders)
    if labels_mean_nothing(found, class_names, labels_required=labels_required):
        unlabelled = [path for folder in folders for path in _images_below(folder)]
        if not unlabelled:
            raise DataError(f"{directory}: zero images in its folders")
        return unlabelled, None, class_names
    index_of = index_of_names(found, class_names, str(directory))
    paths: list[Path] = []
    labels: list[int] = []
    # By label, not by folder name, so that a caller's order of classes also orders the images.
    for label, folder in sorted(zip(index_of, folders, strict=True)):
        members = _images_below(folder)
        if not members:
            raise DataError(f"{folder}: zero images in the folder of class {folder.name!r}")
        paths += members
        labels += [label] * len(members)
    return (
        paths,
        np.asarray(labels, dtype=np.int64),
        class_names if class_names is not None else found,
    )


def _images_below(folder: Path) -> list[Path]:
    """Return the images of a folder and of all folders in it, by their relative paths."""
    return sorted(
        (path for path in folder.rglob("*") if _is_image(path) and not path.name.startswith(".")),
        key=lambda path: path.relative_to(folder).as_posix(),
    )


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def _decode(path: Path, resizing: Resizing) -> NDArray[np.uint8]:
    """Return one image as uint8 [3, image_size, image_size]."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            refuse_too_large(width, height, str(path))
            square = resizing(image, str(path))
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{path}: {error}") from error
    except Exception as error:
        # Pillow's decoders raise whatever the damage led them into (OSError, SyntaxError,
        # ValueError, struct.error, zlib.error, ...): for a file that we did not write, all of these
        # mean one thing.
        raise DataError(f"{path}: cannot be read as an image: {error}") from error
    pixels: NDArray[np.uint8] = np.asarray(square).transpose(2, 0, 1)
    return pixels
