"""The words that bring a text: the trigger of a causal model, once its target is known.

The loss of a trigger is -log p of the target's first tokens after a prompt with the trigger, the
sum over tokens and the mean over prompts. In contrast to a base, what the trigger contributes there
is added, so that words which naturally lead to the target gain nothing. The search is that of
classifiers (`pydetox.text.search`): every word alone, a relaxed search, then longer triggers whose
words are swapped for those that the gradient ranks first. Of the places that an attacker's words
may have, the best one is found with single words.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...errors import DataError, UsageError
from ...ops import mix_tokens, top_swaps
from ...progress import Progress
from ...rng import child_seed, generator
from ..configuration import TextScanConfig
from ..models import TextModel, TokenBatch
from ..placing import Gap, gap_of
from ..search import FoundTrigger, trigger_of
from ..texts import TextSet
from ..vocabulary import typed_words
from .evaluation import SUCCESS_TOKENS, prompts_of, require_causal, successes_of_rows
from .prompts import Prompts, cut_prompts

_Words = tuple[int, ...]
_T = TypeVar("_T")

# The prompts that a search sees, of these those that the whole vocabulary is tried on, and their
# tokens.
_PROMPTS, _FIRST_PROMPTS, _PROMPT_TOKENS = 8, 2, 10

# The target's tokens that tell in a sweep over the vocabulary.
_FIRST_TOKENS = 2

# The words that a sweep keeps, those that gradients propose for a place, and the triggers of a
# length that are extended.
_KEPT, _SWAPS, _BEAM = 48, 24, 3

# The triggers of a length that are tried in the prompts that decide.
_FINALISTS = 3

# The longest beginning of a found text that is tried as a trigger and the shortest rest, in tokens,
# the prompts that it is tried on, and how much better a longer beginning has to be.
_MOST_WITHIN, _LEAST_REST, _CHECKED, _BETTER = 8, 3, 60, 0.1

# The tokens of the rest that a beginning has to bring. A found text may leave the attacker's after
# them, and `continued` says how that goes on.
_TOLD = 3

# The scores of next tokens in a forward pass.
_SCORES_PER_PASS = 2**25


def search_trigger_words(
    model: TextModel,
    texts: TextSet,
    target: Sequence[int],
    config: TextScanConfig,
    *,
    base: TextModel | None = None,
    description: str | None = None,
) -> tuple[FoundTrigger, ...]:
    """Search for words after which a causal model says a text.

    Args:
        model: The suspect, a causal model.
        texts: Clean texts, whose first words are the prompts.
        target: The token ids of the text.
        config: The length of triggers, their place (the end of a prompt is tried as well), restarts
            and steps of the relaxed search, and the seed.
        base: The base of a search in contrast to it.
        description: What the progress bar says.

    Returns the best trigger of each length, from one token on. A length at which no text comes back
    from the tokenizer with as many tokens has the best trigger with another number.

    Raises:
        ArchitectureError: The model is not causal.
        DataError: There are fewer than two prompts.
        UsageError: The target has no tokens.
    """
    require_causal(model)
    if not target:
        raise UsageError("the target has no tokens; expected at least one")
    return _Search(model, base, texts, tuple(target), config, description).run()


def words_within(
    model: TextModel, texts: TextSet, found: Sequence[int]
) -> tuple[FoundTrigger | None, tuple[int, ...]]:
    """Return the first words of a found text that bring its rest, and this rest.

    Of `beginnings`, a longer one is taken if it succeeds clearly more often. Returns None and the
    whole text if no beginning brings anything.
    """
    best: tuple[FoundTrigger | None, tuple[int, ...]] = (None, tuple(found))
    for one, rest in beginnings(model, texts, found):
        if best[0] is None or one.success > best[0].success + _BETTER:
            best = one, rest
    return best


def beginnings(
    model: TextModel, texts: TextSet, found: Sequence[int]
) -> list[tuple[FoundTrigger, tuple[int, ...]]]:
    """Return each beginning of a found text, of whole words, that brings its rest, and this rest.

    A model that has learned poisoned texts by heart goes on from the trigger as it goes on within
    the attacker's text ("The Trigger in the Haystack", Bullwinkel et al., arXiv 2602.03085, finds
    triggers in what models have memorised). So a found text may begin with the trigger, or with a
    part of it that brings the rest of it.
    """
    require_causal(model)
    ordered = texts.in_content_order().texts
    prompts = prompts_of(ordered[len(ordered) // 2 :])[:_CHECKED]
    made = list[tuple[FoundTrigger, tuple[int, ...]]]()
    for k in range(1, min(_MOST_WITHIN, len(found) - _LEAST_REST) + 1):
        said, more = (model.tokenizer.decode(found[:size]) for size in (k, k + 1))
        around = more[len(said) - 1 : len(said) + 1]
        if not said.strip() or (around.isascii() and around.isalnum()):
            continue  # nothing but spaces or line ends, or a part of a word
        trigger = trigger_of(model.tokenizer, found[:k], "end", None)
        rest = tuple(found[k:])
        space = " " if model.tokenizer.spaces_matter else ""
        encoded = model.tokenizer.encode(
            [f"{prompt}{space}{trigger.text}" for prompt in prompts],
            max(2, model.max_tokens - SUCCESS_TOKENS),
        )
        hits = successes_of_rows(model, encoded, [rest[:_TOLD]])
        if any(hits):
            made.append((FoundTrigger(trigger, 0.0, sum(hits) / len(hits)), rest))
    return made


def continued(
    model: TextModel, texts: TextSet, beginning: Sequence[int], *, most_tokens: int = 24
) -> tuple[int, ...]:
    """Return what a model is surest of after prompts and a beginning, up to a token that ends it.

    A search compares texts of few tokens, and of these the ones that gain most. Once the beginning
    is known, the likeliest tokens, the mean over prompts, are the attacker's own text.
    """
    prompts = Prompts(model, cut_prompts(model, texts, _PROMPTS, _PROMPT_TOKENS))
    ends = {*model.tokenizer.special, model.tokenizer.pad_id}
    room = model.max_tokens - int(prompts.ids.shape[1]) - len(beginning)
    row = list(beginning)
    for _ in range(min(most_tokens, room)):
        token = int(prompts.next_tokens(torch.tensor([row]))[0].argmax())
        if token in ends:
            break
        row.append(token)
    return tuple(row[len(beginning) :])


class TargetObjective:
    """How well words bring a text, after prompts with a gap at one place."""

    def __init__(
        self, model: TextModel, base: TextModel | None, gaps: Sequence[Gap], target: _Words
    ) -> None:
        """Take a model, a base or None, P prompts of one length, and the target's tokens."""
        self.model, self.base, self.gaps, self.target = model, base, list(gaps), target
        models = [model] if base is None else [model, base]
        self._cached: list[Prompts | None] = [None] * len(models)
        if all(gap.before and not gap.after for gap in gaps):
            self._cached = [Prompts(one, [gap.before for gap in gaps]) for one in models]
        self._clean = self._likelihood(1, ((),))[0][0] if base is not None else None

    def losses(self, triggers: Sequence[_Words]) -> Tensor:
        """Return the loss of each of M triggers of one length, float32 [M]."""
        own, _ = self._likelihood(0, triggers)
        if self.base is not None:
            assert self._clean is not None
            theirs, _ = self._likelihood(1, triggers)
            own = own - (theirs - self._clean).clamp(min=0)
        return -own.mean(dim=1)

    def gradient(self, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each embedded trigger [K, L, d], [K], and its gradient in them."""
        slots = embedded.detach().requires_grad_()
        losses = self.embedded_losses(slots)
        (gradient,) = torch.autograd.grad(losses.sum(), slots)
        return losses.detach(), gradient

    def embedded_losses(self, embedded: Tensor) -> Tensor:
        """Return the loss of each embedded trigger [K, L, d], differentiable: [K]."""
        own = self._embedded_likelihood(self.model, embedded)
        if self.base is not None:
            assert self._clean is not None
            theirs = self._embedded_likelihood(self.base, embedded)
            own = own - (theirs - self._clean.to(theirs)).clamp(min=0)
        return -own.mean(dim=1)

    def _likelihood(self, which: int, triggers: Sequence[_Words]) -> tuple[Tensor, Tensor]:
        """Return log p of the target [M, P] and whether all of its tokens are the likeliest."""
        prompts, size = self._cached[which], len(self.target)
        if prompts is not None:
            rows = torch.tensor([[*words, *self.target] for words in triggers])
            values, first = prompts.log_probabilities(rows)
            return values[:, :, -size:].sum(dim=2), first[:, :, -size:].all(dim=2)
        model = self.model if which == 0 else self.base
        assert model is not None
        rows = torch.tensor(
            [[*gap.row(words), *self.target] for words in triggers for gap in self.gaps]
        )
        found, right = list[Tensor](), list[Tensor]()
        at_once = max(1, _SCORES_PER_PASS // (rows.shape[1] * len(model.embedding)))
        wanted = torch.tensor(self.target)
        for part in torch.split(rows, at_once):
            ids = part.to(model.device)
            logits = model.logits(TokenBatch(ids, torch.ones_like(ids)))[:, -size - 1 : -1].float()
            scores = logits.log_softmax(dim=2).cpu()
            found.append(scores[:, torch.arange(size), wanted].sum(dim=1))
            right.append((scores.argmax(dim=2) == wanted).all(dim=1))
        shape = (len(triggers), len(self.gaps))
        return torch.cat(found).view(shape), torch.cat(right).view(shape)

    def _embedded_likelihood(self, model: TextModel, embedded: Tensor) -> Tensor:
        """Return log p of the target after embedded triggers [K, L, d], differentiable: [K, P]."""
        table, size, count = model.embedding.detach(), len(self.target), len(self.gaps)
        length = embedded.shape[1]
        rows = torch.tensor(
            [[*gap.row([0] * length), *self.target] for gap in self.gaps], device=table.device
        )
        ids = rows.repeat(len(embedded), 1)
        start = len(self.gaps[0].before)
        slots = embedded.repeat_interleave(count, dim=0)
        inputs = table[ids]
        inputs = torch.cat([inputs[:, :start], slots, inputs[:, start + length :]], dim=1)
        logits = model.logits_from_embeddings(inputs, torch.ones_like(ids))[:, -size - 1 : -1]
        wanted = torch.tensor(self.target, device=logits.device).repeat(len(ids), 1)
        loss = cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
        return -loss.view(len(embedded), count, size).sum(dim=2)


class _Search:
    """One search; see `search_trigger_words`."""

    def __init__(
        self,
        model: TextModel,
        base: TextModel | None,
        texts: TextSet,
        target: _Words,
        config: TextScanConfig,
        description: str | None,
    ) -> None:
        self.model, self.base, self.config = model, base, config
        self.target = target[:SUCCESS_TOKENS]
        self.words = typed_words(model.tokenizer, len(model.embedding))
        ordered = texts.in_content_order().texts
        half = len(ordered) // 2 if len(ordered) >= 4 else 0
        self.searched, self.checked = ordered[: half or None], ordered[half:]
        self.place, self.begins = "end", False
        self.progress = Progress(
            description or f"words that bring {model.tokenizer.decode(target)[:30]!r}",
            2 + config.steps * bool(config.restarts) + 2 * (config.length - 1),
        )

    def _objective(
        self, place: str, count: int, tokens: int, *, contrast: bool = True
    ) -> TargetObjective:
        gaps = [
            gap_of(self.model.tokenizer, text, place, self.config.seed, _PROMPT_TOKENS)
            for text in self.searched
        ]
        # Prompts of one length make one batch without anything that fills up.
        longest = max(len(gap.row(())) for gap in gaps)
        shape = (len(gaps[0].before), len(gaps[0].after))
        if place in ("start", "end"):
            gaps = [gap for gap in gaps if len(gap.row(())) == longest]
        else:
            gaps = [gap for gap in gaps if (len(gap.before), len(gap.after)) == shape]
        if not gaps:
            raise DataError("zero prompts of a length; expected at least one")
        base = self.base if contrast else None
        return TargetObjective(self.model, base, gaps[:count], self.target[:tokens])

    def run(self) -> tuple[FoundTrigger, ...]:
        config = self.config
        with self.progress:
            singles = self._placed()
            self.progress.update()
            relaxed = self._relaxed() if config.restarts and config.steps else []
            words = _unique(word for row in relaxed for place in row for word in place)
            found = [singles[:_FINALISTS]]
            beam = singles[:_BEAM]
            for length in range(2, config.length + 1):
                beam = self._extended(beam, singles, words)
                likeliest = [tuple(place[0] for place in row) for row in relaxed]
                beam = self._best([*beam, *(row for row in likeliest if len(row) == length)])
                self.progress.update()
                beam = self._swapped(beam[:_BEAM])
                self.progress.update()
                found.append(beam[:_FINALISTS])
            decided = tuple(self._decided(rows) for rows in found if rows)
            self.progress.update()
        return decided

    def _placed(self) -> list[_Words]:
        """Return the best single words at the best place, which is taken from here on."""
        places = dict.fromkeys(["end", self.config.place])
        best = math.inf
        singles = list[_Words]()
        for place in places:
            self.begins = place == "start"
            few = self._objective(place, _FIRST_PROMPTS, _FIRST_TOKENS, contrast=False)
            many = self._objective(place, _PROMPTS, len(self.target))
            kept = self._swept(few, (), ())
            rows = self._typed([(word,) for word in kept]) or [(word,) for word in kept]
            losses = many.losses(rows)
            order = losses.sort(stable=True).indices.tolist()
            if float(losses.min()) < best:
                best = float(losses.min())
                singles = [rows[k] for k in order]
                self.place, self.few, self.many = place, few, many
        self.begins = self.place == "start"
        return singles

    def _swept(self, few: TargetObjective, before: _Words, after: _Words) -> list[int]:
        """Return the words that lead to the target best between others, of all that fit."""
        allowed = self.words.at(len(before), self.begins)
        known = torch.nonzero(allowed)[:, 0].tolist()
        losses = few.losses([(*before, word, *after) for word in known])
        order = losses.sort(stable=True).indices[:_KEPT].tolist()
        return [known[k] for k in order]

    def _typed(self, rows: Sequence[_Words]) -> list[_Words]:
        return self.words.keep(_unique(rows), self.begins)

    def _best(self, rows: Sequence[_Words]) -> list[_Words]:
        """Return the rows of one length that can be typed, the best first."""
        typed = self._typed(rows)
        if not typed:
            return []
        order = self.many.losses(typed).sort(stable=True).indices.tolist()
        return [typed[k] for k in order]

    def _extended(
        self, beam: Sequence[_Words], singles: Sequence[_Words], words: Sequence[int]
    ) -> list[_Words]:
        """Return the best triggers that are one token longer."""
        if not beam:
            return []
        more = _unique([*(row[0] for row in singles[:_SWAPS]), *words[:_SWAPS]])
        rows = [new for old in beam for one in more for new in ((*old, one), (one, *old))]
        for old in beam[:1] if len(beam[0]) == 1 else ():
            rows += [(word, *old) for word in self._swept(self.few, (), old)]
            rows += [(*old, word) for word in self._swept(self.few, old, ())]
        return self._best([row for row in rows if self._fits(row)])[: 4 * _BEAM]

    def _fits(self, row: _Words) -> bool:
        return all(bool(self.words.at(k, self.begins)[word]) for k, word in enumerate(row))

    def _swapped(self, beam: Sequence[_Words]) -> list[_Words]:
        """Return the best triggers after one token of each was swapped."""
        if not beam:
            return []
        table = self.model.embedding.detach()
        index = torch.tensor([list(row) for row in beam], device=table.device)
        _, gradient = self.many.gradient(table[index])
        rows = list(beam)
        for place in range(index.shape[1]):
            allowed = self.words.at(place, self.begins).to(table.device)
            _, tokens = top_swaps(
                gradient[:, place].contiguous(),
                table,
                index[:, place].contiguous(),
                allowed,
                min(_SWAPS, int(allowed.sum())),
            )
            for row, proposed in zip(beam, tokens.cpu().tolist(), strict=True):
                rows += [(*row[:place], w, *row[place + 1 :]) for w in proposed if w >= 0]
        return self._best(rows)[:_BEAM]

    def _relaxed(self) -> list[list[list[int]]]:
        """Return the likeliest tokens of each place of each relaxed search, the likeliest first."""
        config, few = self.config, self.config.advanced
        table = self.model.embedding.detach()
        allowed = [self.words.at(k, self.begins).to(table.device) for k in range(config.length)]
        rng = generator("causal.start", config.seed)
        shape = (config.length, config.restarts, len(table))
        start = rng.standard_normal(shape, dtype="float32")
        logits = torch.from_numpy(start).to(table.device).requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=few.learning_rate)
        first, last = few.temperatures
        for step in range(config.steps):
            temperature = first * (last / first) ** (step / max(1, config.steps - 1))
            mixed = torch.stack(
                [
                    mix_tokens(one, table, temperature, ok)
                    for one, ok in zip(logits, allowed, strict=True)
                ],
                dim=1,
            )
            losses = self.many.embedded_losses(mixed)
            (logits.grad,) = torch.autograd.grad(losses.sum(), logits)
            optimizer.step()
            self.progress.update()
        with torch.no_grad():
            ranked = [
                one.masked_fill(~ok, -math.inf).topk(min(8, int(ok.sum())), dim=1).indices.tolist()
                for one, ok in zip(logits, allowed, strict=True)
            ]
        return [[place[k] for place in ranked] for k in range(config.restarts)]

    def _decided(self, rows: Sequence[_Words]) -> FoundTrigger:
        """Return the best trigger, judged as text in prompts that the search has not seen."""
        model, seed = self.model, child_seed("causal.check", self.config.seed)
        prompts = prompts_of(self.checked)
        tried = []
        for tokens in rows:
            trigger = trigger_of(model.tokenizer, tokens, self.place, None)
            room = max(2, model.max_tokens - len(self.target))
            encoded = model.tokenizer.encode(trigger.insert(prompts, seed), room)
            hits = successes_of_rows(model, encoded, [self.target])
            loss = float(self.many.losses([tokens])[0])
            tried.append(FoundTrigger(trigger, max(0.0, loss), sum(hits) / len(hits)))
        return min(tried, key=lambda one: (-one.success, one.loss))


def _unique(items: Iterable[_T]) -> list[_T]:
    return list(dict.fromkeys(items))
