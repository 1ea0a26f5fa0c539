"""The scaling coefficient alpha: how much of a trigger vector to subtract."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import ImageSet
from ..data.sampling import stratified_sample
from ..errors import DataError
from ..evaluation import Stamp, predict
from ..models import OpenClipModel
from ..prototypes import image_features
from ..rng import generator
from .coarse_to_fine import LEAST_ATTACKED, Limits, Measured, measure_alphas
from .configuration import UnlearnConfig
from .retention import DriftProbe
from .subtraction import Candidates
from .task_vectors import TaskVector
from .trigger_vector import one_target_each


@dataclass(frozen=True)
class Compromise:
    """The alpha that removes the given triggers at the least cost, where the limits forbid it.

    Attributes:
        index: The index of the alpha.
        min_accuracy_kept: The limit of `UnlearnConfig` that allows this alpha. It is the one that
            was asked for if that is wide enough.
        max_drift: The same for this limit.
    """

    index: int
    min_accuracy_kept: float
    max_drift: float


@dataclass(frozen=True)
class CoefficientSearch:
    """CA and ASR over the scaling coefficient alpha.

    Attributes:
        coefficients: The values of alpha that were measured, ascending (see `coarse_to_fine`).
        clean_accuracy: The share, in [0, 1], per alpha. Without labels, this is the agreement with
            theta_b, and each image is weighted by how certain theta_b was of it (see `certainty`).
        attack_success_rate: The share, in [0, 1], per alpha that the worst of the given triggers
            sends to the target. It counts only images of other classes that theta_b, without a
            trigger, sends elsewhere. An image that theta_b takes for the target anyway says nothing
            about a trigger.
        chosen: The index of the chosen alpha.
        reached: Whether all limits hold there.
        accuracy_before: The accuracy that the clean accuracy was compared with.
        reserve: The share of the accuracy to spend that was left to later passes.
        drift: The distance per alpha that image features have moved from the model before any
            repair (`FeatureDrift.mean_distance`); empty if it was not measured.
        compromise: The alpha that removes the triggers if no alpha does so within the limits. None
            if one does, or if none removes them at all.
    """

    coefficients: tuple[float, ...]
    clean_accuracy: tuple[float, ...]
    attack_success_rate: tuple[float, ...]
    chosen: int
    reached: bool
    accuracy_before: float
    reserve: float = 0.0
    drift: tuple[float, ...] = ()
    compromise: Compromise | None = None

    def pareto_front(self) -> tuple[int, ...]:
        """Return the indices of the alphas that no other equals in ASR, CA and drift at once."""
        drift = self.drift or (0.0,) * len(self.coefficients)
        costs = [
            (asr, -ca, moved)
            for asr, ca, moved in zip(
                self.attack_success_rate, self.clean_accuracy, drift, strict=True
            )
        ]

        def beaten(k: int) -> bool:
            return any(
                all(a <= b for a, b in zip(other, costs[k], strict=True))
                and (other != costs[k] or j < k)
                for j, other in enumerate(costs)
                if j != k
            )

        return tuple(k for k in range(len(costs)) if not beaten(k))

    @property
    def hopeless(self) -> bool:
        """Whether nothing is subtracted though all of the accuracy and drift could be spent."""
        return self.coefficient == 0 and not self.reached and self.reserve == 0

    @property
    def coefficient(self) -> float:
        """The chosen alpha."""
        return self.coefficients[self.chosen]


def search_coefficient(
    model: OpenClipModel,
    vector: TaskVector,
    validation: ImageSet,
    triggers: Sequence[Stamp],
    head: Tensor,
    targets: int | Sequence[int],
    config: UnlearnConfig | None = None,
    *,
    accuracy_before: float | None = None,
    reserve: float = 0.0,
    probe: DriftProbe | None = None,
) -> CoefficientSearch:
    """Try values of alpha and choose one.

    Not all candidates are measured, but those that decide (see `coarse_to_fine`). The images are
    decoded and stamped once. The weights change in memory.

    The chosen alpha is the smallest that satisfies three limits, raised by up to `safety_factor`:
    ASR <= max_attack_success for every trigger, CA >= min_accuracy_kept of accuracy_before, and
    drift <= max_drift. If there is none, it is the one with the least mean ASR of all triggers
    among those that keep accuracy and drift, because the worst trigger alone may be beyond what any
    alpha reaches. If this mean is above 2%, which is about one image of each trigger, the alpha has
    to keep the reserve as well. If none keeps accuracy and drift, it is 0.

    Args:
        model: The model to repair.
        vector: The trigger vector.
        validation: The images. Without labels, CA is the agreement with the model's own
            predictions, weighted by `certainty`.
        triggers: Known or recovered triggers, at least one.
        head: The zero-shot head, [C, D].
        targets: The class that the triggers lead to, or one class per trigger.
        config: The candidates and the limits; default: UnlearnConfig().
        accuracy_before: The CA to compare with; default: that of `model`. In a second round, this
            is the CA of the first round's model.
        reserve: The share of the accuracy to spend (1 - min_accuracy_kept) that is left to later
            passes if this vector cannot finish.
        probe: Measures how far features move. None sets no limit to this.

    Raises:
        DataError: All validation images belong to a target class.
        UsageError: There are no triggers.
    """
    config = config or UnlearnConfig()
    target_of_each = one_target_each(triggers, targets)
    # The images are sent once, as bytes, and not again for every alpha. They are stamped there.
    shown = validation.images.to(head.device)
    own = predict(model, shown, head)
    weights = torch.ones(len(own), dtype=torch.float64)
    if validation.labels is None:
        weights = certainty(model, shown, head)
    labels = own if validation.labels is None else validation.labels
    most = max(LEAST_ATTACKED, config.attacked_images // len(triggers))
    attacked = {}
    for target in dict.fromkeys(target_of_each):
        others = torch.nonzero((labels != target) & (own != target)).flatten()
        # The sample has images of all classes, because a trigger may not work on some classes.
        rng = generator("repair.attacked", config.seed, target)
        few = stratified_sample(labels[others].numpy(), len(others), most, rng)
        attacked[target] = shown[others[torch.from_numpy(few)].to(shown.device)]
    for target, others in attacked.items():
        if not len(others):
            raise DataError(f"{validation.name}: no images outside the target class {target}")
    parts = [trigger(attacked[t]) for trigger, t in zip(triggers, target_of_each, strict=True)]
    stamped, sizes = torch.cat(parts), [len(part) for part in parts]
    wanted = torch.repeat_interleave(torch.tensor(target_of_each), torch.tensor(sizes))
    candidates = Candidates(model, vector)
    coefficients = config.alphas()
    if accuracy_before is None:
        accuracy_before = weighted_share((own == labels).cpu(), weights)

    def measure(index: int) -> Measured:
        candidate, seen = candidates.at(coefficients[index]), own  # known already
        if not candidates.is_start(coefficients[index]):
            seen = predict(candidate, shown, head)
        sent = (predict(candidate, stamped, head).cpu() == wanted).double()
        return Measured(
            weighted_share((seen == labels).cpu(), weights),
            tuple(float(part.mean()) for part in torch.split(sent, sizes)),
            0.0 if probe is None else probe.of(candidate).mean_distance,
        )

    measured = measure_alphas(
        measure,
        coefficients,
        Limits(config, accuracy_before, reserve),
        stride=config.advanced.alpha_stride,
    )
    coefficients = tuple(coefficients[k] for k in measured)
    accuracy = [one.accuracy for one in measured.values()]
    success = [one.success for one in measured.values()]
    drift = [] if probe is None else [one.drift for one in measured.values()]
    chosen, reached = choose_coefficient(
        coefficients,
        accuracy,
        success,
        config,
        accuracy_before=accuracy_before,
        reserve=reserve,
        drift=drift or None,
    )
    return CoefficientSearch(
        coefficients,
        tuple(accuracy),
        tuple(max(shares) for shares in success),
        chosen,
        reached,
        accuracy_before,
        reserve,
        tuple(drift),
        None if reached else find_compromise(accuracy, success, config, accuracy_before, drift),
    )


def certainty(model: OpenClipModel, images: Tensor, head: Tensor) -> Tensor:
    """Return how certain a model is of each image, float64 [N] in [0, 1], on the CPU.

    This is the probability of the likeliest class minus that of the next. An image that belongs to
    none of the names lies between them, and a small change of the weights changes its class. It
    must not count as much as an image that the model knows. If the model is certain of no image, or
    knows only one class, all images count 1.
    """
    return certainty_of(model.logit_scale * image_features(model, images) @ head.T)


def certainty_of(logits: Tensor) -> Tensor:
    """Return `certainty` of logits [N, C], float64 [N] on the CPU."""
    if logits.shape[1] < 2:
        return torch.ones(len(logits), dtype=torch.float64)
    first, second = logits.softmax(dim=1).double().topk(2, dim=1).values.unbind(dim=1)
    sure = (first - second).cpu()
    return sure if float(sure.sum()) > 0 else torch.ones_like(sure)


def weighted_share(right: Tensor, weights: Tensor) -> float:
    """Return the weighted share of images that are right: bool [N], float64 [N]."""
    return float((right.double() * weights).sum() / weights.sum())


def find_compromise(
    accuracy: Sequence[float],
    success: Sequence[Sequence[float]],
    config: UnlearnConfig,
    accuracy_before: float,
    drift: Sequence[float] = (),
) -> Compromise | None:
    """Return the smallest alpha that removes every trigger, whatever it costs; None without one.

    The arguments are those of `choose_coefficient`. The limits are rounded so that they allow this
    alpha.
    """
    removing = [k for k, one in enumerate(success) if max(one) <= config.max_attack_success]
    if not removing or accuracy_before <= 0:
        return None
    index = removing[0]
    kept = math.floor(1000 * accuracy[index] / accuracy_before) / 1000
    moved = math.ceil(1000 * drift[index]) / 1000 if drift else config.max_drift
    return Compromise(index, min(kept, config.min_accuracy_kept), max(moved, config.max_drift))


def choose_coefficient(
    coefficients: Sequence[float],
    accuracy: Sequence[float],
    success: Sequence[Sequence[float]],
    config: UnlearnConfig,
    *,
    accuracy_before: float,
    reserve: float = 0.0,
    drift: Sequence[float] | None = None,
) -> tuple[int, bool]:
    """Return the index of the alpha to take, and whether all limits hold there.

    coefficients: A candidates, ascending, the first of them 0. accuracy: The share per candidate.
    success: The share per candidate and trigger, A x T. drift: The drift per candidate, or None for
    no limit. The rule is that of `search_coefficient`.
    """
    moved = drift or [0.0] * len(coefficients)
    limits = Limits(config, accuracy_before, reserve)
    measured = [
        Measured(one, tuple(shares), far)
        for one, shares, far in zip(accuracy, success, moved, strict=True)
    ]
    keeping = [k for k, one in enumerate(measured) if limits.keeps(one)]
    good = [k for k in keeping if limits.removes(measured[k])]
    if good:
        largest = limits.safest(coefficients, good[0])
        return [k for k in good if coefficients[k] <= largest][-1], True
    if min((measured[k].mean_success for k in keeping), default=0.0) > 1 / LEAST_ATTACKED:
        keeping = [k for k in keeping if limits.keeps(measured[k], reserve)]
    return min(keeping or [0], key=lambda k: (measured[k].mean_success, k)), False
