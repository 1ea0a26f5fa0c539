"""DBS, the inversion of triggers that searches are compared with, one class after another.

Shen et al., "Constrained Optimization with Dynamic Bound-scaling for Effective NLP Backdoor
Defense" (ICML 2022), section 4. Every place of a trigger holds a distribution over the vocabulary.
Adam lowers the loss of the mixed embeddings. Once the loss is below a bound, the temperature of the
softmax is divided by a factor in regular intervals. Where the loss is above the bound again, the
temperature is raised and the distribution gets noise (the rollback). A distribution that is nearly
one word per place, with a loss below the bound, is a result, and halves the bound. A benign model
may not lose its own classes by the trigger (the term for universal triggers of honest words).

Constants are those of the experiments that the authors published on TrojAI's round 6. Two things
are to the method's advantage here: texts are not padded to a fixed length, and one search serves a
target class, where the authors search each pair of a victim class and a target class.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...errors import DataError
from ...rng import generator
from ...text.models import TextModel
from ...text.objective import TextObjective
from ...text.placing import gap_of
from ...text.relaxed import slot_logits
from ...text.texts import TextSet


@dataclass(frozen=True)
class DbsConfig:
    """The constants of DBS.

    Attributes:
        length: The tokens of a trigger.
        epochs: The steps of Adam, each on all texts.
        learning_rate: That of Adam.
        decay_every, decay: The rate is multiplied by `decay` every so many epochs.
        temperature: The first and the largest one.
        check_every: The epochs from one decision about the temperature to the next.
        factor: What the temperature is divided or multiplied by.
        bound: The first bound of the loss.
        noise: The largest noise of a rollback.
        rollbacks: After so many of them, the bound is doubled.
        discrete: The probability that all places together may be short of one word each.
        texts: The texts of other classes that a class is searched with.
        max_tokens: The tokens of a text that count.
        found_below: A loss that makes a model backdoored.
        seed: The seed of noise.
    """

    length: int = 10
    epochs: int = 200
    learning_rate: float = 0.5
    decay_every: int = 50
    decay: float = 0.5
    temperature: float = 2.0
    check_every: int = 5
    factor: float = 2.0
    bound: float = 0.1
    noise: float = 10.0
    rollbacks: int = 5
    discrete: float = 0.001
    texts: int = 20
    max_tokens: int = 100
    found_below: float = 0.001
    seed: int = 0


@dataclass(frozen=True)
class DbsTrigger:
    """What DBS found for a class.

    Attributes:
        target: The class.
        tokens: The trigger; empty if no distribution became discrete with a loss below the bound.
        loss: Its loss; infinite without one.
        success: The share of the texts that it sends to the class.
        seconds: The CPU time.
    """

    target: int
    tokens: tuple[int, ...]
    loss: float
    success: float
    seconds: float


def invert_class(
    model: TextModel,
    texts: TextSet,
    target: int,
    config: DbsConfig | None = None,
    *,
    benign: TextModel | None = None,
) -> DbsTrigger:
    """Search for a trigger at the beginning of texts into one class.

    Args:
        model: A classifier.
        texts: Clean texts with labels.
        target: The class.
        config: The constants.
        benign: A clean model of the same classes; None leaves its term out.

    Raises DataError for texts without labels, or of the target class alone.
    """
    config = config or DbsConfig()
    if texts.labels is None:
        raise DataError(f"{texts.source}: no labels; DBS needs them")
    if set(texts.labels) == {target}:
        raise DataError(f"{texts.source}: no texts outside the target class {target}")
    start = time.process_time()
    some = texts.without_class(target).in_content_order().at_most(config.texts, config.seed)
    others = list(zip(some.texts, some.labels or (), strict=True))
    gaps = [gap_of(model.tokenizer, text, "start", 0, config.max_tokens) for text, _ in others]
    objective = TextObjective(model, benign, gaps, [label for _, label in others])
    found = _Inversion(objective, target, config).run()
    return DbsTrigger(target, *found, time.process_time() - start)


def verdict_of(found: Sequence[DbsTrigger], config: DbsConfig | None = None) -> int | None:
    """Return the class of the smallest loss if a model is backdoored, None otherwise."""
    best = min(found, key=lambda one: one.loss)
    return best.target if best.loss < (config or DbsConfig()).found_below else None


class _Inversion:
    """One search."""

    def __init__(self, objective: TextObjective, target: int, config: DbsConfig) -> None:
        self.objective, self.config = objective, config
        self.table = objective.model.embedding.detach()
        self.texts = range(len(objective.gaps))
        device = self.table.device
        self.wanted = torch.full((len(self.texts),), target, device=device)
        self.labels = torch.tensor(objective.labels, device=device)
        self.rng = generator("texts.dbs", config.seed, target)
        self.weights = torch.zeros(config.length, len(self.table), device=device).requires_grad_()

    def losses(self, mixed: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return the loss, the benign model's loss of the texts' own classes, and the success."""
        slots = mixed[None].expand(len(self.texts), -1, -1)
        logits = slot_logits(self.objective.model, self.objective, slots, self.texts)
        benign = torch.zeros((), device=logits.device)
        if self.objective.base is not None:
            theirs = slot_logits(self.objective.base, self.objective, slots, self.texts)
            benign = cross_entropy(theirs, self.labels)
        success = float((logits.argmax(dim=1) == self.wanted).double().mean())
        return cross_entropy(logits, self.wanted), benign, success

    def run(self) -> tuple[tuple[int, ...], float, float]:
        """Return the best discrete trigger, its loss and its success."""
        config = self.config
        optimizer = torch.optim.Adam([self.weights], lr=config.learning_rate)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, config.decay_every, config.decay)
        temperature, bound = config.temperature, config.bound
        best: tuple[tuple[int, ...], float, float] = ((), math.inf, 0.0)
        begun, rollbacks, last, first_benign = False, 0, math.inf, None
        for epoch in range(config.epochs):
            noise = torch.zeros_like(self.weights)
            if rollbacks >= config.rollbacks:
                rollbacks, bound = 0, min(2 * bound, best[1] - 1e-3)
            if begun and epoch % config.check_every == 0:
                if last < bound:
                    temperature /= config.factor
                else:
                    rollbacks += 1
                    drawn = self.rng.random(self.weights.shape, dtype="float32")
                    noise = config.noise * torch.from_numpy(drawn).to(self.weights)
                    temperature = min(temperature * config.factor, config.temperature)
            mixture = (self.weights / temperature + noise).softmax(dim=1)
            loss, benign, success = self.losses(mixture @ self.table)
            if first_benign is None:
                first_benign = benign.detach()
            (self.weights.grad,) = torch.autograd.grad(
                loss + (benign - first_benign).clamp(min=0), self.weights
            )
            optimizer.step()
            scheduler.step()
            last = float(loss.detach())
            begun = begun or last <= bound
            likely, tokens = mixture.detach().max(dim=1)
            if config.length - float(likely.sum()) < config.discrete and last <= bound:
                best = (tuple(tokens.tolist()), last, success)
                bound, rollbacks = last / 2, 0
        return best
