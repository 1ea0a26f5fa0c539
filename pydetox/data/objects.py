"""Image sets from objects of Python: arrays, lists of pictures, and data sets of libraries.

Nothing here imports those libraries. A data set is whatever has a length and gives rows by their
index, as torch's `Dataset` and the `datasets.Dataset` of Hugging Face do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor, bfloat16

from ..errors import DataError
from .image_set import ImageSet
from .npz_arrays import refuse_single, to_labels
from .rows import Rows, white_of

#: The names that rows of a mapping give pictures and labels, the likeliest first.
IMAGE_KEYS = ("image", "img", "images", "jpg", "jpeg", "png", "webp", "picture", "x")
LABEL_KEYS = ("label", "labels", "class", "cls", "target", "fine_label", "category", "y")


class IndexedRows(Protocol):
    """What has a length and gives rows by their index."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def __getitem__(self, index: Any, /) -> Any:
        """Return a row: a picture, a pair of picture and label, or a mapping of both."""
        ...


#: Everything that `load_images` reads.
ImageData: TypeAlias = "str | Path | ImageSet | IndexedRows"


def rows_of(data: Any) -> Rows:
    """Return the rows of an object; see `load_images` for the kinds of objects.

    Raises DataError, which says what is expected, for an object that is none of them.
    """
    data = _without_loader(data)
    if isinstance(data, Mapping):
        return _of_mapping(data)
    if isinstance(data, np.ndarray | Tensor):
        return _of_array(data, None)
    pair = isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], np.ndarray | Tensor)
    if pair and data[0].ndim in (3, 4) and not isinstance(data[1], Image.Image):
        return _of_array(data[0], data[1])
    if isinstance(data, tuple) and len(data) == 2 and _is_list_with_labels(*data):
        return _with_labels(_of_data_set(data[0]), data[1])
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        hint = ""
        if hasattr(data, "__iter__"):
            hint = "; make a list of some hundred rows of it, such as list(itertools.islice(it, N))"
        raise DataError(
            f"images are a {type(data).__name__}; expected a folder or file, an ImageSet, an array "
            f"[N, H, W, 3], a list of Pillow's images, or a data set with a length{hint}"
        )
    return _of_data_set(data)


def _without_loader(data: Any) -> Any:
    """Return the data set of a torch DataLoader, whose order and batches mean nothing here."""
    if hasattr(data, "batch_size") and hasattr(data, "dataset") and hasattr(data, "collate_fn"):
        return data.dataset
    return data


def _of_mapping(data: Mapping[Any, Any]) -> Rows:
    """Return the rows of arrays by name; a mapping of parts of a data set is refused."""
    images = next((key for key in IMAGE_KEYS if key in data), None)
    if images is None:
        names = ", ".join(map(repr, list(data)[:5]))
        raise DataError(
            f"images are a mapping of {names or 'nothing'}; expected one part of a data set, such "
            "as data['test'], or arrays under 'images' and 'labels'"
        )
    labels = next((key for key in LABEL_KEYS if key in data), None)
    given = None if labels is None else data[labels]
    if isinstance(data[images], np.ndarray | Tensor):
        return _of_array(data[images], given)
    rows = _of_data_set(data[images])
    return rows if given is None else _with_labels(rows, given)


def _is_list_with_labels(pictures: Any, labels: Any) -> bool:
    """Return whether a pair is a list of pictures and one of their labels, not two rows."""
    if not isinstance(pictures, list | tuple) or not isinstance(
        labels, list | tuple | np.ndarray | Tensor
    ):
        return False
    if isinstance(labels, np.ndarray | Tensor):
        return labels.ndim == 1
    if len(pictures) == 2 and isinstance(pictures[1], int | str | np.generic):
        return False  # rows as lists: [picture, label]
    return all(one is None or isinstance(one, int | str | np.generic) for one in labels)


def _with_labels(rows: Rows, labels: Any) -> Rows:
    """Return rows with labels that stand beside them, one for each."""
    if not hasattr(labels, "__len__") or len(labels) != rows.count:
        count = len(labels) if hasattr(labels, "__len__") else repr(labels)[:40]
        raise DataError(
            f"{rows.name}: {rows.count} images, but labels: {count}; expected one for each"
        )
    given = list(labels)
    fetch = rows.fetch
    rows.fetch = lambda index: (fetch(index)[0], given[index])
    rows.labels = given
    return rows


