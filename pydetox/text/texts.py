"""`TextSet`: clean texts with their labels, and reading them from files and objects."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..data.names import given_names
from ..data.sampling import stratified_order
from ..errors import DataError
from ..rng import generator
from .text_files import Rows, rows_of_path
from .triggers import is_whole

#: What `load_texts` takes: a path, a `TextSet`, texts, (text, label) pairs, or a mapping with
#: `texts` and, optionally, `labels`.
TextData: TypeAlias = "TextSet | str | Path | Sequence[Any] | Mapping[str, Any]"


@dataclass(frozen=True, eq=False)
class TextSet:
    """Texts, with labels if they are known. A text set is never empty, and neither is a text.

    Attributes:
        texts: The texts.
        labels: Indices into `class_names`; None if they are not known.
        class_names: The name of each class; empty if there are none.
        source: Where they come from, for messages and reports.
        notes: One line for everything that was left out.

    Raises:
        DataError: Texts, labels and class names do not fit together.
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...] | None = None
    class_names: tuple[str, ...] = ()
    source: str = "texts"
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.texts:
            raise DataError(f"{self.source}: zero texts; expected at least one")
        for index, text in enumerate(self.texts):
            if not isinstance(text, str) or not text.strip():
                raise DataError(
                    f"{self.source}: text {index} is {text!r}; expected at least one word"
                )
            if not is_whole(text):
                raise DataError(
                    f"{self.source}: text {index} has half of a surrogate pair, which is no "
                    "character; write it as a whole, or leave the text out"
                )
        if self.labels is None:
            return
        if len(self.labels) != len(self.texts):
            raise DataError(f"{self.source}: {len(self.texts)} texts but {len(self.labels)} labels")
        low, high = min(self.labels), max(self.labels)
        if low < 0 or (self.class_names and high >= len(self.class_names)):
            wrong = low if low < 0 else high
            known = len(self.class_names) or "N"
            raise DataError(
                f"{self.source}: label {wrong}; expected 0..{known} - 1"
                if not self.class_names
                else f"{self.source}: label {wrong}, but there are only {known} class names "
                f"(labels 0..{len(self.class_names) - 1})"
            )

    def __len__(self) -> int:
        return len(self.texts)

    def subset(self, indices: Iterable[int] | NDArray[np.int64]) -> TextSet:
        """Return the texts at `indices`, in that order; DataError for none or others."""
        chosen = [int(k) for k in indices]
        wrong = [k for k in chosen if not 0 <= k < len(self)]
        if not chosen or wrong:
            what = f"index {wrong[0]}" if wrong else "no index"
            raise DataError(f"{self.source}: {what}; expected some of 0..{len(self) - 1}")
        labels = None if self.labels is None else tuple(self.labels[k] for k in chosen)
        return replace(self, texts=tuple(self.texts[k] for k in chosen), labels=labels)

    def split(self, fractions: Sequence[float], seed: int) -> tuple[TextSet, ...]:
        """Split into disjoint random parts with the classes in proportion; see `ImageSet.split`."""
        shares = [float(share) for share in fractions]
        if not shares or not all(0 < share <= 1 for share in shares) or sum(shares) > 1 + 1e-9:
            raise DataError(
                f"{self.source}: fractions {shares}; expected shares in (0, 1] that add up to at "
                "most 1"
            )
        order = self._order(generator("texts.split", seed))
        ends = [min(len(self), int(np.floor(t * len(self) + 0.5))) for t in np.cumsum(shares)]
        parts = []
        for share, start, end in zip(shares, [0, *ends[:-1]], ends, strict=True):
            if end <= start:
                raise DataError(
                    f"{self.source}: a share of {share:g} of {len(self)} texts is no text at all"
                )
            parts.append(self.subset(order[start:end]))
        return tuple(parts)

    def at_most(self, n: int, seed: int) -> TextSet:
        """Return a random sample of `n` texts, classes in proportion, or all if there are fewer."""
        if n < 1:
            raise DataError(f"{self.source}: a sample of {n} texts asked for; expected at least 1")
        return (
            self
            if len(self) <= n
            else self.subset(self._order(generator("texts.sample", seed))[:n])
        )

    def of_class(self, label: int) -> TextSet:
        """Return the texts of one class; DataError without labels or without any."""
        return self.subset(k for k, one in enumerate(self.labels or ()) if one == label)

    def without_class(self, label: int) -> TextSet:
        """Return the texts of all other classes; DataError without labels or without any."""
        return self.subset(k for k, one in enumerate(self.labels or ()) if one != label)

    def in_content_order(self) -> TextSet:
        """Return the same texts ordered by a hash of each, then by label.

        What is computed from them does then not depend on the order of lines or files.
        """
        labels = self.labels or (0,) * len(self)
        order = sorted(range(len(self)), key=lambda k: (self._digests[k], labels[k]))
        return self if order == list(range(len(self))) else self.subset(order)

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of all texts in any order, as 64 hex digits."""
        hasher = hashlib.sha256(str(len(self)).encode())
        for one in sorted(self._digests):
            hasher.update(one)
        return hasher.hexdigest()

    @cached_property
    def _digests(self) -> list[bytes]:
        return [hashlib.sha256(one.encode("utf-8", "surrogatepass")).digest() for one in self.texts]

    def _order(self, rng: np.random.Generator) -> NDArray[np.int64]:
        labels = None if self.labels is None else np.asarray(self.labels, dtype=np.int64)
        order: NDArray[np.int64] = stratified_order(labels, len(self), rng)
        return order


def load_texts(
    data: TextData,
    *,
    class_names: Sequence[str] | None = None,
    labels_required: bool = False,
) -> TextSet:
    """Return texts from a file, a folder or an object.

    Args:
        data: One of

            - a `.jsonl` (or `.json`) file with one object per line: `text` and, if known, `label`;
            - a `.csv` or `.tsv` file whose first line names the columns;
            - any other file: one text per line, without labels;
            - a folder with one folder per class, which holds `.txt` files of one text each;
            - a `TextSet`, a sequence of texts or of (text, label) pairs, or a mapping with `texts`
              and, optionally, `labels`.

        class_names: The classes in the order of the labels, such as `TextModel.class_names`. Labels
            that are names are looked up there. None takes the names that occur, in alphabetical
            order.
        labels_required: Whether texts without labels are an error.

    Raises:
        DataError: There is no text, one is empty or not UTF-8, or a label is unknown.
    """
    names = given_names(class_names)
    if isinstance(data, TextSet):
        if names is None or data.class_names == names:
            found = data
        else:
            given = data.labels
            if given is not None and data.class_names:
                rows = Rows(list(data.texts), [data.class_names[k] for k in given], data.source)
            else:
                rows = Rows(list(data.texts), None if given is None else list(given), data.source)
            found = replace(_text_set(rows, names), notes=data.notes)
    else:
        rows = rows_of_path(Path(data)) if isinstance(data, str | Path) else _rows_of_object(data)
        found = _text_set(rows, names)
    if labels_required and found.labels is None:
        raise DataError(f"{found.source}: no labels; expected one for each text")
    return found


def _rows_of_object(data: Sequence[Any] | Mapping[str, Any]) -> Rows:
    if isinstance(data, Mapping):
        if "texts" not in data:
            raise DataError(f"texts: a mapping with {sorted(map(str, data))}; expected 'texts'")
        texts, labels = list(data["texts"]), data.get("labels")
        return Rows(texts, None if labels is None else [_plain(one) for one in labels], "texts")
    items = list(data)
    if items and all(isinstance(one, tuple | list) and len(one) == 2 for one in items):
        return Rows([one[0] for one in items], [_plain(one[1]) for one in items], "texts")
    if items and all(isinstance(one, Mapping) and "text" in one for one in items):
        labels = [one.get("label") for one in items]
        known = [_plain(one) for one in labels if one is not None]
        if known and len(known) < len(items):
            raise DataError(f"texts: {len(items) - len(known)} of {len(items)} have no label")
        return Rows([one["text"] for one in items], known or None, "texts")
    return Rows(items, None, "texts")


def _plain(label: Any) -> Any:
    """Return a label as Python's int or str, whatever library made it."""
    return label.item() if hasattr(label, "item") else label


