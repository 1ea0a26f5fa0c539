"""`Rows`: pictures that are fetched one by one, from whatever holds them, and made an image set.

Tables, archives and objects of Python differ in how a picture and its label are found. Everything
after that is the same, and stands here: the sample, the classes, decoding, and what is left out.
"""

from __future__ import annotations

import io
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..errors import DataError
from ..progress import track
from .image_set import ImageSet
from .labels import ALL_OR_NONE, index_of_names, labels_mean_nothing
from .npz_arrays import largest_value, refuse_normalised, to_channels_first, to_uint8
from .report import ImageReport
from .resize import MAX_PIXELS, Resizing, refuse_too_large
from .sampling import sample_order

#: A class by its index or its name; None for a picture without a label.
Label: TypeAlias = int | str | None

#: Encoded pictures of more bytes than this are not decoded: no photograph has as many.
MAX_PICTURE_BYTES = 256 << 20


@dataclass
class Rows:
    """N pictures, and what is known of their labels before any of them is decoded.

    Attributes:
        name: The name of the source, for messages.
        count: N.
        fetch: Returns the picture of a row, and its label. A picture is one of Pillow's images, an
            array or tensor, the encoded bytes, or the path of a file. DataError leaves the row out.
        labels: The labels of all rows; None if only `fetch` tells them. The sample is drawn by
            them, and they count where `fetch` gives no label.
        class_names: The name of each integer label; None if the source has none.
        call: Returns the name of a row, for messages.
        report: The counts of what the source itself leaves out.
        prefetch: Reads some rows ahead, in the order that suits the source; None if all suit it.
        white: What stands for white in all pictures that are arrays of floats, 1 or 255; None if
            their values tell.
    """

    name: str
    count: int
    fetch: Callable[[int], tuple[Any, Any]]
    labels: Sequence[Any] | None = None
    class_names: tuple[str, ...] | None = None
    call: Callable[[int], str] = field(default="row {}".format)
    report: ImageReport | None = None
    prefetch: Callable[[Sequence[int]], None] | None = None
    white: int | None = None


def read_rows(
    rows: Rows,
    *,
    resizing: Resizing,
    max_images: int | None,
    seed: int,
    class_names: tuple[str, ...] | None,
    labels_required: bool,
    strict: bool,
) -> ImageSet:
    """Return the pictures as an image set; see `load_images` for arguments and errors.

    If the labels are known beforehand, the sample holds the classes in proportion. Otherwise it is
    a random sample of all rows. Rows are in the order of the source, or in that of the sample.
    """
    if rows.count == 0:
        raise DataError(f"{rows.name}: zero images; expected at least one")
    report = rows.report or ImageReport(rows.name)
    if strict:
        report.refuse()
    known: list[Label] | None = None
    unusable: DataError | None = None
    if rows.labels is not None:
        try:
            known = [_plain_label(one, rows.name) for one in rows.labels]
        except DataError as error:  # an attribute of another meaning, if the rows have labels
            unusable = error
    order: Sequence[int] = range(rows.count)
    if max_images is not None and max_images < rows.count:
        order = sample_order(_numbered(known), rows.count, max_images, seed).tolist()
        if rows.prefetch is not None:
            rows.prefetch(order)
    size = resizing.image_size
    pixels = torch.empty((len(order), 3, size, size), dtype=torch.uint8)
    labels: list[Label] = []
    good, first_error = list[int](), None
    whites = _Whites(rows.name)
    with warnings.catch_warnings():
        # Pillow's, about transparency in palettes and sizes that are checked here.
        warnings.filterwarnings("ignore", module="PIL")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for place, index in enumerate(track(order, "Decoding images")):
            try:
                picture, label = rows.fetch(index)
                what = f"{rows.name}, {rows.call(index)}"
                pixels[place] = decode_picture(picture, resizing, what, rows.white)
            except DataError as error:
                if strict:
                    raise
                first_error = first_error or error
                report.leave_out("cannot be read", rows.call(index))
                continue
            labels.append(_plain_label(label, rows.name))
            good.append(place)
            if rows.white is None:
                whites.note(picture, place, rows.call(index))
        for place, dark in whites.dark_ones():
            pixels[place] = decode_picture(dark, resizing, rows.name)
    if not good:
        raise DataError(f"{rows.name}: none of {len(order)} images can be read: {first_error}")
    if all(label is None for label in labels):
        if unusable is not None:
            raise unusable
        labels = labels if known is None else [known[order[place]] for place in good]
    elif known is not None:
        other = next((k for k, x in zip(good, labels, strict=True) if known[order[k]] != x), None)
        if other is not None:
            index = order[other]
            report.notes.append(
                f"labels are those of the rows, not those of an attribute beside them "
                f"({rows.call(index)}: {labels[good.index(other)]!r}, not {known[index]!r})"
            )
            known = None
    found, names = _classes(
        labels,
        known,
        rows.class_names,
        class_names,
        rows.name,
        labels_required=labels_required,
        call=lambda k: rows.call(order[good[k]]),
    )
    report.images, report.resizing = len(good), resizing
    report.classes = None if found is None else len(np.unique(found))
    return ImageSet(
        pixels if len(good) == len(order) else pixels[good],
        None if found is None else torch.from_numpy(found),
        names,
        Path(rows.name).stem or rows.name,
        report,
    )


