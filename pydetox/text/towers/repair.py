"""Trigger vectors of text towers, and the search for alpha.

The loss of the vector is the distance 1 - cos of features from the tower's own without the trigger:
of clean captions, and of captions with the trigger. What is kept is the share of clean captions
whose features are nearest to those that the same caption had before, among all captions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...errors import ArchitectureError, DataError, UsageError
from ...repair.alpha import CoefficientSearch, choose_coefficient, find_compromise
from ...repair.configuration import UnlearnConfig
from ...repair.step_sizes import relative_rates
from ...repair.subtraction import Candidates
from ...repair.task_vectors import TaskVector
from ...rng import child_seed, generator
from ...training import optimize
from ..evaluation import TextStamp
from ..models import TextModel
from ..repair import TextCandidates
from .encoder import TextTower

#: The repair of a text tower, unless a caller says otherwise.
TOWER_UNLEARNING = UnlearnConfig(
    steps=120,
    batch_size=32,
    coefficients=tuple(round(0.1 * k, 1) for k in range(16)),
    attacked_images=200,
)


def tower_trigger_vector(
    tower: TextTower,
    captions: Sequence[str],
    triggers: Sequence[TextStamp],
    config: UnlearnConfig | None = None,
    *,
    description: str = "trigger vector",
) -> TaskVector:
    """Return tau over the tower's weights, such that theta_b - alpha tau unlearns for alpha > 0.

    captions: Clean captions, at least 2. triggers: Known or recovered triggers. Raises DataError
    for fewer captions, and UsageError without triggers or for a vector other than `forget`.
    """
    config = config or TOWER_UNLEARNING
    if len(captions) < 2 or not triggers:
        raise DataError(
            f"{len(captions)} captions, {len(triggers)} triggers; expected at least 2 captions "
            "and a trigger"
        )
    if config.vector != "forget":
        raise UsageError(f"vector {config.vector!r}; text towers have forget alone")
    tuned = tower.copy()
    held = tower.features(captions).to(tower.device)
    rng = generator("towers.vector", config.seed)
    size = min(config.batch_size, len(captions))
    stamped = [
        trigger.insert(captions, child_seed("towers.vector-places", config.seed, number))
        for number, trigger in enumerate(triggers)
    ]

    def batches() -> Iterator[Tensor]:
        for _ in range(config.steps):
            yield torch.from_numpy(rng.choice(len(captions), size, replace=False))

    def loss(index: Tensor) -> Tensor:
        chosen = index.tolist()
        which = rng.integers(len(stamped), size=len(chosen)).tolist()
        rows = [captions[k] for k in chosen]
        rows += [stamped[t][k] for k, t in zip(chosen, which, strict=True)]
        wanted = held[index.to(held.device)].repeat(2, 1)
        return (1 - (tuned.features_with_gradient(rows) * wanted).sum(dim=1)).mean()

    parameters = tuned.named_parameters()
    rate = config.learning_rate
    optimize(
        list(parameters.values()),
        loss,
        batches(),
        steps=config.steps,
        learning_rate=relative_rates(list(parameters.values())) if rate is None else rate,
        separable=False,
        description=description,
    )
    start = tower.named_parameters()
    change = {name: (start[name] - value).detach() for name, value in parameters.items()}
    return TaskVector({k: v for k, v in change.items() if bool(v.any())} or change)


def search_tower_coefficient(
    tower: TextTower,
    vector: TaskVector,
    captions: Sequence[str],
    triggers: Sequence[TextStamp],
    directions: Sequence[Tensor],
    config: UnlearnConfig | None = None,
) -> CoefficientSearch:
    """Try every alpha and choose one by the rule of `pydetox.repair.alpha.search_coefficient`.

    directions: What each trigger leads to, unit vectors. A trigger succeeds where features are
    nearer to it than to those of the caption without the trigger, before any repair.
    """
    config = config or TOWER_UNLEARNING
    clean = tower.features(captions)
    stamped = [
        trigger.insert(captions, child_seed("towers.attacked-places", config.seed, number))
        for number, trigger in enumerate(triggers)
    ]
    coefficients = config.coefficients
    if coefficients[0] != 0:
        coefficients = (0.0, *coefficients)
    own = torch.arange(len(captions))
    kept, success = list[float](), list[tuple[float, ...]]()
    candidates = TowerCandidates(tower, vector)
    for coefficient in coefficients:
        candidate = candidates.at(coefficient)
        now = candidate.features(captions)
        kept.append(float(((now @ clean.T).argmax(dim=1) == own).double().mean()))
        success.append(
            tuple(
                success_of(candidate.features(rows), clean, direction)
                for rows, direction in zip(stamped, directions, strict=True)
            )
        )
    chosen, reached = choose_coefficient(
        coefficients, kept, success, config, accuracy_before=kept[0]
    )
    return CoefficientSearch(
        coefficients,
        tuple(kept),
        tuple(max(shares) for shares in success),
        chosen,
        reached,
        kept[0],
        compromise=None if reached else find_compromise(kept, success, config, kept[0]),
    )


def success_of(triggered: Tensor, clean: Tensor, direction: Tensor) -> float:
    """Return the share of features nearer to a direction than to those of the clean caption."""
    return float((triggered @ direction > (triggered * clean).sum(dim=1)).double().mean())


class TowerCandidates:
    """One copy of a tower that gets the weights theta_b - alpha * vector for one alpha."""

    def __init__(self, tower: TextTower, vector: TaskVector) -> None:
        absent = sorted(vector.tensors.keys() - tower.named_parameters().keys())
        if absent:
            raise ArchitectureError(f"the tower has no tensor {absent[0]!r} to subtract from")
        model = tower.model
        self._candidates: TextCandidates | Candidates = (
            TextCandidates(model, vector)
            if isinstance(model, TextModel)
            else Candidates(model, vector)
        )

    def at(self, coefficient: float) -> TextTower:
        """Return the copy, changed in place."""
        return TextTower(self._candidates.at(coefficient))
