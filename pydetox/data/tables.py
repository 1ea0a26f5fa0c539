"""Tables of images: CSV files with paths and classes, and the parquet files of Hugging Face."""

from __future__ import annotations

import csv
import json
from bisect import bisect_right
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import DataError
from .labels import labels_of_texts
from .lines import lines_of
from .objects import IMAGE_KEYS, LABEL_KEYS
from .parts import refuse_parts
from .report import ImageReport
from .rows import Rows

TABLE_SUFFIXES = (".csv", ".tsv")
PARQUET_SUFFIX = ".parquet"

# The likeliest names first; open_clip's training tables have `filepath` and `title`.
_PATHS = ("filepath", "path", "file_path", "image_path", "filename", "file_name", "file", "image")
_CLASSES = (*LABEL_KEYS, "class_name", "classname", "label_name")
_CAPTIONS = ("title", "caption", "text")
_SPLITS = ("split", "subset", "partition", "set")
_SEPARATORS = "\t,;|"
_MOST_ROWS = 50_000_000


def rows_of_table(path: Path, class_names: Sequence[str] | None) -> Rows:
    """Return the rows of a CSV file: one picture each, by path, with its class if there is one.

    The first line names the columns. Paths are relative to the folder of the table or, if the file
    is not there, to the current folder, as open_clip takes them. Captions count as classes if they
    are among the caller's class names, or if few of them differ.

    class_names: The caller's names; None if there are none.
    Raises DataError for a file that is no such table.
    """
    lines = _read_lines(path)
    header = lines[0] if lines else ""
    separator = max(_SEPARATORS, key=lambda one: (header.count(one), -_SEPARATORS.index(one)))
    try:
        # With their ends, which belong to a name that has several lines.
        ended = [f"{line}\n" for line in lines]
        table = list(csv.reader(ended, delimiter=separator, skipinitialspace=True))
    except csv.Error as error:
        raise DataError(f"{path}: cannot be read as a table: {error}") from None
    columns = [name.strip().lower() for name in table[0]] if table else []
    where = next((name for name in _PATHS if name in columns), None)
    if where is None:
        raise DataError(
            f"{path}: its first line names the columns {', '.join(map(repr, columns[:8]))}; "
            f"expected one with the paths of images, such as {', '.join(_PATHS[:3])}"
        )
    place = columns.index(where)
    body = [row for row in table[1:] if row]
    short = next((k for k, row in enumerate(body, start=2) if len(row) != len(columns)), None)
    if short is not None:
        raise DataError(
            f"{path}, row {short}: {len(body[short - 2])} columns; expected {len(columns)}"
        )
    for name in (name for name in _SPLITS if name in columns):
        refuse_parts([row[columns.index(name)].strip() for row in body], f"{path}, column {name!r}")
    report = ImageReport(str(path))
    labels = _table_labels(columns, body, class_names, report)
    files = [row[place].strip() for row in body]

    def fetch(index: int) -> tuple[Path, Any]:
        found = _find_file(path.parent, files[index])
        if found is None:
            raise DataError(f"{path}: {files[index]}: no such file")
        return found, None if labels is None else labels[index]

    return Rows(str(path), len(files), fetch, labels, call=lambda k: files[k], report=report)


def files_of_table(path: Path) -> list[Path]:
    """Return the files that a table names and that exist, in the order of its rows."""
    rows = rows_of_table(path, None)
    found = (_find_file(path.parent, rows.call(index)) for index in range(rows.count))
    return [one for one in found if one is not None]


def _read_lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a table: {error}") from error
    if "\0" in text:
        raise DataError(f"{path}: cannot be read as a table: it holds null characters")
    return lines_of(text)


def _table_labels(
    columns: Sequence[str],
    body: Sequence[Sequence[str]],
    class_names: Sequence[str] | None,
    report: ImageReport,
) -> list[Any] | None:
    """Return the class of each row, by name or number, None for none; None if there are none."""
    column = next((name for name in _CLASSES if name in columns), None)
    caption = next((name for name in _CAPTIONS if name in columns), None)
    if column is None and caption is None:
        return None
    place = columns.index(column or str(caption))
    values = [row[place].strip() for row in body]
    if column is None:
        known = class_names is not None and set(values) <= set(class_names)
        if not known and 2 * len(set(values)) > len(values):
            report.notes.append(
                f"its column {caption!r} has {len(set(values))} captions for {len(values)} images, "
                "and none of them counts as a class"
            )
            return None
    return labels_of_texts(values, class_names, report.name)


