"""Triggers in a `.safetensors` file, which `pydetox invert` writes and other commands read.

The file has the tensors `mask` float32 [K, H, W] and `pattern` float32 [K, 3, H, W], both in [0,
1]. It may also have `p_l1` float64 [K] (infinite for a search that found nothing) and `success`
float32 [K]. Its metadata has JSON under the key `pydetox`, with "schema": "pydetox.triggers/1" and
"targets", a list of K class names or nulls. In a file without this metadata, the targets are
unknown. A trigger turns an image x in [0, 1] into (1 - mask) x + mask pattern.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike, fspath
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..checkpoints.weights import read_safetensors
from ..errors import CheckpointError, DataError, UsageError
from .result import RecoveredTrigger

SCHEMA = "pydetox.triggers/1"
_METADATA_KEY = "pydetox"


@dataclass(frozen=True, eq=False)
class TriggerFile:
    """K triggers.

    Attributes:
        masks: float32 [K, H, W] in [0, 1].
        patterns: float32 [K, 3, H, W] in [0, 1].
        targets: The name of each trigger's target class; None if it is not known.
        p_l1: float64 [K], |mask|_1 / (H W); infinite for a search that found nothing.
        success: float32 [K] in [0, 1], the share of images on which the trigger works; None if it
            is not known.
        extra: Further metadata, as values that JSON can hold.
    """

    masks: Tensor
    patterns: Tensor
    targets: tuple[str | None, ...]
    p_l1: Tensor
    success: Tensor | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.masks.shape[0])

    def trigger(self, index: int) -> RecoveredTrigger:
        """Return trigger `index`, 0..K-1, without a target class."""
        return RecoveredTrigger(self.masks[index], self.patterns[index])

    def select(self, target: str | None) -> list[int]:
        """Return the indices of the triggers that lead to `target`, the smallest trigger first.

        Triggers with an unknown target count as leading to `target`. If `target` is None and all
        triggers share one known target, all are returned. Raises UsageError if no trigger leads to
        the target, or if it is unclear which triggers are meant.
        """
        known = sorted({name for name in self.targets if name is not None})
        if target is None:
            if len(known) != 1 or None in self.targets:
                shown = ", ".join(map(repr, known[:10])) or "none"
                raise UsageError(
                    f"the triggers have the target classes {shown}; name one with target="
                )
            target = known[0]
        chosen = [k for k, name in enumerate(self.targets) if name is None or name == target]
        if not chosen:
            raise UsageError(
                f"no trigger into class {target!r}; there are some into "
                + ", ".join(map(repr, known[:10]))
            )
        working = [k for k in chosen if torch.isfinite(self.p_l1[k])]
        return sorted(working or chosen, key=lambda k: float(self.p_l1[k]))

    def to_bytes(self) -> bytes:
        """Return the content of a trigger file. Equal triggers give equal bytes."""
        content = {**self.extra, "schema": SCHEMA, "targets": list(self.targets)}
        tensors = {"mask": self.masks, "pattern": self.patterns, "p_l1": self.p_l1}
        if self.success is not None:
            tensors["success"] = self.success
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {_METADATA_KEY: json.dumps(content, sort_keys=True, allow_nan=False)}
        return save(tensors, metadata)


def load_triggers(path: str | PathLike[str]) -> TriggerFile:
    """Read a trigger file; DataError, which names the file, if it is not one."""
    try:
        tensors, metadata = read_safetensors(path)
        return _checked(tensors, metadata.get(_METADATA_KEY))
    except (CheckpointError, DataError) as error:
        raise DataError(f"{fspath(path)}: no trigger file: {error}") from error


def _checked(tensors: Mapping[str, Tensor], metadata: str | None) -> TriggerFile:
    unknown = set(tensors) - {"mask", "pattern", "p_l1", "success"}
    if unknown or not {"mask", "pattern"} <= set(tensors):
        raise DataError(f"found the tensors {sorted(tensors)}; expected mask and pattern")
    mask, pattern = _shares(tensors, "mask"), _shares(tensors, "pattern")
    count = mask.shape[0] if mask.ndim == 3 else 0
    if count == 0 or pattern.shape != (count, 3, *mask.shape[1:]) or mask.numel() == 0:
        raise DataError(
            f"mask {list(mask.shape)} and pattern {list(pattern.shape)}; expected [K, H, W] and "
            "[K, 3, H, W]"
        )
    p_l1 = tensors.get("p_l1", mask.double().mean(dim=(1, 2))).double()
    if p_l1.shape != (count,) or not bool((p_l1 >= 0).all()):
        raise DataError(f"p_l1 has shape {list(p_l1.shape)}; expected [{count}], not negative")
    success = _shares(tensors, "success") if "success" in tensors else None
    if success is not None and success.shape != (count,):
        raise DataError(f"success has shape {list(success.shape)}; expected [{count}]")
    extra = _parse(metadata)
    targets = extra.pop("targets", [None] * count)
    named = isinstance(targets, list) and all(t is None or isinstance(t, str) for t in targets)
    if not named or len(targets) != count:
        raise DataError(f"its metadata names no targets; expected {count} names or nulls")
    return TriggerFile(mask, pattern, tuple(targets), p_l1, success, extra)


def _shares(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    values = tensors[name]
    if not values.dtype.is_floating_point:
        raise DataError(f"{name} is {values.dtype}; expected floating-point numbers in [0, 1]")
    values = values.float()
    if not bool(((values >= 0) & (values <= 1)).all()):  # also catches NaN
        raise DataError(f"{name} has values outside [0, 1]")
    return values


def _parse(metadata: str | None) -> dict[str, Any]:
    if metadata is None:
        return {}
    try:
        content = json.loads(metadata)
    except (ValueError, RecursionError) as error:
        raise DataError(f"its metadata is not JSON ({error})") from error
    if not isinstance(content, dict) or content.pop("schema", None) != SCHEMA:
        raise DataError(f'its metadata has no "schema": "{SCHEMA}"')
    return content
