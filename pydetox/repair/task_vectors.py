"""Task arithmetic: differences of weights, their sums and multiples.

Source: Ilharco et al., "Editing Models with Task Arithmetic" (ICLR 2023).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checkpoints import describe_mismatch
from ..checkpoints.mapped import MappedWeights
from ..errors import ArchitectureError, UsageError
from ..ops import weight_diff_project
from ..ops.weights import CHUNK


@dataclass(frozen=True, eq=False)
class TaskVector:
    """A task vector: theta_finetuned - theta_start, tensor by tensor.

    Attributes:
        tensors: Tensors of float32 or wider, by name. Tensors that do not differ may be missing;
            sums and products count a missing tensor as zero. The mapping may compute its tensors
            on demand, as that of `from_checkpoints` does. Every method holds one tensor at a time.
    """

    tensors: Mapping[str, Tensor]

    @classmethod
    def between(cls, start: Mapping[str, Tensor], finetuned: Mapping[str, Tensor]) -> TaskVector:
        """Return finetuned - start over all floating-point tensors, in float32 or wider.

        Raises ArchitectureError, which names the tensors, if the two do not have the same tensors.
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

    @classmethod
    def from_checkpoints(
        cls,
        start: str | os.PathLike[str],
        finetuned: str | os.PathLike[str],
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        offline: bool = False,
    ) -> TaskVector:
        """Return finetuned - start of two checkpoints that stay in their files.

        The vector equals that of `between`, but each tensor is computed whenever it is used. Sums
        and multiples of such vectors work in the same way. The files stay open as long as the
        vector exists. `pydetox.analysis.weight_space` computes the inner products of many models in
        fewer passes, and without rounding the differences to float32.

        Args:
            start: The checkpoint that is subtracted, named as for `load_checkpoint`.
            finetuned: The checkpoint that it is subtracted from.
            cache_dir: The folder for hub downloads; None for the hub's default.
            offline: Whether to use only files on this machine.

        Raises:
            ArchitectureError: The two do not have the same tensors; the message names them.
            CheckpointError: A file cannot be found or read. This is also raised later, if a file
                has changed.
        """
        files = [
            MappedWeights(name, cache_dir=cache_dir, offline=offline) for name in (start, finetuned)
        ]
        before, after = files
        mismatch = describe_mismatch(before.shapes, after.shapes)
        if mismatch is not None:
            raise ArchitectureError(
                f"no task vector between {before.path} and {after.path}: {mismatch}"
            )

        def difference(name: str) -> Tensor:
            value = _wide(after.tensor(name)) - _wide(before.tensor(name))
            before.check()
            after.check()
            return value

        return cls(
            ComputedTensors(
                [n for n, entry in before.entries.items() if "float" in entry.dtype], difference
            )
        )

    def __add__(self, other: TaskVector) -> TaskVector:
        return self._combine(other, torch.add)

    def __sub__(self, other: TaskVector) -> TaskVector:
        return self._combine(other, torch.sub)

    def __neg__(self) -> TaskVector:
        return self * -1.0

    def __mul__(self, factor: float) -> TaskVector:
        return self._made(list(self.tensors), lambda name: self.tensors[name] * factor)

    __rmul__ = __mul__

    def dot(self, other: TaskVector) -> float:
        """Return the inner product over the common tensors, summed in float64."""
        shared = self.tensors.keys() & other.tensors.keys()
        return math.fsum(_dot(self.tensors, other.tensors, name) for name in sorted(shared))

    def norm(self) -> float:
        """Return the Euclidean norm over all tensors."""
        return math.sqrt(self.dot(self))

    def cosine(self, other: TaskVector) -> float:
        """Return the cosine of the angle to `other`; UsageError if either vector is zero."""
        product = self.norm() * other.norm()
        if product == 0:
            raise UsageError("the cosine with a zero task vector is not defined")
        return self.dot(other) / product

    @torch.no_grad()
    def apply_to(self, module: nn.Module, scaling_coefficient: float = 1.0) -> None:
        """Add scaling_coefficient times the vector to a module's weights, in place.

        Raises ArchitectureError, before anything is changed, if the module lacks a tensor.
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

        def combined(name: str) -> Tensor:
            pair = (
                tensors[name] if name in tensors else torch.zeros(())
                for tensors in (self.tensors, other.tensors)
            )
            return operation(*pair)

        return self._made(names, combined, other)

    def _made(
        self, names: list[str], make: Callable[[str], Tensor], *others: TaskVector
    ) -> TaskVector:
        """Return a vector of computed tensors; on demand if one of the operands is on demand."""
        if any(isinstance(vector.tensors, ComputedTensors) for vector in (self, *others)):
            return TaskVector(ComputedTensors(names, make))
        return TaskVector({name: make(name) for name in names})


class ComputedTensors(Mapping[str, Tensor]):
    """A mapping that computes each tensor whenever it is used, and does not keep it."""

    def __init__(self, names: list[str], make: Callable[[str], Tensor]) -> None:
        self._names = dict.fromkeys(names)
        self._make = make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:  # Mapping's own method would compute the tensor.
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _dot(left: Mapping[str, Tensor], right: Mapping[str, Tensor], name: str) -> float:
    a = left[name]
    b = a if right is left else right[name]
    if a.device.type != "cpu" or a.shape != b.shape:
        return float((a.double() * b.double()).sum())
    # The operator widens nothing in memory. Its chunks share one base of zeros.
    pieces = [torch.split(_wide(t).detach().reshape(-1), CHUNK) for t in (a, b)]
    zeros = torch.zeros(min(CHUNK, a.numel()))
    base = [zeros[: len(piece)] for piece in pieces[0]]
    return float(weight_diff_project(base, pieces[0], [pieces[1]]))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.dtype == torch.float64 else tensor.float()