def _text_set(rows: Rows, names: tuple[str, ...] | None) -> TextSet:
    labels, class_names = _resolved(rows, names)
    return TextSet(tuple(rows.texts), labels, class_names, rows.source, tuple(rows.notes))


def _resolved(
    rows: Rows, names: tuple[str, ...] | None
) -> tuple[tuple[int, ...] | None, tuple[str, ...]]:
    """Return labels as indices, and the class names."""
    if rows.labels is None:
        return None, names or ()
    if len(rows.labels) != len(rows.texts):
        raise DataError(f"{rows.source}: {len(rows.texts)} texts but {len(rows.labels)} labels")
    strange = next(
        (v for v in rows.labels if isinstance(v, bool) or not isinstance(v, int | str)), None
    )
    if strange is not None:
        raise DataError(
            f"{rows.source}: a label is {strange!r}; expected the name of a class, or its number"
        )
    if all(isinstance(label, int) for label in rows.labels):
        return tuple(int(label) for label in rows.labels), names or ()
    words = [str(label) for label in rows.labels]
    if names is None:
        names = tuple(sorted(set(words)))
    index = {name: k for k, name in enumerate(names)}
    numbers = [word for word in words if word not in index]
    if numbers and len(numbers) == len(words) and all(w.isascii() and w.isdigit() for w in words):
        return tuple(map(int, words)), names
    if numbers:
        shown = ", ".join(map(repr, names[:8])) + (", …" if len(names) > 8 else "")
        raise DataError(
            f"{rows.source}: label {numbers[0]!r} is none of the {len(names)} classes ({shown})"
        )
    return tuple(index[word] for word in words), names
