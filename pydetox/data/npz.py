"""Reading a NumPy .npz file, treated as hostile: no pickles, sizes checked before reading."""

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
from .labels import index_of_names, labels_mean_nothing
from .resize import Resizing
from .sampling import sample_order

KEYS = ("images", "labels", "class_names")

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
) -> ImageSet:
    """Read `path`; see `pydetox.data.load_images` for arguments, layout of the file and errors."""
    image_size = resizing.image_size
    arrays = _read_arrays(path)
    images = arrays["images"]
    images = _to_channels_first(images, path)
    _check_values(images, path)
    labels = _check_labels(arrays.get("labels"), len(images), path)
    labels, names = _match_names(
        arrays.get("class_names"), labels, class_names, path, labels_required=labels_required
    )
    height, width = images.shape[2:]
    if (height, width) != (image_size, image_size) and not resize:
        raise DataError(
            f"{path}: images are {height}x{width} pixels; expected {image_size}x{image_size} "
            "(resize=True scales them as the model's configuration says)"
        )
    if max_images is not None and max_images < len(images):
        chosen = sample_order(labels, len(images), max_images, seed)
        images = images[chosen]
        labels = None if labels is None else labels[chosen]
    images = _to_uint8(images)
    if images.shape[1] == 1:
        images = np.repeat(images, 3, axis=1)
    if (height, width) != (image_size, image_size):
        images = _resize_all(images, resizing, path)
    pixels = torch.from_numpy(np.ascontiguousarray(images))
    return ImageSet(pixels, None if labels is None else torch.from_numpy(labels), names, path.stem)


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(archive, path)
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except DataError:
        raise
    except zipfile.BadZipFile as error:
        raise DataError(f"{path}: not a readable .npz file: {error}") from error
    except Exception as error:
        # numpy and zipfile raise OSError, ValueError, EOFError, zlib.error, struct.error,
        # MemoryError, ... on damage.
        raise DataError(f"{path}: cannot be read as .npz: {error}") from error


def _check_members(archive: zipfile.ZipFile, path: Path) -> None:
    keys = [member.filename.removesuffix(".npy") for member in archive.infolist()]
    for key in keys:
        if key not in KEYS:
            # A misspelt "labels" would otherwise pass as an unlabelled set.
            raise DataError(
                f"{path}: array {key!r} is not known; "
                f"expected {', '.join(KEYS)} (the last two optional)"
            )
        if keys.count(key) > 1:
            raise DataError(f"{path}: array {key!r} is stored twice")
    if "images" not in keys:
        raise DataError(f"{path}: no array 'images'; found {', '.join(keys) or 'nothing'}")
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
            # A Python product: the sizes in a forged header overflow int64.
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


def _to_channels_first(images: NDArray[Any], path: Path) -> NDArray[Any]:
    """Return a view [N, 3, H, W] of colour images, or [N, 1, H, W] of grey ones."""
    shape = list(images.shape)
    expected = "expected [N, H, W], [N, H, W, 3] or [N, 3, H, W]"
    if images.ndim not in (3, 4):
        raise DataError(f"{path}: images have shape {shape}; {expected}")
    if 0 in shape:
        raise DataError(f"{path}: zero images or pixels, shape {shape}; {expected}")
    if images.ndim == 3:
        return images[:, None]
    first, last = shape[1] == 3, shape[3] == 3
    if first and last:
        raise DataError(f"{path}: images have shape {shape}; where the channels are is ambiguous")
    if not first and not last:
        raise DataError(f"{path}: images have shape {shape}; {expected}")
    return images if first else images.transpose(0, 3, 1, 2)


def _check_values(images: NDArray[Any], path: Path) -> None:
    if images.dtype == np.uint8:
        return
    if images.dtype.kind != "f":
        raise DataError(
            f"{path}: images have dtype {images.dtype}; expected uint8, or float in [0, 1]"
        )
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):  # also catches NaN
        raise DataError(f"{path}: float images have values {low:g} to {high:g}; expected [0, 1]")


def _to_uint8(images: NDArray[Any]) -> NDArray[np.uint8]:
    if images.dtype == np.uint8:
        return images
    result = np.empty(images.shape, dtype=np.uint8)
    for index in range(len(images)):  # image by image: no float64 copy of the whole set
        result[index] = np.rint(images[index].astype(np.float64) * 255)
    return result


def _check_labels(labels: NDArray[Any] | None, count: int, path: Path) -> NDArray[np.int64] | None:
    if labels is None:
        return None
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(
            f"{path}: labels are {labels.dtype} {list(labels.shape)}; expected integers [N]"
        )
    if len(labels) != count:
        raise DataError(f"{path}: {count} images but {len(labels)} labels")
    if int(labels.max()) > np.iinfo(np.int64).max:
        raise DataError(f"{path}: label {labels.max()}; expected class indices")
    return labels.astype(np.int64)


def _match_names(
    stored: NDArray[Any] | None,
    labels: NDArray[np.int64] | None,
    wanted: tuple[str, ...] | None,
    path: Path,
    *,
    labels_required: bool,
) -> tuple[NDArray[np.int64] | None, tuple[str, ...] | None]:
    """Return labels and class names in the caller's order of classes, or else in the file's."""
    if stored is None:
        return labels, wanted
    if stored.ndim != 1 or stored.dtype.kind != "U":
        raise DataError(
            f"{path}: class_names are {stored.dtype} {list(stored.shape)}; expected text [C]"
        )
    names = tuple(str(name) for name in stored)
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
