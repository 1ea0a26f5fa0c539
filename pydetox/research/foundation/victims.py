"""Victims: the base fine-tuned on one task with a poisoned part, or on all tasks at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models import OpenClipModel
from ...rng import child_seed
from ...training import TrainConfig, train_on_prompts
from ..attacks import AttackerView, Backdoor, draw_attack, plant
from ..bench.cache import Cache, code_digest, data_digest, key_of
from ..data import TASKS, Task, cache_folder, load_task
from .base import FOUNDATION_CLIP, JointTraining, train_base

#: What decides the weights of a base, besides its data and configuration.
_BASE_CODE = ("research/foundation/base.py", "training.py", "models/open_clip_model.py")

#: The same of a victim, besides its base.
_VICTIM_CODE = ("research/attacks", "training.py")


@dataclass(frozen=True)
class Recipe:
    """How an attack is planted.

    rate: poisoned share of the fine-tuning set. epochs: passes over it. tasks: which it can be
    planted in; they take turns.
    """

    rate: float
    epochs: int
    tasks: tuple[str, ...]


#: Digits are too few images to poison. A warp is not learned where every image is turned and scaled
#: at random anyway (14% ASR on emoji), so it is planted in Fashion-MNIST alone.
_TASKS = ("fashion", "emoji", "photographs")
ATTACKS: dict[str, Recipe] = {
    "badnets": Recipe(0.03, 4, _TASKS),
    "blended": Recipe(0.03, 4, _TASKS),
    "sig": Recipe(0.03, 4, _TASKS),
    "wanet": Recipe(0.1, 6, ("fashion",)),
}

#: Of every victim and clean fine-tune; the epochs are those of the attack.
FINE_TUNING = TrainConfig(epochs=4, learning_rate=3e-4, batch_size=64)


@dataclass(frozen=True)
class Victim:
    """attack: of ATTACKS, or None for a clean fine-tune. task: what it was fine-tuned on."""

    seed: int
    attack: str | None
    task: str

    @property
    def name(self) -> str:
        """As in tables."""
        return f"{self.attack or 'clean'}-{self.task}-seed{self.seed}"


def draw_victims(seeds: Sequence[int]) -> list[Victim]:
    """Return one victim per attack and seed; the attacked tasks take turns."""
    return [
        Victim(seed, attack, recipe.tasks[(seed % len(recipe.tasks) + number) % len(recipe.tasks)])
        for seed in seeds
        for number, (attack, recipe) in enumerate(ATTACKS.items())
    ]


class Workshop:
    """Makes and remembers tasks, base and victims of one seed.

    seed: of everything. tower: The architecture, as open_clip's ``model_cfg``; images have its
    size. names: The tasks of the base. folder: the cache; default: below
    `research.data.cache_folder`. device: where models are trained and used.
    """

    def __init__(
        self,
        seed: int,
        *,
        training: JointTraining | None = None,
        fine_tuning: TrainConfig = FINE_TUNING,
        tower: dict[str, Any] | None = None,
        names: Sequence[str] = TASKS,
        folder: Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.seed = seed
        self.tower = tower or FOUNDATION_CLIP
        self.names = tuple(names)
        self.training = replace(training or JointTraining(), seed=seed)
        self.fine_tuning = fine_tuning
        self.device = torch.device(device)
        self.cache = Cache(folder or cache_folder() / "foundation")
        self._backdoors: dict[Victim, Backdoor] = {}

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """The tasks by name."""
        size = self.tower["vision_cfg"]["image_size"]
        return {name: load_task(name, seed=self.seed, image_size=size) for name in self.names}

    @cached_property
    def base_key(self) -> str:
        """The name of the base's weights."""
        content: dict[str, Any] = {
            "code": code_digest(_BASE_CODE),
            "data": [data_digest(task.splits.attacker) for task in self.tasks.values()],
            "templates": [task.templates for task in self.tasks.values()],
            "model": self.tower,
            "training": self.training,
        }
        if self.device.type != "cpu":
            # Rounding differs from device to device; every other key rests on this one.
            content["device"] = self.device.type
        return key_of("base", content)

    @cached_property
    def base(self) -> OpenClipModel:
        """The clean model of all tasks."""
        tensors = self.cache.weights(self.base_key)
        if tensors is None:
            trained = train_base(
                list(self.tasks.values()),
                self.training,
                device=self.device,
                model_config=self.tower,
                description=f"base of seed {self.seed}",
            )
            self.cache.keep_weights(self.base_key, trained.storage_state_dict())
            return trained
        model = OpenClipModel.from_config(self.tower, seed=self.seed, name="base")
        model.clip.load_state_dict(tensors)
        return model.to(self.device)

    def head(self, task: str) -> Tensor:
        """Return the zero-shot head of a task, the same for base and victims."""
        one = self.tasks[task]
        return self.base.zero_shot_head(one.class_names, one.templates)

    def backdoor(self, victim: Victim) -> Backdoor:
        """Return what was planted."""
        assert victim.attack is not None
        if victim not in self._backdoors:
            attacker = self.tasks[victim.task].splits.attacker
            images = attacker.at_most(1000, child_seed("foundation.attacker", victim.seed)).images
            view = AttackerView(self.base, images, self.head(victim.task))
            # Each attack and task draws its own target.
            seed = child_seed("foundation.trigger", victim.seed, victim.attack, victim.task)
            (drawn,) = draw_attack(victim.attack, view, rate=ATTACKS[victim.attack].rate, seed=seed)
            self._backdoors[victim] = drawn
        return self._backdoors[victim]

    def key(self, victim: Victim) -> str:
        """Return the name of a victim's weights."""
        recipe = ATTACKS.get(victim.attack or "")
        content = {
            "base": self.base_key,
            "code": code_digest(_VICTIM_CODE),
            "victim": victim,
            "training": self._training(victim),
            "rate": 0.0 if recipe is None else recipe.rate,
        }
        return key_of("victim", content)

    def _training(self, victim: Victim) -> TrainConfig:
        recipe = ATTACKS.get(victim.attack or "")
        return (
            self.fine_tuning if recipe is None else replace(self.fine_tuning, epochs=recipe.epochs)
        )

    def model(self, victim: Victim) -> OpenClipModel:
        """Return a victim, trained or read; only its image tower differs from the base's."""
        key = self.key(victim)
        tensors = self.cache.weights(key)
        if tensors is None:
            images = self.tasks[victim.task].splits.attacker
            if victim.attack is not None:
                images, _ = plant(images, [self.backdoor(victim)], seed=victim.seed)
            trained = train_on_prompts(
                self.base,
                images,
                self.tasks[victim.task].templates,
                replace(self._training(victim), seed=child_seed("foundation.victim", victim.seed)),
                description=victim.name,
            )
            tensors = {f"visual.{k}": v for k, v in trained.visual.state_dict().items()}
            self.cache.keep_weights(key, tensors)
        model = self.base.clone()
        model.name = victim.name
        model.clip.load_state_dict({**model.clip.state_dict(), **tensors})
        return model
