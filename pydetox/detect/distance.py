"""How far a model's weights lie from those of its base, and which references are about as far.

The distance is that of the image towers' matrices: the Euclidean norm of all their differences over
that of the base's. Biases, norms' gains and other vectors are left out. They have few numbers, and
their size says little about what they do.

References lie at rungs: distances that are powers of two. A suspect is judged beside the references
at the two rungs around its own distance. What is usual at its distance is interpolated between the
two on a logarithmic scale. One set of references serves all suspects around it.
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


def rungs_around(distance: float) -> dict[float, float] | None:
    """Return the two rungs around a distance, each with its weight; None if it is too far away.

    The weights are those of an interpolation of log distances; their sum is 1. A distance below
    the first rung counts as that rung, and one just above the last rung as that one.
    """
    # 0.5: halfway, on a logarithmic scale, to the rung that there is none of.
    if math.isnan(distance) or distance >= 2.0 ** (LAST_RUNG + 0.5):
        return None
    place = math.log2(min(max(distance, 2.0**FIRST_RUNG), 2.0**LAST_RUNG))
    below = min(math.floor(place), LAST_RUNG - 1)
    share = place - below
    return {2.0**below: 1 - share, 2.0 ** (below + 1): share}


def too_far(distance: float) -> str:
    """Return why a model that lies so far from its base has no references, and what would help."""
    if math.isnan(distance):
        return "the distance of the weights from those of the base is no number: check the weights"
    return (
        f"the weights lie {distance:.0%} of the base's norm away from the base, too far for copies "
        "of it to be comparable: give the base= that the model was fine-tuned from, or references= "
        "that were made as the model was"
    )
