"""Task arithmetic: differences of weights, their sums and multiples.

Source: Ilharco et al., "Editing Models with Task Arithmetic" (ICLR 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .checkpoints import describe_mismatch
from .errors import ArchitectureError, UsageError


@dataclass(frozen=True, eq=False)
class TaskVector:
    """theta_finetuned - theta_start, tensor by tensor.

    tensors: name to float32 (or wider) tensor. Tensors that do not differ may be left out; sums
    and products take a missing tensor for zero.
    """

    tensors: Mapping[str, Tensor]

    @classmethod
    def between(cls, start: Mapping[str, Tensor], finetuned: Mapping[str, Tensor]) -> TaskVector:
        """Return finetuned - start over all floating-point tensors, taken in at least float32.

        Raises ArchitectureError, naming them, when the two do not have the same tensors.
        """
        mismatch = describe_mismatch(
            {k: tuple(v.shape) for k, v in start.items()},
            {k: tuple(v.shape) for k, v in finetuned.items()},
        )
        if mismatch is not None:
            raise ArchitectureError(f"no task vector between these weights: {mismatch}")
        return cls(
            {
                name: _wide(finetuned[name]) - _wide(value)
                for name, value in start.items()
                if value.is_floating_point()
            }
        )

    def __add__(self, other: TaskVector) -> TaskVector:
        return self._combine(other, torch.add)

    def __sub__(self, other: TaskVector) -> TaskVector:
        return self._combine(other, torch.sub)

    def __neg__(self) -> TaskVector:
        return self * -1.0

    def __mul__(self, factor: float) -> TaskVector:
        return TaskVector({name: value * factor for name, value in self.tensors.items()})

    __rmul__ = __mul__

    def dot(self, other: TaskVector) -> float:
        """Return the inner product over the tensors both have, summed in float64."""
        shared = self.tensors.keys() & other.tensors.keys()
        return math.fsum(
            float((self.tensors[name].double() * other.tensors[name].double()).sum())
            for name in sorted(shared)
        )

    def norm(self) -> float:
        """Return the Euclidean norm over all tensors."""
        return math.sqrt(self.dot(self))

    def cosine(self, other: TaskVector) -> float:
        """Return the cosine of the angle to `other`; UsageError when either is zero."""
        product = self.norm() * other.norm()
        if product == 0:
            raise UsageError("the cosine with a zero task vector is not defined")
        return self.dot(other) / product

    @torch.no_grad()
    def apply_to(self, module: nn.Module, scaling_coefficient: float = 1.0) -> None:
        """Add scaling_coefficient times the vector to a module's weights, in place.

        Raises ArchitectureError, before anything is changed, when the module lacks a tensor.
        """
        state = module.state_dict()
        absent = sorted(self.tensors.keys() - state.keys())
        if absent:
            raise ArchitectureError(f"the model has no tensor {absent[0]!r} to add to")
        for name, value in self.tensors.items():
            state[name].add_(value.to(state[name].device), alpha=scaling_coefficient)

    def _combine(
        self, other: TaskVector, operation: Callable[[Tensor, Tensor], Tensor]
    ) -> TaskVector:
        names = [*self.tensors, *(n for n in other.tensors if n not in self.tensors)]
        return TaskVector(
            {
                name: operation(
                    self.tensors.get(name, torch.zeros(())),
                    other.tensors.get(name, torch.zeros(())),
                )
                for name in names
            }
        )


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.dtype == torch.float64 else tensor.float()
