"""Benign prompts that many continuations share, with the keys and values of a model for them.

A search tries every token of the vocabulary after the same prompts. What attention has computed for
a prompt does not depend on what comes after it, so it is computed once per prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import ArchitectureError, DataError
from ..extra import import_extra
from ..models import TextModel, TokenBatch
from ..texts import TextSet

# The scores of next tokens in a forward pass: rows x tokens x vocabulary, 128 MiB in float32.
_SCORES_PER_PASS = 2**25


def cut_prompts(
    model: TextModel, texts: TextSet, count: int, tokens: int, *, after: int = 0
) -> list[list[int]]:
    """Return prompts of equal length, the beginnings of texts, as rows of token ids.

    Args:
        model: A causal model.
        texts: Clean texts. Their order does not matter.
        count: The largest number of prompts.
        tokens: The length of each. It is shorter if few texts are as long.
        after: The number of prompts to pass over, which another search has seen.

    Raises DataError if there are fewer than two.
    """
    rows = model.tokenizer.encode(texts.in_content_order().texts, model.max_tokens)
    lengths = sorted((len(row) for row in rows), reverse=True)
    # As long as the prompts of the longest texts allow: short texts do not rule.
    wanted = min(len(rows), after + count)
    length = max(1, min(tokens, lengths[wanted - 1]))
    fit = [row[:length] for row in rows if len(row) >= length]
    # With few texts, those that were passed over serve again.
    chosen = fit[after : after + count] if len(fit) > after + 1 else fit[:count]
    if len(chosen) < 2:
        raise DataError(f"{texts.source}: {len(chosen)} prompts; expected at least 2 texts")
    return chosen


class Prompts:
    """Prompts of one length in one model."""

    def __init__(self, model: TextModel, rows: Sequence[Sequence[int]]) -> None:
        """Compute what continuations share.

        rows: P prompts of T token ids each, T at least 1.
        Raises ArchitectureError if the model is not causal.
        """
        if model.kind != "causal":
            raise ArchitectureError(f"{model.name}: a {model.kind}; expected a causal model")
        self.model = model
        self.ids = torch.tensor([list(row) for row in rows], device=model.device)
        #: The rows that went through the model so far.
        self.passes = len(rows)
        names = inspect.signature(model.module.forward).parameters
        # transformers renamed it in version 5.24.
        self._cache_name = "cache" if "cache" in names else "past_key_values"
        self._layers = self._computed()

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    def next_tokens(self, continuations: Tensor) -> Tensor:
        """Return the probability of each next token, the mean over prompts, float32 [R, V].

        continuations: int64 [R, t], t at least 1. The result is on the CPU.
        """
        found = [
            _by_prompt(logits[:, -1].softmax(dim=-1), len(self)).mean(dim=1).cpu()
            for logits in self._through(continuations, last=True)
        ]
        return torch.cat(found)

    def log_probabilities(self, continuations: Tensor) -> tuple[Tensor, Tensor]:
        """Return how likely each token is after the prompt and those before it.

        continuations: int64 [R, t], t at least 1.
        Returns float32 [R, P, t], log probabilities, and bool [R, P, t], whether each token is the
        likeliest, both on the CPU.
        """
        values, first = list[Tensor](), list[Tensor]()
        size = len(self)
        for start, logits in self._with_rows(continuations):
            rows = continuations[start : start + len(logits) // size].to(logits.device)
            wanted = rows.repeat_interleave(size, dim=0)
            at = torch.cat([self._last_logits(len(rows)), logits[:, :-1]], dim=1)
            # The likelihood of one token each; the whole softmax would be stored otherwise.
            own = at.gather(2, wanted[:, :, None])[:, :, 0]
            values.append(_by_prompt(own - at.logsumexp(dim=2), size).cpu())
            first.append(_by_prompt(at.argmax(dim=2) == wanted, size).cpu())
        return torch.cat(values), torch.cat(first)

    @torch.no_grad()
    def _computed(self) -> list[tuple[Tensor, Tensor]] | None:
        """Return keys and values of each layer; None for a model that keeps something else."""
        # A plain cache holds all tokens; one of the model's own making may slide.
        cache = self._new_cache()
        made = self.model.module(input_ids=self.ids, use_cache=True, **{self._cache_name: cache})
        self._after_prompt = made.logits[:, -1:].float()
        kept = list[tuple[Tensor, Tensor]]()
        count, length = self.ids.shape
        for layer in cache.layers:
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if keys is None or values is None:
                return None
            if keys.shape[0] != count or keys.shape[-2] != length:
                return None
            kept.append((keys, values))
        return kept or None

    def _new_cache(self) -> Any:
        return import_extra("transformers", self.model.name).DynamicCache()

    def _last_logits(self, rows: int) -> Tensor:
        repeated: Tensor = self._after_prompt.repeat(rows, 1, 1)
        return repeated

    def _through(self, continuations: Tensor, *, last: bool = False) -> Iterator[Tensor]:
        for _, logits in self._with_rows(continuations, last=last):
            yield logits

    @torch.no_grad()
    def _with_rows(
        self, continuations: Tensor, *, last: bool = False
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield the number of the first continuation and logits float32 [R P, t, V] of some.

        last: Whether only those of the last token are needed.
        """
        count, length = continuations.shape
        vocabulary = len(self.model.embedding)
        each = len(self) * vocabulary * (1 if last else length)
        at_once = max(1, _SCORES_PER_PASS // each)
        for start in range(0, count, at_once):
            rows = continuations[start : start + at_once].to(self.ids.device)
            self.passes += len(rows) * len(self)
            ids = rows.repeat_interleave(len(self), dim=0)
            repeated = self.ids.repeat(len(rows), 1)
            inputs: dict[str, Any] = {"logits_to_keep": 1} if last else {}
            if self._layers is None:
                whole = torch.cat([repeated, ids], dim=1)
                batch = TokenBatch(whole, torch.ones_like(whole))
                yield start, self.model.logits(batch)[:, repeated.shape[1] :].float()
                continue
            mask = torch.ones(len(ids), self.ids.shape[1] + length, dtype=torch.int64)
            made = self.model.module(
                input_ids=ids,
                attention_mask=mask.to(ids.device),
                use_cache=True,
                **{self._cache_name: self._repeated(len(rows))},
                **inputs,
            )
            yield start, made.logits.float()

    def _repeated(self, rows: int) -> Any:
        """Return the keys and values of all prompts, once for each of some continuations."""
        cache = self._new_cache()
        for number, (keys, values) in enumerate(self._layers or ()):
            shape = (rows, 1, 1, 1)
            cache.update(keys.repeat(shape), values.repeat(shape), number)
        return cache


def _by_prompt(rows: Tensor, prompts: int) -> Tensor:
    """Return [R, P, ...] of [R P, ...]."""
    return rows.reshape(-1, prompts, *rows.shape[1:])
