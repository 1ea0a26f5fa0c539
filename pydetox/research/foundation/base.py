"""The base: one small CLIP trained on four tasks at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from ...data import fill_template
from ...errors import UsageError
from ...models import OpenClipModel
from ...rng import generator
from ...training import optimize
from ..data import Task

#: Four blocks of 128 channels on 16 patches of 8 pixels.
FOUNDATION_CLIP: dict[str, Any] = {
    "embed_dim": 96,
    "vision_cfg": {
        "image_size": 32,
        "layers": 4,
        "width": 128,
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


@dataclass(frozen=True)
class JointTraining:
    """How the base is trained.

    Attributes:
        steps: The number of optimiser steps.
        per_task: The number of images of each task per step.
        learning_rate: The peak of AdamW's rate (see `training.optimize`).
        weight_decay: AdamW's decoupled weight decay.
        seed: The seed of the weights, batches and prompts.
    """

    steps: int = 1_500
    per_task: int = 40
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.per_task < 1 or not self.learning_rate > 0:
            raise UsageError(
                f"steps {self.steps}, per_task {self.per_task}, learning_rate "
                f"{self.learning_rate}; expected all above 0"
            )


def train_base(
    tasks: Sequence[Task],
    config: JointTraining,
    *,
    model_config: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
    description: str = "base",
) -> OpenClipModel:
    """Return a CLIP trained on the attackers' parts of all tasks at once.

    The loss is CLIP's, symmetric over images and captions, with one caption per class in the batch:
    a prompt of its own task, drawn anew in every step. Captions that several images share are one
    column, so that none is its own negative. Raises DataError for tasks without labels.
    """
    model = OpenClipModel.from_config(
        model_config or FOUNDATION_CLIP, seed=config.seed, name="base"
    ).to(device)
    rng = generator("foundation.base", config.seed)
    tokens = [
        torch.stack(
            [
                model.tokenize([fill_template(template, name) for name in task.class_names])
                for template in task.templates
            ]
        )
        for task in tasks
    ]

    def batches() -> Iterator[Tensor]:
        orders = [np.empty(0, dtype=np.int64) for _ in tasks]
        for _ in range(config.steps):
            chosen = []
            for k, task in enumerate(tasks):
                while len(orders[k]) < config.per_task:
                    orders[k] = np.concatenate(
                        [orders[k], rng.permutation(len(task.splits.attacker))]
                    )
                chosen.append(orders[k][: config.per_task])
                orders[k] = orders[k][config.per_task :]
            yield torch.from_numpy(np.stack(chosen))

    def loss(batch: Tensor) -> Tensor:
        pixels, captions, columns, start = [], [], [], 0
        for task, prompts, index in zip(tasks, tokens, batch, strict=True):
            part = task.splits.attacker
            assert part.labels is not None
            present, column = torch.unique(part.labels[index], return_inverse=True)
            which = torch.from_numpy(rng.integers(len(prompts), size=len(present)))
            pixels.append(part.images[index])
            captions.append(prompts[which, present])
            columns.append(column + start)
            start += len(present)
        column = torch.cat(columns).to(model.device)
        seen = normalize(model.encode_pixels(model.pixels(torch.cat(pixels))), dim=-1)
        said = normalize(model.encode_tokens(torch.cat(captions)), dim=-1)
        scale = model.clip.logit_scale
        assert isinstance(scale, Tensor)
        logits = scale.exp().clamp(max=100) * seen @ said.T
        # Text to image: each caption's images share its probability equally.
        owners = torch.nn.functional.one_hot(column, start).T.float()
        owners = owners / owners.sum(dim=1, keepdim=True)
        return (cross_entropy(logits, column) + cross_entropy(logits.T, owners)) / 2

    parameters = [p for name, p in model.clip.named_parameters() if "token_embedding" not in name]
    model.clip.train()
    optimize(
        parameters,
        loss,
        batches(),
        steps=config.steps,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        separable=False,
        description=description,
    )
    model.clip.eval()
    return model
