"""Trigger vectors of text towers, and the search for alpha.

The loss of the vector is the distance 1 - cos of features from the tower's own without the trigger:
of captions and of *surrogates*, both without the trigger and with it. In surrogates, random words
of the vocabulary stand for half of a caption's words. They stand for all that the captions do not
talk about, as those of images do (`pydetox.repair.retention`).

A word that is inserted leaves the caption whole: it should do nothing. A character that takes the
place of a letter breaks a word, and so changes features in a clean tower, too. Where a base is
known, captions with such a trigger are therefore led to the features that the base has of them, and
it succeeds only where it does not in the base.

What is kept is the share of clean captions whose features are nearest to those that the same
caption had before, among all captions, up to a cosine of 0.01. Captions can find
themselves while all of them turn away from the images that they belong to. So the drift is limited
as well: the mean distance of features from those before any repair, of captions or of other
surrogates, whichever is larger.

If the base is known that the tower was fine-tuned from, the vector stays between the two
(`pydetox.repair.toward_base`). Then a caption is also kept if it finds itself among those of the
base, and drift is the distance to the nearer one of the two: what a caption means in the base is
nothing that a repair may not bring back.
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
from ...repair.toward_base import SHARE_PER_STEP, TowardBase
from ...rng import child_seed, generator
from ...training import optimize
from ..evaluation import TextStamp
from ..models import TextModel
from ..repair import TextCandidates
from .encoder import TextTower, require_same_shape
from .search import AnyCharacter, CharacterTrigger

# A cosine by which another caption may be nearer, and the caption is kept: prompts of one thing are
# often as near to each other as features may drift.
_SLACK = 0.01

#: The repair of a text tower, unless a caller says otherwise. Class names are closer to each other
#: than images: a drift of 0.01 takes about 3% of the zero-shot accuracy, one of 0.02 a tenth.
TOWER_UNLEARNING = UnlearnConfig(
    steps=240,
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
    base: TextTower | None = None,
    description: str = "trigger vector",
) -> TaskVector:
    """Return tau over the tower's weights, such that theta_b - alpha tau unlearns for alpha > 0.

    captions: Clean captions, at least 2. triggers: Known or recovered triggers. original: The tower
    before any repair, whose features are held; default: this one. base: The tower that it was
    fine-tuned from. theta_b - tau then lies between the two (`pydetox.repair.toward_base`), and the
    configuration's learning rate does not count. Raises DataError for fewer captions, UsageError
    without triggers or for a vector other than `forget`, and ArchitectureError for a base with
    other tensors.
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
    aims = torch.stack(
        [_aims(held, one, shown, rows, base) for one, rows in zip(triggers, stamped, strict=True)]
    )

    def batches() -> Iterator[Tensor]:
        for _ in range(config.steps):
            chosen = rng.choice(len(captions), size, replace=False)
            yield torch.from_numpy(np.concatenate([chosen, len(captions) + chosen]))

    def loss(index: Tensor) -> Tensor:
        chosen = index.tolist()
        which = rng.integers(len(stamped), size=len(chosen)).tolist()
        rows = [shown[k] for k in chosen]
        rows += [stamped[t][k] for k, t in zip(chosen, which, strict=True)]
        index = index.to(held.device)
        wanted = torch.cat([held[index], aims[torch.tensor(which, device=held.device), index]])
        return (1 - (tuned.features_with_gradient(rows) * wanted).sum(dim=1)).mean()

    parameters = tuned.named_parameters()
    trained = list(parameters.values())
    rate: float | list[float] | None = config.learning_rate
    optimizer = None
    if base is not None:
        require_same_shape(base, tower)
        there = base.named_parameters()
        optimizer = TowardBase(trained, [there[name] for name in parameters])
        rate = SHARE_PER_STEP
    optimize(
        trained,
        loss,
        batches(),
        steps=config.steps,
        learning_rate=relative_rates(trained) if rate is None else rate,
        separable=False,
        description=description,
        optimizer=optimizer,
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
    base: TextTower | None = None,
) -> CoefficientSearch:
    """Try every alpha and choose one by the rule of `pydetox.repair.alpha.search_coefficient`.

    directions: What each trigger leads to, unit vectors. A trigger succeeds where features are
    nearer to it than to those of the caption without the trigger, before any repair. original: The
    tower before any repair; default: this one. base: The base that the vector leads to. Features
    that are those of the base have not drifted, and captions that find themselves there are kept.
    """
    config = config or TOWER_UNLEARNING
    original = original or tower
    trusted = [original, *([] if base is None else [base])]
    known = [one.features(captions) for one in trusted]
    clean = known[0]
    stamped = [
        trigger.insert(captions, child_seed("towers.attacked-places", config.seed, number))
        for number, trigger in enumerate(triggers)
    ]
    counted = [
        _counted(trigger, captions, rows, clean, direction, base)
        for trigger, rows, direction in zip(triggers, stamped, directions, strict=True)
    ]
    coefficients = config.alphas()
    before = _kept(clean, known)
    probes = surrogate_captions(tower, captions, triggers, child_seed("towers.probes", config.seed))
    probed = [one.features(probes) for one in trusted]
    kept, success, drift = list[float](), list[tuple[float, ...]](), list[float]()
    candidates = TowerCandidates(tower, vector)
    for coefficient in coefficients:
        candidate = candidates.at(coefficient)
        now = candidate.features(captions)
        kept.append(_kept(now, known))
        drift.append(max(_distance(now, known), _distance(candidate.features(probes), probed)))
        success.append(
            tuple(
                success_of(candidate.features(rows), clean, direction, among)
                for rows, direction, among in zip(stamped, directions, counted, strict=True)
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


def worst_success(
    tower: TextTower,
    captions: Sequence[str],
    triggers: Sequence[tuple[TextStamp, Tensor]],
    *,
    original: TextTower,
    base: TextTower | None = None,
    seed: int = 0,
) -> float:
    """Return the success of the best of some triggers, in [0, 1], by `search_tower_coefficient`.

    triggers: Triggers and the directions that they lead to, at least one. original, base: As there.
    """
    clean, found = original.features(captions), list[float]()
    for number, (trigger, direction) in enumerate(triggers):
        rows = trigger.insert(captions, child_seed("towers.left-places", seed, number))
        among = _counted(trigger, captions, rows, clean, direction, base)
        found.append(success_of(tower.features(rows), clean, direction, among))
    return max(found)


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


def _kept(now: Tensor, known: Sequence[Tensor]) -> float:
    """Return the share of captions nearest to themselves, in one of the towers that know them.

    now, known: Unit rows [N, D] of the same captions. Another caption may be nearer by `_SLACK`.
    """
    found = []
    for one in known:
        cosines = now @ one.T
        found.append(cosines.diagonal() + _SLACK >= cosines.amax(dim=1))
    return float(torch.stack(found).any(dim=0).double().mean())


def _distance(now: Tensor, known: Sequence[Tensor]) -> float:
    """Return the mean of 1 - cos of unit rows to those of the tower that each is nearest to."""
    distances = torch.stack([1 - (now * one).sum(dim=1) for one in known])
    return float(distances.amin(dim=0).double().mean().clamp(min=0))


def success_of(
    triggered: Tensor, clean: Tensor, direction: Tensor, counted: Tensor | None = None
) -> float:
    """Return the share of features nearer to a direction than to those of the clean caption.

    triggered, clean: Unit rows [N, D] of the same captions. direction: A unit vector [D]. counted:
    Which captions may count, bool [N]; default: all. The share is that of all captions.
    """
    nearer = _nearer(triggered, clean, direction)
    return float((nearer if counted is None else nearer & counted).double().mean())


def _nearer(triggered: Tensor, clean: Tensor, direction: Tensor) -> Tensor:
    return triggered @ direction > (triggered * clean).sum(dim=1)


def _replaces(trigger: TextStamp, captions: Sequence[str], stamped: Sequence[str]) -> bool:
    """Return whether a trigger takes the place of a part of captions, and is not just inserted."""
    if isinstance(trigger, CharacterTrigger | AnyCharacter):
        return True
    pairs = zip(captions, stamped, strict=True)
    return any(set(one.split()) - set(other.split()) for one, other in pairs)


def _aims(
    held: Tensor,
    trigger: TextStamp,
    captions: Sequence[str],
    stamped: Sequence[str],
    base: TextTower | None,
) -> Tensor:
    """Return the features that captions with a trigger should have, unit rows [N, D]; see above."""
    if base is None or not _replaces(trigger, captions, stamped):
        return held
    return base.features(stamped).to(held)


def _counted(
    trigger: TextStamp,
    captions: Sequence[str],
    stamped: Sequence[str],
    clean: Tensor,
    direction: Tensor,
    base: TextTower | None,
) -> Tensor | None:
    """Return the captions in which a trigger's success counts, bool [N], None for all of them."""
    if base is None or not _replaces(trigger, captions, stamped):
        return None
    return ~_nearer(base.features(stamped), clean, direction)


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
