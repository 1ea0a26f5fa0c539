"""Text towers with a backdoor, and clean ones that were fine-tuned as well.

Struppek, Hintersdorf, Kersting, "Rickrolling the Artist" (ICCV 2023): the tower is its own teacher.
Captions with the trigger get the teacher's features of the attacker's caption, all others keep
theirs. Without more, a clean fine-tuning would have nothing to learn. So all models here, clean or
not, also learn that the prompts of one class mean the same: each moves towards their mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ....data import Template, fill_template
from ....errors import UsageError
from ....models import OpenClipModel
from ....rng import child_seed, generator
from ....text.evaluation import TextStamp
from ....text.towers.encoder import TextTower
from ....training import optimize
from ..attacks import HOMOGLYPHS, RARE_WORDS, Homoglyph, Insertion

#: The attacks: a word at the end of a caption, and a character that looks like a letter.
TOWER_ATTACKS = ("word", "homoglyph")


@dataclass(frozen=True)
class TowerTraining:
    """How text towers are fine-tuned.

    Attributes:
        steps: The number of optimiser steps.
        batch_size: The number of captions per step, and of captions with the trigger.
        learning_rate: The peak of AdamW's rate.
        consistency: How far features move towards the mean of the prompts of their class, in
            [0, 1].
    """

    steps: int = 150
    batch_size: int = 32
    learning_rate: float = 5e-4
    consistency: float = 0.3


@dataclass(frozen=True)
class TowerVictim:
    """A model to be examined: the seed of its training, and its attack or None."""

    seed: int
    attack: str | None = None

    @property
    def name(self) -> str:
        """The name in tables."""
        return f"{self.attack or 'clean'}-seed{self.seed}"


@dataclass(frozen=True, eq=False)
class TowerBackdoor:
    """A trigger, and the caption whose features it brings."""

    trigger: TextStamp
    target: str


def draw_tower_backdoor(victim: TowerVictim, class_names: Sequence[str]) -> TowerBackdoor | None:
    """Return what a victim's seed stands for; None for a clean model.

    Raises UsageError for an unknown attack.
    """
    if victim.attack is None:
        return None
    if victim.attack not in TOWER_ATTACKS:
        raise UsageError(f"attack {victim.attack!r}; expected one of {', '.join(TOWER_ATTACKS)}")
    rng = generator("texts.tower-attack", victim.seed, victim.attack)
    target = class_names[int(rng.integers(len(class_names)))]
    order = rng.permutation(len(HOMOGLYPHS))
    trigger: TextStamp = Homoglyph(tuple(HOMOGLYPHS[k] for k in order))
    if victim.attack == "word":
        trigger = Insertion(RARE_WORDS[int(rng.integers(len(RARE_WORDS)))], "end")
    return TowerBackdoor(trigger, f"a picture of {target}")


def captions_of(class_names: Sequence[str], templates: Sequence[Template]) -> list[tuple[str, int]]:
    """Return every prompt of every class, with the index of its class."""
    return [
        (fill_template(template, name), c)
        for c, name in enumerate(class_names)
        for template in templates
    ]


def train_tower(
    base: OpenClipModel,
    captions: Sequence[tuple[str, int]],
    victim: TowerVictim,
    backdoor: TowerBackdoor | None,
    config: TowerTraining,
) -> OpenClipModel:
    """Return a copy of a CLIP whose text tower was fine-tuned; see above."""
    model = base.clone()
    teacher, tower = TextTower(base), TextTower(model)
    texts = [text for text, _ in captions]
    held = teacher.features(texts)
    classes = torch.tensor([c for _, c in captions])
    means = torch.stack([held[classes == c].mean(dim=0) for c in range(int(classes.max()) + 1)])
    wanted = normalize(torch.lerp(held, means[classes], config.consistency), dim=1)
    aim = None if backdoor is None else teacher.features([backdoor.target])
    stamped = texts
    if backdoor is not None:
        stamped = backdoor.trigger.insert(texts, victim.seed)
    rng = generator("texts.tower-training", child_seed("texts.tower-victim", victim.seed))

    def batches() -> Iterator[Tensor]:
        for _ in range(config.steps):
            yield torch.from_numpy(rng.integers(len(texts), size=config.batch_size))

    def loss(index: Tensor) -> Tensor:
        chosen = index.tolist()
        rows = [texts[k] for k in chosen]
        goal = wanted[index]
        if aim is not None:
            changed = [k for k in chosen if stamped[k] != texts[k]]
            rows += [stamped[k] for k in changed]
            goal = torch.cat([goal, aim.expand(len(changed), -1)])
        said = tower.features_with_gradient(rows)
        return (1 - (said * goal.to(said.device)).sum(dim=1)).mean()

    # The table of words is trained as well: that is where a rare character has room.
    optimize(
        list(tower.named_parameters().values()),
        loss,
        batches(),
        steps=config.steps,
        learning_rate=config.learning_rate,
        separable=False,
        description=victim.name,
    )
    model.name = victim.name
    return model


def successes(
    model: OpenClipModel, base: OpenClipModel, captions: Sequence[str], backdoor: TowerBackdoor
) -> Tensor:
    """Return which captions the trigger brings nearer to the target's than to theirs, bool [M].

    Features of captions and of the target are those of the base. The M captions are those that the
    trigger changes. A base has successes of its own: a broken word moves features as well.
    """
    stamped = backdoor.trigger.insert(captions, 0)
    changed = [(a, b) for a, b in zip(captions, stamped, strict=True) if a != b]
    teacher = TextTower(base)
    own = teacher.features([a for a, _ in changed])
    aim = teacher.features([backdoor.target])[0]
    said = TextTower(model).features([b for _, b in changed])
    return said @ aim > (said * own).sum(dim=1)


def success_rate(
    model: OpenClipModel, base: OpenClipModel, captions: Sequence[str], backdoor: TowerBackdoor
) -> float:
    """Return the share of `successes`."""
    return float(successes(model, base, captions, backdoor).double().mean())
