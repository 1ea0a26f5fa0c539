"""JSON that any parser reads: no NaN, no infinity, no Python or NumPy types."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch


def to_json(value: object, *, indent: int | None = 2) -> str:
    """Return `value` as JSON text (RFC 8259), ending without a newline.

    NaN and infinities become null, because JSON has no such numbers. Tensors and arrays become
    lists, dataclasses and mappings objects, sets sorted lists, paths and enum members strings.
    Raises TypeError, naming the type, for anything else.
    """
    return json.dumps(to_plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def to_plain(value: object) -> Any:
    """Return `value` made of dict, list, str, int, float, bool and None only; see `to_json`."""
    if isinstance(value, Enum):
        return to_plain(value.value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        # A lone surrogate, as in an undecodable file name, cannot be written as UTF-8.
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, torch.Tensor):
        return to_plain(value.detach().cpu().tolist())
    if isinstance(value, np.ndarray | np.generic):
        return to_plain(value.tolist())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # Not asdict: it would copy tensors.
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(to_plain(item) for item in value)
    if isinstance(value, PurePath):
        return to_plain(str(value))
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON as a dict; ValueError for a key that is there twice.

    It is an `object_pairs_hook` for `json.loads`, which would take the last one.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is there twice")
        found[key] = value
    return found


def rows_to_json(rows: Sequence[Sequence[float]]) -> list[list[float | None]]:
    """Return rows of numbers as lists, with null for those that are not finite."""
    return [[v if math.isfinite(v) else None for v in row] for row in rows]


def rows_from_json(rows: Sequence[Sequence[float | None]]) -> tuple[tuple[float, ...], ...]:
    """Return what `rows_to_json` wrote, with infinity for null."""
    return tuple(tuple(math.inf if v is None else float(v) for v in row) for row in rows)
