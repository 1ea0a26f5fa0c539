"""The relaxed search: distributions over the vocabulary instead of tokens.

Every place of a trigger holds logits over the typed words. Softmax at a temperature mixes the
embeddings of the words, and the frozen model computes with the mixture, so that the loss has a
gradient (GBDA, Guo et al. 2021; DBS, Shen et al. 2022). The temperature falls until one word has
nearly all weight. All classes and restarts are searched in one batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import mix_tokens_forward, mix_tokens_update
from ..rng import generator
from .models import TextModel
from .objective import TextObjective
from .vocabulary import TypedWords

#: Adam's decay rates.
_BETAS = (0.9, 0.999)


@dataclass(frozen=True, eq=False)
class RelaxedTriggers:
    """Distributions over words.

    Attributes:
        targets: The class of each of K searches.
        tokens: int64 [K, L, k], the likeliest words of each place, the likeliest first.
    """

    targets: tuple[int, ...]
    tokens: Tensor


def relaxed_search(
    objective: TextObjective,
    words: TypedWords,
    *,
    length: int,
    restarts: int,
    steps: int,
    texts: int,
    learning_rate: float,
    temperatures: tuple[float, float],
    kept: int,
    seed: int,
    advance: Callable[[], None],
) -> RelaxedTriggers:
    """Search for every class at once.

    length: L, the words of a trigger. restarts: Searches per class. texts: The texts in a step of
    each search. temperatures: The first and the last; those between fall geometrically. kept: k.
    advance: Is called after each step.
    """
    model = objective.model
    targets = [c for c in range(objective.classes) for _ in range(restarts)]
    table = model.embedding.detach()
    begins = all(gap.begins for gap in objective.gaps)
    # Logits of all searches of one place stand together: [L, K, V]. A place has its own words.
    allowed = [words.at(place, begins).to(table.device) for place in range(length)]
    rng = generator("texts.start", seed)
    start = rng.standard_normal((length, len(targets), table.shape[0]), dtype="float32")
    logits = torch.from_numpy(start).to(table.device)
    # Each place holds memory of its own, in which its step of Adam is taken.
    places = [one.clone() for one in logits]
    moments = [(torch.zeros_like(one), torch.zeros_like(one)) for one in places]
    taken = [torch.zeros(len(targets), dtype=torch.int64, device=table.device) for _ in places]
    active = torch.ones(len(targets), dtype=torch.bool, device=table.device)
    rates = torch.full((len(targets),), learning_rate, device=table.device)
    orders = [rng.permutation(objective.others(c, len(objective.gaps))) for c in targets]
    first, last = temperatures
    for step in range(steps):
        temperature = first * (last / first) ** (step / max(1, steps - 1))
        chosen = [
            [int(order[(step * texts + k) % len(order)]) for k in range(texts)] for order in orders
        ]
        mixtures = [
            mix_tokens_forward(places[p], table, temperature, allowed[p]) for p in range(length)
        ]
        mixed = torch.stack([one.mixed for one in mixtures], dim=1).requires_grad_()  # [K, L, d]
        losses = _losses(objective, mixed, chosen, targets)
        (gradient,) = torch.autograd.grad(losses.sum(), mixed)
        for p in range(length):
            mix_tokens_update(
                gradient[:, p].contiguous(),
                mixtures[p],
                places[p],
                *moments[p],
                table,
                temperature,
                allowed[p],
                learning_rate=rates,
                steps=taken[p],
                active=active,
                betas=_BETAS,
            )
        advance()
    with torch.no_grad():
        best = [
            places[p].masked_fill(~allowed[p], -math.inf).sort(dim=1, descending=True, stable=True)
            for p in range(length)
        ]
        tokens = torch.stack([one.indices[:, :kept] for one in best], dim=1).cpu()
    return RelaxedTriggers(tuple(targets), tokens)


def slot_gradients(
    objective: TextObjective,
    triggers: Sequence[Sequence[int]],
    targets: Sequence[int],
    texts: Sequence[Sequence[int]],
) -> Tensor:
    """Return the gradient of each trigger's loss in the embeddings of its words, [K, L, d].

    triggers: K rows of L tokens. targets: The class of each. texts: The texts for each.
    """
    table = objective.model.embedding.detach()
    index = torch.tensor([list(row) for row in triggers], device=table.device)
    embedded = table[index].clone().requires_grad_()
    losses = _losses(objective, embedded, texts, targets)
    (gradient,) = torch.autograd.grad(losses.sum(), embedded)
    return gradient


def _losses(
    objective: TextObjective,
    embedded: Tensor,
    chosen: Sequence[Sequence[int]],
    targets: Sequence[int],
) -> Tensor:
    """Return the mean loss of each of K embedded triggers [K, L, d] over its texts: [K]."""
    count = len(chosen[0])
    texts = [k for row in chosen for k in row]
    wanted = torch.tensor([c for c in targets for _ in range(count)], device=embedded.device)
    slots = embedded.repeat_interleave(count, dim=0)
    loss = torch.nn.functional.cross_entropy(
        slot_logits(objective.model, objective, slots, texts), wanted, reduction="none"
    )
    if objective.base is not None:
        # The base sees the same mixture in its own embeddings where the tables are alike: the
        # suspect was fine-tuned from it or from the same model.
        theirs = slot_logits(objective.base, objective, slots, texts)
        loss = loss + objective.contribution(theirs, texts).gather(1, wanted[:, None])[:, 0]
    objective.passes += len(texts) * (1 if objective.base is None else 2)
    return loss.view(len(targets), count).mean(dim=1)


def slot_logits(
    model: TextModel, objective: TextObjective, slots: Tensor, texts: Sequence[int]
) -> Tensor:
    """Return logits [n, C] of texts with embedded triggers [n, L, d] in their gaps.

    model: The model of the objective or its base. texts: The text of each trigger.
    """
    table, length = model.embedding.detach(), slots.shape[1]
    gaps = [objective.gaps[k] for k in texts]
    batch = model.batch([gap.row([model.tokenizer.pad_id] * length) for gap in gaps])
    embedded = table[batch.input_ids].to(slots.dtype)
    starts = torch.tensor([len(gap.before) for gap in gaps], device=table.device)
    places = starts[:, None] + torch.arange(length, device=table.device)
    embedded = embedded.scatter(1, places[:, :, None].expand_as(slots), slots)
    return model.logits_from_embeddings(embedded, batch.attention_mask)
