"""Clean copies of a causal base, fine-tuned on clean texts until they lie as far as a suspect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.nn.functional import cross_entropy

from ..copies import LEAST_ACCURACY, OutOfReachError, copy_at_distance, require_reachable
from ..models import TextModel
from ..texts import TextSet
from .repair import inverse_perplexity


def next_token_loss(model: TextModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return the mean cross-entropy of all tokens but the first of each row, differentiable."""
    batch = model.batch(rows)
    logits = model.logits_with_gradient(batch)[:, :-1]
    wanted = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)[:, 1:]
    return cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-100)


def causal_copies(
    base: TextModel, texts: TextSet, distance: float, *, count: int, max_tokens: int, seed: int
) -> Iterator[TextModel]:
    """Yield copies of a base that moved by a relative distance, each on a bootstrap of the texts.

    Raises OutOfReachError if copies do not get there, or if their perplexity grows too much.
    """
    distance = require_reachable(distance)
    rows = base.tokenizer.encode(texts.texts, min(max_tokens, base.max_tokens))
    before = inverse_perplexity(base, rows)

    def loss(copy: TextModel, chosen: Sequence[int]) -> Tensor:
        return next_token_loss(copy, [rows[k] for k in chosen])

    for k in range(count):
        copy = copy_at_distance(
            base, len(rows), loss, distance, k, seed, f"reference {k + 1} of {count}"
        )
        after = inverse_perplexity(copy, rows)
        if after < LEAST_ACCURACY * before:
            raise OutOfReachError(
                f"the perplexity of copies of the base that moved as far ({distance:.2g} of its "
                f"norm) is {1 / after:.0f}, and {1 / before:.0f} in the base: give more texts, or "
                "references= that were made as the suspect was"
            )
        yield copy