def _of_array(images: Any, labels: Any) -> Rows:
    name = "array" if isinstance(images, np.ndarray) else "tensor"
    if images.ndim not in (3, 4):
        raise DataError(
            f"images are an {name} of shape {list(images.shape)}; expected [N, H, W, 3], "
            "[N, 3, H, W] or [N, H, W]"
        )
    if labels is not None and not hasattr(labels, "__len__"):
        raise DataError(f"{name}: labels are {labels!r:.40}; expected one for each image")
    refuse_single(images.shape, labels is not None, name)
    if isinstance(images, Tensor):
        images = images.detach().cpu()
        images = images.float() if images.dtype == bfloat16 else images
    if isinstance(labels, np.ndarray | Tensor):
        given = labels if isinstance(labels, np.ndarray) else labels.detach().cpu().numpy()
        labels = given if given.dtype.kind in "USO" else to_labels(given, len(images), Path(name))
    if labels is not None and len(labels) != len(images):
        raise DataError(f"{name}: {len(images)} images, but {len(labels)} labels")
    return Rows(
        name,
        len(images),
        lambda index: (images[index], None if labels is None else labels[index]),
        labels,
        call="image {}".format,
        white=white_of(np.asarray(images), name),
    )


def _of_data_set(data: Any) -> Rows:
    """Return the rows of a list or of a data set with a length."""
    is_plain = isinstance(data, list | tuple)
    name = "list of images" if is_plain else type(data).__name__
    columns = getattr(data, "column_names", None)
    label_key = _label_column(data, columns)
    image_key = None
    if isinstance(columns, list) and not is_plain:
        image_key = next((key for key in _image_columns(data, columns) if key in columns), None)
        if image_key is None:
            raise DataError(
                f"{name}: its columns are {', '.join(columns)}; expected one of "
                f"{', '.join(IMAGE_KEYS)} with the images"
            )

    def fetch(index: int) -> tuple[Any, Any]:
        what = f"{name}, row {index}"
        try:
            row = data[index]
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            # What Pillow raises in a data set that decodes damaged files itself.
            raise DataError(f"{what}: cannot be read as an image: {error}") from error
        return _picture_and_label(row, what, image_key, label_key)

    labels: Sequence[Any] | None = None
    if label_key is not None:
        try:
            labels = list(data[label_key])
        except KeyError:
            labels = None  # its transform wants whole rows, which tell their labels
    elif not is_plain:
        labels = _targets(data)
    return Rows(name, len(data), fetch, labels, _names(data, label_key))


def _image_columns(data: Any, columns: Sequence[str]) -> list[str]:
    """Return columns that hold images: those whose type says so, then those called so."""
    features = getattr(data, "features", None) or {}
    typed = [key for key in columns if type(features.get(key)).__name__ == "Image"]
    return [*typed, *IMAGE_KEYS]


def _label_column(data: Any, columns: Any) -> str | None:
    if not isinstance(columns, list):
        return None
    features = getattr(data, "features", None) or {}
    typed = [key for key in columns if type(features.get(key)).__name__ == "ClassLabel"]
    called = [key for key in LABEL_KEYS if key in columns]
    both = [key for key in called if key in typed]
    return next(iter([*both, *typed, *called]), None)


def _picture_and_label(
    row: Any, what: str, image_key: str | None, label_key: str | None
) -> tuple[Any, Any]:
    if isinstance(row, Mapping):
        key = image_key or next((k for k in IMAGE_KEYS if k in row), None)
        if key is None:
            raise DataError(
                f"{what}: has {', '.join(map(str, row))}; expected an image under one of "
                f"{', '.join(IMAGE_KEYS)}"
            )
        label_key = label_key or next((k for k in LABEL_KEYS if k in row), None)
        missing = [k for k in (key, label_key) if k is not None and k not in row]
        if missing:
            raise DataError(
                f"{what}: has {', '.join(map(str, row))}, and not {missing[0]!r}, which is one of "
                "its columns; give the data set without its transform: data.with_format(None)"
            )
        picture = row[key]
        if isinstance(picture, Mapping):  # of `datasets`, where images are not decoded
            picture = picture.get("bytes") or picture.get("path")
        return picture, None if label_key is None else row[label_key]
    if isinstance(row, tuple | list) and row:
        return row[0], row[1] if len(row) > 1 else None
    return row, None


def _targets(data: Any) -> Sequence[Any] | None:
    """Return the labels that a data set of torchvision, or a part of one, has as an attribute."""
    indices = getattr(data, "indices", None)
    if indices is not None and hasattr(data, "dataset"):
        whole = _targets(data.dataset)
        return None if whole is None else [whole[int(index)] for index in indices]
    if getattr(data, "target_transform", None) is not None:
        return None  # which may make other labels of them
    for key in ("targets", "labels", "_labels"):
        found = getattr(data, key, None)
        if isinstance(found, list | tuple | np.ndarray | Tensor) and len(found) == len(data):
            return list(found)
    return None


def _names(data: Any, label_key: str | None) -> tuple[str, ...] | None:
    features = getattr(data, "features", None)
    if label_key is not None and isinstance(features, Mapping):
        names = getattr(features.get(label_key), "names", None)
        if names:
            return tuple(map(str, names))
    found = getattr(data, "classes", None)
    if isinstance(found, list | tuple) and found:
        # torchvision's ImageNet has all synonyms of a class; the first is its name.
        return tuple(str(one[0] if isinstance(one, tuple | list) else one) for one in found)
    inner = getattr(data, "dataset", None)
    return None if inner is None or inner is data else _names(inner, None)
