"""Texts and labels in files, before labels become numbers: JSON lines, tables, lines, folders."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.lines import lines_of
from ..errors import DataError

#: The likeliest names first.
_TEXTS = ("text", "sentence", "content", "review", "prompt", "question", "title", "caption")
_LABELS = ("label", "labels", "class", "class_name", "category", "target", "label_name")
_LINES = (".jsonl", ".ndjson", ".json")
_TABLES = (".csv", ".tsv")
_SEPARATORS = "\t,;|"
#: What tables hold where there is no label.
_MISSING = ("", "nan", "NaN")

# A file of clean texts has a few megabytes; a larger one is another kind of file.
_MOST_BYTES = 1 << 30
_MOST_CHARACTERS = 1_000_000


@dataclass
class Rows:
    """Texts with their labels as they are given.

    Attributes:
        texts: The texts.
        labels: The name or number of each text's class; None if there are none.
        source: Where they come from.
        notes: One line for everything that was left out.
    """

    texts: list[str]
    labels: list[Any] | None
    source: str
    notes: list[str] = field(default_factory=list)


def rows_of_path(path: Path) -> Rows:
    """Return the texts of a file or a folder; see `load_texts`. Raises DataError."""
    if path.is_dir():
        rows = _folder(path)
    else:
        content = _read(path)
        suffix = path.suffix.lower()
        if suffix in _LINES:
            rows = _json_lines(path, content)
        elif suffix in _TABLES:
            rows = _table(path, content)
        else:
            rows = Rows([one for one in lines_of(content) if one.strip()], None, str(path))
    if not rows.texts:
        raise DataError(f"{path}: zero texts; expected at least one")
    for index, text in enumerate(rows.texts):
        if len(text) > _MOST_CHARACTERS:
            raise DataError(
                f"{path}: text {index} has {len(text)} characters; expected at most "
                f"{_MOST_CHARACTERS}"
            )
    return rows


def _read(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise DataError(f"{path}: has {size} bytes; a file of texts has at most {_MOST_BYTES}")
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: is not UTF-8 (byte {raw[error.start]:#04x}); convert the file, "
            "such as with iconv"
        ) from None
    if "\n" not in text:  # lines of old Macs
        text = text.replace("\r", "\n")
    if "\0" in text:
        raise DataError(f"{path}: holds null characters; expected a text file")
    return text


def _json_lines(path: Path, content: str) -> Rows:
    """Return the rows of JSON lines, or of one JSON array."""
    items: list[Any] = []
    if content.lstrip().startswith("["):
        items = _parsed(content, str(path))
        numbers = list(range(1, len(items) + 1))
    else:
        lines = [(k, one) for k, one in enumerate(lines_of(content), 1) if one.strip()]
        items = [_parsed(one, f"{path}, line {k}") for k, one in lines]
        numbers = [k for k, _ in lines]
    if all(isinstance(one, str) for one in items):
        return Rows(list(items), None, str(path))
    texts: list[str] = []
    labels: list[Any] = []
    for number, item in zip(numbers, items, strict=True):
        where = f"{path}, line {number}"
        if not isinstance(item, dict):
            raise DataError(f"{where}: expected an object with 'text', or a text")
        key = next((name for name in _TEXTS if name in item), None)
        if key is None:
            known = ", ".join(map(repr, list(item)[:6]))
            raise DataError(f"{where}: has {known or 'nothing'}; expected 'text'")
        text = item[key]
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}: its text is {text!r}; expected at least one word")
        texts.append(text)
        label = next((item[name] for name in _LABELS if item.get(name) is not None), None)
        if label is not None:
            labels.append(label)
        if labels and len(labels) < len(texts):
            raise DataError(f"{where}: has no label, and other lines have one")
    return Rows(texts, labels or None, str(path))


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not JSON ({error})") from None


def _table(path: Path, content: str) -> Rows:
    """Return the rows of a table whose first line names the columns."""
    header = content.partition("\n")[0]
    separator = max(_SEPARATORS, key=lambda one: (header.count(one), -_SEPARATORS.index(one)))
    try:
        table = list(csv.reader(io.StringIO(content, newline=""), delimiter=separator))
    except csv.Error as error:
        raise DataError(f"{path}: cannot be read as a table: {error}") from None
    columns = [name.strip().lower() for name in table[0]] if table else []
    if separator == "\t":
        # Tabs need no quoting, so many a file has a quotation mark that opens nothing.
        torn = next((k for k, row in enumerate(table, 1) if any("\n" in one for one in row)), None)
        if torn is not None:
            raise DataError(
                f"{path}, row {torn}: a field that begins with a quotation mark goes on in the "
                "next line; double the marks inside a quoted field, or write the texts as JSON "
                "lines"
            )
    twice = next((name for name in (*_TEXTS, *_LABELS) if columns.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}: two columns are named {twice!r}; expected one")
    key = next((name for name in _TEXTS if name in columns), None)
    if key is None:
        raise DataError(
            f"{path}: its first line names the columns {', '.join(map(repr, columns[:8]))}; "
            "expected one of them to be 'text'"
        )
    label = next((name for name in _LABELS if name in columns), None)
    texts: list[str] = []
    labels: list[Any] = []
    for number, row in enumerate(table[1:], 2):
        if not any(cell.strip() for cell in row):
            continue
        if len(row) != len(columns):
            raise DataError(f"{path}, row {number}: {len(row)} columns; expected {len(columns)}")
        text = row[columns.index(key)]
        if not text.strip():
            raise DataError(f"{path}, row {number}: its text is empty; expected at least one word")
        texts.append(text)
        if label is not None:
            labels.append(row[columns.index(label)].strip())
            if (labels[0] in _MISSING) != (labels[-1] in _MISSING):
                raise DataError(
                    f"{path}, row {number}: its label is {labels[-1]!r}, and those before it "
                    f"are such as {labels[0]!r}; expected a label in every row, or in none"
                )
    known = labels and labels[0] not in _MISSING
    return Rows(texts, labels if known else None, str(path))


def _folder(path: Path) -> Rows:
    """Return the texts of a folder: a folder per class, or files alone."""
    try:
        entries = sorted(path.iterdir(), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{path}: cannot list the folder: {error.strerror or error}") from error
    visible = [entry for entry in entries if not entry.name.startswith(".")]
    folders = [entry for entry in visible if entry.is_dir()]
    flat = [entry for entry in visible if entry.suffix.lower() == ".txt" and entry.is_file()]
    notes: list[str] = []
    if not folders:
        return Rows([_whole(one) for one in flat], None, str(path), notes)
    if flat:
        notes.append(f"{path}: {len(flat)} files beside the class folders are left out")
    texts: list[str] = []
    labels: list[Any] = []
    for folder in folders:
        inside = sorted(
            Path(root) / name
            for root, _, names in os.walk(folder)
            for name in names
            if name.lower().endswith(".txt")
            and not name.startswith(".")
            and not (Path(root) / name).is_fifo()
        )
        if not inside:
            notes.append(f"{path}: the folder {folder.name} has no .txt file, and is no class")
        texts += [_whole(one) for one in inside]
        labels += [folder.name] * len(inside)
    if not texts:
        raise DataError(f"{path}: zero texts; expected one folder per class with .txt files")
    return Rows(texts, labels, str(path), notes)


def _whole(path: Path) -> str:
    text = _read(path).strip()
    if not text:
        raise DataError(f"{path}: is empty; expected one text")
    return text
