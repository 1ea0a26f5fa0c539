"""Reading a NumPy .npz file as a hostile file: without pickles, with sizes checked first."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..errors import DataError
from .image_set import ImageSet
from .labels import ALL_OR_NONE, index_of_names, labels_mean_nothing, labels_of_texts
from .npz_arrays import (
    Chosen,
    choose_arrays,
    largest_value,
    refuse_single,
    to_channels_first,
    to_labels,
    to_names,
    to_uint8,
)
from .report import ImageReport
from .resize import Resizing
from .sampling import sample_order

# An array that unpacks to more than BOMB_BYTES at more than BOMB_RATIO times its packed size is a
# decompression bomb; photographs pack at ratios near 1, plain drawings near 20.
BOMB_BYTES = 1 << 30
BOMB_RATIO = 100


def load_npz(
    path: Path,
    *,
    resizing: Resizing,
    max_images: int | None,
    seed: int,
    class_names: tuple[str, ...] | None,
    labels_required: bool,
    resize: bool,
    strict: bool,
) -> ImageSet:
    """Read `path`; see `pydetox.data.load_images` for arguments, layout of the file and errors."""
    image_size = resizing.image_size
    chosen, arrays = _read_arrays(path)
    report = ImageReport(str(path))
    note = chosen.note()
    if note is not None:
        report.notes.append(note)
    if strict:
        report.refuse()
    refuse_single(arrays[chosen.images].shape, chosen.labels is not None, str(path))
    images = to_channels_first(arrays[chosen.images], path)
    white = largest_value(images, path)
    stored = to_names(_of(arrays, chosen.class_names), path)
    labels, stored = _labels(_of(arrays, chosen.labels), stored, class_names, len(images), path)
    labels, names = _match_names(stored, labels, class_names, path, labels_required=labels_required)
    height, width = images.shape[2:]
    if (height, width) != (image_size, image_size) and not resize:
        raise DataError(
            f"{path}: images are {height}x{width} pixels; expected {image_size}x{image_size} "
            "(resize=True scales them as the model's configuration says)"
        )
    if max_images is not None and max_images < len(images):
        sample = sample_order(labels, len(images), max_images, seed)
        images = images[sample]
        labels = None if labels is None else labels[sample]
    images = to_uint8(images, white)
    if images.shape[1] == 1:
        images = np.repeat(images, 3, axis=1)
    if (height, width) != (image_size, image_size):
        images = _resize_all(images, resizing, path)
        report.resizing = resizing
    pixels = torch.from_numpy(np.ascontiguousarray(images))
    report.images = len(pixels)
    report.classes = None if labels is None else len(np.unique(labels))
    known = None if labels is None else torch.from_numpy(labels)
    return ImageSet(pixels, known, names, path.stem, report)


def _labels(
    given: NDArray[Any] | None,
    stored: tuple[str, ...] | None,
    wanted: tuple[str, ...] | None,
    count: int,
    path: Path,
) -> tuple[NDArray[np.int64] | None, tuple[str, ...] | None]:
    """Return labels as indices, and the names of the file's classes, from numbers or from names.

    stored, wanted: The names in the file and those of the caller. count: The number of images.
    """
    if given is None or given.dtype.kind not in "US":
        return to_labels(given, count, path), stored
    texts = to_names(given[:, 0] if given.ndim == 2 and given.shape[1] == 1 else given, path)
    assert texts is not None
    if len(texts) != count:
        raise DataError(f"{path}: {count} images but {len(texts)} labels")
    read = labels_of_texts([text.strip() for text in texts], wanted or stored, str(path))
    missing = sum(label is None for label in read)
    if missing == count:
        return None, stored
    if missing:
        raise DataError(
            f"{path}: {missing} of {count} images have no label (image {read.index(None)}); "
            f"{ALL_OR_NONE}"
        )
    names = [label for label in read if isinstance(label, str)]
    if not names:
        return to_labels(np.asarray(read), count, path), stored
    order = stored if stored is not None and set(names) <= set(stored) else sorted(set(names))
    place = {name: k for k, name in enumerate(order)}
    return np.asarray([place[name] for name in names], dtype=np.int64), tuple(order)


def _of(arrays: dict[str, NDArray[Any]], key: str | None) -> NDArray[Any] | None:
    return None if key is None else arrays[key]


def _read_arrays(path: Path) -> tuple[Chosen, dict[str, NDArray[Any]]]:
    """Return which arrays are images, labels and names, and those; others are not read."""
    try:
        with zipfile.ZipFile(path) as archive:
            chosen = _check_members(archive, path)
        wanted = [k for k in (chosen.images, chosen.labels, chosen.class_names) if k is not None]
        with np.load(path, allow_pickle=False) as file:
            return chosen, {key: file[key] for key in wanted}
    except DataError:
        raise
    except zipfile.BadZipFile as error:
        raise DataError(f"{path}: not a readable .npz file: {error}") from error
    except Exception as error:
        # numpy and zipfile raise OSError, ValueError, EOFError, zlib.error, struct.error,
        # MemoryError, ... on damage.
        raise DataError(f"{path}: cannot be read as .npz: {error}") from error


def _check_members(archive: zipfile.ZipFile, path: Path) -> Chosen:
    keys = [member.filename.removesuffix(".npy") for member in archive.infolist()]
    for key in keys:
        if keys.count(key) > 1:
            raise DataError(f"{path}: array {key!r} is stored twice")
    chosen = choose_arrays(keys, path)
    for member in archive.infolist():
        if member.file_size > BOMB_BYTES and member.file_size > BOMB_RATIO * member.compress_size:
            raise DataError(
                f"{path}: {member.filename} would unpack {member.compress_size:,} bytes "
                f"to {member.file_size:,} "
                "(decompression bomb?)"
            )
        with archive.open(member) as stream:
            version = np.lib.format.read_magic(stream)
            read_header = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read_header(stream)
            # This product uses Python integers, because forged sizes would overflow int64.
            size = dtype.itemsize
            for length in shape:
                size *= length
            if dtype.hasobject:
                raise DataError(
                    f"{path}: {member.filename} holds pickled Python objects, "
                    "which are never loaded"
                )
            if size != member.file_size - stream.tell():
                raise DataError(
                    f"{path}: {member.filename} announces {dtype} {list(shape)}, {size:,} bytes, "
                    f"but {member.file_size - stream.tell():,} are stored"
                )
    return chosen


def _match_names(
    names: tuple[str, ...] | None,
    labels: NDArray[np.int64] | None,
    wanted: tuple[str, ...] | None,
    path: Path,
    *,
    labels_required: bool,
) -> tuple[NDArray[np.int64] | None, tuple[str, ...] | None]:
    """Return labels and class names in the caller's order of classes, or in that of the file."""
    if names is None:
        return labels, wanted
    if wanted is None or labels is None:
        return labels, wanted if wanted is not None else names
    if labels.min() < 0 or labels.max() >= len(names):
        raise DataError(
            f"{path}: labels {labels.min()}..{labels.max()}, but {len(names)} class names"
        )
    if labels_mean_nothing(names, wanted, labels_required=labels_required):
        return None, wanted
    return np.asarray(index_of_names(names, wanted, str(path)), dtype=np.int64)[labels], wanted


def _resize_all(images: NDArray[np.uint8], resizing: Resizing, path: Path) -> NDArray[np.uint8]:
    size = resizing.image_size
    result = np.empty((len(images), 3, size, size), dtype=np.uint8)
    for index, image in enumerate(images):
        picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
        square = resizing(picture, f"{path}, image {index}")
        result[index] = np.asarray(square).transpose(2, 0, 1)
    return result
