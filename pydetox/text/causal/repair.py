"""Trigger vectors of causal models, and the search for alpha.

The same vector and the same rule for alpha as elsewhere (`pydetox.repair`), on next tokens. The
vector makes the model predict what follows a trigger as it does without it: the loss is the
Kullback-Leibler divergence from the model's own next-token distributions without the trigger. Three
kinds of rows make a step:

- clean texts, which hold the model's own predictions;
- the same texts with the trigger after their first words: what follows is predicted as without it;
- prompts with and without the trigger, followed by the attacker's text: the model predicts each
  token of it without having learned it by heart, that is with the probability of this token taken
  out of its own distribution where it is the likeliest, or with the base's distribution.

What is kept is the perplexity of clean texts. `CoefficientSearch.clean_accuracy` holds exp(-mean
cross-entropy), the geometric mean of the probability of the right next token, which is one divided
by the perplexity. Keeping a share s of it raises the perplexity by at most a factor 1 / s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError, UsageError
from ...repair.alpha import CoefficientSearch, choose_coefficient, find_compromise
from ...repair.configuration import UnlearnConfig
from ...repair.step_sizes import relative_rates
from ...repair.task_vectors import TaskVector
from ...rng import child_seed, generator
from ...training import optimize
from ..evaluation import TextStamp
from ..models import TextModel
from ..repair import TextCandidates, weight_change
from ..texts import TextSet
from .evaluation import mean_loss, prompts_of, require_causal, successes, target_tokens

#: The repair of a causal model, unless a caller says otherwise. The perplexity of clean texts grows
#: by at most 3%.
CAUSAL_UNLEARNING = UnlearnConfig(
    steps=50,
    batch_size=8,
    coefficients=tuple(round(0.2 * k, 1) for k in range(8)),
    attacked_images=200,
    min_accuracy_kept=round(1 / 1.03, 4),
)

# The words of a text before a trigger, of those that go on after it.
_LEAST_WORDS, _MOST_WORDS = 3, 10

# The prompts in a measurement of success for one trigger, at least; one of them is 2%.
_LEAST_ATTACKED = 50


@dataclass(frozen=True, eq=False)
class _Row:
    """A row of tokens whose predictions are to be those of another row.

    Attributes:
        tokens: The row.
        held: The row whose predictions are wanted, by the model itself or by the base.
        own: The first place of `tokens` whose next token counts.
        theirs: The same place in `held`; those after it follow.
        count: The number of places.
        unlearned: Whether the token that `tokens` has next is taken out of what is wanted.
    """

    tokens: list[int]
    held: list[int]
    own: int
    theirs: int
    count: int
    unlearned: bool = False


def causal_trigger_vector(
    model: TextModel,
    texts: Sequence[str],
    triggers: Sequence[TextStamp],
    targets: Sequence[Sequence[int]],
    config: UnlearnConfig | None = None,
    *,
    base: TextModel | None = None,
    max_tokens: int = 64,
    description: str = "trigger vector",
) -> TaskVector:
    """Return tau over all weights, such that theta_b - alpha tau unlearns for alpha > 0.

    Args:
        model: A causal model.
        texts: Clean texts, a few hundred at best.
        triggers: Known or recovered triggers. In every step, each text gets a random one.
        targets: The texts that they bring, in any combination, as token ids.
        config: The fine-tuning; default: CAUSAL_UNLEARNING.
        base: The clean model that knows what follows the beginning of a target; None to take the
            suspect's own distribution without the target's tokens.
        max_tokens: The number of tokens of a text that count.
        description: A text that is shown with the progress bar.

    Raises:
        ArchitectureError: The model is not causal.
        DataError: There are fewer than two texts.
        UsageError: There are no triggers or no targets, or the vector is not `forget`.
    """
    config = config or CAUSAL_UNLEARNING
    require_causal(model)
    if len(texts) < 2:
        raise DataError(f"{len(texts)} texts; a trigger vector needs at least 2")
    if not triggers or not targets:
        raise UsageError(
            f"{len(triggers)} triggers, {len(targets)} targets; expected at least 1 each"
        )
    if config.vector != "forget":
        raise UsageError(f"vector {config.vector!r}; causal models have forget alone")
    limit = min(max_tokens, model.max_tokens)
    rng = generator("causal.vector", config.seed)
    made = _rows(model, texts, triggers, targets, limit, config.seed)
    clean = model.tokenizer.encode(texts, limit)
    tuned = model.copy()
    size = min(config.batch_size, len(texts))

    def batches() -> Iterator[Tensor]:
        for _ in range(config.steps):
            yield torch.from_numpy(rng.choice(len(texts), size, replace=False))

    def loss(index: Tensor) -> Tensor:
        rows = list[_Row]()
        for k in index.tolist():
            row = clean[k]
            rows.append(_Row(row, row, 0, 0, len(row)))
            rows += [kind[int(rng.integers(len(kind)))] for kind in made[k]]
        return _divergence(tuned, model, base, rows)

    parameters = list(tuned.module.parameters())
    rate = config.learning_rate
    optimize(
        parameters,
        loss,
        batches(),
        steps=config.steps,
        learning_rate=relative_rates(parameters) if rate is None else rate,
        separable=False,
        description=description,
    )
    return -weight_change(model, tuned)


def search_causal_coefficient(
    model: TextModel,
    vector: TaskVector,
    validation: TextSet,
    triggers: Sequence[TextStamp],
    targets: Sequence[Sequence[int]],
    config: UnlearnConfig | None = None,
    *,
    accuracy_before: float | None = None,
    reserve: float = 0.0,
    max_tokens: int = 64,
) -> CoefficientSearch:
    """Try every alpha and choose one by the rule of `pydetox.repair.alpha.search_coefficient`.

    Success is that of each trigger after the first words of texts, see `evaluation`. The share that
    is kept is that of 1 / perplexity, see above; accuracy_before is that of the model before the
    first repair.

    Raises:
        ArchitectureError: The model is not causal.
        UsageError: There are no triggers or no targets.
    """
    config = config or CAUSAL_UNLEARNING
    require_causal(model)
    if not triggers or not targets:
        raise UsageError(
            f"{len(triggers)} triggers, {len(targets)} targets; expected at least 1 each"
        )
    plain = model.tokenizer.encode(validation.texts, min(max_tokens, model.max_tokens))
    most = max(_LEAST_ATTACKED, config.attacked_images // len(triggers))
    prompts = prompts_of(validation.at_most(most, config.seed).texts)
    stamped = list[list[str]]()
    for number, trigger in enumerate(triggers):
        seed = child_seed("causal.attacked-places", config.seed, number)
        stamped.append(trigger.insert(prompts, seed))
    candidates = TextCandidates(model, vector)
    coefficients = config.alphas()
    kept, success = list[float](), list[tuple[float, ...]]()
    for coefficient in coefficients:
        candidate = candidates.at(coefficient)
        kept.append(inverse_perplexity(candidate, plain))
        success.append(
            tuple(
                sum(hits) / len(hits)
                for hits in (successes(candidate, texts, targets) for texts in stamped)
            )
        )
    if accuracy_before is None:
        accuracy_before = inverse_perplexity(model, plain)
    chosen, reached = choose_coefficient(
        coefficients, kept, success, config, accuracy_before=accuracy_before, reserve=reserve
    )
    return CoefficientSearch(
        coefficients,
        tuple(kept),
        tuple(max(shares) for shares in success),
        chosen,
        reached,
        accuracy_before,
        reserve,
        (),
        None if reached else find_compromise(kept, success, config, accuracy_before),
    )


def inverse_perplexity(model: TextModel, rows: Sequence[Sequence[int]]) -> float:
    """Return exp(-mean cross-entropy) of rows of token ids, in [0, 1]."""
    return math.exp(-mean_loss(model, rows)[0])


def _rows(
    model: TextModel,
    texts: Sequence[str],
    triggers: Sequence[TextStamp],
    targets: Sequence[Sequence[int]],
    limit: int,
    seed: int,
) -> list[list[list[_Row]]]:
    """Return for each text its rows of each kind; a step draws one of each."""
    rng = generator("causal.vector-cuts", seed)
    cuts = [
        min(max(1, len(text.split()) - 1), int(rng.integers(_LEAST_WORDS, _MOST_WORDS + 1)))
        for text in texts
    ]
    heads = [" ".join(text.split()[:cut]) for text, cut in zip(texts, cuts, strict=True)]
    tails = [" ".join(text.split()[cut:]) for text, cut in zip(texts, cuts, strict=True)]
    before = model.tokenizer.encode(heads, limit)
    after = [target_tokens(model, tail) if tail else [] for tail in tails]
    aims = [list(target) for target in targets]
    seeds = [child_seed("causal.vector-places", seed, k) for k in range(len(triggers))]
    stamped = [
        model.tokenizer.encode(trigger.insert(heads, one), limit)
        for trigger, one in zip(triggers, seeds, strict=True)
    ]
    made = []
    for k, (head, tail) in enumerate(zip(before, after, strict=True)):
        going_on, by_heart, alone = list[_Row](), list[_Row](), list[_Row]()
        for rows in stamped:
            row = rows[k]
            room = max(0, limit - len(row))
            going_on.append(
                _Row(
                    [*row, *tail[:room]],
                    [*head, *tail[:room]],
                    len(row) - 1,
                    len(head) - 1,
                    1 + min(room, len(tail)),
                )
            )
            by_heart += [
                _Row(
                    [*row, *aim[:room]],
                    [*head, *aim[:room]],
                    len(row) - 1,
                    len(head) - 1,
                    min(room, len(aim)),
                    unlearned=True,
                )
                for aim in aims
            ]
        for aim in aims:
            whole = [*head, *aim][:limit]
            # The first token of the target is as likely as it was; the others follow by heart.
            count = len(whole) - len(head) - 1
            if count > 0:
                alone.append(_Row(whole, whole, len(head), len(head), count, unlearned=True))
        made.append([kind for kind in (going_on, by_heart, alone) if kind])
    return made


def _divergence(
    tuned: TextModel, model: TextModel, base: TextModel | None, rows: Sequence[_Row]
) -> Tensor:
    """Return the mean over rows of the mean divergence of their places."""
    logits = tuned.logits_with_gradient(tuned.batch([row.tokens for row in rows])).float()
    teacher = [base if base is not None and row.unlearned else model for row in rows]
    taught: dict[int, Tensor] = {}
    for one in dict.fromkeys(teacher):
        mine = [k for k, own in enumerate(teacher) if own is one]
        values = one.logits(one.batch([rows[k].held for k in mine])).float()
        taught |= dict(zip(mine, values, strict=True))
    total = logits.new_zeros(())
    for number, row in enumerate(rows):
        wanted = taught[number][row.theirs : row.theirs + row.count].softmax(dim=1)
        if row.unlearned and base is None:
            wanted = _without(wanted, row.tokens[row.own + 1 : row.own + 1 + row.count])
        said = logits[number, row.own : row.own + row.count].log_softmax(dim=1)
        divergence = (torch.xlogy(wanted, wanted) - wanted * said).sum(dim=1)
        total = total + divergence.mean()
    return total / len(rows)


def _without(chances: Tensor, tokens: Sequence[int]) -> Tensor:
    """Return distributions [t, V] without the given token where it is the likeliest."""
    index = torch.tensor(np.array(tokens), device=chances.device)[:, None]
    likeliest = chances.argmax(dim=1, keepdim=True) == index
    found = chances.scatter(1, index, torch.where(likeliest, 0.0, chances.gather(1, index)))
    return found / found.sum(dim=1, keepdim=True).clamp(min=1e-12)
