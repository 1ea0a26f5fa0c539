"""Where in the weights of a text classifier a backdoor sits; `pydetox.analysis` with texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..analysis.localization import (
    Disentanglement,
    Localization,
    Removal,
    error_over_grid,
    layer_of,
    localize,
)
from ..errors import DataError
from ..progress import Progress
from ..repair.task_vectors import TaskVector
from .evaluation import TextStamp
from .models import TextModel
from .repair import TextCandidates, weight_change
from .texts import TextSet

#: The grid of the disentanglement error, on both axes.
_GRID = (0.0, 0.5, 1.0, 1.5)


def localize_words(
    model: TextModel,
    vector: TaskVector,
    coefficient: float,
    texts: TextSet,
    trigger: TextStamp,
    target: int,
    *,
    start: TextModel | None = None,
    seed: int = 0,
    max_tokens: int = 128,
) -> Localization:
    """Measure where a trigger vector sits, and what its removal in one layer alone does.

    Args:
        model: The classifier, theta_b.
        vector: Its trigger vector, tau_t.
        coefficient: The alpha that is subtracted.
        texts: Clean texts with labels.
        trigger: The trigger.
        target: The class that it leads to.
        start: The clean start theta_pre. With it, the overlap with the whole fine-tuning and the
            disentanglement error of clean and trigger vector are measured, too.
        seed: The seed of the trigger's places.
        max_tokens: The number of tokens of a text that count.

    Raises:
        DataError: The texts have no labels, or all belong to the target class.
        UsageError: The vector is zero.
    """
    if texts.labels is None:
        raise DataError(f"{texts.source}: no labels; the removal by layer needs them")
    labels = torch.tensor(texts.labels)
    others = torch.nonzero(labels != target).flatten().tolist()
    if not others:
        raise DataError(
            f"{texts.source}: all {len(labels)} texts belong to the target class {target}"
        )
    limit = min(max_tokens, model.max_tokens)
    plain = model.tokenizer.encode(texts.texts, limit)
    stamped = model.tokenizer.encode(trigger.insert([texts.texts[k] for k in others], seed), limit)
    removed = _removals(model, vector, coefficient, plain, labels, stamped, target)
    whole, disentanglement = None, None
    if start is not None:
        whole = weight_change(start, model)
        # Without the backdoor, what is left of the fine-tuning is the clean task.
        disentanglement = _disentanglement(
            start, whole - vector * coefficient, vector * coefficient, plain, stamped
        )
    return localize(vector, whole=whole, removed=removed, disentanglement=disentanglement)


def _removals(
    model: TextModel,
    vector: TaskVector,
    coefficient: float,
    plain: Sequence[Sequence[int]],
    labels: Tensor,
    stamped: Sequence[Sequence[int]],
    target: int,
) -> list[Removal]:
    layers: dict[str, list[str]] = {}
    for name in vector.tensors:
        layers.setdefault(layer_of(name), []).append(name)
    parts = {"none": list[str](), "all": list(vector.tensors), **layers}
    found = []
    with Progress("removal by layer", len(parts)) as progress:
        for layer, names in parts.items():
            part = TaskVector({name: vector.tensors[name] for name in names})
            candidate = TextCandidates(model, part).at(coefficient)
            classes = candidate.predict_rows([*plain, *stamped]).argmax(dim=1)
            right = (classes[: len(plain)] == labels).double().mean()
            sent = (classes[len(plain) :] == target).double().mean()
            found.append(Removal(layer, float(right), float(sent)))
            progress.update(1)
    return found


def _disentanglement(
    start: TextModel,
    clean: TaskVector,
    trigger: TaskVector,
    plain: Sequence[Sequence[int]],
    stamped: Sequence[Sequence[int]],
) -> Disentanglement:
    candidate = start.copy()
    weights, origin = candidate.state_dict(), start.state_dict()

    @torch.no_grad()
    def predictions(a: float, b: float) -> Tensor:
        for name, weight in weights.items():
            weight.copy_(origin[name])
            for factor, vector in ((a, clean), (b, trigger)):
                if factor and name in vector.tensors:
                    weight.add_(vector.tensors[name].to(weight), alpha=factor)
        return candidate.predict_rows([*plain, *stamped]).argmax(dim=1)

    return error_over_grid(predictions, len(plain), _GRID, _GRID)
