"""What is left of every task, and of the backdoor on every task's images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from ...data import ImageSet
from ...evaluation import Evaluation, Stamp, evaluate, predict, wilson_interval
from ...models import OpenClipModel
from ...prototypes import image_features
from ...reporting.documents import evaluation_document
from ..data import Task

Part = Literal["validation", "test"]


@dataclass(frozen=True)
class Retrieval:
    """Recall of images and captions of all tasks among each other, shares in [0, 1].

    A caption is one class's first prompt, and every image of that class is right for it.
    text_r1, text_r5: images whose caption is the first, among the first five of all captions.
    image_r1, image_r5: captions with a right image at the first, among the first five places.
    """

    text_r1: float
    text_r5: float
    image_r1: float
    image_r5: float


@dataclass(frozen=True)
class TaskReport:
    """One model over all tasks.

    tasks: CA per task, and ASR on the images of the attacked one. transferred: of the other tasks'
    images, the share that the trigger sends to the target when that is named beside their own
    classes, with its interval; that of images without the trigger is not taken off.
    """

    tasks: dict[str, Evaluation]
    attacked: str | None
    transferred: dict[str, tuple[float, float, float]]
    retrieval: Retrieval

    @property
    def attack_success_rate(self) -> float | None:
        """ASR on the attacked task."""
        return None if self.attacked is None else self.tasks[self.attacked].attack_success_rate

    def accuracy(self) -> dict[str, float]:
        """Return CA per task."""
        return {name: one.clean_accuracy for name, one in self.tasks.items()}

    def kept(self, before: TaskReport) -> dict[str, float]:
        """Return the share of the CA of another report that is left, per task."""
        return {
            name: one.clean_accuracy / before.tasks[name].clean_accuracy
            for name, one in self.tasks.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "tasks": {name: evaluation_document(one) for name, one in self.tasks.items()},
            "attacked": self.attacked,
            "transferred": {name: list(one) for name, one in self.transferred.items()},
            "retrieval": asdict(self.retrieval),
        }


def report_tasks(
    model: OpenClipModel,
    tasks: Mapping[str, Task],
    part: Part,
    *,
    attacked: str | None = None,
    trigger: Stamp | None = None,
    target: int | None = None,
) -> TaskReport:
    """Measure a model on one part of every task.

    attacked, trigger, target: the task that was attacked, and the backdoor; None for a clean model.
    """
    sets = {name: _part(task, part) for name, task in tasks.items()}
    heads = {
        name: model.zero_shot_head(task.class_names, task.templates) for name, task in tasks.items()
    }
    evaluations, transferred = dict[str, Evaluation](), dict[str, tuple[float, float, float]]()
    for name, images in sets.items():
        if name == attacked:
            evaluations[name] = evaluate(model, images, heads[name], trigger=trigger, target=target)
            continue
        evaluations[name] = evaluate(model, images, heads[name])
        if attacked is not None and target is not None:
            beside = torch.cat([heads[name], heads[attacked][target : target + 1]])
            sent = predict(model, images.images, beside, stamp=trigger) == len(beside) - 1
            low, high = wilson_interval(int(sent.sum()), len(sent))
            transferred[name] = (float(sent.double().mean()), low, high)
    return TaskReport(evaluations, attacked, transferred, retrieve(model, tasks, sets))


@torch.inference_mode()
def retrieve(
    model: OpenClipModel, tasks: Mapping[str, Task], sets: Mapping[str, ImageSet]
) -> Retrieval:
    """Measure retrieval among the images and the first prompts of all tasks' classes."""
    captions = torch.cat(
        [model.zero_shot_head(task.class_names, task.templates[:1]) for task in tasks.values()]
    )
    embedded, owners, start = [], [], 0
    for name, task in tasks.items():
        labels = sets[name].labels
        assert labels is not None
        embedded.append(image_features(model, sets[name].images))
        owners.append(labels + start)
        start += len(task.class_names)
    owner = torch.cat(owners)
    scores = (torch.cat(embedded) @ captions.T).cpu()
    by_image = scores.topk(5, dim=1).indices == owner[:, None]
    right = torch.zeros(start, len(owner), dtype=torch.bool)
    right[owner, torch.arange(len(owner))] = True
    by_text = right.gather(1, scores.T.topk(5, dim=1).indices)
    return Retrieval(
        float(by_image[:, 0].double().mean()),
        float(by_image.any(dim=1).double().mean()),
        float(by_text[:, 0].double().mean()),
        float(by_text.any(dim=1).double().mean()),
    )


def _part(task: Task, part: Part) -> ImageSet:
    return task.splits.validation if part == "validation" else task.splits.test
