"""TBAR: find the trigger vector in weight space and subtract it.

Source: Abdelraheem, Favero, Bovet, Frossard, "Backdoor Unlearning by Linear Task Decomposition",
arXiv 2510.14845. A short fine-tuning on triggered images gives the trigger vector tau; the repaired
weights are theta_b - alpha tau. Three ways to get tau:

* `strengthen`: the paper's. Triggered images are pushed to the target class; tau is what changed.
* `paired`: the same, while the same clean images are held to the model's own predictions.
* `forget` (default): triggered images are pushed to what the model says of them *without* the
  trigger, the target class left out, and clean ones are held; tau is the change with its sign
  turned. On small models, where the backdoor is less disentangled than in the paper, it removes
  most for the least clean accuracy: at theta_b the loss of the other two is already close to 0,
  that of this one is not.

None of them needs labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot

from ..data import ImageSet
from ..data.sampling import stratified_sample
from ..errors import ArchitectureError, DataError, UsageError
from ..evaluation import Stamp, predict
from ..inversion import InversionResult, WarpResult
from ..models import OpenClipModel
from ..rng import child_seed, generator
from ..training import optimize
from .task_vectors import TaskVector

# Images that each trigger is tried on for every alpha, however many triggers there are.
_LEAST_ATTACKED = 50

VectorKind = Literal["forget", "paired", "strengthen"]


@dataclass(frozen=True)
class UnlearnConfig:
    """How to find and subtract the trigger vector.

    Attributes:
        vector: Which trigger vector, see this module.
        steps: Optimiser steps of the fine-tuning.
        learning_rate: Its peak rate.
        batch_size: Clean images per step; as many triggered ones are added.
        certainly_target: With `forget`, triggered images whose clean version has at least this
            probability of the target class keep it; all others are pushed away from that class,
            the nearer ones among them too: a clean model takes a few images for the target anyway,
            and those that it takes for something else by a hair are the first to follow a trigger.
        augment: Whether each image is mirrored or not and moved by up to a sixteenth of its side,
            at random in every step, before it is triggered. What the model says of the moved image
            is asked for anew, so that this needs no label either.
        forget_share: Share of the given images that make the trigger vector; alpha is chosen on
            all of them.
        passes: With recovered triggers, how often to recover and subtract before the next scan: the
            triggers that still work on the repaired model join those found before.
        amplifications: Factors of a recovered patch's mask; each trigger is used with each. The
            search ends with the faintest mask that works, and a model that forgot only that still
            obeys the attacker's stronger one.
        blend_amplifications: The same for recovered blends.
        warps: With recovered triggers, searches for a smooth warp into each target class, in every
            pass; 0 for none. Of these only those that find one have a part in the vector.
        warp_amplifications: Factors of a recovered warp's offsets.
        coefficients: Candidate values of alpha, ascending and at least 0. 0, which leaves the model
            as it is, is tried whether it is among them or not.
        max_attack_success: ASR on validation images that is small enough, a share.
        attacked_images: Stamped images to try for every alpha, shared out over the triggers, but at
            least 50 with each, if there are so many.
        safety_factor: The smallest alpha within the limits is raised by up to this factor while the
            accuracy allows it: recovered triggers only estimate the attacker's.
        min_accuracy_kept: Least share of the clean accuracy of theta_b to keep. A pass whose
            vector cannot finish leaves an equal part of the rest to each that follows.
        seed: Of the batches.
    """

    vector: VectorKind = "forget"
    steps: int = 160
    learning_rate: float = 4e-4
    batch_size: int = 64
    certainly_target: float = 0.9
    augment: bool = True
    forget_share: float = 0.8
    passes: int = 2
    amplifications: tuple[float, ...] = (1.0, 2.0, 4.0)
    blend_amplifications: tuple[float, ...] = (1.0, 2.0)
    warps: int = 4
    warp_amplifications: tuple[float, ...] = (1.0, 2.0)
    coefficients: tuple[float, ...] = tuple(round(0.1 * k, 1) for k in range(21))
    max_attack_success: float = 0.01
    attacked_images: int = 1000
    safety_factor: float = 1.2
    min_accuracy_kept: float = 0.97
    seed: int = 0

    def __post_init__(self) -> None:
        if self.vector not in ("forget", "paired", "strengthen"):
            raise UsageError(
                f"trigger vector {self.vector!r}; expected forget, paired or strengthen"
            )
        if self.steps < 1 or self.batch_size < 1 or not self.learning_rate > 0:
            raise UsageError(
                f"steps {self.steps}, batch_size {self.batch_size}, learning_rate "
                f"{self.learning_rate}; expected all above 0"
            )
        if not 0 < self.certainly_target <= 1 or not 0 < self.forget_share <= 1 or self.passes < 1:
            raise UsageError(
                f"certainly_target {self.certainly_target}, forget_share {self.forget_share}, "
                f"passes {self.passes}; expected shares in (0, 1] and at least 1"
            )
        if self.attacked_images < 1 or self.safety_factor < 1:
            raise UsageError(
                f"attacked_images {self.attacked_images}, safety_factor {self.safety_factor}; "
                "expected at least 1 each"
            )
        if not (self.amplifications and self.blend_amplifications and self.warp_amplifications):
            raise UsageError("no amplifications; expected at least one factor for each family")
        if self.warps < 0:
            raise UsageError(f"warps {self.warps}; expected at least 0")
        if not self.coefficients or list(self.coefficients) != sorted(set(self.coefficients)):
            raise UsageError(f"coefficients {self.coefficients}; expected ascending numbers")
        if not all(0 <= one < math.inf for one in self.coefficients):
            raise UsageError(f"coefficients {self.coefficients}; expected finite numbers from 0")

    def forget_set(self, images: ImageSet) -> ImageSet:
        """Return the images that make the trigger vector."""
        if self.forget_share == 1:
            return images
        seed = child_seed("repair.forget", self.seed)
        return images.split((self.forget_share,), seed=seed)[0]

    def reserve(self, number: int) -> float:
        """Return the share of the accuracy to spend that pass 0..passes-1 leaves to later ones.

        Were the first pass to spend all of it on a vector that cannot finish, the next one, whose
        vector knows more triggers, could not subtract anything.
        """
        return 1 - (number + 1) / self.passes

    def amplified(self, recovered: InversionResult | WarpResult) -> list[Stamp]:
        """Return the recovered triggers that work, each with each factor of its family."""
        if isinstance(recovered, WarpResult):
            return [
                recovered.trigger(k).amplified(factor)
                for k in recovered.working()
                for factor in self.warp_amplifications
            ]
        blend = recovered.family == "blend"
        working = torch.isfinite(recovered.p_l1).nonzero().flatten().tolist()
        return [
            recovered.trigger(k).amplified(factor)
            # Where no search succeeded, what it ended with is still the best guess.
            for k in working or range(len(recovered))
            for factor in (self.blend_amplifications if blend else self.amplifications)
        ]


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
        reached: Whether both limits hold there.
        accuracy_before: What the clean accuracy was compared with.
    """

    coefficients: tuple[float, ...]
    clean_accuracy: tuple[float, ...]
    attack_success_rate: tuple[float, ...]
    chosen: int
    reached: bool
    accuracy_before: float

    @property
    def coefficient(self) -> float:
        """The chosen alpha."""
        return self.coefficients[self.chosen]


