"""The survey of weights: a checkpoint's difference to the base, and to vectors of known attacks.

This decides no verdict, because fine-tuning changes weights with and without a backdoor. It gives
the order in which checkpoints are scanned, and the layers that changed most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints import describe_mismatch, identify_checkpoint
from ..checkpoints.index import refuse_ambiguous
from ..checkpoints.sources import open_weights
from ..checkpoints.weights import read_open
from ..detect.distance import counted, squared_norm
from ..errors import CheckpointError, DataError
from ..ops import weight_diff_gram, weight_diff_project

#: The number of tensors that are named: those with the largest share of the squared difference.
_NAMED = 5


@dataclass(frozen=True, eq=False)
class Reference:
    """The weights that checkpoints are compared with.

    Attributes:
        base: The tensors of the base, by name.
        norm: The Euclidean norm of the base.
        squares: The squared norm of each tensor of the base.
        known: The tensors of each known vector, by its name. A missing tensor is zero.
    """

    base: Mapping[str, Tensor]
    norm: float
    squares: Mapping[str, float]
    known: tuple[tuple[str, Mapping[str, Tensor]], ...] = ()

    @classmethod
    def of(cls, base: Mapping[str, Tensor], known_files: Sequence[str] = ()) -> Reference:
        """Return the floating-point tensors of a base, and vectors from `.safetensors` files.

        Raises DataError, which names the file, if a vector has tensors that the base lacks.
        """
        floats = {k: v for k, v in base.items() if v.is_floating_point()}
        squares = {name: squared_norm(None, value) for name, value in floats.items()}
        norm = math.sqrt(sum(squares.values()))
        known = tuple((name, _read_vector(name, floats)) for name in known_files)
        return cls(floats, norm, squares, known)

    def relation(self, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return how weights differ from the base, as plain data.

        The keys are "norm", the Euclidean norm of the difference; "relative", this norm divided by
        that of the base; "distance", the relative distance of the image tower (see
        `detect.distance`); "layers", the tensors with the largest share of the squared difference;
        and "known", the cosine with each known vector. For weights of another architecture, the
        only key is "mismatch", which says how they differ. All sums are in float64 in a fixed
        order: they have the same bits for any number of threads.
        """
        floats = {k: v for k, v in weights.items() if v.is_floating_point()}
        mismatch = describe_mismatch(_shapes(self.base), _shapes(floats))
        if mismatch is not None:
            return {"mismatch": mismatch}
        squares = _squares(self.base, floats)
        total = math.fsum(squares.values())
        ranked = sorted(squares, key=lambda name: (-squares[name], name))[:_NAMED]
        return {
            "norm": math.sqrt(total),
            "relative": math.sqrt(total) / self.norm if self.norm else None,
            "distance": self._distance(squares),
            "layers": [
                {"name": name, "share": squares[name] / total} for name in ranked if squares[name]
            ],
            "known": [
                {"name": name, "cosine": self._cosine(vector, floats, total)}
                for name, vector in self.known
            ],
        }

    def _distance(self, squares: Mapping[str, float]) -> float | None:
        names = counted(self.base)
        norm = math.fsum(self.squares[name] for name in names)
        return math.sqrt(math.fsum(squares[name] for name in names) / norm) if norm else None

    def _cosine(
        self, vector: Mapping[str, Tensor], weights: Mapping[str, Tensor], total: float
    ) -> float | None:
        names = list(vector)
        mine = [self.base[name] for name in names]
        zeros = [torch.zeros_like(t) for t in vector.values()]
        length = float(weight_diff_gram(zeros, [list(vector.values())])[0, 0])
        product = float(
            weight_diff_project(mine, [weights[n] for n in names], [list(vector.values())])[0]
        )
        scale = math.sqrt(total * length)
        return product / scale if scale else None


def suspicion(relation: Mapping[str, Any] | None) -> tuple[float, float]:
    """Return the sort key of the queue, larger first: similarity to a known vector, distance."""
    if not relation or "mismatch" in relation:
        return (0.0, 0.0)
    cosines = [one["cosine"] or 0.0 for one in relation["known"]]
    return (max([0.0, *cosines]), relation["relative"] or 0.0)


def _squares(base: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the squared norm of each tensor's difference."""
    return {name: squared_norm(value, weights[name]) for name, value in base.items()}


def _read_vector(path: str, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    try:
        weights = identify_checkpoint(Path(path)).weights
        # The sandbox indexes the file, because a stranger may have made it.
        with open_weights(weights) as file:
            refuse_ambiguous(file.findings)
            tensors, _ = read_open(file)
    except CheckpointError as error:
        raise DataError(f"{Path(path)}: no weight vector: {error}") from error
    found, expected = _shapes(tensors), _shapes(base)
    for name, shape in found.items():
        if expected.get(name) != shape:
            raise DataError(
                f"{path}: has a tensor {name!r} of shape {list(shape)}, the base "
                + (f"{list(expected[name])}" if name in expected else "none of that name")
            )
    if not tensors:
        raise DataError(f"{path}: no weight vector: it holds no tensors")
    return tensors


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
