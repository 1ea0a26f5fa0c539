"""Models with weights theta_b - alpha tau, as their files can hold them."""

from __future__ import annotations

import torch

from ..errors import ArchitectureError
from ..models import OpenClipModel
from .task_vectors import TaskVector


def subtract(model: OpenClipModel, vector: TaskVector, coefficient: float) -> OpenClipModel:
    """Return a copy with weights theta_b - coefficient * vector, as its file can hold them."""
    candidates = Candidates(model, vector)
    return candidates.at(coefficient)


class Candidates:
    """One copy of a model that gets the weights theta_b - alpha * vector for one alpha at a time.

    Every alpha is computed from theta_b itself, so rounding errors do not accumulate. No file is
    read again.
    """

    def __init__(self, model: OpenClipModel, vector: TaskVector) -> None:
        self._candidate = model.clone()
        start, weights = model.clip.state_dict(), self._candidate.clip.state_dict()
        absent = sorted(vector.tensors.keys() - weights.keys())
        if absent:
            raise ArchitectureError(f"the model has no tensor {absent[0]!r} to subtract from")
        self._changed = [
            (weights[name], start[name], change.to(start[name].device), model.storage_dtype(name))
            for name, change in vector.tensors.items()
        ]

    def is_start(self, coefficient: float) -> bool:
        """Whether `at` returns theta_b itself: nothing is subtracted, and nothing is rounded."""
        as_stored = all(weight.dtype == dtype for weight, *_, dtype in self._changed)
        return coefficient == 0 and as_stored

    @torch.no_grad()
    def at(self, coefficient: float) -> OpenClipModel:
        """Return the copy, changed in place: it is the same object every time."""
        for weight, start, change, dtype in self._changed:
            torch.add(start, change, alpha=-coefficient, out=weight)
            if dtype != weight.dtype:
                # Round as the file does, so that the tested weights are the saved ones.
                weight.copy_(weight.to(dtype))
        return self._candidate
