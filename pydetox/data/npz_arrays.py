"""Which arrays of a .npz file are images, labels and names, as people's tools write them.

Keras writes `x_train`, `y_test` and so on, medmnist `test_images` and `test_labels`; labels come as
a column or one-hot, whole floats or integers, names as bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError

KEYS = ("images", "labels", "class_names")
_IMAGES = ("images", "image", "x", "X", "data")
_LABELS = ("labels", "label", "y", "Y", "targets", "fine_labels")
_NAMES = ("class_names", "classes", "label_names", "names")
#: Of a file that holds several parts of a data set, the one that models were trained on comes last.
_PARTS = ("test", "val", "valid", "validation", "train")


@dataclass(frozen=True)
class Chosen:
    """The names of the arrays that are read. None for what the file does not hold.

    others: of the arrays that are not.
    """

    images: str
    labels: str | None
    class_names: str | None
    others: tuple[str, ...]

    def note(self) -> str | None:
        """Return what is to be said about it."""
        parts = []
        if self.images != KEYS[0]:
            labels = "" if self.labels is None else f" and {self.labels!r}"
            parts.append(f"its arrays {self.images!r}{labels} are read")
        if self.others:
            parts.append("not read: " + ", ".join(map(repr, self.others)))
        return "; ".join(parts) or None


def choose_arrays(keys: Sequence[str], path: Path) -> Chosen:
    """Return which arrays are read; DataError where none is called as images are."""
    for part in ("", *_PARTS):
        images = _first(keys, _IMAGES, part)
        if images is not None:
            labels, names = _first(keys, _LABELS, part), _first(keys, _NAMES, "")
            taken = {images, labels, names}
            others = tuple(key for key in keys if key not in taken)
            return Chosen(images, labels, names, others)
    raise DataError(f"{path}: no array {KEYS[0]!r}; found {', '.join(map(str, keys)) or 'nothing'}")


def _first(keys: Sequence[str], stems: Sequence[str], part: str) -> str | None:
    forms = [f"{part}_{s}" for s in stems] + [f"{s}_{part}" for s in stems] if part else stems
    return next((form for form in forms if form in keys), None)


def to_channels_first(images: NDArray[Any], path: Path) -> NDArray[Any]:
    """Return a view [N, 3, H, W] of colour images (alpha is dropped), or [N, 1, H, W] of grey ones.

    Raises DataError for another shape.
    """
    shape = list(images.shape)
    expected = "expected [N, H, W], [N, H, W, 3] or [N, 3, H, W] (or 1 or 4 channels)"
    if images.ndim not in (3, 4):
        raise DataError(f"{path}: images have shape {shape}; {expected}")
    if 0 in shape:
        raise DataError(f"{path}: zero images or pixels, shape {shape}; {expected}")
    if images.ndim == 3:
        return images[:, None]
    for channels in (3, 1, 4):
        first, last = shape[1] == channels, shape[3] == channels
        if first and last:
            raise DataError(
                f"{path}: images have shape {shape}; where the channels are is ambiguous"
            )
        if first or last:
            found = images if first else images.transpose(0, 3, 1, 2)
            return found[:, :3]
    raise DataError(f"{path}: images have shape {shape}; {expected}")


def largest_value(images: NDArray[Any], path: Path) -> int:
    """Return 255 or 1: what stands for white in images of any dtype.

    Integers, and floats that are whole and above 1, are in 0..255; other floats are in [0, 1].
    Raises DataError for values that are neither.
    """
    if images.dtype == np.uint8:
        return 255
    if images.dtype.kind not in "iuf":
        raise DataError(
            f"{path}: images have dtype {images.dtype}; expected whole numbers in 0..255, or float "
            "in [0, 1]"
        )
    low, high = float(images.min()), float(images.max())
    if images.dtype.kind == "f" and low >= 0 and high <= 1:
        return 1
    whole = images.dtype.kind != "f" or all(bool((one == np.rint(one)).all()) for one in images)
    if low >= 0 and high <= 255 and whole:  # NaN is in no range
        return 255
    raise DataError(
        f"{path}: images have values {low:g} to {high:g}; expected 0..255, whole, or [0, 1]"
    )


def refuse_normalised(images: NDArray[Any], what: str) -> None:
    """Raise DataError for floats below 0 or above 255. what: The name of the images."""
    if images.dtype.kind == "f" and (images.min() < 0 or images.max() > 255):
        raise DataError(
            f"{what}: values from {images.min():.3g} to {images.max():.3g}, as if they were "
            "normalised; give images as they are before that, uint8 or floats in [0, 1]"
        )


def refuse_single(shape: Sequence[int], labelled: bool, what: str) -> None:
    """Raise DataError for a shape [A, B, C] that may be one colour picture as well as grey ones.

    labelled: Whether each of A pictures has a label, so that the first axis is that of the images.
    what: The name of the images.
    """
    if len(shape) == 3 and (shape[2] in (3, 4) or (shape[0] in (3, 4) and not labelled)):
        raise DataError(
            f"{what}: images have shape {list(shape)}, one colour picture or {shape[0]} grey ones; "
            "expected an axis more: images[None] for one picture, images[..., None] for grey ones"
        )


def to_uint8(images: NDArray[Any], white: int) -> NDArray[np.uint8]:
    """Return images as uint8, rounded. white: of `largest_value`."""
    if images.dtype == np.uint8:
        return images
    result = np.empty(images.shape, dtype=np.uint8)
    for index in range(len(images)):  # image by image: no float64 copy of the whole set
        result[index] = np.rint(images[index].astype(np.float64) * (255 / white))
    return result


def to_labels(labels: NDArray[Any] | None, count: int, path: Path) -> NDArray[np.int64] | None:
    """Return labels as int64 [N]: from integers or whole floats, a column, or one-hot rows.

    Raises DataError for anything else.
    """
    if labels is None:
        return None
    given = f"labels are {labels.dtype} {list(labels.shape)}"
    if labels.dtype.kind not in "iuf" or labels.ndim not in (1, 2):
        raise DataError(f"{path}: {given}; expected integers [N], [N, 1] or one-hot [N, C]")
    if len(labels) != count:
        raise DataError(f"{path}: {count} images but {len(labels)} labels")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    elif labels.ndim == 2:
        if not (np.isin(labels, (0, 1)).all() and (labels.sum(axis=1) == 1).all()):
            raise DataError(f"{path}: {given}; expected a single 1 in each row, and 0 beside it")
        labels = labels.argmax(axis=1)
    if labels.dtype.kind == "f" and not (np.isfinite(labels) & (labels == np.rint(labels))).all():
        raise DataError(f"{path}: {given} that are not whole; expected integers [N]")
    if float(labels.max()) > np.iinfo(np.int64).max:
        raise DataError(f"{path}: label {labels.max()}; expected class indices")
    result: NDArray[np.int64] = labels.astype(np.int64)
    return result


def to_names(stored: NDArray[Any] | None, path: Path) -> tuple[str, ...] | None:
    """Return class names from text or bytes [C]; DataError for anything else."""
    if stored is None:
        return None
    if stored.ndim != 1 or stored.dtype.kind not in "US":
        raise DataError(
            f"{path}: class_names are {stored.dtype} {list(stored.shape)}; expected text [C]"
        )
    try:
        return tuple(x.decode("utf-8") if isinstance(x, bytes) else str(x) for x in stored)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: class_names are bytes that are not UTF-8") from error
