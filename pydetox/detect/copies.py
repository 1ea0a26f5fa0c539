"""The clean copies of a base that a calibration searches: fine-tuned as told, or as far as told.

Copies that hardly move look like their base, and every honest fine-tuning looks suspicious beside
them. Copies that move too far hide a backdoor in their scatter. By default, copies are therefore
fine-tuned until their weights lie as far from the base's as the suspect's do (see
`pydetox.detect.distance`).

A short pilot finds the learning rate at which a copy gets there in `STEPS` steps. It fine-tunes the
base for a fifth of them, and measures how the distance grows. Distances of Adam grow in proportion
to the rate, and like a power of the number of steps. Each copy then trains at this rate until it is
there. Its last step is shortened to end exactly at the distance.

Suspects differ in their data, too. Copies of one base on the same few images would be more alike
than suspects are. Therefore each copy is trained on a bootstrap sample of the images: as many as
there are, drawn with replacement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from ..data import ImageSet, Template
from ..errors import DataError
from ..evaluation import predict
from ..models import OpenClipModel
from ..rng import child_seed, generator
from ..session import Session
from ..training import TrainConfig, train_on_prompts
from .configuration import ScanConfig
from .distance import counted, squared_norm

#: The number of steps in which a copy is to get to its distance, and the batch of each. This is a
#: tenth of the images that a default search of ten classes takes.
STEPS, BATCH = 160, 32

#: A copy that is not there after this many times `STEPS` steps is not made.
_PATIENCE = 4

#: The rounds of the pilot, and how far from `STEPS` its forecast may be.
_ROUNDS, _CLOSE_ENOUGH = 4, 1.25

#: The least share of the base's accuracy on the given images that copies keep. Copies that lose
#: more are broken models, and a suspect that works is not one.
LEAST_ACCURACY = 0.8


_Stop: TypeAlias = Callable[[OpenClipModel, int], bool]


class OutOfReachError(DataError):
    """Copies of the base cannot be fine-tuned that far on these images."""


def fine_tuned_copies(
    session: Session, config: ScanConfig, distance: float | None
) -> Iterator[OpenClipModel]:
    """Yield the references that are made of a session's model, each with its seed.

    distance: That of the copies (see `distance.rungs_around`); None for copies whose fine-tuning
    `config.reference_training` describes, with the base itself as the first reference. Without
    labels, the copies learn the base's own predictions. Raises OutOfReachError if copies do not get
    there, or no longer work there.
    """
    base, labelled = session.model, session.images
    head = None
    if config.objective == "label-free" and not session.has_head:
        # The model's own groups of images stand for classes that nobody has named.
        head = session.prototypes
        groups = predict(base, labelled.images, head)
        labelled = replace(labelled, labels=groups, class_names=None)
    elif labelled.labels is None:
        labelled = replace(labelled, labels=predict(base, labelled.images, session.head))
    if distance is None:
        yield base
        yield from _as_told(session, labelled, config, head)
    else:
        yield from _as_far(session, labelled, config, head, distance)


def numbered(k: int, count: int, distance: float | None) -> str:
    """Return what progress calls reference k of some; distance: from the base, if that is given."""
    at = "" if distance is None else f" at distance {distance:.2g}"
    return f"reference {k + 1} of {count}{at}"


def _as_told(
    session: Session, labelled: ImageSet, config: ScanConfig, head: Tensor | None
) -> Iterator[OpenClipModel]:
    assert config.reference_training is not None
    for k in range(1, config.references):
        copy = train_on_prompts(
            session.model,
            labelled,
            session.templates,
            replace(config.reference_training, seed=_training_seed(config, k)),
            head=head,
            description=f"reference {k + 1} of {config.references}: fine-tuning",
        )
        copy.name = f"{session.model.name}, fine-tuned {k}"
        yield copy


def _as_far(
    session: Session,
    labelled: ImageSet,
    config: ScanConfig,
    head: Tensor | None,
    distance: float,
) -> Iterator[OpenClipModel]:
    base, templates = session.model, session.templates
    rate = pilot_rate(base, labelled, templates, distance, head=head, seed=config.seed)
    directions = session.head if head is None else head
    before = _accuracy(base, labelled, directions)
    for k in range(config.references):
        # A suspect is judged beside copies of two distances, which must have nothing in common.
        drawn = generator("calibration.bootstrap", config.seed, k, f"{distance:g}").integers(
            len(labelled), size=len(labelled)
        )
        copy = copy_at_distance(
            base,
            labelled.subset(drawn),
            templates,
            distance,
            head=head,
            learning_rate=rate,
            seed=_training_seed(config, k, f"{distance:g}"),
            description=f"{numbered(k, config.references, distance)}: fine-tuning",
        )
        copy.name = f"{base.name}, fine-tuned {k + 1}, moved by {distance:.2g}"
        kept = _accuracy(copy, labelled, directions) / max(before, 1 / len(labelled))
        if kept < LEAST_ACCURACY:
            raise OutOfReachError(
                f"copies of the base that moved as far ({distance:.2g} of its norm) keep {kept:.0%}"
                f" of its accuracy on {len(labelled)} images, less than {LEAST_ACCURACY:.0%}: give "
                "more images, or references= that were made as the suspect was"
            )
        yield copy


def pilot_rate(
    base: OpenClipModel,
    images: ImageSet,
    templates: Sequence[Template],
    distance: float,
    *,
    head: Tensor | None = None,
    seed: int,
) -> float:
    """Return the learning rate at which a copy gets to a distance in about `STEPS` steps.

    images: With labels and class names. head: As in `train_on_prompts`. The result is the best of a
    few rounds, each with a fifth of the steps.
    """
    measured = _Measured(base)
    length = max(2, STEPS // 5)
    # Adam moves each weight by about the rate in each step, partly back and forth.
    rate = distance * measured.rms / math.sqrt(STEPS)
    best = (math.inf, rate)
    for _ in range(_ROUNDS):
        seen = dict[int, float]()

        def watch(model: OpenClipModel, step: int, seen: dict[int, float] = seen) -> bool:
            if step in (length // 2, length):
                seen[step] = measured.of(model)
            return step >= length

        _train(
            base,
            images,
            templates,
            TrainConfig(1, rate, BATCH, seed=child_seed("calibration.pilot", seed)),
            steps=length,
            head=head,
            description="references: learning rate",
            stop=watch,
        )
        half, whole = seen[length // 2], seen[length]
        if not (0 < half <= whole < math.inf):
            rate /= 10  # training has diverged
            continue
        power = min(1.0, max(0.5, math.log(whole / half) / math.log(length / (length // 2))))
        factor = distance / (whole * (STEPS / length) ** power)
        best = min(best, (abs(math.log(factor)), rate))
        if 1 / _CLOSE_ENOUGH <= factor <= _CLOSE_ENOUGH:
            break
        rate *= factor
    return best[1]


def copy_at_distance(
    base: OpenClipModel,
    images: ImageSet,
    templates: Sequence[Template],
    distance: float,
    *,
    head: Tensor | None = None,
    learning_rate: float,
    seed: int,
    description: str = "fine-tuning",
) -> OpenClipModel:
    """Return a copy of a base, fine-tuned until its weights moved by a relative distance.

    Raises OutOfReachError if it does not get there.
    """
    measured = _Measured(base)
    reached = 0.0

    def there(model: OpenClipModel, step: int) -> bool:
        nonlocal reached
        reached = measured.of(model)
        return not reached < distance

    copy = _train(
        base,
        images,
        templates,
        TrainConfig(1, learning_rate, BATCH, seed=seed),
        steps=_PATIENCE * STEPS,
        head=head,
        description=description,
        stop=there,
    )
    if not distance <= reached < math.inf:
        raise OutOfReachError(
            f"copies of the base moved {reached:.2g} of its norm in {_PATIENCE * STEPS} steps of "
            f"fine-tuning, and the suspect moved about {distance:.2g}: give references= that were "
            "made as the suspect was"
        )
    with torch.no_grad():
        for name, value in copy.visual.named_parameters():
            start = base.visual.get_parameter(name).to(value)
            value.copy_(torch.lerp(start, value, distance / reached))
    return copy


def _train(
    base: OpenClipModel,
    images: ImageSet,
    templates: Sequence[Template],
    config: TrainConfig,
    *,
    steps: int,
    head: Tensor | None,
    description: str,
    stop: _Stop,
) -> OpenClipModel:
    epochs = math.ceil(steps / math.ceil(len(images) / config.batch_size))

    def at_last(model: OpenClipModel, step: int) -> bool:
        return stop(model, step) or step >= steps

    return train_on_prompts(
        base,
        images,
        templates,
        replace(config, epochs=epochs),
        head=head,
        description=description,
        stop=at_last,
    )


class _Measured:
    """Distances from a base, whose matrices and norm are found once."""

    def __init__(self, base: OpenClipModel) -> None:
        self._matrices = counted(base.clip.state_dict())
        self._norm = math.sqrt(math.fsum(squared_norm(None, v) for v in self._matrices.values()))
        self.rms = self._norm / math.sqrt(sum(v.numel() for v in self._matrices.values()))

    def of(self, model: OpenClipModel) -> float:
        """Return the relative distance of a model."""
        weights = model.clip.state_dict()
        moved = math.fsum(squared_norm(v, weights[name]) for name, v in self._matrices.items())
        return math.sqrt(moved) / self._norm if self._norm else math.inf


def _training_seed(config: ScanConfig, number: int, *distance: str) -> int:
    return child_seed("calibration.training", config.seed, number, *distance)


def _accuracy(model: OpenClipModel, images: ImageSet, head: Tensor) -> float:
    assert images.labels is not None
    return float((predict(model, images.images, head) == images.labels).double().mean())
