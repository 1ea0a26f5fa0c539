"""Weights under the names of another library: rules that lose no bit, in both directions.

A rule takes some tensors of one model and makes tensors of another of them. It renames, transposes,
joins or splits them, and changes no number. What goes in as a file of one library therefore comes
out as one (`renamed`, `renamed_back`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pydetox.checkpoints.index import quote
from pydetox.errors import ArchitectureError

Change = Literal["same", "transposed", "leading", "patches"]


@dataclass(frozen=True)
class Rule:
    """Tensors of ours, and the tensors of theirs that hold the same numbers.

    Attributes:
        ours: Our names. Several names share the rows of what theirs hold, in this order.
        theirs: Their names. Several tensors are joined along their rows.
        change: What is done to the numbers: nothing, a matrix is transposed, a leading dimension of
            size 1 is added, or rows of patches ``[d, P * P * 3]`` become a kernel ``[d, 3, P, P]``.
        shares: How many of the rows each of ours gets, as a ratio; all equal by default.
        patch: P, for `patches`.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    change: Change = "same"
    shares: tuple[int, ...] = ()
    patch: int = 0


def rename(ours: str, theirs: str, change: Change = "same") -> Rule:
    """Return the rule of one tensor that has another name there."""
    return Rule((ours,), (theirs,), change)


def affine(ours: str, theirs: str) -> Iterator[Rule]:
    """Yield the rules of a layer's weight and bias."""
    for kind in ("weight", "bias"):
        yield rename(f"{ours}.{kind}", f"{theirs}.{kind}")


def attention(ours: str, theirs: tuple[str, str, str], separator: str = "_") -> Iterator[Rule]:
    """Yield the rules of query, key and value, which are one matrix of ours and three of theirs."""
    for kind in ("weight", "bias"):
        yield Rule((f"{ours}{separator}{kind}",), tuple(f"{part}.{kind}" for part in theirs))


def renamed(state: Mapping[str, Tensor], rules: Iterable[Rule]) -> dict[str, Tensor]:
    """Return their tensors under our names.

    Raises:
        ArchitectureError: A tensor is missing, or there is one without a rule, or tensors that are
            joined differ in dtype or shape.
    """
    rules = list(rules)
    wanted = {name for rule in rules for name in rule.theirs}
    missing = [name for rule in rules for name in rule.theirs if name not in state]
    extra = sorted(state.keys() - wanted)
    if missing or extra:
        kinds = (("missing", missing), ("unexpected", extra))
        raise ArchitectureError(
            "the weights are not those of its configuration: "
            + "; ".join(
                f"{len(names)} {kind} ({', '.join(map(quote, names[:3]))}"
                f"{', …' if len(names) > 3 else ''})"
                for kind, names in kinds
                if names
            )
        )
    result: dict[str, Tensor] = {}
    for rule in rules:
        parts = [state[name] for name in rule.theirs]
        first = quote(rule.theirs[0])
        if len({part.dtype for part in parts}) > 1:
            raise ArchitectureError(f"tensor {first}: query, key and value have different dtypes")
        if len({part.shape for part in parts}) > 1:
            raise ArchitectureError(f"tensor {first}: query, key and value have different shapes")
        value = _forward(rule, torch.cat(parts) if len(parts) > 1 else parts[0], first)
        result |= zip(rule.ours, _shared(rule, value, first), strict=True)
    return result


def renamed_back(state: Mapping[str, Tensor], rules: Iterable[Rule]) -> dict[str, Tensor]:
    """Return our tensors under their names: the inverse of `renamed`.

    Raises KeyError for a tensor that is missing.
    """
    result: dict[str, Tensor] = {}
    for rule in rules:
        parts = [state[name] for name in rule.ours]
        value = _back(rule, torch.cat(parts) if len(parts) > 1 else parts[0])
        if len(rule.theirs) == 1:
            result[rule.theirs[0]] = value
        else:
            chunks = value.chunk(len(rule.theirs))
            result |= {n: p.contiguous() for n, p in zip(rule.theirs, chunks, strict=True)}
    return result


def _forward(rule: Rule, value: Tensor, name: str) -> Tensor:
    if rule.change == "same":
        return value
    if rule.change == "leading":
        return value[None]
    if value.ndim != 2:
        raise ArchitectureError(f"tensor {name}: expected a matrix")
    if rule.change == "transposed":
        return value.T.contiguous()
    size = rule.patch
    if value.shape[1] != 3 * size * size:
        raise ArchitectureError(
            f"tensor {name}: {list(value.shape)}; expected rows of {3 * size * size} numbers, for "
            f"patches of {size} pixels"
        )
    return value.view(-1, size, size, 3).permute(0, 3, 1, 2).contiguous()


def _back(rule: Rule, value: Tensor) -> Tensor:
    undo: Mapping[Change, Callable[[Tensor], Tensor]] = {
        "same": lambda x: x,
        "leading": lambda x: x[0],
        "transposed": lambda x: x.T.contiguous(),
        "patches": lambda x: x.permute(0, 2, 3, 1).flatten(1).contiguous(),
    }
    return undo[rule.change](value)


def _shared(rule: Rule, value: Tensor, name: str) -> tuple[Tensor, ...]:
    """Return the rows of a tensor, shared out over ours."""
    if len(rule.ours) == 1:
        return (value,)
    shares = rule.shares or (1,) * len(rule.ours)
    if value.ndim == 0 or value.shape[0] % sum(shares):
        raise ArchitectureError(
            f"tensor {name}: {list(value.shape)}; expected {sum(shares)} equal parts"
        )
    unit = value.shape[0] // sum(shares)
    return tuple(
        part.contiguous() for part in torch.split(value, [unit * share for share in shares])
    )
