"""The scatter of the sizes of clean models, learned from a few references.

Every class c has its own variance sigma_c^2. R references give an estimate s_c^2 of it with
d = R - 1 degrees of freedom. These are too few alone, and pooling all classes would mistake a class
with a large scatter for an outlier. As in limma (Smyth 2004, doi 10.2202/1544-6115.1027), the
classes inform each other: 1 / sigma_c^2 is distributed as chi^2 with d0 degrees of freedom over d0
v, so that s_c^2 / v follows F(d, d0), and the standardised distance of a further clean model,

    distance_c / sqrt((d0 v + d s_c^2) / (d0 + d)),   follows Student's t with d0 + d degrees.

limma uses point estimates of d0 and v. With few references and classes, both are uncertain, and
point estimates raise false alarms (benchmarks/false_alarms.py). This module averages the tail over
their posterior instead. The prior is uniform over h = 1 / d0 in {0, 0.1, ..., 0.4} and over log v.
(At h = 0, all classes scatter alike; Fashion-MNIST shows 0.25.) h = 0 is the pooled t test. For
other h, log v is integrated numerically.

All functions take N calibrations at once, so that simulations run the code that judges models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, stdtr  # scipy.stats is large, and a worker keeps it loaded

Array: TypeAlias = "NDArray[np.float64]"
_Real = TypeVar("_Real", bound="np.floating[Any]")

#: The least deviation of log sizes. With few references, a smaller estimate is chance.
SMALLEST_DEVIATION = 0.05

#: The same of log efforts (see `pydetox.detect.screening`). All screenings start alike and see the
#: same images, so that efforts scatter less: by 0.01 between clean models of 100 emoji.
SMALLEST_EFFORT_DEVIATION = 0.005

# The values of 1 / d0, with equal prior probability.
_HETEROGENEITY = (0.0, 0.1, 0.2, 0.3, 0.4)

# The trapezoidal rule for log v: the number of nodes, and the distance of the first and last node
# in standard deviations of the posterior.
_NODES, _FIRST, _LAST = 9, -3.5, 4.5

# The quantiles whose distance is a width, that of standard normal values, and what is added: a part
# of the estimate's relative error 0.88 / sqrt(C), so that too small widths raise no false alarms.
_QUANTILES, _BETWEEN, _MARGIN = (0.07, 0.93), 2.9516, 0.6


@dataclass(frozen=True)
class Scatter:
    """The posterior of the variances of log sizes, as mixtures of K components, of N calibrations.

    Attributes:
        own_degrees: d, the degrees of freedom of every s_c^2.
        prior_degrees: [K], d0; infinite for classes that scatter alike.
        variance: [K, N], v.
        weight: [K, N], the probability of each component; the sum over K is 1.
        pooled_degrees: The degrees of freedom of v if d0 is infinite.
    """

    own_degrees: int
    prior_degrees: Array
    variance: Array
    weight: Array
    pooled_degrees: int

    def tail(
        self,
        distance: Array,
        squares: Array,
        *,
        factor: float | Array = 1.0,
        own: bool | NDArray[np.bool_] = True,
        least: float = SMALLEST_DEVIATION,
    ) -> Array:
        """Return the chance that a further clean model is at this distance or farther away.

        distance: [N, ...], at least 0. squares: The s_c^2 of its class, of a shape that fits.
        factor: The variance of the distance divided by the variance that s_c^2 estimates. own:
        False for classes without an s_c^2 of their own, so that only the other classes inform about
        them. least: The smallest deviation that counts.
        """
        moderated, prior, weight, degrees = self._moderated(distance.ndim, squares, own)
        scale = np.sqrt(np.maximum(moderated, least**2) * factor)
        pooled = np.isinf(prior)
        finite = np.where(pooled, 1.0, prior)
        chances = stdtr(np.where(pooled, self.pooled_degrees, finite + degrees), -distance / scale)
        chance: Array = (weight * chances).sum(axis=0)
        return chance

    def deviation(
        self,
        squares: Array,
        *,
        factor: float | Array = 1.0,
        own: bool | NDArray[np.bool_] = True,
        least: float = SMALLEST_DEVIATION,
    ) -> Array:
        """Return the expected deviation of such a distance, [N, ...]; the arguments are `tail`'s.

        squares: [N, ...], the s_c^2 of the classes.
        """
        moderated, _, weight, _ = self._moderated(squares.ndim, squares, own)
        expected = (weight * np.maximum(moderated, least**2)).sum(axis=0)
        deviation: Array = np.sqrt(expected * factor)
        return deviation

    def _moderated(
        self, dimensions: int, squares: Array, own: bool | NDArray[np.bool_]
    ) -> tuple[Array, Array, Array, Array]:
        """Return the moderated variances, d0, weights and own degrees, for [K, N, ...]."""
        rest = (...,) + (None,) * (dimensions - 1)
        variance, weight = self.variance[rest], self.weight[rest]  # [K, N, ...]
        prior = self.prior_degrees.reshape(-1, *(1,) * dimensions)
        pooled = np.isinf(prior)
        finite = np.where(pooled, 1.0, prior)
        degrees = self.own_degrees * np.asarray(own, dtype=np.float64)
        moderated = (finite * variance + degrees * squares) / (finite + degrees)
        return np.where(pooled, variance, moderated), prior, weight, degrees


def fit_scatter(squares: Array, degrees: int) -> Scatter:
    """Return the posterior given the variances between references.

    squares: [N, C], the s_c^2, positive on average, each with `degrees` degrees of freedom. With
    C = 1, they are those of sizes. With C >= 2, they are those of contrasts of a class to the mean
    of the others, which have (C - 1) / C times as many independent values. degrees: At least 1.
    """
    classes = squares.shape[1]
    pooled_degrees = degrees * max(classes - 1, 1)
    share = pooled_degrees / (degrees * classes)
    d = float(degrees)
    mean = squares.mean(axis=1)
    constant = share * classes * (d / 2 * np.log(d / 2) - gammaln(d / 2))
    half = pooled_degrees / 2
    evidence = [gammaln(half) - half * np.log(share * d * classes * mean / 2) + constant]
    priors, variances = [np.inf], [mean]
    # Two classes have one contrast, so it is unknown whether they scatter alike.
    for h in _HETEROGENEITY[1:] if classes > 2 else ():
        d0 = 1 / h
        v = mean * max(1 - 2 * h, 0.2)
        for _ in range(8):  # the maximum of the likelihood, as a fixed point
            v = 1 / ((d + d0) / (d0 * v[:, None] + d * squares)).mean(axis=1)
        # The Fisher information of log v in scaled F(d, d0), times the number of classes.
        deviation = (share * classes * d0 * d / (2 * (d0 + d + 2))) ** -0.5
        step = (_LAST - _FIRST) / (_NODES - 1) * deviation
        scale = gammaln((d + d0) / 2) - gammaln(d / 2) - gammaln(d0 / 2) + d / 2 * np.log(d)
        for k in range(_NODES):
            node = v * np.exp(_FIRST * deviation + k * step)
            density = np.log(d0 * node[:, None] + d * squares).sum(axis=1)
            likelihood = classes * (scale + d0 / 2 * np.log(d0 * node)) - (d0 + d) / 2 * density
            ends = 0.5 if k in (0, _NODES - 1) else 1.0
            priors.append(d0)
            variances.append(node)
            evidence.append(share * likelihood + np.log(ends * step))
    weight = np.array(evidence)
    weight = np.exp(weight - weight.max(axis=0))
    weight /= weight.sum(axis=0)
    return Scatter(degrees, np.array(priors), np.array(variances), weight, pooled_degrees)


def contrasts(logarithms: Array, comparable: NDArray[np.bool_] | None = None) -> Array:
    """Return the difference of each class to the mean of the others of its model: [..., C].

    logarithms: [..., C], C >= 2. comparable: bool [C], the classes that the means include, at least
    two; default: all.
    """
    if comparable is None:
        comparable = np.ones(logarithms.shape[-1], dtype=bool)
    count = comparable.sum() - comparable
    total = (logarithms * comparable).sum(axis=-1, keepdims=True) - logarithms * comparable
    difference: Array = logarithms - total / count
    return difference


def median_of_others(values: NDArray[_Real]) -> NDArray[_Real]:
    """Return for each of C >= 2 values the median of the other C - 1: [..., C]."""
    others = values.shape[-1] - 1
    if others == 1:
        return values[..., ::-1]
    k = others // 2
    if others % 2:
        few = np.partition(values, [k, k + 1], axis=-1)
        below, above = few[..., k : k + 1], few[..., k + 1 : k + 2]
        return np.where(values <= below, above, below)
    few = np.partition(values, [k - 1, k, k + 1], axis=-1)
    first, middle, last = (few[..., j : j + 1] for j in (k - 1, k, k + 1))
    with_last = np.where(values == middle, (first + last) / 2, (first + middle) / 2)
    median: NDArray[_Real] = np.where(values <= first, (middle + last) / 2, with_last)
    return median


def median_variance(count: int) -> float:
    """Return the variance of the median of `count` standard normal values, within 2%.

    pi / (2 n) for large n; what is added to n is fitted to the exact values of small samples.
    """
    if count <= 2:
        return 1 / count
    return np.pi / 2 / (count + (np.pi / 2 - 1 if count % 2 else 1.31))


def distance_factor(references: float, classes: int, others: int) -> float:
    """Return the variance of (mu_c - x_c) - median_{j != c}(mu_j - x_j) over that of a contrast.

    The result is exact if the classes scatter alike. references: R, the number behind mu, or of
    equally good ones if mu is a weighted mean. classes:
    C, the number of contrasts, each to the mean of C - 1. others: The number of classes that the
    median is taken of.
    """
    return (1 + 1 / references) * (1 + median_variance(others)) / (1 + 1 / (classes - 1))


def least_distance(too_likely: Callable[[float], bool]) -> float:
    """Return the distance, above 0, from which on one is no longer too likely, by bisection."""
    near, far = 0.0, 1.0
    while too_likely(far):
        near, far = far, 2 * far
    while far - near > 1e-9 * far:
        middle = (near + far) / 2
        near, far = (middle, far) if too_likely(middle) else (near, middle)
    return far


def log_size(p_l1: float) -> float:
    """Return the logarithm of a P-L1; a search that found nothing counts as the largest, 1."""
    return math.log(p_l1) if math.isfinite(p_l1) else 0.0


def relative_width(values: Array) -> float:
    """Return how many times wider than standard normal values some values scatter, with a margin.

    values: [n], finite, at least two. The width is the distance of two quantiles, which a few
    backdoors hardly change.
    """
    low, high = np.quantile(values, _QUANTILES)
    return (1 + _MARGIN / math.sqrt(len(values))) * float(high - low) / _BETWEEN


def adjusted(chance: float, tries: int) -> float:
    """Return the chance of at least one success in that many independent tries (Sidak)."""
    return -math.expm1(tries * math.log1p(-min(chance, 1 - 1e-16)))
