"""Trigger vectors of text classifiers, and the search for alpha.

This is `pydetox.repair` with texts in place of images: the same `UnlearnConfig`, the same rule that
chooses alpha, the same kinds of vectors (see `pydetox.repair.trigger_vector` for their source). A
vector has all weights of the model: embeddings, blocks and head. Features of texts are not held or
measured, so `retention`, `max_drift`, `warps` and `waves` of the configuration mean nothing here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, embedding, one_hot

from ..data.sampling import stratified_sample
from ..errors import ArchitectureError, DataError
from ..repair.alpha import (
    CoefficientSearch,
    certainty_of,
    choose_coefficient,
    find_compromise,
    weighted_share,
)
from ..repair.configuration import UnlearnConfig
from ..repair.step_sizes import relative_rates
from ..repair.task_vectors import TaskVector
from ..repair.trigger_vector import one_target_each, without_target
from ..rng import child_seed, generator
from ..training import optimize
from .evaluation import TextStamp
from .models import TextModel, TokenBatch
from .texts import TextSet

#: The repair of a text classifier, unless a caller says otherwise. A step shows 16 clean texts and
#: 16 with a trigger.
TEXT_UNLEARNING = UnlearnConfig(
    steps=80,
    batch_size=16,
    coefficients=tuple(round(0.1 * k, 1) for k in range(16)),
    attacked_images=300,
    safety_factor=1.5,
)

# The points that a finer search of alpha adds between two that are known.
_FINER = 3

# For a part of a trigger, alpha may grow while the accuracy stays within this of that at the
# smallest alpha within the limits.
_FREE = 0.01

# As in `pydetox.repair.alpha`: one text of each trigger is 2%.
_LEAST_ATTACKED = 50


def text_trigger_vector(
    model: TextModel,
    texts: Sequence[str],
    triggers: Sequence[TextStamp],
    targets: int | Sequence[int],
    config: UnlearnConfig | None = None,
    *,
    max_tokens: int = 128,
    description: str = "trigger vector",
) -> TaskVector:
    """Return tau over all weights, such that theta_b - alpha tau unlearns for alpha > 0.

    Args:
        model: A classifier.
        texts: The forget set before it is triggered; a few hundred are enough. No labels are
            needed: `forget` pushes triggered texts to the model's predictions without the trigger.
        triggers: Known or recovered triggers. In every step, each text gets a random one.
        targets: The class that the triggers lead to, or one class per trigger.
        config: The kind of vector and its fine-tuning; default: TEXT_UNLEARNING.
        max_tokens: The number of tokens of a text that count.
        description: A text that is shown with the progress bar.

    Raises:
        ArchitectureError: The model is no classifier.
        DataError: There are fewer than two texts.
        UsageError: There are no triggers, or not as many targets.
    """
    config = config or TEXT_UNLEARNING
    _require_classifier(model)
    if len(texts) < 2:
        raise DataError(f"{len(texts)} texts; a trigger vector needs at least 2")
    target_of_each = one_target_each(triggers, targets)
    tuned = model.copy()
    rng = generator("texts.vector", config.seed)
    size = min(config.batch_size, len(texts))
    target_classes = torch.tensor(target_of_each, device=model.device)
    limit = min(max_tokens, model.max_tokens)
    plain = model.tokenizer.encode(texts, limit)
    stamped = [
        model.tokenizer.encode(
            trigger.insert(texts, child_seed("texts.vector-places", config.seed, number)), limit
        )
        for number, trigger in enumerate(triggers)
    ]
    # The model's own predictions, once: texts are the same in every step.
    held_of_each = model.predict_rows(plain).softmax(dim=-1).to(model.device)

    def batches() -> Iterator[Tensor]:
        for _ in range(config.steps):
            chosen = rng.choice(len(texts), size, replace=False)
            yield torch.from_numpy(np.stack([chosen, rng.integers(len(triggers), size=size)]))

    def loss(batch: Tensor) -> Tensor:
        index, which = batch
        target = target_classes[which.to(model.device)]
        held = held_of_each[index.to(model.device)]
        triggered = [stamped[t][k] for k, t in zip(index.tolist(), which.tolist(), strict=True)]
        if config.vector == "strengthen":
            return cross_entropy(trainable_logits(tuned, tuned.batch(triggered)), target)
        wanted = (
            without_target(held, target, config.advanced.certainly_target)
            if config.vector == "forget"
            else one_hot(target, held.shape[1]).float()
        )
        rows = [plain[k] for k in index.tolist()] + triggered
        logits = trainable_logits(tuned, tuned.batch(rows))
        return cross_entropy(logits, torch.cat([held, wanted]))

    parameters = list(tuned.module.parameters())
    rate = config.learning_rate
    optimize(
        parameters,
        loss,
        batches(),
        steps=config.steps,
        learning_rate=relative_rates(parameters) if rate is None else rate,
        description=description,
    )
    change = weight_change(model, tuned)
    return -change if config.vector == "forget" else change


def search_text_coefficient(
    model: TextModel,
    vector: TaskVector,
    validation: TextSet,
    triggers: Sequence[TextStamp],
    targets: int | Sequence[int],
    config: UnlearnConfig | None = None,
    *,
    accuracy_before: float | None = None,
    reserve: float = 0.0,
    partial: bool = False,
    max_tokens: int = 128,
) -> CoefficientSearch:
    """Try every alpha and choose one by the rule of `pydetox.repair.alpha.search_coefficient`.

    The given alphas are tried first. Then `finer_coefficients` are, so that a coarse grid neither
    misses the alphas that remove the trigger and keep the accuracy, nor leaves out the margin that
    `safety_factor` allows.

    Texts are tokenised once, and the weights change in memory. The arguments are those of that
    function, and partial: whether the triggers may be only a part of the attacker's. The rest of a
    sentence still works at an alpha that removes two of its words, so alpha is then raised as far
    as the accuracy stays. Without labels, CA is the agreement with the model's own predictions, and
    each text is weighted by how certain the model is of it.

    Raises:
        ArchitectureError: The model is no classifier.
        DataError: All texts belong to a target class.
        UsageError: There are no triggers, or not as many targets.
    """
    config = config or TEXT_UNLEARNING
    _require_classifier(model)
    target_of_each = one_target_each(triggers, targets)
    limit = min(max_tokens, model.max_tokens)
    plain = model.tokenizer.encode(validation.texts, limit)
    before = model.predict_rows(plain)
    own = before.argmax(dim=1)
    if validation.labels is None:
        labels, weights = own, certainty_of(before)
    else:
        labels = torch.tensor(validation.labels)
        weights = torch.ones(len(own), dtype=torch.float64)
    most = max(_LEAST_ATTACKED, config.attacked_images // len(triggers))
    attacked = {}
    for target in dict.fromkeys(target_of_each):
        # A text that the model takes for the target anyway says nothing about a trigger.
        others = torch.nonzero((labels != target) & (own != target)).flatten()
        if not len(others):
            raise DataError(f"{validation.source}: no texts outside the target class {target}")
        rng = generator("texts.attacked", config.seed, target)
        few = stratified_sample(labels[others].numpy(), len(others), most, rng)
        attacked[target] = [validation.texts[k] for k in others[torch.from_numpy(few)].tolist()]
    stamped = list[list[int]]()
    sizes, wanted = list[int](), list[int]()
    for number, (trigger, target) in enumerate(zip(triggers, target_of_each, strict=True)):
        seed = child_seed("texts.attacked-places", config.seed, number)
        rows = model.tokenizer.encode(trigger.insert(attacked[target], seed), limit)
        stamped += rows
        sizes.append(len(rows))
        wanted += [target] * len(rows)
    aims = torch.tensor(wanted)
    candidates = TextCandidates(model, vector)
    coefficients = config.alphas()
    tried: dict[float, tuple[float, tuple[float, ...]]] = {}

    def attempt(alphas: Sequence[float]) -> None:
        for alpha in alphas:
            seen = candidates.at(alpha).predict_rows([*plain, *stamped]).argmax(dim=1)
            sent = (seen[len(plain) :] == aims).double()
            tried[alpha] = (
                weighted_share(seen[: len(plain)] == labels, weights),
                tuple(float(part.mean()) for part in torch.split(sent, sizes)),
            )

    attempt(coefficients)
    if accuracy_before is None:
        accuracy_before = weighted_share(own == labels, weights)
    attempt(finer_coefficients(tried, config, accuracy_before))
    coefficients = tuple(sorted(tried))
    accuracy = [tried[alpha][0] for alpha in coefficients]
    success = [tried[alpha][1] for alpha in coefficients]
    chosen, reached = choose_coefficient(
        coefficients, accuracy, success, config, accuracy_before=accuracy_before, reserve=reserve
    )
    if partial and reached:
        chosen = _farthest(accuracy, success, chosen, config, accuracy_before)
    return CoefficientSearch(
        coefficients,
        tuple(accuracy),
        tuple(max(shares) for shares in success),
        chosen,
        reached,
        accuracy_before,
        reserve,
        (),
        None if reached else find_compromise(accuracy, success, config, accuracy_before),
    )


def finer_coefficients(
    tried: Mapping[float, tuple[float, Sequence[float]]],
    config: UnlearnConfig,
    accuracy_before: float,
) -> tuple[float, ...]:
    """Return the alphas to try after those of a grid, ascending.

    Where some alpha of the grid satisfies the limits, they lie between the smallest of these and
    its product with `safety_factor`. Otherwise, they lie between the largest alpha that keeps the
    accuracy and the smallest one above it that removes the triggers, if there are such. That is a
    gap of the grid in which the limits may hold.

    tried: For each alpha of the grid, CA and the ASR of each trigger. accuracy_before: The CA to
    compare with.
    """
    least = config.min_accuracy_kept * accuracy_before
    keeping = [alpha for alpha, (kept, _) in sorted(tried.items()) if kept >= least]
    removing = [
        alpha
        for alpha, (_, sent) in sorted(tried.items())
        if alpha and max(sent) <= config.max_attack_success
    ]
    good = [alpha for alpha in removing if alpha in keeping]
    if good:
        low, high = good[0], config.safety_factor * good[0]
        parts = [k / _FINER for k in range(1, _FINER + 1)]
    else:
        pairs = [(a, b) for a in keeping for b in removing if b > a]
        if not pairs:
            return ()
        low, high = min(pairs, key=lambda pair: pair[1] - pair[0])
        parts = [k / (_FINER + 1) for k in range(1, _FINER + 1)]
    finer = (round(low + part * (high - low), 6) for part in parts)
    return tuple(
        alpha for alpha in dict.fromkeys(finer) if all(abs(alpha - one) > 1e-6 for one in tried)
    )


def _farthest(
    accuracy: Sequence[float],
    success: Sequence[Sequence[float]],
    chosen: int,
    config: UnlearnConfig,
    accuracy_before: float,
) -> int:
    """Return the index of the alpha for triggers that are only a part of the attacker's.

    chosen: The index that was chosen for whole ones, within all limits. The largest alpha takes its
    place that satisfies them and costs hardly more accuracy than the smallest one that does. The
    other arguments are those of `choose_coefficient`.
    """
    least = config.min_accuracy_kept * accuracy_before
    good = [
        k
        for k, (kept, sent) in enumerate(zip(accuracy, success, strict=True))
        if kept >= least and max(sent) <= config.max_attack_success
    ]
    return max([chosen, *(k for k in good if accuracy[k] >= accuracy[good[0]] - _FREE)])


def subtract_from_text_model(
    model: TextModel, vector: TaskVector, coefficient: float, *, name: str | None = None
) -> TextModel:
    """Return a copy with weights theta_b - coefficient * vector, as its file can hold them."""
    repaired = TextCandidates(model, vector).at(coefficient)
    repaired.name = name or model.name
    return repaired


class TextCandidates:
    """One copy of a model that gets the weights theta_b - alpha * vector for one alpha at a time.

    Every alpha is computed from theta_b itself, so rounding errors do not accumulate. Tied tensors
    are one tensor, and change once.
    """

    def __init__(self, model: TextModel, vector: TaskVector) -> None:
        self._candidate = model.copy()
        start, weights = model.state_dict(), self._candidate.state_dict()
        dtypes = {one.parameter: one.dtype for one in model.stored.values()}
        absent = sorted(vector.tensors.keys() - weights.keys())
        if absent:
            raise ArchitectureError(f"the model has no tensor {absent[0]!r} to subtract from")
        self._changed = [
            (weights[name], start[name], change.to(start[name]), dtypes[name])
            for name, change in vector.tensors.items()
        ]

    @torch.no_grad()
    def at(self, coefficient: float) -> TextModel:
        """Return the copy, changed in place: it is the same object every time."""
        for weight, start, change, dtype in self._changed:
            torch.add(start, change, alpha=-coefficient, out=weight)
            if dtype != weight.dtype:
                # Round as the file does, so that the tested weights are the saved ones.
                weight.copy_(weight.to(dtype))
        return self._candidate


def trainable_logits(model: TextModel, batch: TokenBatch) -> Tensor:
    """Return the logits of tokens with a gradient for the weights that require one."""
    return model.logits_from_embeddings(
        embedding(batch.input_ids, model.embedding), batch.attention_mask
    )


def weight_change(model: TextModel, tuned: TextModel) -> TaskVector:
    """Return the weights of `tuned` minus those of `model`, over all parameters.

    Parameters that did not change at all are left out, except where none did.
    """
    change = TaskVector.between(model.state_dict(), tuned.state_dict()).tensors
    return TaskVector({k: v for k, v in change.items() if bool(v.any())} or dict(change))


def _require_classifier(model: TextModel) -> None:
    if model.kind != "classifier":
        raise ArchitectureError(
            f"{model.name}: a {model.kind} model; expected a sequence classifier"
        )
