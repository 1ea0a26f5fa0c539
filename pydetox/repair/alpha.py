"""The scaling coefficient alpha: how much of a trigger vector to subtract."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import ImageSet
from ..data.sampling import stratified_sample
from ..errors import DataError, UsageError
from ..evaluation import Stamp, predict
from ..models import OpenClipModel
from ..rng import generator
from .configuration import UnlearnConfig
from .retention import DriftProbe
from .subtraction import Candidates
from .task_vectors import TaskVector
from .trigger_vector import one_target_each

# The number of images that each trigger is tried on for every alpha, for any number of triggers.
# One of them is 2%, the smallest success that can be distinguished from none.
_LEAST_ATTACKED = 50


@dataclass(frozen=True)
class CoefficientSearch:
    """CA and ASR over the scaling coefficient alpha.

    Attributes:
        coefficients: alpha, ascending.
        clean_accuracy: Share per alpha; agreement with theta_b where there are no labels.
        attack_success_rate: Share per alpha that the worst of the given triggers sends to the
            target, of the images that are of other classes and that theta_b, without a trigger,
            sends elsewhere: what it takes for the target anyway says nothing about a trigger.
        chosen: Index of the chosen alpha.
        reached: Whether all limits hold there.
        accuracy_before: What the clean accuracy was compared with.
        reserve: Share of the accuracy to spend that was left to later passes.
        drift: How far image features have moved per alpha (`FeatureDrift.mean_distance`) from the
            model before any repair; empty where that was not measured.
    """

    coefficients: tuple[float, ...]
    clean_accuracy: tuple[float, ...]
    attack_success_rate: tuple[float, ...]
    chosen: int
    reached: bool
    accuracy_before: float
    reserve: float = 0.0
    drift: tuple[float, ...] = ()

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
    """Try every alpha on images that are decoded and stamped once, weights changed in memory.

    targets: The class the triggers lead to, or one per trigger. head: zero-shot head [C, D].
    accuracy_before: What CA is compared with; default: that of `model`; in a second round, that of
    the model of the first. reserve: Share of the accuracy to spend, 1 - min_accuracy_kept, that is
    left to later passes where this vector cannot finish. probe: Measures how far features move;
    None sets no limit to that.

    Chosen is the smallest alpha, times safety_factor, with ASR <= max_attack_success of every
    trigger, CA >= min_accuracy_kept of accuracy_before and drift <= max_drift; if there is none,
    the one with the least mean ASR of all triggers among those that keep accuracy and drift: the
    worst one alone may be beyond what any alpha reaches. If that mean is above 2%, about one image
    of each trigger, they have to keep the reserve as well. Where none keeps both it is 0. Without
    labels CA is the agreement with the model's own predictions.
    Raises DataError when all validation images belong to a target class, UsageError without
    triggers.
    """
    config = config or UnlearnConfig()
    if not triggers:
        raise UsageError("no triggers; expected at least one to choose alpha with")
    target_of_each = one_target_each(triggers, targets)
    # Sent once, as bytes, and not again for every alpha; stamped there.
    shown = validation.images.to(head.device)
    own = predict(model, shown, head)
    labels = own if validation.labels is None else validation.labels
    most = max(_LEAST_ATTACKED, config.attacked_images // len(triggers))
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
    coefficients = config.coefficients
    if coefficients[0] != 0:  # what is chosen where none keeps the accuracy
        coefficients = (0.0, *coefficients)
    accuracy, success, drift = list[float](), list[tuple[float, ...]](), list[float]()
    for coefficient in coefficients:
        candidate = candidates.at(coefficient)
        seen = own  # known already
        if not candidates.is_start(coefficient):
            seen = predict(candidate, shown, head)
        accuracy.append(float((seen == labels).double().mean()))
        if probe is not None:
            drift.append(probe.of(candidate).mean_distance)
        sent = (predict(candidate, stamped, head).cpu() == wanted).double()
        success.append(tuple(float(part.mean()) for part in torch.split(sent, sizes)))
    if accuracy_before is None:
        accuracy_before = float((own == labels).double().mean())
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
    )


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

    coefficients: A ascending candidates, the first of them 0. accuracy: share per candidate.
    success: share per candidate of each trigger, A x T. drift: per candidate, or None for no limit.
    The rule is that of `search_coefficient`.
    """
    moved = drift or [0.0] * len(coefficients)
    kept = config.min_accuracy_kept
    means = [sum(shares) / len(shares) for shares in success]
    keeping = [
        k
        for k, value in enumerate(accuracy)
        if value >= kept * accuracy_before and moved[k] <= config.max_drift
    ]
    good = [k for k in keeping if max(success[k]) <= config.max_attack_success]
    if good:
        largest = config.safety_factor * coefficients[good[0]] + 1e-9
        return [k for k in good if coefficients[k] <= largest][-1], True
    if min((means[k] for k in keeping), default=0.0) > 1 / _LEAST_ATTACKED:
        least = (kept + reserve * (1 - kept)) * accuracy_before
        most = (1 - reserve) * config.max_drift
        keeping = [k for k in keeping if accuracy[k] >= least and moved[k] <= most]
    return min(keeping or [0], key=lambda k: (means[k], k)), False
