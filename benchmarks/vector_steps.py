"""Which learning rate a trigger vector needs in towers of several sizes.

    python benchmarks/vector_steps.py [--sizes 1,2] [--seeds 0,1] [--rates 4e-4,auto]
        [--device cuda]

Trains CLIPs of several sizes on digits, plants a BadNets patch in each by fine-tuning, and
subtracts the vector of the known trigger, made with one learning rate for all weights, or with
those of `repair.step_sizes` (auto). Prints, for each, the chosen alpha, and ASR, CA kept and drift
of features on digits that nothing was made or chosen on.
"""

from __future__ import annotations

import time
from typing import Any

import click

from pydetox.data import DIGIT_TEMPLATES, ImageSet
from pydetox.evaluation import evaluate
from pydetox.models import OpenClipModel
from pydetox.models.device import find_device
from pydetox.repair.alpha import search_coefficient
from pydetox.repair.configuration import UnlearnConfig
from pydetox.repair.retention import DriftProbe
from pydetox.repair.subtraction import subtract
from pydetox.repair.trigger_vector import trigger_vector
from pydetox.research.attacks import badnets, poison
from pydetox.research.data import load_task
from pydetox.training import TrainConfig, train_on_prompts

#: Layers and channels; images of 16 pixels in patches of 8.
SIZES = ((1, 32), (2, 96), (4, 192))


def tower(layers: int, width: int) -> dict[str, Any]:
    """Return open_clip's configuration of a tower."""
    return {
        "embed_dim": 48,
        "vision_cfg": {
            "image_size": 16,
            "layers": layers,
            "width": width,
            "head_width": 32,
            "patch_size": 8,
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 1,
        },
    }


def row(
    victim: OpenClipModel, defender: ImageSet, test: ImageSet, trigger: Any, rate: float | None
) -> str:
    """Return one line of the table."""
    head = victim.zero_shot_head(defender.class_names or (), DIGIT_TEMPLATES)
    before = evaluate(victim, test, head, trigger=trigger, target=3)
    config, start = UnlearnConfig(learning_rate=rate), time.perf_counter()
    probe = DriftProbe(victim, defender.images, seed=0)
    vector = trigger_vector(victim, defender.images, [trigger], head, 3, config)
    found = search_coefficient(victim, vector, defender, [trigger], head, [3], config, probe=probe)
    repaired = subtract(victim, vector, found.coefficient)
    after = evaluate(repaired, test, head, trigger=trigger, target=3)
    drift = probe.of(repaired).mean_distance
    assert before.attack_success_rate is not None
    assert after.attack_success_rate is not None
    return (
        f"{'auto' if rate is None else f'{rate:g}':>8} {found.coefficient:6.1f} "
        f"{before.attack_success_rate:7.1%} {after.attack_success_rate:7.1%} "
        f"{after.clean_accuracy / before.clean_accuracy:8.1%} {drift:8.4f} "
        f"{'yes' if found.reached else 'no':>6} {time.perf_counter() - start:5.0f} s"
    )


@click.command()
@click.option("--sizes", default="1,2,3", help="Which of the sizes, by number.")
@click.option("--seeds", default="0", help="Seeds, separated by commas.")
@click.option("--rates", default="1e-4,4e-4,1.6e-3,auto", help="Learning rates.")
@click.option("--device", default="cpu", help="Where to compute: cpu, cuda or cuda:1.")
def main(sizes: str, seeds: str, rates: str, device: str) -> None:
    """Print the table."""
    place = find_device(device)
    tried = [None if one == "auto" else float(one) for one in rates.split(",")]
    click.echo(
        f"{'rate':>8} {'alpha':>6} {'before':>7} {'ASR':>7} {'CA kept':>8} {'drift':>8} limits"
    )
    for seed in map(int, seeds.split(",")):
        splits = load_task("digits", seed=seed, image_size=16).splits
        for layers, width in (SIZES[int(one) - 1] for one in sizes.split(",")):
            # The rate of training falls with the width, as that of hidden weights should.
            rate = 0.1 / width
            base = train_on_prompts(
                OpenClipModel.from_config(tower(layers, width), seed=seed).to(place),
                splits.attacker,
                DIGIT_TEMPLATES,
                TrainConfig(epochs=25, learning_rate=min(3e-3, rate), train_text=True, seed=seed),
                description="base",
            )
            trigger = badnets(16, seed=seed)
            poisoned, _ = poison(splits.attacker, trigger, 3, rate=0.1, seed=seed)
            training = TrainConfig(epochs=10, learning_rate=min(3e-3, rate) / 2, seed=seed)
            victim = train_on_prompts(base, poisoned, DIGIT_TEMPLATES, training)
            click.echo(f"seed {seed}, {layers} layers of {width} channels")
            for one in tried:
                click.echo(row(victim, splits.defender, splits.test, trigger, one))


if __name__ == "__main__":
    main()
