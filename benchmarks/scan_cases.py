"""The models of bench_scan: a base, and clean and backdoored models that start from it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pydetox.data import ImageSet
from pydetox.models import OpenClipModel
from pydetox.research.attacks import Backdoor
from pydetox.research.bench.cache import Cache
from pydetox.research.foundation.base import JointTraining
from pydetox.research.foundation.classes import ClassesLab, ClassesPlan
from pydetox.research.foundation.verdicts import SMALL_CLIP, VerdictPlan, drawn_models
from pydetox.research.foundation.victims import FINE_TUNING, Victim, Workshop
from pydetox.training import TrainConfig


@dataclass(frozen=True)
class Suspect:
    """A model, and the truth about it.

    Attributes:
        name: In tables.
        key: What decides its weights.
        make: Returns the model.
        backdoor: What was planted; None in a clean model.
    """

    name: str
    key: str
    make: Callable[[], OpenClipModel]
    backdoor: Backdoor | None


@dataclass(frozen=True)
class Case:
    """Models with one base and one set of classes.

    Attributes:
        classes: The number of classes.
        tower: What the models are, in words.
        base: The base.
        images: The defender's, without labels.
        test: Images that CA and ASR are measured on.
        templates: The prompts.
        suspects: The models that are judged.
        cache: Where results are kept.
    """

    classes: int
    tower: str
    base: OpenClipModel
    images: ImageSet
    test: ImageSet
    templates: tuple[str, ...]
    suspects: tuple[Suspect, ...]
    cache: Cache


def quick_case() -> Case:
    """Return two models of the embedded digits that are made in seconds, and are worth nothing."""
    shop = Workshop(
        10,
        training=JointTraining(steps=40, per_task=16),
        fine_tuning=replace(FINE_TUNING, epochs=1),
        tower=SMALL_CLIP,
        names=("digits",),
    )
    victims = [(Victim(1_000, None, "digits"), shop), (Victim(1_000, "badnets", "digits"), shop)]
    return _of_workshop(shop, victims)


def ten_classes(seed: int, models: int, device: str) -> Case:
    """Return the tower of the part `verdicts` of bench_foundation, and models of Fashion-MNIST.

    Of the models of that part, those with the largest learning rates below 6e-4 are taken, as many
    clean ones as ones with BadNets. Such rates plant the backdoor (ASR of 90% and more).
    """
    plan = VerdictPlan(seeds=(seed,), device=device)
    shop = Workshop(
        seed,
        training=plan.training,
        tower=plan.tower,
        names=plan.base_tasks,
        device=device,
    )
    victims = list[tuple[Victim, Workshop]]()
    for attack in (None, "badnets"):
        rates = [(rate, v) for v, rate in drawn_models(plan) if v.attack == attack and rate < 6e-4]
        for rate, victim in sorted(rates, key=lambda one: -one[0])[:models]:
            tuning = replace(FINE_TUNING, epochs=plan.epochs, learning_rate=rate)
            victims.append((victim, _with_tuning(shop, tuning)))
    return _of_workshop(shop, victims)


def many_classes(classes: int, seed: int, models: int, device: str) -> Case:
    """Return the tower of bench_classes, and models of that many emoji."""
    images = 6_000 if classes <= 100 else 8_000
    plan = ClassesPlan(classes=(classes,), seeds=((seed,),), images=(images,), device=device)
    lab = ClassesLab(plan, classes, seed)

    def of(kind: str, number: int) -> Suspect:
        name = f"{kind}-{number}-{classes}-seed{seed}"
        backdoor = None if kind == "clean" else lab.backdoor(kind, number)
        key = lab.key("scan-time", name, plan.scan)
        return Suspect(name, key, lambda: lab.model(kind, number), backdoor)

    return Case(
        classes,
        "3 blocks of 96 channels, 17 tokens, 32 pixels; emoji",
        lab.base,
        lab.defender,
        lab.task.splits.test,
        lab.task.templates,
        tuple(of(kind, k) for kind in ("clean", "badnets") for k in range(models)),
        lab.cache,
    )


def _with_tuning(shop: Workshop, tuning: TrainConfig) -> Workshop:
    other = copy.copy(shop)  # base and tasks are shared
    other.fine_tuning = tuning
    return other


def _of_workshop(shop: Workshop, victims: Sequence[tuple[Victim, Workshop]]) -> Case:
    task = shop.tasks[victims[0][0].task]

    def of(victim: Victim, made_in: Workshop) -> Suspect:
        backdoor = None if victim.attack is None else made_in.backdoor(victim)
        return Suspect(victim.name, made_in.key(victim), lambda: made_in.model(victim), backdoor)

    return Case(
        len(task.class_names),
        f"2 blocks of 64 channels, 5 tokens, 16 pixels; {task.name}",
        shop.base,
        replace(task.splits.defender, labels=None),
        task.splits.test,
        task.templates,
        tuple(of(*one) for one in victims),
        shop.cache,
    )
