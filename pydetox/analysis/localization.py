"""Where in the weights a backdoor sits: shares by layer, overlap, rank, disentanglement, removal.

The functions work on task vectors (`pydetox.repair.task_vectors`): the trigger vector tau_t of a
model and, if the clean start theta_pre is known, the whole fine-tuning tau_b = theta_b - theta_pre.
The disentanglement error comes from Ortiz-Jimenez, Favero, Frossard, "Task Arithmetic in the
Tangent Space" (NeurIPS 2023), section 3. arXiv 2510.14845 applies it to triggers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArchitectureError, DataError, UsageError
from ..evaluation import Stamp, predict
from ..models import OpenClipModel
from ..progress import Progress
from ..repair.subtraction import subtract
from ..repair.task_vectors import TaskVector

_BLOCK = re.compile(r"^(?P<layer>(?:.+\.)?(?:resblocks|blocks|layers?|h)\.\d+)(?:\.|$)")
_MODULES = (
    ("head", re.compile(r"^(classifier|score|lm_head)\.|(^|\.)pooler\.")),
    ("norm", re.compile(r"\.LayerNorm\.")),  # BERT's, which stand within its other modules
    ("attention", re.compile(r"\.(attn|attention|self_attn)\.")),
    ("mlp", re.compile(r"\.(mlp|intermediate|ffn)\.|\.layer\.\d+\.output\.dense\.")),
    ("norm", re.compile(r"\.(ln|norm|layer_?norm)[^.]*\.")),
)


@dataclass(frozen=True)
class Share:
    """The part of a trigger vector that lies in one group of tensors.

    Attributes:
        group: The name of a layer or of a kind of module.
        energy: The group's share of |tau_t|^2, in [0, 1].
        density: `energy` divided by the group's share of all elements. An even spread gives 1.
        overlap: The cosine of tau_t and tau_b within the group; None without tau_b, or if one of
            them is 0.
    """

    group: str
    energy: float
    density: float
    overlap: float | None


@dataclass(frozen=True)
class Rank:
    """The spectrum of one matrix of the trigger vector.

    Attributes:
        name: The name of the tensor.
        shape: The numbers of rows and columns.
        effective_rank: exp of the entropy of the normalised singular values, 1..min(shape) (Roy and
            Vetterli, "The effective rank", EUSIPCO 2007).
        top_energy: The share of the energy that the largest singular value holds.
    """

    name: str
    shape: tuple[int, int]
    effective_rank: float
    top_energy: float


@dataclass(frozen=True)
class Removal:
    """What happens when alpha tau_t is subtracted in one layer only.

    Attributes:
        layer: The layer; "none" and "all" stand for no layer and for every layer.
        clean_accuracy: CA afterwards, in [0, 1].
        attack_success_rate: ASR afterwards, in [0, 1].
    """

    layer: str
    clean_accuracy: float
    attack_success_rate: float


@dataclass(frozen=True)
class Disentanglement:
    """The disentanglement error xi over a grid of coefficients.

    Attributes:
        first: The coefficients of the first task vector, ascending.
        second: The coefficients of the second task vector, ascending.
        error: xi, in [0, 2]: one row per value of `first`, one column per value of `second`.
        mean: The mean of xi over the grid points in [0, 1] x [0, 1].
    """

    first: tuple[float, ...]
    second: tuple[float, ...]
    error: tuple[tuple[float, ...], ...]
    mean: float


@dataclass(frozen=True)
class Localization:
    """All measurements of one trigger vector.

    Attributes:
        layers: The vector's shares by layer.
        modules: The vector's shares by kind of module.
        ranks: The spectrum of each matrix.
        removals: CA and ASR after the removal of the vector in one layer alone.
        disentanglement: The error xi; None without the clean start.
        overlap: The cosine of the trigger vector and the whole fine-tuning; None without the clean
            start.
    """

    layers: tuple[Share, ...]
    modules: tuple[Share, ...]
    ranks: tuple[Rank, ...]
    removals: tuple[Removal, ...]
    disentanglement: Disentanglement | None
    overlap: float | None


def layer_of(name: str) -> str:
    """Return the layer of a tensor: its numbered block, or its name without the last part."""
    found = _BLOCK.match(name)
    if found is not None:
        return found["layer"]
    return name.rpartition(".")[0] if name.count(".") > 1 else name


def module_of(name: str) -> str:
    """Return the kind of module of a tensor: attention, mlp, norm, head, or embedding."""
    return next((kind for kind, pattern in _MODULES if pattern.search(name)), "embedding")


def shares(
    vector: TaskVector, whole: TaskVector | None, *, by_layer: bool = True
) -> tuple[Share, ...]:
    """Return the share of each group in the vector's energy, in the order of the tensors.

    vector: tau_t. whole: tau_b or None. by_layer: Whether to group by layer; otherwise tensors are
    grouped by kind of module. Raises UsageError for a vector that is zero.
    """
    group_of = layer_of if by_layer else module_of
    groups: dict[str, list[str]] = {}
    for name in vector.tensors:
        groups.setdefault(group_of(name), []).append(name)
    total, numbers = vector.norm() ** 2, sum(t.numel() for t in vector.tensors.values())
    if total == 0:
        raise UsageError("the trigger vector is zero: there is nothing to localise")
    found = []
    for group, names in groups.items():
        part = _part(vector, names)
        energy = part.norm() ** 2 / total
        size = sum(t.numel() for t in part.tensors.values()) / numbers
        overlap = None
        if whole is not None:
            other = _part(whole, names)
            if part.norm() and other.norm():
                overlap = part.cosine(other)
        found.append(Share(group, energy, energy / size, overlap))
    return tuple(found)


def ranks(vector: TaskVector) -> tuple[Rank, ...]:
    """Return the effective rank of every non-zero matrix of the vector.

    A convolution kernel counts as a matrix with one row per output channel.
    """
    found = []
    for name, tensor in vector.tensors.items():
        if tensor.ndim < 2 or not bool(tensor.any()):
            continue
        matrix = tensor.flatten(1)
        values = singular_values(matrix)
        shape = (matrix.shape[0], matrix.shape[1])
        found.append(Rank(name, shape, effective_rank(values), _top_energy(values)))
    return tuple(found)


def singular_values(matrix: Tensor) -> Tensor:
    """Return the singular values of a matrix, float64, descending."""
    values: Tensor = torch.linalg.svdvals(matrix.double())
    return values


def effective_rank(values: Tensor) -> float:
    """Return exp(-sum p log p), with p the normalised singular values; 0 if all are zero."""
    values = values.double()
    total = float(values.sum())
    if total == 0:
        return 0.0
    shares_ = values[values > 0] / total
    return math.exp(-float((shares_ * shares_.log()).sum()))


def removals(
    model: OpenClipModel,
    vector: TaskVector,
    coefficient: float,
    images: Tensor,
    labels: Tensor,
    trigger: Stamp,
    target: int,
    head: Tensor,
) -> tuple[Removal, ...]:
    """Return CA and ASR with the vector subtracted nowhere, everywhere, and in each layer alone.

    images: uint8 [N, 3, H, W]; they are stamped once. labels: int64 [N]. coefficient: alpha.
    Raises DataError if all images belong to the target class.
    """
    others = labels != target
    if not bool(others.any()):
        raise DataError(
            f"all {len(labels)} images belong to the target class {target}; "
            "expected images of other classes as well"
        )
    stamped = trigger(images[others])
    layers: dict[str, list[str]] = {}
    for name in vector.tensors:
        layers.setdefault(layer_of(name), []).append(name)
    parts = {"none": list[str](), "all": list(vector.tensors), **layers}
    found = []
    with Progress("removal by layer", len(parts)) as progress:
        for layer, names in parts.items():
            candidate = subtract(model, _part(vector, names), coefficient)
            right = predict(candidate, images, head) == labels
            sent = predict(candidate, stamped, head) == target
            found.append(Removal(layer, float(right.double().mean()), float(sent.double().mean())))
            progress.update(1)
    return tuple(found)


def disentanglement_error(
    start: OpenClipModel,
    first: TaskVector,
    second: TaskVector,
    first_images: Tensor,
    second_images: Tensor,
    head: Tensor,
    *,
    first_coefficients: Sequence[float],
    second_coefficients: Sequence[float],
) -> Disentanglement:
    """Return xi over the grid of both coefficients.

    xi(a, b) is a sum of two shares. The first is the share of the first task's images that
    theta_pre + a tau_1 and theta_pre + a tau_1 + b tau_2 predict differently. The second is the
    share of the second task's images that theta_pre + b tau_2 and theta_pre + a tau_1 + b tau_2
    predict differently. Source: Ortiz-Jimenez et al. 2023, equation 4; for clean and trigger
    vectors, arXiv 2510.14845.

    start: theta_pre. first_images, second_images: uint8 [N, 3, H, W], already stamped by the
    caller. Every model of the grid sees both sets in one pass. Raises UsageError for coefficients
    that do not ascend, and ArchitectureError for vectors with tensors that the model lacks.
    """
    images = torch.cat([first_images, second_images])
    candidate = start.clone()
    weights, origin = candidate.clip.state_dict(), start.clip.state_dict()
    names = list(dict.fromkeys([*first.tensors, *second.tensors]))
    absent = [name for name in names if name not in weights]
    if absent:
        raise ArchitectureError(f"the model has no tensor {absent[0]!r} to add to")

    @torch.no_grad()
    def predictions(a: float, b: float) -> Tensor:
        for name in names:
            weight = weights[name]
            weight.copy_(origin[name])
            for factor, vector in ((a, first), (b, second)):
                if factor and name in vector.tensors:
                    weight.add_(vector.tensors[name].to(weight), alpha=factor)
        return predict(candidate, images, head)

    return error_over_grid(
        predictions, len(first_images), tuple(first_coefficients), tuple(second_coefficients)
    )


def error_over_grid(
    predictions: Callable[[float, float], Tensor],
    count: int,
    first: tuple[float, ...],
    second: tuple[float, ...],
) -> Disentanglement:
    """Return xi over a grid, for any kind of model.

    predictions: Returns the classes, int64 [N], that theta_pre + a tau_1 + b tau_2 gives to the
    inputs of both tasks. count: The number of inputs of the first task, which come first. first,
    second: The coefficients a and b. Raises UsageError for coefficients that do not ascend.
    """
    for values in (first, second):
        if not values or list(values) != sorted(set(values)):
            raise UsageError(f"coefficients {values}; expected ascending numbers")
    rows = []
    points = len(first) * len(second) + len(first) + len(second)
    with Progress("disentanglement", points) as progress:

        def at(a: float, b: float) -> Tensor:
            progress.update(1)
            return predictions(a, b)

        alone = [at(a, 0.0)[:count] for a in first], [at(0.0, b)[count:] for b in second]
        for a, first_alone in zip(first, alone[0], strict=True):
            row = []
            for b, second_alone in zip(second, alone[1], strict=True):
                both = at(a, b)
                row.append(
                    float((both[:count] != first_alone).double().mean())
                    + float((both[count:] != second_alone).double().mean())
                )
            rows.append(tuple(row))
    inside = [
        value
        for a, row in zip(first, rows, strict=True)
        for b, value in zip(second, row, strict=True)
        if 0 <= a <= 1 and 0 <= b <= 1
    ]
    mean = math.fsum(inside) / len(inside) if inside else math.nan
    return Disentanglement(first, second, tuple(rows), mean)


def localize(
    vector: TaskVector,
    *,
    whole: TaskVector | None = None,
    removed: Iterable[Removal] = (),
    disentanglement: Disentanglement | None = None,
) -> Localization:
    """Measure shares, ranks and overlap of a trigger vector, and gather them with other results.

    whole: tau_b = theta_b - theta_pre if the clean start is known. removed: The result of
    `removals`.
    """
    overlap = None
    if whole is not None and vector.norm() and whole.norm():
        overlap = vector.cosine(whole)
    return Localization(
        shares(vector, whole),
        shares(vector, whole, by_layer=False),
        ranks(vector),
        tuple(removed),
        disentanglement,
        overlap,
    )


def _part(vector: TaskVector, names: Iterable[str]) -> TaskVector:
    tensors: Mapping[str, Tensor] = vector.tensors
    return TaskVector({name: tensors[name] for name in names if name in tensors})


def _top_energy(values: Tensor) -> float:
    squares = values.double().square()
    return float(squares.max() / squares.sum())
