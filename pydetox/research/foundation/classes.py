"""Models of many classes: a base that knows up to 1,000 emoji, and what is fine-tuned from it.

Every fine-tuned model sees a part of the images of its own. Some of the clean ones are references.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ...data import ImageSet
from ...detect.configuration import ScanConfig
from ...inversion import InversionConfig
from ...models import OpenClipModel
from ...rng import child_seed
from ...training import TrainConfig, train_on_prompts
from ..attacks import AttackerView, Backdoor, draw_attack, plant
from ..bench.cache import Cache, code_digest, data_digest, key_of
from ..data import Task, TaskSizes, cache_folder, load_task
from .base import JointTraining, train_base

#: Three blocks of 96 channels on 16 patches of 8 pixels.
CLASSES_CLIP: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": 32,
        "layers": 3,
        "width": 96,
        "head_width": 32,
        "patch_size": 8,
    },
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 64,
        "heads": 2,
        "layers": 2,
    },
}

_TRAINING_CODE = (
    "research/foundation/base.py",
    "research/foundation/classes.py",
    "research/attacks",
    "training.py",
)
_SCAN_CODE = (
    *_TRAINING_CODE,
    "research/foundation/classes_benchmark.py",
    "detect",
    "inversion",
    "ops",
    "models",
    "session.py",
    "api.py",
)

# The share of the attacker's images that each fine-tuned model sees, drawn anew for each.
_OWN_SHARE = 0.7


@dataclass(frozen=True)
class ClassesPlan:
    """Everything that decides a run.

    Attributes:
        classes: The numbers of classes.
        seeds: Of bases and suspects, for each number of classes; those below 10 were developed on.
        training, fine_tuning: Of base and models.
        images: The number of images that the base is trained on, for each number of classes.
        attacks: How the backdoored suspects are attacked.
        victims: The number of suspects for each attack and seed.
        rate: The poisoned share of the fine-tuning images.
        clean: The number of clean suspects per seed.
        references: The number of clean references.
        scan: How models are scanned.
        compared: The numbers of classes for which every class is searched as well. For others, the
            passes of such a search are those of all its steps.
        least_planted: A victim counts when its ASR on test images is at least this.
        draws: The number of sets of references that each clean model is judged by, for the rate of
            false alarms.
        device: Where models are trained, searched and evaluated: `cpu`, `cuda` or `cuda:1`.
    """

    classes: tuple[int, ...] = (100, 1000)
    seeds: tuple[tuple[int, ...], ...] = ((10,), (10,))
    training: JointTraining = field(default_factory=lambda: JointTraining(steps=800, per_task=96))
    fine_tuning: TrainConfig = field(
        default_factory=lambda: TrainConfig(epochs=3, learning_rate=3e-4, batch_size=64)
    )
    images: tuple[int, ...] = (6_000, 8_000)
    attacks: tuple[str, ...] = ("badnets", "blended", "sig")
    victims: int = 1
    rate: float = 0.1
    clean: int = 2
    references: int = 3
    scan: ScanConfig = field(
        default_factory=lambda: ScanConfig(
            inversion=InversionConfig(steps=150, precision="bfloat16")
        )
    )
    compared: tuple[int, ...] = (100,)
    least_planted: float = 0.5
    draws: int = 20
    device: str = "cpu"


def quick_classes_plan() -> ClassesPlan:
    """Return a run of under a minute that shows that everything works, not how well."""
    return ClassesPlan(
        classes=(30,),
        seeds=((10,),),
        training=JointTraining(steps=80, per_task=48),
        fine_tuning=TrainConfig(epochs=1, learning_rate=3e-4, batch_size=64),
        images=(1_200,),
        attacks=("badnets",),
        victims=1,
        clean=1,
        scan=ScanConfig(inversion=InversionConfig(steps=20), families=("patch",)),
        compared=(30,),
        least_planted=0.0,
    )


class ClassesLab:
    """Makes and remembers the models of one number of classes and one seed."""

    def __init__(
        self, plan: ClassesPlan, classes: int, seed: int, folder: Path | None = None
    ) -> None:
        self.plan, self.classes, self.seed = plan, classes, seed
        self.images = plan.images[plan.classes.index(classes)]
        self.cache = Cache(folder or cache_folder() / "foundation")

    @cached_property
    def task(self) -> Task:
        """The emoji."""
        sizes = TaskSizes(self.images, 500, 400, max(800, self.classes))
        return load_task("emoji", seed=self.seed, classes=self.classes, sizes=sizes)

    @cached_property
    def _base_key(self) -> str:
        content: dict[str, Any] = {
            "code": code_digest(_TRAINING_CODE),
            "data": data_digest(self.task.splits.attacker),
            "model": CLASSES_CLIP,
            "training": replace(self.plan.training, seed=self.seed),
        }
        if self.plan.device != "cpu":
            # Rounding differs from device to device; every other key rests on this one.
            content["device"] = self.plan.device
        return key_of("classes-base", content)

    @cached_property
    def base(self) -> OpenClipModel:
        """The model that all others are fine-tuned from."""
        tensors = self.cache.weights(self._base_key)
        if tensors is None:
            model = train_base(
                [self.task],
                replace(self.plan.training, seed=self.seed),
                model_config=CLASSES_CLIP,
                device=self.plan.device,
                description=f"base of {self.classes} classes, seed {self.seed}",
            )
            self.cache.keep_weights(self._base_key, model.storage_state_dict())
            return model
        model = OpenClipModel.from_config(CLASSES_CLIP, seed=self.seed, name="base")
        model.clip.load_state_dict(tensors)
        return model.to(self.plan.device)

    @cached_property
    def head(self) -> Tensor:
        """The zero-shot head, the same for all models."""
        return self.base.zero_shot_head(self.task.class_names, self.task.templates)

    def backdoor(self, attack: str, number: int) -> Backdoor:
        """Return what an attack plants in its suspect of that number."""
        view = AttackerView(self.base, self.task.splits.test.images, self.head)
        seed = child_seed("foundation.classes-trigger", self.seed, attack, number, self.classes)
        (drawn,) = draw_attack(attack, view, rate=self.plan.rate, seed=seed)
        return drawn

    def model(self, kind: str, number: int = 0) -> OpenClipModel:
        """Return a fine-tuned model. kind: `reference`, `clean` or an attack."""
        name = f"{kind}-{number}-{self.classes}-seed{self.seed}"
        content = {
            "base": self._base_key,
            "code": code_digest(_TRAINING_CODE),
            "name": name,
            "fine_tuning": self.plan.fine_tuning,
            "rate": self.plan.rate,
        }
        key = key_of("classes-model", content)
        tensors = self.cache.weights(key)
        if tensors is None:
            seed = child_seed("foundation.classes-model", self.seed, kind, number, self.classes)
            images = self.task.splits.attacker.split((_OWN_SHARE,), seed=seed)[0]
            if kind not in ("reference", "clean"):
                images, _ = plant(images, [self.backdoor(kind, number)], seed=seed)
            trained = train_on_prompts(
                self.base,
                images,
                self.task.templates,
                replace(self.plan.fine_tuning, seed=seed),
                description=name,
            )
            tensors = dict(trained.visual.state_dict())
            self.cache.keep_weights(key, tensors)
        model = self.base.clone()
        model.name = name
        model.visual.load_state_dict(tensors)
        return model

    @property
    def defender(self) -> ImageSet:
        """The defender's images, without labels."""
        return replace(self.task.splits.defender, labels=None)

    def key(self, kind: str, name: str, config: ScanConfig) -> str:
        """Return the name of a result."""
        content = {
            "base": self._base_key,
            "code": code_digest(_SCAN_CODE),
            "name": name,
            "scan": config,
            "fine_tuning": self.plan.fine_tuning,
            "rate": self.plan.rate,
            "references": self.plan.references,
        }
        return key_of(kind, content)