def trigger_vector(
    model: OpenClipModel,
    images: Tensor,
    triggers: Sequence[Stamp],
    head: Tensor,
    targets: int | Sequence[int],
    config: UnlearnConfig | None = None,
    *,
    description: str = "trigger vector",
) -> TaskVector:
    """Return tau over the image tower, such that theta_b - alpha tau unlearns for alpha > 0.

    images: the forget set before it is triggered, uint8 [N, 3, H, W]; a few hundred are enough.
    triggers: known or recovered; each image gets one of them, at random, anew in every step.
    head: zero-shot head [C, D]. targets: the class the triggers lead to, or one per trigger.
    Raises DataError without images and UsageError without triggers.
    """
    config = config or UnlearnConfig()
    if len(images) < 2:
        raise DataError(f"{len(images)} image; a trigger vector needs at least 2")
    if not triggers:
        raise UsageError("no triggers; a trigger vector needs at least one")
    led_to = _for_each(triggers, targets)
    tuned = model.clone()
    scale = model.logit_scale
    rng = generator("repair.vector", config.seed)
    size = min(config.batch_size, len(images))
    classes = torch.tensor(led_to)

    def batches() -> Iterator[Tensor]:
        for _ in range(config.steps):
            chosen = rng.choice(len(images), size, replace=False)
            yield torch.from_numpy(np.stack([chosen, rng.integers(len(triggers), size=size)]))

    def loss(batch: Tensor) -> Tensor:
        index, which = batch
        clean = images[index]
        if config.augment:
            clean = _moved(clean, rng)
        # Stamped here and not beforehand: all triggers on all images would fill the memory.
        stamped = clean.clone()
        for k in which.unique().tolist():
            stamped[which == k] = triggers[k](clean[which == k])
        target = classes[which].to(head.device)
        if config.vector == "strengthen":
            return cross_entropy(_logits(tuned, stamped, head, scale), target)
        with torch.no_grad():
            held = _probabilities(model, clean, head, scale)
        wanted = (
            _without_target(held, target, config.certainly_target)
            if config.vector == "forget"
            else one_hot(target, len(head)).float()
        )
        logits = _logits(tuned, torch.cat([clean, stamped]), head, scale)
        return cross_entropy(logits, torch.cat([held, wanted]))

    optimize(
        list(tuned.visual.parameters()),
        loss,
        batches(),
        steps=config.steps,
        learning_rate=config.learning_rate,
        description=description,
    )
    change = TaskVector.between(model.clip.state_dict(), tuned.clip.state_dict())
    moved = TaskVector({k: v for k, v in change.tensors.items() if k.startswith("visual.")})
    return -moved if config.vector == "forget" else moved


