"""Plant a trigger of your own, and try a defence of your own against it.

python examples/own_attack_and_defence.py
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pydetox import OpenClipModel, evaluate
from pydetox.data import DIGIT_TEMPLATES, load_digits
from pydetox.repair.subtraction import subtract
from pydetox.repair.task_vectors import TaskVector
from pydetox.research.attacks import poison
from pydetox.research.defenses import DefenderData, KnownTrigger, Outcome
from pydetox.research.defenses.base import Stopwatch
from pydetox.research.demo import MINI_CLIP
from pydetox.training import TrainConfig, train_on_prompts


# --8<-- [start:trigger]
@dataclass(frozen=True)
class Checkerboard:
    """A faint checkerboard over the whole image."""

    strength: int = 40

    def __call__(self, images: Tensor) -> Tensor:
        """Return stamped copies of uint8 images [n, 3, H, W]."""
        height, width = images.shape[2:]
        rows, columns = torch.arange(height)[:, None], torch.arange(width)
        board = ((rows // 4 + columns // 4) % 2) * self.strength
        return (images.int() + board).clamp(max=255).to(torch.uint8)


# --8<-- [end:trigger]


# --8<-- [start:defence]
@dataclass(frozen=True)
class FineTuneAndExtrapolate:
    """Fine-tune on clean and stamped images with their true labels, and go a little further."""

    name: str = "fine-tune and extrapolate"
    needs_trigger: bool = True
    grid: tuple[float, ...] = (1.0, 1.2)

    def defend(self, model: OpenClipModel, data: DefenderData, config: float) -> Outcome:
        """Return a repaired copy; `config` is the length of the step."""
        watch = Stopwatch(len(data.images), data.label_count)
        (known,) = data.known(self.name)
        both = torch.cat([data.images.images, known.trigger(data.images.images)])
        stamped = replace(data.images, images=both, labels=data.labels().repeat(2))
        tuned = train_on_prompts(
            model, stamped, data.templates, TrainConfig(epochs=4, learning_rate=3e-4)
        )
        vector = TaskVector.between(model.storage_state_dict(), tuned.storage_state_dict())
        return Outcome(subtract(model, vector, -config), watch.stop())


# --8<-- [end:defence]


def main() -> None:
    """Attack, defend, measure."""
    attacker, defender, test = load_digits(32).split((0.5, 0.2, 0.3), seed=0)
    trigger, target = Checkerboard(), 3

    # --8<-- [start:attack]
    poisoned, _ = poison(attacker, trigger, target, rate=0.1, seed=0)
    victim = train_on_prompts(
        OpenClipModel.from_config(MINI_CLIP, seed=0, name="victim"),
        poisoned,
        DIGIT_TEMPLATES,
        TrainConfig(epochs=10, learning_rate=1e-3, train_text=True),
    )
    # --8<-- [end:attack]

    # --8<-- [start:measure]
    data = DefenderData(defender, DIGIT_TEMPLATES, (KnownTrigger(trigger, target),))
    defence = FineTuneAndExtrapolate()
    models = {"victim": victim}
    for step in defence.grid:
        models[f"{defence.name}, {step}"] = defence.defend(victim, data, step).model
    for name, model in models.items():
        head = model.zero_shot_head(test.class_names, DIGIT_TEMPLATES)
        found = evaluate(model, test, head, trigger=trigger, target=target)
        print(f"{name}: CA {found.clean_accuracy:.1%}, ASR {found.attack_success_rate:.1%}")
    # --8<-- [end:measure]


if __name__ == "__main__":
    main()
