"""The inert descriptions that a pickle becomes: see :mod:`pydetox.checkpoints.pickle_index`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pydetox.checkpoints.index import TensorEntry, quote
from pydetox.checkpoints.pickle_globals import Global

#: The dictionaries that are built here, by the name of their class.
MAPPING_KINDS: Final = frozenset(
    {
        "builtins.dict",
        "collections.Counter",
        "collections.OrderedDict",
        "collections.defaultdict",
    }
)


class Mapping:
    """A dictionary in the pickle, as pairs: hashing a key from it could already be an attack.

    ``kind`` is the name of its class, one of ``MAPPING_KINDS``.
    """

    __slots__ = ("kind", "pairs")

    def __init__(self, kind: str = "builtins.dict") -> None:
        self.kind = kind
        self.pairs: list[tuple[object, object]] = []

    def get(self, name: str) -> object:
        """Return the last value stored under the string ``name``, or ``None``."""
        for key, value in reversed(self.pairs):
            if isinstance(key, str) and key == name:
                return value
        return None


@dataclass(frozen=True, slots=True)
class Opaque:
    """A value that was allowed, but not built.

    ``name`` is the global it would have come from; ``known`` is false for one of another package.
    """

    name: str
    known: bool = True


@dataclass(frozen=True, slots=True)
class Storage:
    """A reference to a record of weights, with the claims that it makes: type and elements.

    ``dtype`` is ``None`` for quantised ones, which are not read.
    """

    key: str
    dtype: str | None
    item_size: int
    count: int

    @property
    def nbytes(self) -> int:
        """Claimed size in bytes."""
        return self.count * self.item_size


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A tensor in the pickle, with the storage that it is a view of."""

    entry: TensorEntry
    storage: Storage


def describe(value: object) -> str:
    """What a value is, for a message."""
    if isinstance(value, Mapping):
        return "a dictionary"
    if isinstance(value, Opaque):
        return f"an object of {quote(value.name)}"
    if isinstance(value, PickledTensor):
        return "a tensor"
    if isinstance(value, Global):
        return f"the name {quote(value.name)}"
    if isinstance(value, Storage):
        return "a storage"
    if value is None:
        return "None"
    plain = {
        bool: "a bool",
        int: "an integer",
        float: "a number",
        str: "text",
        bytes: "bytes",
        list: "a list",
        tuple: "a tuple",
    }
    return plain.get(type(value), "part of a pickle")
