"""Trigger vectors of text towers, and the search for alpha.

The loss of the vector is the distance 1 - cos of features from the tower's own without the trigger:
of captions and of *surrogates*, both without the trigger and with it. In surrogates, random words
of the vocabulary stand for half of a caption's words. They stand for all that the captions do not
talk about, as those of images do (`pydetox.repair.retention`).

What is kept is the share of clean captions whose features are nearest to those that the same
caption had before, among all captions. Captions can find themselves while all of them turn away
from the images that they belong to. So the drift is limited as well: the mean distance of features
from those before any repair, of captions or of other surrogates, whichever is larger.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
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

#: The repair of a text tower, unless a caller says otherwise. Class names are closer to each other
#: than images: a drift of 0.01 takes about 3% of the zero-shot accuracy, one of 0.02 a tenth.
TOWER_UNLEARNING = UnlearnConfig(
    steps=120,
    batch_size=32,
    max_drift=0.01,
    coefficients=tuple(round(0.1 * k, 1) for k in range(16)),
    attacked_images=200,
)


def tower_trigger_vector(
    tower: TextTower,
    captions: Sequence[str],
    triggers: Sequence[TextStamp],
    config: UnlearnConfig | None = None,
    *,
    original: TextTower | None = None,
    description: str = "trigger vector",
) -> TaskVector:
    """Return tau over the tower's weights, such that theta_b - alpha tau unlearns for alpha > 0.

    captions: Clean captions, at least 2. triggers: Known or recovered triggers. original: The tower
    before any repair, whose features are held; default: this one. Raises DataError for fewer
    captions, and UsageError without triggers or for a vector other than `forget`.
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
    original = original or tower
    rng = generator("towers.vector", config.seed)
    size = min(config.batch_size, len(captions))
    others = surrogate_captions(tower, captions, triggers, child_seed("towers.held", config.seed))
    shown = [*captions, *others]
    held = original.features(shown).to(tower.device)
    stamped = [
        trigger.insert(shown, child_seed("towers.vector-places", config.seed, number))
        for number, trigger in enumerate(triggers)
    ]

    def batches() -> Iterator[Tensor]:
        for _ in range(config.steps):
            chosen = rng.choice(len(captions), size, replace=False)
            yield torch.from_numpy(np.concatenate([chosen, len(captions) + chosen]))

    def loss(index: Tensor) -> Tensor:
        chosen = index.tolist()
        which = rng.integers(len(stamped), size=len(chosen)).tolist()
        rows = [shown[k] for k in chosen]
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
    *,
    original: TextTower | None = None,
) -> CoefficientSearch:
    """Try every alpha and choose one by the rule of `pydetox.repair.alpha.search_coefficient`.

    directions: What each trigger leads to, unit vectors. A trigger succeeds where features are
    nearer to it than to those of the caption without the trigger, before any repair. original: The
    tower before any repair; default: this one.
    """
    config = config or TOWER_UNLEARNING
    original = original or tower
    clean = original.features(captions)
    stamped = [
        trigger.insert(captions, child_seed("towers.attacked-places", config.seed, number))
        for number, trigger in enumerate(triggers)
    ]
    coefficients = config.alphas()
    own = torch.arange(len(captions))
    before = float(((clean @ clean.T).argmax(dim=1) == own).double().mean())  # some may be alike
    probes = surrogate_captions(tower, captions, triggers, child_seed("towers.probes", config.seed))
    probed = original.features(probes)
    kept, success, drift = list[float](), list[tuple[float, ...]](), list[float]()
    candidates = TowerCandidates(tower, vector)
    for coefficient in coefficients:
        candidate = candidates.at(coefficient)
        now = candidate.features(captions)
        kept.append(float(((now @ clean.T).argmax(dim=1) == own).double().mean()))
        drift.append(max(_distance(now, clean), _distance(candidate.features(probes), probed)))
        success.append(
            tuple(
                success_of(candidate.features(rows), clean, direction)
                for rows, direction in zip(stamped, directions, strict=True)
            )
        )
    chosen, reached = choose_coefficient(
        coefficients, kept, success, config, accuracy_before=before, drift=drift
    )
    return CoefficientSearch(
        coefficients,
        tuple(kept),
        tuple(max(shares) for shares in success),
        chosen,
        reached,
        before,
        drift=tuple(drift),
        compromise=None if reached else find_compromise(kept, success, config, before, drift),
    )


def surrogate_captions(
    tower: TextTower, captions: Sequence[str], triggers: Sequence[TextStamp], seed: int
) -> list[str]:
    """Return each caption with half of its words, at least one, replaced by words of the tower.

    Words of the triggers are not among them: their features are not to be held.
    """
    shown = " ".join(trigger.insert([""], seed)[0] for trigger in triggers).split()
    words = [word for word in tower.words() if word not in shown]
    if not words:
        return list(captions)
    rng = generator("towers.surrogates", seed)
    made = []
    for caption in captions:
        parts = caption.split() or [""]
        count = max(1, len(parts) // 2)
        for place in rng.choice(len(parts), count, replace=False).tolist():
            parts[place] = words[int(rng.integers(len(words)))]
        made.append(" ".join(parts))
    return made


def _distance(first: Tensor, second: Tensor) -> float:
    """Return the mean of 1 - cos of unit rows."""
    return float((1 - (first * second).sum(dim=1)).double().mean().clamp(min=0))


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
