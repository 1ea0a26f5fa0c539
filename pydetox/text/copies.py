"""Clean copies of a base, fine-tuned until their weights lie as far from it as a suspect's do.

The reasons are those of `detect.copies`: copies that hardly move look like their base, and every
honest fine-tuning looks suspicious beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import DataError, UsageError
from ..ops import weight_diff_gram
from ..progress import Progress
from ..rng import child_seed, generator
from .models import TextModel
from .texts import TextSet

#: The number of steps in which a copy is to get to its distance, and the texts of each.
STEPS, BATCH = 60, 16

#: A copy that is not there after this many times `STEPS` steps is not made.
_PATIENCE = 4

#: The least share of the base's accuracy that copies keep; those that lose more are broken models.
LEAST_ACCURACY = 0.8

#: Suspects that are nearer to their base than this are compared with copies that are as far.
_LEAST_DISTANCE = 2.0**-10

#: Above it, a model has little in common with its base.
_MOST_DISTANCE = 2.0**-0.5


class OutOfReachError(DataError):
    """Copies of the base cannot be fine-tuned that far on these texts."""


def text_distance(base: TextModel, model: TextModel) -> float:
    """Return how far a model's matrices lie from its base's, relative to the base's norm.

    Embeddings and the layers after them count; vectors do not (see `detect.distance`). Raises
    UsageError if they do not have the same tensors.
    """
    require_same_tensors(base, model)
    return _Measured(base).of(model.state_dict())


def require_same_tensors(base: TextModel, model: TextModel) -> None:
    """Raise UsageError, naming what differs, unless two models have tensors of the same shapes."""
    theirs, ours = base.state_dict(), model.state_dict()
    types = [one.config["model_type"] for one in (base, model)]
    differ = next(
        (
            name
            for name in (*theirs, *ours)
            if name not in theirs or name not in ours or theirs[name].shape != ours[name].shape
        ),
        None,
    )
    if types[0] != types[1]:
        found = f"model_type {types[0]!r} and {types[1]!r}"
    elif differ is not None:
        shapes = [
            list(one[differ].shape) if differ in one else "not there" for one in (theirs, ours)
        ]
        found = f"tensor {differ!r} is {shapes[0]} and {shapes[1]}"
    else:
        return
    raise UsageError(
        f"{base.name} does not fit {model.name}: {found} (a base needs the architecture and the "
        "classes of the suspect)"
    )


def nearest_rung(distance: float) -> float:
    """Return the power of two that is nearest to a distance by their ratio, at least 2^-10.

    References at a rung serve all suspects for which it is the nearest.
    """
    if not 0 < distance < math.inf:
        return _LEAST_DISTANCE if distance == 0 else distance
    return max(_LEAST_DISTANCE, 2.0 ** math.floor(math.log2(distance) + 0.5))


def copies_at_distance(
    base: TextModel, texts: TextSet, distance: float, *, count: int, max_tokens: int, seed: int
) -> Iterator[TextModel]:
    """Yield copies of a base that moved by a relative distance, each on a bootstrap of the texts.

    texts: With labels. Raises OutOfReachError if copies do not get there, or no longer work there.
    """
    assert texts.labels is not None
    distance = require_reachable(distance)
    labels = torch.tensor(texts.labels)
    before = float((base.predict(texts.texts).argmax(dim=1) == labels).double().mean())
    rows = base.tokenizer.encode(texts.texts, min(max_tokens, base.max_tokens))

    def loss(copy: TextModel, chosen: Sequence[int]) -> Tensor:
        logits = copy.logits_with_gradient(copy.batch([rows[k] for k in chosen]))
        return torch.nn.functional.cross_entropy(logits, labels[list(chosen)].to(logits.device))

    for k in range(count):
        copy = copy_at_distance(
            base, len(texts), loss, distance, k, seed, f"reference {k + 1} of {count}"
        )
        after = float((copy.predict(texts.texts).argmax(dim=1) == labels).double().mean())
        if after < LEAST_ACCURACY * before:
            raise OutOfReachError(
                f"copies of the base that moved as far ({distance:.2g} of its norm) keep "
                f"{after / max(before, 1e-9):.0%} of its accuracy on {len(texts)} texts, less than "
                f"{LEAST_ACCURACY:.0%}: give more texts, or references= that were made as the "
                "suspect was"
            )
        yield copy


def require_reachable(distance: float) -> float:
    """Return the distance that copies are to have; OutOfReachError if none could be compared."""
    if not distance <= _MOST_DISTANCE:
        raise OutOfReachError(
            f"the weights lie {distance:.0%} of the base's norm away from the base, too far for "
            "copies of it to be comparable: give the base= that the model was fine-tuned from, or "
            "references= that were made as the model was"
        )
    return max(distance, _LEAST_DISTANCE)


def copy_at_distance(
    base: TextModel,
    count: int,
    loss_of: Callable[[TextModel, Sequence[int]], Tensor],
    distance: float,
    number: int,
    seed: int,
    description: str,
) -> TextModel:
    """Return a copy of a base that was fine-tuned until it had moved by a relative distance.

    count: The number of texts, of which the copy sees a bootstrap. loss_of: The loss of a copy on
    some of them, by their numbers. number: Tells copies apart. Raises OutOfReachError if the copy
    does not get there.
    """
    measured = _Measured(base)
    drawn = generator("texts.bootstrap", seed, number).integers(count, size=count)
    rng = generator("texts.copies", seed, number)
    copy = base.copy(f"{base.name}, fine-tuned {number + 1}")
    parameters = [one for one in copy.module.parameters() if one.is_floating_point()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    # Adam moves each weight by about the rate in each step, partly back and forth.
    optimizer = torch.optim.Adam(parameters, lr=distance * measured.rms / math.sqrt(STEPS))
    reached, step = 0.0, 0
    with Progress(f"{description}: fine-tuning", STEPS) as progress:
        order: list[int] = []
        while reached < distance and step < _PATIENCE * STEPS:
            if len(order) < BATCH:
                order += [int(drawn[int(k)]) for k in rng.permutation(len(drawn))]
            chosen, order = order[:BATCH], order[BATCH:]
            slopes = torch.autograd.grad(loss_of(copy, chosen), parameters, allow_unused=True)
            for parameter, slope in zip(parameters, slopes, strict=True):
                parameter.grad = slope
            optimizer.step()
            step += 1
            reached = measured.of(copy.state_dict())
            if step == STEPS // 5 and reached > 0:
                # Distances grow like the square root of the number of steps, or faster.
                wanted = distance * math.sqrt(step / STEPS)
                for group in optimizer.param_groups:
                    group["lr"] *= min(10.0, max(0.1, wanted / reached))
            progress.update()
    for parameter in parameters:
        parameter.requires_grad_(False)
    if not distance <= reached < math.inf:
        raise OutOfReachError(
            f"copies of the base moved {reached:.2g} of its norm in {step} steps of fine-tuning, "
            f"and the suspect moved about {distance:.2g}: give references= that were made as the "
            "suspect was"
        )
    start = base.state_dict()
    with torch.no_grad():
        for name, value in copy.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.lerp(start[name].to(value), value, distance / reached))
    return copy


class _Measured:
    """Distances from a base, whose matrices and norm are found once."""

    def __init__(self, base: TextModel) -> None:
        self._matrices = {
            name: value.detach()
            for name, value in base.state_dict().items()
            if value.ndim > 1 and value.is_floating_point()
        }
        norm = math.fsum(_squared(None, value) for value in self._matrices.values())
        self._norm = math.sqrt(norm)
        self.rms = self._norm / math.sqrt(sum(v.numel() for v in self._matrices.values()))

    def of(self, weights: Mapping[str, Tensor]) -> float:
        """Return the relative distance of weights."""
        moved = math.fsum(_squared(v, weights[name]) for name, v in self._matrices.items())
        return math.sqrt(moved) / self._norm if self._norm else math.inf


def _squared(base: Tensor | None, weights: Tensor) -> float:
    first = torch.zeros_like(weights) if base is None else base
    return float(weight_diff_gram([first], [[weights.detach()]])[0, 0])


def copy_seed(seed: int) -> int:
    """Return the seed of all copies of a scan."""
    return child_seed("texts.references", seed)
