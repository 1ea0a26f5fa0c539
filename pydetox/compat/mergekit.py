"""Recipes in the form of github.com/arcee-ai/mergekit, for task arithmetic on checkpoints.

A recipe is the YAML or JSON file that `mergekit-yaml` takes, with `merge_method: task_arithmetic`:

    merge_method: task_arithmetic
    base_model: suspect.safetensors
    models:
      - vector: trigger_vector.safetensors
        parameters: {weight: -0.6}

An entry names a `model`, whose difference to the base is taken, or, beyond mergekit, a `vector`: a
file with a difference of weights, such as a trigger vector. The result is
base + lambda * sum of weight * difference, divided by the sum of the weights with `normalize`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..numbers import require_number
from ..scanning.config import read_config_file
from .task_vectors import TaskVector

_KEYS = {"merge_method", "base_model", "models", "parameters", "dtype"}
# Sums of weights below this do not divide, as in mergekit.
_NO_SUM = 1e-8


def merge(
    recipe: str | os.PathLike[str] | Mapping[str, Any], output: str | os.PathLike[str]
) -> Path:
    """Write the model of a recipe to a new `.safetensors` file, tensor by tensor.

    Args:
        recipe: A YAML or JSON file, or its content. Relative names of files in a file are relative
            to its folder if they are there, else to the current folder.
        output: The file to write.

    Returns:
        The path of the file.

    Raises:
        UsageError: The recipe is none, or has a merge method or a parameter that is not known here;
            the message names it.
        ArchitectureError: The checkpoints do not have the same tensors.
        CheckpointError: One of them cannot be found or read.
        OutputError: The file exists or cannot be written.
    """
    folder, name = Path(), "recipe"
    if not isinstance(recipe, Mapping):
        folder, name = Path(recipe).parent, os.fspath(recipe)
        recipe = read_config_file(recipe)
    unknown = sorted(set(recipe) - _KEYS)
    if unknown:
        raise UsageError(
            f"{name}: {unknown[0]!r} is not known; expected {', '.join(sorted(_KEYS))}"
        )
    if recipe.get("merge_method") != "task_arithmetic":
        raise UsageError(
            f"{name}: merge_method is {recipe.get('merge_method')!r}; expected 'task_arithmetic'"
        )
    if recipe.get("dtype") is not None:
        raise UsageError(f"{name}: dtype is set; the result has the dtypes of the base")
    base = _file(recipe.get("base_model"), folder, f"{name}: base_model")
    entries = recipe.get("models")
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"{name}: no models; expected a list of at least one")
    options = _parameters(recipe, name, {"normalize", "lambda"})
    weights, vectors = list[float](), list[TaskVector]()
    for place, entry in enumerate(entries):
        where = f"{name}: models[{place}]"
        if not isinstance(entry, Mapping) or len({"model", "vector"} & set(entry)) != 1:
            raise UsageError(f"{where}: expected a model or a vector")
        if "model" in entry and _file(entry["model"], folder, where) == base:
            continue  # mergekit lists the base as well, whose difference is nothing
        weight = _parameters(entry, where, {"weight"}).get("weight")
        if weight is None:
            raise UsageError(f"{where}: no weight; expected a number in its parameters")
        weights.append(_number(weight, f"{where}: weight"))
        if "model" in entry:
            vectors.append(TaskVector(base, _file(entry["model"], folder, where)))
        else:
            vectors.append(TaskVector(vector=_file(entry["vector"], folder, where)))
    if not vectors:
        raise UsageError(f"{name}: all models are the base; expected another one")
    factor = _number(options.get("lambda", 1.0), f"{name}: lambda")
    normalize = options.get("normalize", False)
    if normalize not in (False, True):  # 0 and 1 are meant so in mergekit, too
        raise UsageError(f"{name}: normalize is {normalize!r}; expected true or false")
    if normalize and abs(sum(weights)) >= _NO_SUM:
        factor /= sum(weights)
    total = reduce(add, (vector * weight for vector, weight in zip(vectors, weights, strict=True)))
    written = total.apply_to(base, factor, output=output)
    assert isinstance(written, Path)
    return written


def _parameters(part: Mapping[str, Any], where: str, known: set[str]) -> Mapping[str, Any]:
    given = part.get("parameters") or {}
    unknown = sorted(set(given) - known)
    if unknown:
        raise UsageError(
            f"{where}: parameter {unknown[0]!r} is not known; expected {', '.join(sorted(known))}"
        )
    return dict(given)


def _number(value: Any, where: str) -> float:
    return require_number(where, value, meaning=" (no gradients or filters)")


def _file(name: Any, folder: Path, where: str) -> str:
    if not isinstance(name, str) or not name:
        raise UsageError(f"{where}: expected the name of a checkpoint, found {name!r}")
    inside = folder / name
    return str(inside) if inside.exists() else name
