"""The models of a benchmark: base, victims, clean fine-tunes and references, made once and kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from ...data import (
    ImageSet,
    Splits,
    default_templates,
    load_images,
    split_fashion_mnist,
    split_in_four,
)
from ...errors import DataError
from ...models import OpenClipModel
from ...rng import child_seed, generator
from ...training import train_on_prompts
from ..attacks import AttackerView, Backdoor, draw_attack, plant
from .cache import (
    TRAINING_CODE,
    Cache,
    code_digest,
    data_digest,
    key_of,
)
from .plan import Plan

#: The attack that the maps of xi are drawn for.
_XI_ATTACK = "badnets"

#: Equal parts of the way from a victim to its repair, between which it is measured.
_PATH_PARTS = 8


@dataclass(frozen=True)
class Suspect:
    """A model to judge or repair, or a clean model that the defender compares with.

    Attributes:
        seed: The seed of its base, training and attack.
        attack: A name of `attacks.ATTACKS`; None for a clean fine-tuning.
        number: The index among the clean models.
        reference: Whether it is a reference of the calibration. References are fine-tuned on images
            of their own and never measured.
    """

    seed: int
    attack: str | None
    number: int = 0
    reference: bool = False

    @property
    def name(self) -> str:
        """The name in tables and file names."""
        kind = "reference" if self.reference else "clean"
        return f"{self.attack or f'{kind}-{self.number}'}-seed{self.seed}"


class Models:
    """The cached models and data of one seed of one plan.

    plan: The configuration. seed: The seed of the splits, the base and all suspects. folder: The
    folder of the cache.
    """

    def __init__(self, plan: Plan, seed: int, folder: Path) -> None:
        self.plan, self.seed = plan, seed
        self.cache = Cache(folder)
        self.templates = default_templates(plan.data)
        self._planted: dict[str, tuple[Backdoor, ...]] = {}

    @cached_property
    def splits(self) -> Splits:
        """The parts of the data, each of at most its planned size."""
        plan, size = self.plan, int(self.plan.model_config["vision_cfg"]["image_size"])
        source, _, root = plan.data.partition("=")
        if source == "fashion-mnist":
            return split_fashion_mnist(
                size,
                attacker=plan.attacker,
                defender=plan.defender,
                validation=plan.validation,
                test=plan.test,
                seed=self.seed,
                folder=root or None,
            )
        images = load_images(plan.data, image_size=size, resize=True)
        if images.labels is None or not images.class_names:
            raise DataError(f"{plan.data}: a benchmark needs labels and class names")
        parts = split_in_four(images, self.seed)
        wanted = (plan.attacker, plan.defender, plan.validation, plan.test)
        given = (parts.attacker, parts.defender, parts.validation, parts.test)
        few = [
            part.at_most(count, child_seed("bench.parts", self.seed, k))
            for k, (part, count) in enumerate(zip(given, wanted, strict=True))
        ]
        return Splits(few[0], few[1], few[2], few[3])

    @cached_property
    def base(self) -> OpenClipModel:
        """The clean model that all suspects of the seed are fine-tuned from."""
        plan = self.plan
        training = replace(plan.base_training, seed=self.seed)
        start = OpenClipModel.from_config(plan.model_config, seed=self.seed, name="base")
        tensors = self.cache.weights(self._base_key)
        if tensors is None:
            trained = train_on_prompts(
                start.to(plan.device),
                self.splits.attacker,
                self.templates,
                training,
                description=f"base of seed {self.seed}",
            )
            tensors = trained.storage_state_dict()
            self.cache.keep_weights(self._base_key, tensors)
        start.clip.load_state_dict(tensors)
        return start.to(plan.device)

    @cached_property
    def _base_key(self) -> str:
        return key_of(
            "base",
            {
                "code": code_digest(TRAINING_CODE),
                "data": data_digest(self.splits.attacker),
                "model": self.plan.model_config,
                "training": self.plan.base_training,
                "templates": self.templates,
                "seed": self.seed,
            }
            # Rounding differs from device to device; every other key rests on this one.
            | ({} if self.plan.device == "cpu" else {"device": self.plan.device}),
        )

    @cached_property
    def head(self) -> Tensor:
        """The zero-shot head of the base and of every suspect; they share the text tower."""
        return self.base.zero_shot_head(self.names, self.templates)

    @property
    def names(self) -> tuple[str, ...]:
        """The class names."""
        names = self.splits.attacker.class_names
        assert names is not None
        return names

    @cached_property
    def _poisonable(self) -> ImageSet:
        seed = child_seed("bench.poisonable", self.seed)
        return self.splits.attacker.at_most(self.plan.fine_tuning_images, seed)

    def _reference_images(self, number: int) -> ImageSet:
        """Return the images of a reference: as many as a suspect has, drawn from the same part.

        The images that a model saw change its trigger sizes about as much as its seed does.
        References with the same images would therefore be more alike than a suspect is to them.
        """
        rng = generator("bench.reference-images", self.seed, number)
        drawn = rng.permutation(len(self.splits.attacker))[: len(self._poisonable)]
        return self.splits.attacker.subset(drawn.tolist())

    @property
    def references(self) -> list[Suspect]:
        """The clean models that the defender has."""
        return [Suspect(self.seed, None, k, True) for k in range(self.plan.reference_models)]

    def backdoors(self, suspect: Suspect) -> tuple[Backdoor, ...]:
        """Return the backdoors that were planted; empty for a clean model."""
        if suspect.attack is None:
            return ()
        name = suspect.attack
        if name not in self._planted:  # BadCLIP optimises its patch
            few = self.splits.attacker.at_most(1000, child_seed("bench.attacker", self.seed))
            view = AttackerView(self.base, few.images, self.head)
            self._planted[name] = draw_attack(name, view, rate=self.plan.rate(name), seed=self.seed)
        return self._planted[name]

    def key(self, suspect: Suspect) -> str:
        """Return the name of a suspect's weights."""
        content = {
            "base": self._base_key,
            "attack": suspect.attack,
            "number": suspect.number,
            "rate": None if suspect.attack is None else self.plan.rate(suspect.attack),
            "images": len(self._poisonable),
            "training": self.plan.training(suspect.attack),
        }
        if suspect.reference:
            content["reference"] = True
        return key_of("model", content)

    def model(self, suspect: Suspect) -> OpenClipModel:
        """Return the suspect, trained or read; only its image tower differs from the base's."""
        key = self.key(suspect)
        tensors = self.cache.weights(key)
        if tensors is None:
            images = self._poisonable
            if suspect.reference:
                images = self._reference_images(suspect.number)
            if suspect.attack is not None:
                images, _ = plant(images, self.backdoors(suspect), seed=self.seed)
            kind = "reference" if suspect.reference else "suspect"
            seed = child_seed("bench.suspect", self.seed, kind, suspect.number)
            trained = train_on_prompts(
                self.base,
                images,
                self.templates,
                replace(self.plan.training(suspect.attack), seed=seed),
                description=suspect.name,
            )
            tensors = {
                f"visual.{name}": value.cpu() for name, value in trained.visual.state_dict().items()
            }
            self.cache.keep_weights(key, tensors)
        model = self.base.clone()
        model.name = suspect.name
        model.clip.load_state_dict({**model.clip.state_dict(), **tensors})
        return model