class _Whites:
    """Finds what stands for white in arrays of floats that come one by one.

    An array whose values are 0 and 1 alone is black and white, or so dark that its values do not
    tell: the other pictures of the set do, as in an array of them all.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._dark: list[tuple[int, NDArray[np.uint8]]] = []
        self._bright: str | None = None
        self._unit: str | None = None

    def note(self, picture: Any, place: int, called: str) -> None:
        """Note a picture that has been decoded."""
        if not isinstance(picture, np.ndarray | Tensor):
            return
        array = _numbers(picture)
        if array.dtype.kind != "f":
            return
        if float(array.max()) > 1:
            self._bright = self._bright or called
        elif bool((array == np.rint(array)).all()):
            small = array.astype(np.uint8)
            # A tensor stays one: it says where the channels are if the shape does not.
            dark: Any = torch.from_numpy(small) if isinstance(picture, Tensor) else small
            self._dark.append((place, dark))
        else:
            self._unit = self._unit or called

    def dark_ones(self) -> list[tuple[int, Any]]:
        """Return place and picture, uint8, of those to decode anew: 1 was taken for white.

        Raises DataError for pictures of both scales.
        """
        if self._bright is None:
            return []
        if self._unit is not None:
            raise DataError(
                f"{self._name}: {self._bright} has floats up to 255, and {self._unit} floats in "
                "[0, 1]; expected one scale for all pictures: save them as uint8"
            )
        return list(self._dark)


def white_of(images: NDArray[Any], name: str) -> int | None:
    """Return what stands for white in all of an array of images, 1 or 255; None for no floats.

    Raises DataError for values that look normalised, or are neither in [0, 1] nor whole.
    """
    if images.dtype.kind != "f" or images.size == 0:
        return None
    if images.ndim == 4 and images.shape[3] == 4:  # alpha is dropped, whatever its scale is
        images = images[..., :3]
    elif images.ndim == 4 and images.shape[1] == 4:
        images = images[:, :3]
    refuse_normalised(images, name)
    return largest_value(images, Path(name))


def _numbers(picture: NDArray[Any] | Tensor) -> NDArray[Any]:
    """Return a tensor as an array; an array as it is."""
    if isinstance(picture, np.ndarray):
        return picture
    held = picture.detach().cpu()
    array: NDArray[Any] = (held.float() if held.dtype == torch.bfloat16 else held).numpy()
    return array


def decode_picture(picture: Any, resizing: Resizing, what: str, white: int | None = None) -> Tensor:
    """Return a picture as uint8 [3, image_size, image_size].

    picture: As in `Rows.fetch`. Arrays and tensors are [H, W], [H, W, C] or [C, H, W] with 1, 3 or
    4 channels, of uint8, whole numbers in 0..255, or floats in [0, 1]; those that have the size
    already stay as they are, as in a .npz file. what: The name of the picture in messages. white:
    What stands for white in an array of floats, 1 or 255; None if its values tell. Raises DataError
    for what is none of these, cannot be decoded, or has more than MAX_PIXELS pixels.
    """
    try:
        if isinstance(picture, Image.Image):
            return _scaled(picture, resizing, what)
        if isinstance(picture, bytes):
            if len(picture) > MAX_PICTURE_BYTES:
                raise DataError(
                    f"{what}: {len(picture):,} bytes; expected at most {MAX_PICTURE_BYTES:,}"
                )
            with Image.open(io.BytesIO(picture)) as image:
                return _scaled(image, resizing, what)
        if isinstance(picture, str | Path):
            with Image.open(picture) as image:
                return _scaled(image, resizing, what)
        if isinstance(picture, np.ndarray | Tensor):
            image = _from_array(picture, what, white)
            if image.size == (resizing.image_size,) * 2:
                return _pixels(image)  # ready, as arrays of that size in a .npz file
            return _scaled(image, resizing, what)
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"{what}: more pixels than the {MAX_PIXELS:,} that are read (decompression bomb?)"
        ) from error
    except Exception as error:
        # Pillow's decoders raise many kinds of errors for damaged files (OSError, SyntaxError,
        # ValueError, struct.error, zlib.error, ...). Here, all of them mean a damaged picture.
        raise DataError(f"{what}: cannot be read as an image: {error}") from error
    raise DataError(
        f"{what}: a {type(picture).__name__}; expected one of Pillow's images, an array or a tensor"
    )


def _scaled(image: Image.Image, resizing: Resizing, what: str) -> Tensor:
    refuse_too_large(*image.size, what)
    return _pixels(resizing(image, what))


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(np.asarray(image.convert("RGB")).transpose(2, 0, 1)))


def _from_array(picture: NDArray[Any] | Tensor, what: str, white: int | None) -> Image.Image:
    array = _numbers(picture)
    if array.ndim not in (2, 3):
        many = "; for all images and their labels, give a tuple of both" if array.ndim == 4 else ""
        raise DataError(f"{what}: an array of shape {list(array.shape)}; expected [H, W, 3]{many}")
    where = Path(what)
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] in (1, 3, 4):
        array = array.transpose(1, 2, 0) if isinstance(picture, Tensor) else array
        channels = array[None].transpose(0, 3, 1, 2)[:, :3]
    else:
        channels = to_channels_first(array[None], where)
    refuse_normalised(channels, what)
    told = largest_value(channels, where)
    white = white if white is not None and channels.dtype.kind == "f" else told
    pixels = to_uint8(channels, white)[0].transpose(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))


def _plain_label(label: Any, name: str) -> Label:
    """Return a label as an int, a text or None; DataError for anything else."""
    if isinstance(label, Tensor):
        label = label.detach().cpu().numpy()
    if isinstance(label, np.ndarray | np.generic) and label.size == 1:
        label = label.item()
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if (isinstance(label, str) and label == "") or (isinstance(label, float) and label != label):
        return None  # how tables write that there is none
    if isinstance(label, bool) or not (label is None or isinstance(label, int | str)):
        raise DataError(
            f"{name}: a label is {label!r:.60}; expected the index or the name of one class"
        )
    return unicodedata.normalize("NFC", label) if isinstance(label, str) else label


def _numbered(labels: Sequence[Label] | None) -> NDArray[np.int64] | None:
    """Return labels as numbers, to draw a sample by; None if some are missing."""
    if labels is None or any(label is None for label in labels):
        return None
    place = {label: k for k, label in enumerate(sorted(set(labels), key=str))}
    return np.asarray([place[label] for label in labels], dtype=np.int64)


def _classes(
    labels: Sequence[Label],
    all_labels: Sequence[Label] | None,
    own: tuple[str, ...] | None,
    wanted: tuple[str, ...] | None,
    source: str,
    *,
    labels_required: bool,
    call: Callable[[int], str],
) -> tuple[NDArray[np.int64] | None, tuple[str, ...] | None]:
    """Return labels as indices, and the class names they are of.

    Names are matched by name. Numbers count classes from 0, in the order of the caller's names, or
    of the source's. If both have names, they are matched by name where every name of the source is
    among the caller's; lists of equal length count one by one, because then the caller says what
    the source's names mean. call: Returns the name of the row of a label, for messages.
    """
    if all(label == -1 for label in labels):  # Hugging Face's mark of a part without labels
        return None, wanted or own
    if any(label is None for label in labels):
        if not all(label is None for label in labels):
            missing = sum(label is None for label in labels)
            raise DataError(
                f"{source}: {missing} of {len(labels)} images have no label "
                f"({call(list(labels).index(None))}); {ALL_OR_NONE}"
            )
        return None, wanted or own
    if all(isinstance(label, str) for label in labels):
        found = tuple(sorted({str(label) for label in (all_labels or labels)}))
        if labels_mean_nothing(found, wanted, labels_required=labels_required):
            return None, wanted
        order = own if wanted is None and own is not None and set(found) <= set(own) else found
        index = dict(zip(order, index_of_names(order, wanted, source), strict=True))
        return np.asarray([index[str(x)] for x in labels], dtype=np.int64), wanted or order
    if any(isinstance(label, str) for label in labels):
        raise DataError(f"{source}: some labels are numbers and some are names")
    numbers = np.asarray(labels, dtype=np.int64)
    if own is None or wanted is None or own == wanted:
        return numbers, wanted or own
    if set(own) <= set(wanted):
        if numbers.min() < 0 or numbers.max() >= len(own):
            raise DataError(
                f"{source}: labels {numbers.min()}..{numbers.max()}, but {len(own)} class names"
            )
        return np.asarray(index_of_names(own, wanted, source), dtype=np.int64)[numbers], wanted
    if len(own) == len(wanted):
        moved = [name for k, name in enumerate(own) if name in wanted and wanted[k] != name]
        if not moved:
            return numbers, wanted
    index_of_names(own, wanted, source)  # raises: a name is not there
    raise AssertionError  # pragma: no cover - the line above has raised
