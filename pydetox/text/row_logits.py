"""Logits of many rows of token ids: sorted by length, each row once, and remembered for a base.

Screening compares many candidates, of which few are looked at again. It can do so in bfloat16, in
which a processor with instructions for it multiplies about twice as fast. A base goes through the
same rows in every search that is in contrast to it: the whole vocabulary, the clean texts, and the
honest words of each class. Its logits are kept as long as the base itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .models import TextModel

#: The tokens of a forward pass, with those that fill up.
_TOKENS_PER_PASS = 4096

#: The largest memory of remembered logits of one model and precision, in values.
_REMEMBERED = 2**23

#: The dtype of screening by name; `auto` is decided by the device.
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class RowLogits:
    """Logits of rows of token ids.

    Attributes:
        passes: The rows that went through the model.
    """

    def __init__(self, model: TextModel, precision: str, *, remember: bool = False) -> None:
        """Prepare a model.

        precision: One of PRECISIONS. remember: Whether rows that were seen are not computed again.
        """
        self.passes = 0
        self._model = model
        if precision != "float32":
            self._model = copy.copy(model)
            self._model.module = copy.deepcopy(model.module).to(PRECISIONS[precision])
        self._classes = len(model.class_names)
        self._most = _REMEMBERED // self._classes if remember else 0
        self._known: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return the logits of rows, float32 [R, C] on the CPU, in their order."""
        keys = [tuple(row) for row in rows]
        places: dict[tuple[int, ...], int] = {}
        for key in keys:
            places.setdefault(key, len(places))
        found = torch.empty(len(places), self._classes)
        new = list[tuple[int, ...]]()
        for key, place in places.items():
            known = self._known.get(key)
            if known is None:
                new.append(key)
            else:
                found[place] = known
        if new:
            values = self._computed(new)
            found[[places[key] for key in new]] = values
            room = max(0, self._most - len(self._known))
            self._known.update(zip(new[:room], values[:room], strict=True))
        return found[[places[key] for key in keys]]

    def _computed(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        self.passes += len(rows)
        order = sorted(range(len(rows)), key=lambda k: (len(rows[k]), k))
        found = torch.empty(len(rows), self._classes)
        start = 0
        while start < len(order):
            stop, longest = start, 0
            while stop < len(order):
                longest = max(longest, len(rows[order[stop]]))
                if stop > start and longest * (stop - start + 1) > _TOKENS_PER_PASS:
                    break
                stop += 1
            chosen = order[start:stop]
            values = self._model.logits(self._model.batch([rows[k] for k in chosen]))
            found[chosen] = values.float().cpu()
            start = stop
        return found


#: The remembered logits of bases: what the weights were then, and one `RowLogits` per precision.
_BASES: WeakKeyDictionary[TextModel, tuple[Any, dict[str, RowLogits]]] = WeakKeyDictionary()


def base_logits(base: TextModel, precision: str) -> RowLogits:
    """Return the logits of a base, which searches share as long as its weights do not change."""
    # A tensor counts how often it was written in place.
    weights = [(id(one), one.device, one._version) for one in base.module.parameters()]
    state = (id(base.module), weights)
    if base not in _BASES or _BASES[base][0] != state:
        _BASES[base] = (state, {})
    shared = _BASES[base][1]
    if precision not in shared:
        shared[precision] = RowLogits(base, precision, remember=True)
    return shared[precision]


def screening_precision(model: TextModel, wanted: str) -> str:
    """Return the precision in which candidates are screened, `float32` or `bfloat16`.

    wanted: That, or `auto`: bfloat16 where the device has instructions for it, since float32 takes
    about twice as long there. A model that is not in float32 stays as it is.
    """
    if model.embedding.dtype != torch.float32:
        return "float32"
    if wanted != "auto":
        return wanted
    if model.device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if model.device.type != "cpu":
        return "float32"
    # Not every version of torch that is supported tells.
    tell: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    has = tell()
    return "bfloat16" if has.get("avx512_bf16") or has.get("amx_bf16") else "float32"
