"""Singular values and vectors of weight differences: how many directions a fine-tuning changed.

Source: Halko, Martinsson and Tropp, "Finding structure with randomness: Probabilistic algorithms
for constructing approximate matrix decompositions", SIAM Review 53 (2011).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoints import describe_mismatch
from ..errors import ArchitectureError, UsageError
from ..ops import weight_diff_gram, weight_diff_matmul
from ..ops.weights import matrix_shape, sketch_key


@dataclass(frozen=True, eq=False)
class DifferenceSVD:
    """The leading singular values and vectors of one tensor's D = model - base, a matrix [m, n].

    D is approximately U diag(s) V^T.

    Attributes:
        left: U, float64 [m, k], with orthonormal columns.
        singular_values: s, float64 [k], descending.
        right: V, float64 [n, k], with orthonormal columns.
        energy: |D|_F^2 of the whole difference; it is exact.
    """

    left: Tensor
    singular_values: Tensor
    right: Tensor
    energy: float

    @property
    def captured(self) -> float:
        """The share of the energy in these k directions, in [0, 1]; 1 if D is zero."""
        if self.energy == 0:
            return 1.0
        return min(1.0, float(self.singular_values.square().sum()) / self.energy)

    @property
    def stable_rank(self) -> float:
        """|D|_F^2 / |D|_2^2: at least 1 and at most the rank; 0 if D is zero.

        It needs only the largest singular value, so it describes the whole of D for any k.
        """
        if self.energy == 0:
            return 0.0
        return self.energy / float(self.singular_values[0]) ** 2

    @property
    def effective_rank(self) -> float:
        """The effective rank of the k singular values; that of D if `captured` is close to 1."""
        return effective_rank(self.singular_values)


def effective_rank(singular_values: Tensor) -> float:
    """Return exp(H(p)), with H the entropy (in nats) of p = s / sum(s); 0 if all of s is zero.

    The result lies between 1 and the number of values. It is the number of equal singular values
    that would have the same entropy.
    Source: Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO
    2007.

    Args:
        singular_values: A tensor [k] of numbers that are not negative.
    """
    values = singular_values.double()
    if values.ndim != 1 or not bool((values >= 0).all()):
        raise UsageError(
            f"singular values must be a vector of numbers that are not negative, found "
            f"{list(values.shape)}, the least of them {values.min() if values.numel() else 'none'}"
        )
    total = float(values.sum())
    if total == 0:
        return 0.0
    return math.exp(float(torch.special.entr(values / total).sum()))


@torch.no_grad()
def randomized_svd(
    base: Mapping[str, Tensor],
    model: Mapping[str, Tensor],
    rank: int,
    *,
    oversampling: int = 8,
    power_iterations: int = 1,
    seed: int,
) -> dict[str, DifferenceSVD]:
    """Return the leading singular values and vectors of every weight's difference.

    Every floating-point tensor of at least two dimensions counts as a matrix [m, n], as in
    `pydetox.ops.weight_diff_matmul`. The method is randomised subspace iteration in float64
    (algorithm 4.4 of the source, then 5.1). It never stores the difference, and reads both models
    3 + 2 * `power_iterations` times. One power iteration is enough if the singular values decay
    fast. If they hardly decay, more iterations improve the smallest ones of the result.

    The random start of a tensor depends on `seed` and its name alone. The same call gives the same
    bits for any number of threads.

    Args:
        base: The tensors by name, on one device.
        model: Tensors of the same names and shapes.
        rank: The number of singular values, at least 1; a matrix gives min(rank, m, n).
        oversampling: The number of additional random directions, which are not returned.
        power_iterations: The number of times that D D^T is applied.
        seed: The seed of the random start.

    Returns:
        The results by name, in the order of `base`. Tensors without elements are left out.

    Raises:
        ArchitectureError: The models do not have the same tensors.
        UsageError: `rank`, `oversampling` or `power_iterations` is out of range, or a difference is
            not finite.
    """
    if rank < 1 or oversampling < 0 or power_iterations < 0:
        raise UsageError(
            "randomized_svd: rank must be at least 1, oversampling and power_iterations at least "
            f"0, found {rank}, {oversampling} and {power_iterations}"
        )
    mismatch = describe_mismatch(
        {k: tuple(v.shape) for k, v in base.items()}, {k: tuple(v.shape) for k, v in model.items()}
    )
    if mismatch is not None:
        raise ArchitectureError(f"no difference between these weights: {mismatch}")
    names = [k for k, v in base.items() if v.is_floating_point() and v.ndim > 1 and v.numel()]
    if not names:
        return {}
    pair = [base[name] for name in names], [model[name] for name in names]
    energies = {
        name: float(weight_diff_gram([a], [[b]])) for name, a, b in zip(names, *pair, strict=True)
    }
    for name, energy in energies.items():
        if not math.isfinite(energy):
            raise UsageError(f"randomized_svd: the difference of {name} is not finite")

    starts = []
    for name, tensor in zip(names, pair[0], strict=True):
        rows, columns = matrix_shape(tensor)
        generator = torch.Generator().manual_seed(sketch_key(seed, name))
        size = (columns, min(rank + oversampling, rows, columns))
        start = torch.randn(size, dtype=torch.float64, generator=generator)
        starts.append(start.to(tensor.device))
    spans = _orthonormal(weight_diff_matmul(*pair, starts, side="right"))
    for _ in range(power_iterations):
        across = _orthonormal([z.T for z in weight_diff_matmul(*pair, spans, side="left")])
        spans = _orthonormal(weight_diff_matmul(*pair, across, side="right"))
    results = {}
    small = weight_diff_matmul(*pair, spans, side="left")  # [size, n]: D ~ span small
    with _one_thread():
        for name, span, matrix in zip(names, spans, small, strict=True):
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
            left, values, right = (span @ u)[:, :rank], s[:rank], vh[:rank].T
            results[name] = DifferenceSVD(
                left.contiguous(), values.clone(), right.contiguous(), energies[name]
            )
    return results


def _orthonormal(matrices: list[Tensor]) -> list[Tensor]:
    """Return orthonormal bases of matrices' columns, [n, k] with n >= k each."""
    with _one_thread():
        return [torch.linalg.qr(matrix).Q for matrix in matrices]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread in libraries whose order of additions depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