def _find_file(folder: Path, name: str) -> Path | None:
    for candidate in (folder / name, Path(name)):
        try:
            if candidate.is_file():
                return candidate
        except (OSError, ValueError):  # a name that no file can have
            continue
    return None


def rows_of_parquet(paths: Sequence[Path]) -> Rows:
    """Return the rows of parquet files, as the datasets library writes them.

    A column holds encoded images, as bytes or as `{"bytes": ..., "path": ...}`. Another may hold
    labels, whose names are in the metadata of the file. Only needed columns are read.

    Raises DataError without pyarrow, and for files that hold no images.
    """
    try:
        parquet: Any = import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError(
            f"{paths[0]}: pyarrow, which reads parquet files, is not installed; run: "
            'pip install "pydetox[parquet]"'
        ) from error
    try:
        files = [parquet.ParquetFile(path) for path in paths]
    except Exception as error:  # pyarrow has errors of its own
        raise DataError(f"{paths[0]}: cannot be read as parquet: {error}") from error
    schema = files[0].schema_arrow
    features = _features(schema.metadata or {})
    columns = list(schema.names)
    typed = [n for n in columns if features.get(n, {}).get("_type") == "Image"]
    image = next((n for n in [*typed, *IMAGE_KEYS] if n in columns), None)
    if image is None:
        raise DataError(
            f"{paths[0]}: its columns are {', '.join(columns[:8])}; expected one with images, such "
            "as 'image'"
        )
    named = [n for n in columns if features.get(n, {}).get("_type") == "ClassLabel"]
    label = next((n for n in [*named, *LABEL_KEYS] if n in columns), None)
    for path, file in zip(paths, files, strict=True):
        other = file.schema_arrow
        lacking = [n for n in (image, label) if n is not None and n not in other.names]
        if lacking:
            raise DataError(
                f"{path}: has no column {lacking[0]!r}, and {paths[0]} has one; expected files of "
                "one data set"
            )
        if label is not None and _names_of(other, label) != _names_of(schema, label):
            raise DataError(
                f"{path}: its class names are others than those of {paths[0]}; expected files of "
                "one data set"
            )
    names = None if label is None else _names_of(schema, label)
    if names is not None and not (
        isinstance(names, list) and all(isinstance(one, str) for one in names)
    ):
        raise DataError(f"{paths[0]}: its metadata has class names that are no text")
    labels: list[Any] | None = None
    if label is not None:
        labels = [x for file in files for x in file.read(columns=[label]).column(0).to_pylist()]
    groups = [
        (file, group, file.metadata.row_group(group).num_rows)
        for file in files
        for group in range(file.metadata.num_row_groups)
    ]
    starts, total = [], 0
    for _, _, count in groups:
        starts.append(total)
        total += count
    kept: dict[int, Any] = {}  # the row group that was read last
    pictures: dict[int, Any] = {}

    def group_of(index: int) -> tuple[int, Any]:
        place = bisect_right(starts, index) - 1
        if place not in kept:
            kept.clear()
            file, group, _ = groups[place]
            kept[place] = file.read_row_group(group, columns=[image]).column(0)
        return starts[place], kept[place]

    def prefetch(indices: Sequence[int]) -> None:
        for index in sorted(indices):
            start, column = group_of(index)
            pictures[index] = column[index - start].as_py()

    def fetch(index: int) -> tuple[Any, Any]:
        if index in pictures:
            value = pictures.pop(index)
        else:
            start, column = group_of(index)
            value = column[index - start].as_py()
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        return value, None if labels is None else labels[index]

    return Rows(
        str(paths[0]) if len(paths) == 1 else str(paths[0].parent),
        total,
        fetch,
        labels,
        None if names is None else tuple(names),
        prefetch=prefetch,
    )


def _names_of(schema: Any, label: str) -> Any:
    """Return the class names that the metadata of a parquet file hold, unchecked, or None."""
    return _features(schema.metadata or {}).get(label, {}).get("names")


def _features(metadata: dict[bytes, bytes]) -> dict[str, Any]:
    """Return the features that the datasets library notes in a parquet file."""
    try:
        content = json.loads(metadata.get(b"huggingface", b"{}"))
        found = content.get("info", {}).get("features", {})
    except (AttributeError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, dict)}
