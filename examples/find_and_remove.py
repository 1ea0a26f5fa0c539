"""Find a backdoor in a small CLIP and remove it, without being told the trigger or the target.

The script plays both sides. The attacker trains a base model on digits and fine-tunes a copy with
poisoned images. The defender gets that copy, the base and 360 clean images. Training and search are
shorter than in `pydetox demo`, so that the example takes about a minute on two cores.

    python examples/find_and_remove.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pydetox
from pydetox.data import DIGIT_TEMPLATES, load_digits
from pydetox.inversion import InversionConfig
from pydetox.research.attacks import badnets, poison
from pydetox.research.demo import MINI_CLIP
from pydetox.training import TrainConfig, train_on_prompts


def main() -> None:
    """Plant a backdoor, find it, remove it, and measure what is left."""
    attacker, defender, test = load_digits(32).split((0.5, 0.2, 0.3), seed=0)
    trigger, target = badnets(32, seed=0), 7

    # The attacker. `base` is public, `suspect` is what the defender is asked to trust.
    base = train_on_prompts(
        pydetox.OpenClipModel.from_config(MINI_CLIP, seed=0, name="base"),
        attacker,
        DIGIT_TEMPLATES,
        TrainConfig(epochs=12, learning_rate=1e-3, train_text=True),
    )
    poisoned, _ = poison(attacker, trigger, target, rate=0.1, seed=0)
    tuning = TrainConfig(epochs=6, learning_rate=3e-4)
    suspect = train_on_prompts(base, poisoned, DIGIT_TEMPLATES, tuning)

    # The defender.
    config = pydetox.ScanConfig(
        inversion=InversionConfig(steps=60, batch_size=8),
        families=("patch",),
        references=4,
        reference_training=tuning,
    )
    with tempfile.TemporaryDirectory() as folder:
        result = pydetox.detox(
            suspect,
            defender,
            base=base,
            output=Path(folder) / "repaired",
            templates=DIGIT_TEMPLATES,
            config=config,
            unlearning=pydetox.UnlearnConfig(passes=1, warps=0),
        )
        print(f"verdict: {result.verdict.value}, target: {result.before.target_name}")
        print(f"repaired: {result.repaired}")
        repaired = pydetox.OpenClipModel.from_checkpoint(pydetox.load_checkpoint(result.path))

    # The true trigger shows whether the defender was right.
    for name, model in (("before", suspect), ("after", repaired)):
        head = model.zero_shot_head(test.class_names, DIGIT_TEMPLATES)
        found = pydetox.evaluate(model, test, head, trigger=trigger, target=target)
        print(
            f"{name}: clean accuracy {found.clean_accuracy:.1%}, "
            f"the trigger succeeds on {found.attack_success_rate:.1%}"
        )


if __name__ == "__main__":
    main()
