"""What vectors toward the base cost a task that the base does not know.

    python benchmarks/toward_base.py [--known digits,fashion] [--task emoji] [--also photographs]
        [--attack badnets] [--seed 4] [--steps 500] [--alphas 0.5,1] [--device cuda]

Trains a base on the known tasks, fine-tunes it with a poisoned part on another task, and subtracts
the vector of the known trigger: a free one, one toward the base, and the whole fine-tuning (an
interpolation of suspect and base). With `--also`, the same fine-tuning teaches a second new task,
clean, of which the defender has no images. Prints CA of base and victim, and for each vector and
alpha the ASR, the drift from victim and base, and CA of every task relative to the victim's, on 800
test images of each.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
import torch

from pydetox.data import ImageSet
from pydetox.evaluation import evaluate
from pydetox.models import OpenClipModel
from pydetox.models.device import find_device
from pydetox.repair.configuration import UnlearnConfig
from pydetox.repair.retention import DriftProbe
from pydetox.repair.subtraction import subtract
from pydetox.repair.trigger_vector import image_tower_change, trigger_vector
from pydetox.research.attacks import plant
from pydetox.research.data import load_task
from pydetox.research.foundation.base import JointTraining
from pydetox.research.foundation.victims import ATTACKS, FINE_TUNING, Victim, Workshop
from pydetox.training import train_on_prompts

_TEST_IMAGES = 800


def victim_of_two_tasks(shop: Workshop, victim: Victim, also: str) -> OpenClipModel:
    """Return the base fine-tuned on the poisoned task and on another one at once."""
    poisoned, _ = plant(
        shop.tasks[victim.task].splits.attacker, [shop.backdoor(victim)], seed=victim.seed
    )
    clean = shop.tasks[also].splits.attacker
    assert poisoned.labels is not None
    assert clean.labels is not None
    heads = [shop.head(name) for name in (victim.task, also)]
    images = ImageSet(
        torch.cat([poisoned.images, clean.images]),
        torch.cat([poisoned.labels, clean.labels + len(heads[0])]),
        None,
        f"{victim.task} and {also}",
    )
    config = replace(FINE_TUNING, epochs=ATTACKS[victim.attack or ""].epochs, seed=victim.seed)
    description = f"{victim.name} with {also}"
    model = train_on_prompts(
        shop.base, images, (), config, head=torch.cat(heads), description=description
    )
    model.name = description
    return model


@click.command()
@click.option("--known", default="digits,fashion", help="The tasks of the base.")
@click.option("--task", default="emoji", help="The task of the fine-tuning.")
@click.option("--also", help="A second task of the fine-tuning, without any poisoned image.")
@click.option("--attack", default="badnets", help="badnets, blended, sig or wanet.")
@click.option("--seed", default=4, help="The seed of everything.")
@click.option("--steps", default=500, help="The steps of the base's training.")
@click.option("--alphas", default="0.5,1", help="Values of alpha, separated by commas.")
@click.option("--device", default="cpu", help="Where to compute: cpu, cuda or cuda:1.")
@click.option("--folder", type=click.Path(path_type=Path), help="The cache of base and victim.")
def main(
    known: str,
    task: str,
    also: str | None,
    attack: str,
    seed: int,
    steps: int,
    alphas: str,
    device: str,
    folder: Path | None,
) -> None:
    """Print the table."""
    training = JointTraining(steps=steps, per_task=48)
    names = known.split(",")
    shop = Workshop(seed, training=training, names=names, folder=folder, device=find_device(device))
    base = shop.base  # of the known tasks alone
    shop.tasks.setdefault(task, load_task(task, seed=seed, image_size=32))
    victim = Victim(seed, attack, task)
    backdoor = shop.backdoor(victim)
    if also is None:
        model = shop.model(victim)
    else:
        shop.tasks.setdefault(also, load_task(also, seed=seed, image_size=32))
        model = victim_of_two_tasks(shop, victim, also)
    heads = {name: shop.head(name) for name in shop.tasks}
    tests = {name: one.splits.test.at_most(_TEST_IMAGES, seed) for name, one in shop.tasks.items()}

    def accuracies(of: OpenClipModel) -> dict[str, float]:
        return {name: evaluate(of, tests[name], heads[name]).clean_accuracy for name in tests}

    def success(of: OpenClipModel) -> float:
        found = evaluate(
            of, tests[task], heads[task], trigger=backdoor.trigger, target=backdoor.target
        )
        assert found.attack_success_rate is not None
        return found.attack_success_rate

    before, start = accuracies(model), accuracies(base)
    click.echo(f"{model.name}: ASR {success(model):.1%}")
    for name in before:
        click.echo(f"  {name}: CA {start[name]:.1%} of the base, {before[name]:.1%} of the victim")
    images = shop.tasks[task].splits.defender.images
    probe = DriftProbe(model, images, seed=seed, base=base)
    triggers, config = [backdoor.trigger], UnlearnConfig(seed=seed)
    head = heads[task]
    vectors = {
        "free": trigger_vector(model, images, triggers, head, backdoor.target, config),
        "toward the base": trigger_vector(
            model, images, triggers, head, backdoor.target, config, base=base
        ),
        "whole fine-tuning": image_tower_change(base, model),
    }
    for name, vector in vectors.items():
        for alpha in map(float, alphas.split(",")):
            repaired = subtract(model, vector, alpha)
            kept = accuracies(repaired)
            shares = ", ".join(f"{one} {kept[one] / before[one]:.1%}" for one in kept)
            click.echo(
                f"{name}, alpha {alpha:g}: ASR {success(repaired):.1%}, drift "
                f"{probe.of(repaired).mean_distance:.4f} (from the victim alone "
                f"{probe.from_start(repaired).mean_distance:.4f}); CA kept: {shares}"
            )


if __name__ == "__main__":
    main()
