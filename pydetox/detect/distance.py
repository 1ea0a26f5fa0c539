"""How far a model's weights lie from those of its base, and which references are as far.

The distance is that of the image towers' matrices: the Euclidean norm of all their differences over
that of the base's. Biases, norms' gains and other vectors are left out. They have few numbers, and
their size says little about what they do.

Distances fall into rungs, powers of two. References that moved by a rung's distance serve all
suspects whose distance is nearer to this rung than to another, by their ratio: one set of
references serves many suspects, and a suspect has moved at most sqrt(2) times less or more than its
references.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from ..models import OpenClipModel
from ..ops import weight_diff_gram

#: The rungs of references, as powers of two. Models that moved less than the first one are compared
#: with it: their searches find what those of the base find. Above the last one, a model has little
#: in common with its base (two models that were trained separately are about sqrt(2) apart).
FIRST_RUNG, LAST_RUNG = -10, -1

#: The names of an image tower's weights in open_clip's state dicts begin with this.
IMAGE_TOWER = "visual."


def counted(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a state dict that a distance counts: the image tower's matrices."""
    return {
        name: value
        for name, value in weights.items()
        if name.startswith(IMAGE_TOWER) and value.ndim > 1 and value.is_floating_point()
    }


def squared_norm(base: Tensor | None, weights: Tensor) -> float:
    """Return the squared norm of a difference, or of the weights without a base, in float64."""
    first = weights.new_zeros(()).expand_as(weights) if base is None else base
    return float(weight_diff_gram([first], [[weights]])[0, 0])


def relative_distance(base: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> float:
    """Return the distance of state dicts with the same tensors, relative to the base's norm.

    The result is infinite for a base of zeros, and NaN if weights are not finite.
    """
    matrices = counted(base)
    moved = math.fsum(squared_norm(value, weights[name]) for name, value in matrices.items())
    norm = math.fsum(squared_norm(None, value) for value in matrices.values())
    return math.sqrt(moved / norm) if norm else math.inf


def weight_scale(model: OpenClipModel) -> float:
    """Return the root mean square of the image tower's matrices."""
    matrices = counted(model.clip.state_dict()).values()
    squares = math.fsum(squared_norm(None, value) for value in matrices)
    return math.sqrt(squares / sum(value.numel() for value in matrices))


def model_distance(base: OpenClipModel, model: OpenClipModel) -> float:
    """Return `relative_distance` of two models of one architecture."""
    return relative_distance(base.clip.state_dict(), model.clip.state_dict())


def rung_of(distance: float) -> float | None:
    """Return the distance of the references for a model, or None if the model is too far away."""
    if math.isnan(distance):
        return None
    if distance <= 2.0**FIRST_RUNG:
        return 2.0**FIRST_RUNG
    if distance == math.inf:
        return None
    power = math.floor(math.log2(distance) + 0.5)
    return 2.0 ** max(power, FIRST_RUNG) if power <= LAST_RUNG else None


def too_far(distance: float) -> str:
    """Return why a model that lies so far from its base has no references, and what would help."""
    if math.isnan(distance):
        return "the distance of the weights from those of the base is no number: check the weights"
    return (
        f"the weights lie {distance:.0%} of the base's norm away from the base, too far for copies "
        "of it to be comparable: give the base= that the model was fine-tuned from, or references= "
        "that were made as the model was"
    )
