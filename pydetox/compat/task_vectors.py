"""`TaskVector` with the interface of github.com/mlfoundations/task_vectors, on files.

Source: Ilharco et al., "Editing Models with Task Arithmetic" (ICLR 2023). The original unpickles
whole modules into memory. Here, checkpoints stay in their files, no pickle is executed, and every
operation holds one tensor at a time.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ..atomic import atomic_file
from ..checkpoints.mapped import MappedWeights
from ..checkpoints.provenance import METADATA_KEY, Provenance
from ..checkpoints.writing import safetensors_header
from ..errors import ArchitectureError, PydetoxWarning, UsageError
from ..numbers import require_number
from ..repair.task_vectors import ComputedTensors
from ..repair.task_vectors import TaskVector as Difference

#: Weights: the name of a checkpoint, a module, or tensors by name.
Weights: TypeAlias = "str | os.PathLike[str] | nn.Module | Mapping[str, Tensor]"


class TaskVector:
    """The difference of the weights of two models, tensor by tensor, or a combination of such.

    `+`, `-`, unary `-`, multiples and Python's `sum` give new vectors. A tensor that only one of
    two vectors has is left out of their sum, with a warning, as in the original.

    Args:
        pretrained_checkpoint: The model that is subtracted, named as for `load_checkpoint`, or a
            module, or its tensors by name.
        finetuned_checkpoint: The model that it is subtracted from.
        vector: The difference itself, by name, or a weights file that holds it. This excludes the
            two others.

    Attributes:
        vector: The tensors by name, of float32 or wider. Those of files are computed whenever they
            are used.

    Raises:
        UsageError: There is neither a vector nor both checkpoints.
        ArchitectureError: The two do not have the same tensors; the message names them.
        CheckpointError: A file cannot be found or read.
    """

    def __init__(
        self,
        pretrained_checkpoint: Weights | None = None,
        finetuned_checkpoint: Weights | None = None,
        vector: Mapping[str, Tensor] | str | os.PathLike[str] | None = None,
    ) -> None:
        both = (pretrained_checkpoint, finetuned_checkpoint)
        if (vector is None) == (both == (None, None)):
            raise UsageError("give either vector= or both checkpoints")
        if vector is not None:
            self._difference = Difference(_floating(_tensors(vector)))
            return
        start, finetuned = both
        if start is None or finetuned is None:
            raise UsageError("one checkpoint alone; give both, or vector=")
        if isinstance(start, str | os.PathLike) and isinstance(finetuned, str | os.PathLike):
            self._difference = Difference.from_checkpoints(start, finetuned)
        else:
            self._difference = Difference.between(_tensors(start), _tensors(finetuned))

    @classmethod
    def _of(cls, difference: Difference) -> TaskVector:
        """Return the vector of tensors that are in float32 or wider already."""
        made = cls.__new__(cls)
        made._difference = difference
        return made

    @property
    def vector(self) -> Mapping[str, Tensor]:
        """The tensors by name."""
        return self._difference.tensors

    def __add__(self, other: TaskVector) -> TaskVector:
        if not isinstance(other, TaskVector):
            return NotImplemented
        names = self._common(other)
        return self._of(self._only(names) + other._only(names))

    def __radd__(self, other: object) -> TaskVector:
        if other is None or (isinstance(other, int) and other == 0):  # what `sum` begins with
            return self
        return NotImplemented

    def __sub__(self, other: TaskVector) -> TaskVector:
        if not isinstance(other, TaskVector):
            return NotImplemented
        names = self._common(other)
        return self._of(self._only(names) - other._only(names))

    def __neg__(self) -> TaskVector:
        return self._of(-self._difference)

    def __mul__(self, factor: float) -> TaskVector:
        return self._of(self._difference * require_number("the factor of a task vector", factor))

    __rmul__ = __mul__

    def apply_to(
        self,
        pretrained_checkpoint: Weights,
        scaling_coef: float = 1.0,
        output: str | os.PathLike[str] | None = None,
    ) -> nn.Module | dict[str, Tensor] | Path:
        """Return pretrained + scaling_coef * vector, in the dtypes of the pretrained weights.

        A tensor that the vector lacks stays as it is, with a warning if it is no integer.

        Args:
            pretrained_checkpoint: The weights to add to. They do not change.
            scaling_coef: The factor of the vector.
            output: A new `.safetensors` file to write. No more than one tensor is then in memory.

        Returns:
            The path of `output`, if it is given. Otherwise a copy of the module, if that is what
            was given, and tensors by name in all other cases.

        Raises:
            UsageError: scaling_coef is no finite number.
            ArchitectureError: The vector has a tensor that the weights lack or that has another
                shape.
            OutputError: The file exists or cannot be written.
        """
        scaling_coef = require_number("scaling_coef", scaling_coef)
        start = _tensors(pretrained_checkpoint)
        self._require_fit(start)
        if output is not None:
            return self._write(start, scaling_coef, Path(output), pretrained_checkpoint)
        result = {name: self._sum(start, name, scaling_coef) for name in start}
        if isinstance(pretrained_checkpoint, nn.Module):
            twin = copy.deepcopy(pretrained_checkpoint)
            twin.load_state_dict(result)
            return twin
        return result

    def _common(self, other: TaskVector) -> list[str]:
        lonely = sorted(self.vector.keys() ^ other.vector.keys())
        if lonely:
            warnings.warn(
                f"{len(lonely)} tensors are in one of two task vectors alone and left out "
                f"({', '.join(lonely[:3])})",
                PydetoxWarning,
                stacklevel=3,
            )
        return [name for name in self.vector if name in other.vector]

    def _only(self, names: list[str]) -> Difference:
        if len(names) == len(self.vector):
            return self._difference
        return Difference(ComputedTensors(names, lambda name: self.vector[name]))

    def _require_fit(self, start: Mapping[str, Tensor]) -> None:
        for name in self.vector:
            if name not in start:
                raise ArchitectureError(f"the weights have no tensor {name!r} to add to")
            if self.vector[name].shape != start[name].shape:
                raise ArchitectureError(
                    f"tensor {name!r}: shape {list(self.vector[name].shape)} in the task vector, "
                    f"{list(start[name].shape)} in the weights"
                )
        kept = [n for n, v in start.items() if n not in self.vector and v.is_floating_point()]
        if kept:
            warnings.warn(
                f"{len(kept)} tensors are not in the task vector and stay as they are "
                f"({', '.join(kept[:3])})",
                PydetoxWarning,
                stacklevel=3,
            )

    def _sum(self, start: Mapping[str, Tensor], name: str, factor: float) -> Tensor:
        before = start[name]
        if name not in self.vector:
            return before.clone()
        # Two roundings, as in the original: no fused multiplication and addition.
        change = self.vector[name].to(before.device) * factor
        return (before.to(change.dtype) + change).to(before.dtype)

    def _write(
        self, start: Mapping[str, Tensor], factor: float, path: Path, source: Weights
    ) -> Path:
        if path.suffix.lower() != ".safetensors":
            raise UsageError(f"{path}: expected a name ending in .safetensors")
        recipe = Provenance(
            method=f"task vector, times {factor:g}",
            source_name=type(source).__name__
            if isinstance(source, nn.Module | Mapping)
            else os.fspath(source),
        )
        kinds = {n: (str(v.dtype).removeprefix("torch."), tuple(v.shape)) for n, v in start.items()}
        header, order = safetensors_header(kinds, {"format": "pt", METADATA_KEY: recipe.to_json()})
        with atomic_file(path, overwrite=False) as file:
            file.write(header)
            for name in order:
                values = self._sum(start, name, factor).detach().cpu().contiguous()
                file.write(values.reshape(-1).view(torch.uint8).numpy().data)
        return path


def _tensors(weights: Weights) -> Mapping[str, Tensor]:
    """Return tensors by name; those of a file stay there until they are used."""
    if isinstance(weights, nn.Module):
        return weights.state_dict()
    if isinstance(weights, Mapping):
        return weights
    mapped = MappedWeights(weights)

    def read(name: str) -> Tensor:
        value = mapped.tensor(name)
        mapped.check()
        return value

    return ComputedTensors(list(mapped.entries), read)


def _floating(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the tensors that are no integers, in float32 or wider."""

    def wide(name: str) -> Tensor:
        value = tensors[name]
        return value if value.dtype == torch.float64 else value.float()

    names = list(tensors)
    if isinstance(tensors, ComputedTensors):
        return ComputedTensors([n for n in names if tensors[n].is_floating_point()], wide)
    return {name: wide(name) for name in names if tensors[name].is_floating_point()}