def subtract(model: OpenClipModel, vector: TaskVector, coefficient: float) -> OpenClipModel:
    """Return a copy with weights theta_b - coefficient * vector, as its file can hold them."""
    candidates = _Candidates(model, vector)
    return candidates.at(coefficient)


class _Candidates:
    """One copy of a model that takes the weights theta_b - alpha * vector for one alpha at a time.

    Every alpha starts from theta_b itself, so no rounding adds up, and no file is read again.
    """

    def __init__(self, model: OpenClipModel, vector: TaskVector) -> None:
        self._candidate = model.clone()
        start, weights = model.clip.state_dict(), self._candidate.clip.state_dict()
        absent = sorted(vector.tensors.keys() - weights.keys())
        if absent:
            raise ArchitectureError(f"the model has no tensor {absent[0]!r} to subtract from")
        self._moved = [
            (weights[name], start[name], change.to(start[name].device), model.storage_dtype(name))
            for name, change in vector.tensors.items()
        ]

    def is_start(self, coefficient: float) -> bool:
        """Whether theta_b itself is what `at` gives: nothing subtracted, nothing rounded."""
        return coefficient == 0 and all(weight.dtype == dtype for weight, *_, dtype in self._moved)

    @torch.no_grad()
    def at(self, coefficient: float) -> OpenClipModel:
        """Return the copy, changed in place: it is the same object every time."""
        for weight, start, change, dtype in self._moved:
            torch.add(start, change, alpha=-coefficient, out=weight)
            if dtype != weight.dtype:
                weight.copy_(weight.to(dtype))  # what is tested is what is saved
        return self._candidate


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
) -> CoefficientSearch:
    """Try every alpha on images that are decoded and stamped once, weights changed in memory.

    targets: The class the triggers lead to, or one per trigger. head: zero-shot head [C, D].
    accuracy_before: What CA is compared with; default: that of `model`; in a second round, that of
    the model of the first. reserve: Share of the accuracy to spend, 1 - min_accuracy_kept, that is
    left to later passes where this vector cannot finish.

    Chosen is the smallest alpha, times safety_factor, with ASR <= max_attack_success of every
    trigger and CA >= min_accuracy_kept of accuracy_before; if there is none, the one with the least
    mean ASR of all triggers among those that keep the accuracy: the worst one alone may be beyond
    what any alpha reaches. If that mean is above 2%, about one image of each trigger, they have to
    keep the reserve as well. Where none keeps the accuracy it is 0. Without labels CA is the
    agreement with the model's own predictions.
    Raises DataError when all validation images belong to a target class, UsageError without
    triggers.
    """
    config = config or UnlearnConfig()
    if not triggers:
        raise UsageError("no triggers; expected at least one to choose alpha with")
    led_to = _for_each(triggers, targets)
    own = predict(model, validation.images, head)
    labels = own if validation.labels is None else validation.labels
    most = max(_LEAST_ATTACKED, config.attacked_images // len(triggers))
    attacked = {}
    for target in dict.fromkeys(led_to):
        others = torch.nonzero((labels != target) & (own != target)).flatten()
        # A sample of all classes: those of one alone may be out of the trigger's reach.
        rng = generator("repair.attacked", config.seed, target)
        few = stratified_sample(labels[others].numpy(), len(others), most, rng)
        attacked[target] = validation.images[others[torch.from_numpy(few)]]
    for target, others in attacked.items():
        if not len(others):
            raise DataError(f"{validation.name}: no images outside the target class {target}")
    parts = [trigger(attacked[t]) for trigger, t in zip(triggers, led_to, strict=True)]
    stamped, sizes = torch.cat(parts), [len(part) for part in parts]
    wanted = torch.cat([torch.full((len(p),), t) for p, t in zip(parts, led_to, strict=True)])
    candidates = _Candidates(model, vector)
    coefficients = config.coefficients
    if coefficients[0] != 0:  # what is chosen where none keeps the accuracy
        coefficients = (0.0, *coefficients)
    accuracy, success = list[float](), list[tuple[float, ...]]()
    for coefficient in coefficients:
        candidate = candidates.at(coefficient)
        seen = own  # known already
        if not candidates.is_start(coefficient):
            seen = predict(candidate, validation.images, head)
        accuracy.append(float((seen == labels).double().mean()))
        sent = (predict(candidate, stamped, head).cpu() == wanted).double()
        success.append(tuple(float(part.mean()) for part in torch.split(sent, sizes)))
    if accuracy_before is None:
        accuracy_before = float((own == labels).double().mean())
    chosen, reached = choose_coefficient(
        coefficients, accuracy, success, config, accuracy_before=accuracy_before, reserve=reserve
    )
    return CoefficientSearch(
        coefficients,
        tuple(accuracy),
        tuple(max(shares) for shares in success),
        chosen,
        reached,
        accuracy_before,
    )


def choose_coefficient(
    coefficients: Sequence[float],
    accuracy: Sequence[float],
    success: Sequence[Sequence[float]],
    config: UnlearnConfig,
    *,
    accuracy_before: float,
    reserve: float = 0.0,
) -> tuple[int, bool]:
    """Return the index of the alpha to take, and whether both limits hold there.

    coefficients: A ascending candidates, the first of them 0. accuracy: share per candidate.
    success: share per candidate of each trigger, A x T. The rule is that of `search_coefficient`.
    """
    kept = config.min_accuracy_kept
    means = [sum(shares) / len(shares) for shares in success]
    keeping = [k for k, value in enumerate(accuracy) if value >= kept * accuracy_before]
    good = [k for k in keeping if max(success[k]) <= config.max_attack_success]
    if good:
        largest = config.safety_factor * coefficients[good[0]] + 1e-9
        return [k for k in good if coefficients[k] <= largest][-1], True
    if min((means[k] for k in keeping), default=0.0) > 1 / _LEAST_ATTACKED:
        least = (kept + reserve * (1 - kept)) * accuracy_before
        keeping = [k for k in keeping if accuracy[k] >= least]
    return min(keeping or [0], key=lambda k: (means[k], k)), False


def _for_each(triggers: Sequence[Stamp], targets: int | Sequence[int]) -> list[int]:
    """Return one target class per trigger."""
    led_to = [targets] * len(triggers) if isinstance(targets, int) else list(targets)
    if len(led_to) != len(triggers):
        raise UsageError(
            f"{len(triggers)} triggers, {len(led_to)} target classes; expected as many"
        )
    return led_to


def _logits(model: OpenClipModel, images: Tensor, head: Tensor, scale: float) -> Tensor:
    pixels = images.to(head.device, torch.float32) / 255
    return scale * normalize(model.encode_pixels(pixels), dim=-1) @ head.T


def _probabilities(model: OpenClipModel, images: Tensor, head: Tensor, scale: float) -> Tensor:
    return _logits(model, images, head, scale).softmax(dim=-1)


def _moved(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Return each image mirrored or not, and moved by up to a sixteenth of its sides.

    images: uint8 [n, 3, H, W]; the result, too. Edges are repeated. rng: decides all of it.
    """
    count, _, height, width = images.shape

    def places(side: int) -> Tensor:
        reach = max(1, side // 16)
        shift = torch.from_numpy(rng.integers(-reach, reach + 1, (count, 1)))
        return (torch.arange(side) + shift).clamp(0, side - 1)

    rows, columns = places(height), places(width)
    mirrored = torch.from_numpy(rng.random((count, 1)) < 0.5)
    columns = torch.where(mirrored, columns.flip(1), columns).to(images.device)
    number = torch.arange(count, device=images.device)[:, None, None]
    moved = images[number, :, rows.to(images.device)[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()


def _without_target(probabilities: Tensor, targets: Tensor, certain: float) -> Tensor:
    """Return what triggered images are pushed to: probabilities [N, C] without the target class.

    targets: int64 [N], the class of each row's trigger. Rows whose probability of it is at least
    `certain` are left as they are.
    """
    rest = probabilities.scatter(1, targets[:, None], 0)
    rest /= rest.sum(dim=1, keepdim=True).clamp(min=1e-12)
    sure = probabilities.gather(1, targets[:, None]) >= certain
    return torch.where(sure, probabilities, rest)
