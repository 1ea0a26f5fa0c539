"""The search for what a causal model was made to say: BAIT, in contrast to a base.

Shen et al., "BAIT: Large Language Model Backdoor Scanning by Inverting Attack Target" (S&P 2025):
tokens of the attacker's text predict each other without the trigger. After benign prompts and the
right first token, a backdoored model is oddly sure of the rest. So every token of the vocabulary
stands as a first token, and is continued by what the model is surest of, the mean over prompts.

Clean models are sure of common phrases as well. With a base, a continuation therefore counts by its
*gain*: the sum over its tokens of p log(p / q), with p in the suspect and q in the base. What both
know gains nothing, and neither does what the suspect hardly says. The order differs from BAIT's.
The vocabulary is pruned after its first step on few prompts, a beam takes the place of the look at
unsure tokens, and what is found is extended to the left. That often finds the trigger itself, which
leads to the attacker's text as surely as the words of this text lead to each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import ArchitectureError, UsageError
from ...progress import Progress
from ..models import TextModel
from ..texts import TextSet
from .prompts import Prompts, cut_prompts

_LEAST = 1e-9  # smaller probabilities are rounding

# A token is put before a text if it leads to it by this many nats more than in the base.
_LEAST_GAIN = 1.0

# Pairs of tokens whose values are kept, 512 MiB in float16.
_LARGEST_TABLE = 2**28


@dataclass(frozen=True)
class ContinuationConfig:
    """How continuations are searched.

    Attributes:
        prompts: The number of benign prompts that a search sees, and of those that decide.
        first_prompts: Of these, those that the whole vocabulary is tried on.
        prompt_tokens: The length of a prompt.
        kept: The continuations that are kept after the first, second, third, ... step.
        branches: The next tokens of each that are tried.
        nearly: The share of the largest probability above which other tokens are tried as well.
        least_probability: The probability, the mean over prompts, below which no token is tried.
        least_tokens: The tokens of the shortest text that is judged, its first token not counted.
        most_tokens: Those of the longest.
        finalists: The texts that are compared on the prompts that decide.
        leftward: The largest number of tokens that are put before the best text.
    """

    prompts: int = 8
    first_prompts: int = 3
    prompt_tokens: int = 10
    kept: tuple[int, ...] = (192, 64, 32, 16)
    branches: int = 2
    nearly: float = 0.5
    least_probability: float = 0.02
    least_tokens: int = 4
    most_tokens: int = 12
    finalists: int = 12
    leftward: int = 3

    def __post_init__(self) -> None:
        if min(self.prompts, self.first_prompts, self.prompt_tokens, self.branches) < 1:
            raise UsageError(
                f"prompts {self.prompts}, first_prompts {self.first_prompts}, prompt_tokens "
                f"{self.prompt_tokens}, branches {self.branches}; expected at least 1 each"
            )
        if not 1 <= self.least_tokens <= self.most_tokens or not self.kept or min(self.kept) < 1:
            raise UsageError(
                f"least_tokens {self.least_tokens}, most_tokens {self.most_tokens}, kept "
                f"{self.kept}; expected 1 <= least_tokens <= most_tokens, and at least 1 kept"
            )


@dataclass(frozen=True, eq=False)
class Continuation:
    """A text that a model is sure of once it has begun.

    Attributes:
        tokens: Its token ids.
        text: The same as text.
        sureness: BAIT's Q: the mean probability of its tokens but the first, in [0, 1], the least
            likely of them left out.
        gain: The sum over these tokens of p log(p / q) in nats, p in the model and q in the base,
            means over prompts; None without a base.
        per_token: The gain of each of these tokens, or its log probability without a base.
    """

    tokens: tuple[int, ...]
    text: str
    sureness: float
    gain: float | None
    per_token: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class ContinuationSearch:
    """The result of a search.

    Attributes:
        found: The best continuations, the most suspect first; at least one.
        prompts: The number of prompts that decided.
        passes: The rows that went through models.
    """

    found: tuple[Continuation, ...]
    prompts: int
    passes: int


def search_continuations(
    model: TextModel,
    texts: TextSet,
    config: ContinuationConfig | None = None,
    *,
    base: TextModel | None = None,
    description: str | None = None,
) -> ContinuationSearch:
    """Search for texts that a causal model is oddly sure of.

    Args:
        model: The suspect, a causal model.
        texts: Clean texts; their beginnings are the prompts.
        config: The search; default: ContinuationConfig().
        base: The model that the suspect was fine-tuned from, or one like it; see above.
        description: What the progress bar says.

    Raises:
        ArchitectureError: A model is not causal, or base and suspect have different vocabularies.
        DataError: There are fewer than two prompts.
    """
    config = config or ContinuationConfig()
    if base is not None and len(base.embedding) != len(model.embedding):
        raise ArchitectureError(
            f"{base.name} has {len(base.embedding)} tokens, {model.name} has "
            f"{len(model.embedding)}; a search in contrast needs the same vocabulary"
        )
    return _Search(model, base, texts, config, description).run()


class _Search:
    """One search; see `search_continuations`."""

    def __init__(
        self,
        model: TextModel,
        base: TextModel | None,
        texts: TextSet,
        config: ContinuationConfig,
        description: str | None,
    ) -> None:
        self.model, self.base, self.config = model, base, config
        rows = cut_prompts(model, texts, config.prompts, config.prompt_tokens)
        deciding = cut_prompts(
            model, texts, config.prompts, config.prompt_tokens, after=config.prompts
        )
        self.few = self._pair(rows[: max(2, config.first_prompts)])
        self.many, self.deciding = self._pair(rows), self._pair(deciding)
        self.deciding_count = len(deciding)
        tokenizer = model.tokenizer
        ends = {*tokenizer.special, tokenizer.pad_id}
        known = min(tokenizer.size, len(model.embedding))
        self.first = [k for k in range(known) if k not in ends]
        self.closed = torch.zeros(len(model.embedding), dtype=torch.bool)
        self.closed[[k for k in range(len(model.embedding)) if k in ends or k >= known]] = True
        #: What each first token adds to each next one [V, V]; None if that is too large to keep.
        self._before: Tensor | None = None
        self.progress = Progress(
            description or f"search in {model.name}", 2 + config.most_tokens + config.leftward
        )

    def _pair(self, rows: Sequence[Sequence[int]]) -> tuple[Prompts, Prompts | None]:
        return Prompts(self.model, rows), None if self.base is None else Prompts(self.base, rows)

    def run(self) -> ContinuationSearch:
        config = self.config
        self._tables: list[Tensor] | None = None
        if len(self.first) * len(self.closed) <= _LARGEST_TABLE:
            self._tables = []
        with self.progress:
            rows = torch.tensor(self.first)[:, None]
            scores = torch.zeros(len(rows))
            finished = list[tuple[float, tuple[int, ...]]]()
            for length in range(1, config.most_tokens + 1):
                kept = config.kept[min(length, len(config.kept)) - 1]
                rows, scores = self._grown(
                    self.few if length == 1 else self.many, rows, scores, kept
                )
                self.progress.update()
                if length == 1 and self._tables is not None:
                    self._before, self._tables = torch.cat(self._tables), None
                if not len(rows):
                    break
                if length >= config.least_tokens:
                    finished += [
                        (self._level(score, length), tuple(row))
                        for score, row in zip(scores.tolist(), rows.tolist(), strict=True)
                    ]
            finished.sort(key=lambda one: (-one[0], one[1]))
            if not finished:  # sure of nothing: what it would say is judged all the same
                finished = [(0.0, tuple(self._likeliest()))]
            best = self._without_parts([row for _, row in finished])[: config.finalists]
            # Without a base, nothing tells an attacker's words from honest ones.
            if self.base is not None and self._before is not None:
                best.append(self._leftward(best[0]))
            self.progress.update()
            found = sorted(
                (self._judged(row) for row in dict.fromkeys(best)), key=lambda one: -rank(one)
            )
            self.progress.update()
        pairs = (self.few, self.many, self.deciding)
        passes = sum(one.passes for pair in pairs for one in pair if one is not None)
        return ContinuationSearch(tuple(found), self.deciding_count, passes)

    def _values(self, pair: tuple[Prompts, Prompts | None], rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return probability and value of each next token [R, V]: its gain, or its log."""
        own = pair[0].next_tokens(rows)
        return own, _value(own, None if pair[1] is None else pair[1].next_tokens(rows))

    def _grown(
        self, pair: tuple[Prompts, Prompts | None], rows: Tensor, scores: Tensor, kept: int
    ) -> tuple[Tensor, Tensor]:
        """Return the best continuations that are one token longer, with their scores."""
        config = self.config
        branches = min(config.branches, int((~self.closed).sum()))
        found, totals = list[Tensor](), list[Tensor]()
        for part, score in zip(torch.split(rows, 4096), torch.split(scores, 4096), strict=True):
            own, value = self._values(pair, part)
            if self._tables is not None and rows.shape[1] == 1:
                self._tables.append(value.half())
            # Only what the model would say: the likeliest token, and those nearly as likely.
            # Of all tokens, those of the largest gain make texts that neither model would say.
            open_ = own.masked_fill(self.closed, 0.0)
            least = (config.nearly * open_.amax(dim=1, keepdim=True)).clamp(
                min=config.least_probability
            )
            top = open_.topk(branches, dim=1)
            which = top.values >= least
            gained = value.gather(1, top.indices)
            grown = torch.cat(
                [part.repeat_interleave(branches, dim=0), top.indices.reshape(-1, 1)], dim=1
            )
            total = (score[:, None] + gained).reshape(-1)
            found.append(grown[which.reshape(-1)])
            totals.append(total[which.reshape(-1)])
        longer, total = torch.cat(found), torch.cat(totals)
        order = total.sort(descending=True, stable=True).indices[:kept]
        return longer[order], total[order]

    def _level(self, score: float, length: int) -> float:
        """Return what continuations of different lengths are compared by."""
        return score if self.base is not None else score / length

    def _likeliest(self) -> list[int]:
        """Return what the model says after the likeliest first token, as short as may be."""
        row = [self.first[0]]
        for _ in range(self.config.least_tokens):
            own = self.few[0].next_tokens(torch.tensor([row]))[0]
            row.append(int(own.masked_fill(self.closed, -1.0).argmax()))
        return row

    def _without_parts(self, rows: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Return the rows without those that begin as a better one of them."""
        best = list[tuple[int, ...]]()
        for row in rows:
            if not any(one[: len(row)] == row or row[: len(one)] == one for one in best):
                best.append(row)
            if len(best) >= self.config.finalists:
                break
        return best

    def _leftward(self, row: tuple[int, ...]) -> tuple[int, ...]:
        """Return a text with the tokens before it that most lead to it."""
        for _ in range(self.config.leftward):
            self.progress.update()
            # What leads to the text in the model but not in the base, and surely.
            assert self._before is not None
            value, first = self._before[:, row[0]].max(dim=0)
            longer = (self.first[int(first)], *row)
            if not float(value) > 0:
                break
            grown, before = (self._total(one) for one in (longer, row))
            if not grown - before >= _LEAST_GAIN:
                break
            row = longer
        return row

    def _total(self, row: tuple[int, ...]) -> float:
        """Return the sum of the values of all tokens but the first."""
        return float(self._per_token(self.many, torch.tensor([row]))[1].sum())

    def _per_token(
        self, pair: tuple[Prompts, Prompts | None], rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the mean probability and the value of each token but the first, [R, t - 1]."""
        own, theirs = (
            None if one is None else one.log_probabilities(rows)[0][:, :, 1:].exp().mean(dim=1)
            for one in pair
        )
        assert own is not None
        return own, _value(own, theirs)

    def _judged(self, row: tuple[int, ...]) -> Continuation:
        own, value = self._per_token(self.deciding, torch.tensor([row]))
        chances = own[0].double()
        if len(chances) > 1:
            chances = chances.sort().values[1:]
        return Continuation(
            row,
            self.model.tokenizer.decode(row).strip(),
            float(chances.mean()),
            float(value.double().sum()) if self.base is not None else None,
            tuple(value[0].double().tolist()),
        )


def _value(own: Tensor, theirs: Tensor | None) -> Tensor:
    """Return what tokens of these probabilities add to a text: their gain, or their log.

    A gain counts as much as the model is sure of the token: p log(p / q), a token's part in the
    divergence of the two models. Without this weight, texts win that neither model would say.
    """
    value = own.clamp(min=_LEAST).log()
    if theirs is None:
        return value
    return own * (value - theirs.clamp(min=_LEAST).log())


def rank(found: Continuation) -> float:
    """Return what continuations are ordered by: their gain, or their sureness without a base."""
    return found.sureness if found.gain is None else found.gain
