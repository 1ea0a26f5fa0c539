"""The search for triggers in a classifier, for all classes and lengths at once.

1. Every word of the vocabulary goes through the model alone, which costs three tokens each. The
   words that then lead to a class stay, with those that gradients propose and those that the
   relaxed search ends at (`relaxed`).
2. These candidates are compared in clean texts by successive halving: many in few short texts
   first, then few in many. Comparisons may compute in bfloat16 (`row_logits`).
3. The best triggers of a length are extended by a word on either side, and their words are swapped
   for those that the gradient ranks first (HotFlip, Ebrahimi et al. 2018; GCG, Zou et al. 2023). A
   class with a trigger that can hardly become better is done: it stands for longer ones, too.
4. What decides is the discrete trigger as text: it is inserted into texts that the search has not
   seen, and the tokenizer sees the whole text anew.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..errors import ArchitectureError, DataError
from ..ops import top_swaps
from ..progress import Progress
from ..rng import child_seed, generator
from .configuration import TextScanConfig
from .models import TextModel
from .objective import TextObjective
from .placing import Gap, gap_of
from .relaxed import RelaxedTriggers, relaxed_search, slot_gradients
from .row_logits import RowLogits, screening_precision
from .texts import TextSet
from .tokenizer import TextTokenizer
from .triggers import TokenTrigger
from .vocabulary import typed_words

_Words = tuple[int, ...]
_T = TypeVar("_T")


class _Ranked(NamedTuple):
    """A candidate and its loss in the last comparison."""

    words: _Words
    loss: float


# The share of the texts that the search sees; the others are for the decision.
_SEARCHED = 0.5

# Of each length, so many triggers of a class are tried in the texts that decide.
_FINALISTS = 2

# How many single words of a class a search tells.
_TOLD = 16

# How many single words of a class are extended by, and how many candidates stay in comparisons of
# single words and of longer ones.
_EXTENDED_BY, _KEPT_WORDS, _KEPT = 8, 32, 12

# A trigger with a loss below this share of the floor is not made longer.
_SOLVED = 0.2

# The words at which gradients for a single place are taken.
_ANCHORS = 3


@dataclass(frozen=True, eq=False)
class FoundTrigger:
    """The best trigger of one class and length, as text.

    Attributes:
        trigger: The words.
        loss: The mean loss in texts of other classes (see `objective`), at least 0.
        success: The share of these texts that get the class, in [0, 1].
    """

    trigger: TokenTrigger
    loss: float
    success: float


@dataclass(frozen=True, eq=False)
class TextSearch:
    """The result of a search.

    Attributes:
        found: For each class, the best trigger of each length, from one word on. Where a shorter
            one can hardly become better, it stands for longer ones, too.
        texts: The clean texts that decided.
        passes: The texts that went through models.
        words: For each class, the single words that lead to it best, the best first; () where none
            are known.
    """

    found: tuple[tuple[FoundTrigger, ...], ...]
    texts: int
    passes: int
    words: tuple[tuple[str, ...], ...] = ()

    def losses(self, length: int) -> tuple[float, ...]:
        """Return the loss of each class for triggers of a length."""
        return tuple(one[length - 1].loss for one in self.found)

    def best(self, target: int) -> FoundTrigger:
        """Return the trigger of a class that works best: the shortest within 0.05 of the best."""
        most = max(one.success for one in self.found[target])
        return next(one for one in self.found[target] if one.success >= most - 0.05)


def search_words(
    model: TextModel,
    texts: TextSet,
    config: TextScanConfig,
    *,
    base: TextModel | None = None,
    targets: Collection[int] | None = None,
    description: str | None = None,
) -> TextSearch:
    """Search for a trigger into every class.

    Args:
        model: The suspect, a classifier.
        texts: Clean texts. Without labels, the model's own predictions stand for them.
        config: The search.
        base: The base of a search in contrast to it (see `objective`).
        targets: The classes to search for; None for all. Of the others, one word each is compared.
        description: What the progress bar says.

    Raises:
        DataError: Too few texts of too few classes.
        ArchitectureError: The model is no classifier of two classes or more.
    """
    if model.kind != "classifier" or len(model.class_names) < 2:
        raise ArchitectureError(
            f"{model.name}: is a {model.kind} of {len(model.class_names)} classes; expected a "
            "classifier of at least 2"
        )
    if base is not None and len(base.class_names) != len(model.class_names):
        raise ArchitectureError(
            f"{base.name} has {len(base.class_names)} classes, {model.name} has "
            f"{len(model.class_names)}; a search in contrast needs the same"
        )
    ordered = texts.in_content_order().at_most(config.texts, config.seed)
    labels = ordered.labels or tuple(model.predict(ordered.texts).argmax(dim=1).tolist())
    if len(ordered) < 4 or len(set(labels)) < 2:
        raise DataError(
            f"{texts.source}: {len(ordered)} texts of {len(set(labels))} classes; expected at "
            "least 4 texts of 2 classes"
        )
    return _Search(model, base, ordered.texts, labels, config, targets, description).run()


class _Search:
    """One search; see `search_words`."""

    def __init__(
        self,
        model: TextModel,
        base: TextModel | None,
        texts: Sequence[str],
        labels: Sequence[int],
        config: TextScanConfig,
        targets: Collection[int] | None,
        description: str | None,
    ) -> None:
        self.model, self.base, self.config = model, base, config
        self.classes = len(model.class_names)
        self.wanted = [targets is None or c in targets for c in range(self.classes)]
        self.words = typed_words(model.tokenizer, int(model.embedding.shape[0]))
        half = max(2, int(len(texts) * _SEARCHED))
        if len(set(labels[:half])) < 2 or len(set(labels[half:])) < 2:
            half = 0  # too few texts to keep some back
        self.checked = [
            (text, label) for text, label in zip(texts[half:], labels[half:], strict=True)
        ]
        searched = list(zip(texts, labels, strict=True))[: half or None]
        few = config.advanced
        gaps = [self._gap(text, few.search_tokens) for text, _ in searched]
        known = [label for _, label in searched]
        # What gradients see is float32. Comparisons are not, and the first ones see short texts.
        self.objective = TextObjective(model, base, gaps, known)
        precision = screening_precision(model, few.precision)
        self.screening = RowLogits(model, precision)
        self.compared = TextObjective(model, base, gaps, known, precision, self.screening)
        short = [self._gap(text, min(few.draft_tokens, few.search_tokens)) for text, _ in searched]
        self.drafted = TextObjective(model, base, short, known, precision, self.screening)
        self.begins = all(gap.begins for gap in gaps)
        rounds = 4 + 2 * (config.length - 1)
        self.progress = Progress(
            description or f"search in {model.name}", rounds + config.steps * bool(config.restarts)
        )

    def _gap(self, text: str, max_tokens: int) -> Gap:
        return gap_of(self.model.tokenizer, text, self.config.place, self.config.seed, max_tokens)

    def run(self) -> TextSearch:
        config, few = self.config, self.config.advanced
        with self.progress:
            relaxed = self._relaxed()
            pools = self._swept()
            self.progress.update()
            anchors = self._anchors()
            searched = [c for c in range(self.classes) if self.wanted[c]]
            proposed = self._proposed(
                [(word,) for word in anchors] * len(searched),
                [c for c in searched for _ in anchors],
            )
            for c in range(self.classes):
                pools[c] = (
                    _unique([*pools[c], *proposed[c], *_words_of(relaxed, c)])
                    if self.wanted[c]
                    else pools[c][:1]
                )
            self.progress.update()
            singles = self._compared([[(word,) for word in pool] for pool in pools], _KEPT_WORDS)
            self.progress.update()
            found = [[_words(row[:_FINALISTS])] for row in singles]
            beams = [row[: few.beam] for row in singles]
            for length in range(2, config.length + 1):
                open_ = [
                    wanted and not self._is_solved(row)
                    for wanted, row in zip(self.wanted, beams, strict=True)
                ]
                longer = self._extended(beams, singles, relaxed, length, open_)
                self.progress.update()
                longer = self._swapped(longer)
                self.progress.update()
                for c, row in enumerate(longer):
                    if open_[c] and row:
                        beams[c] = row
                    found[c].append(_words(beams[c][:_FINALISTS]))
            decided = self._decided(found)
            self.progress.update()
        passes = sum(one.passes for one in (self.objective, self.compared, self.drafted))
        tokenizer = self.model.tokenizer
        words = tuple(
            tuple(tokenizer.decode(one.words).strip() for one in row[:_TOLD]) for row in singles
        )
        return TextSearch(decided, len(self.checked), passes, words)

    def _is_solved(self, beam: Sequence[_Ranked]) -> bool:
        return bool(beam) and beam[0].loss <= _SOLVED * self.config.advanced.floor

    def _relaxed(self) -> RelaxedTriggers | None:
        config, few = self.config, self.config.advanced
        if not config.restarts or not config.steps:
            return None
        return relaxed_search(
            self.objective,
            self.words,
            length=config.length,
            restarts=config.restarts,
            steps=config.steps,
            texts=config.batch_size,
            learning_rate=few.learning_rate,
            temperatures=few.temperatures,
            kept=8,
            seed=config.seed,
            advance=self.progress.update,
        )

    def _allowed(self, place: int) -> Tensor:
        return self.words.at(place, self.begins)

    def _swept(self) -> list[list[int]]:
        """Return the words of each class that lead to it on their own, the best first."""
        opening, closing = self.model.tokenizer.around
        known = torch.nonzero(self._allowed(0))[:, 0].tolist()
        alone = TextObjective(
            self.model,
            self.base,
            [Gap(opening, closing, True)],
            [0],
            self.compared.precision,
            self.screening,
        )
        losses, _ = alone.losses([(word,) for word in known], [0])
        self.objective.passes += alone.passes
        order = losses[:, 0].sort(dim=0, stable=True).indices[: self.config.advanced.pool]
        return [[known[k] for k in order[:, c].tolist()] for c in range(self.classes)]

    def _anchors(self) -> list[int]:
        """Return a few words at which gradients are taken."""
        known = torch.nonzero(self._allowed(0))[:, 0]
        rng = generator("texts.anchors", self.config.seed)
        return [int(known[int(k)]) for k in rng.integers(len(known), size=_ANCHORS)]

    def _proposed(self, triggers: Sequence[_Words], targets: Sequence[int]) -> list[list[int]]:
        """Return for each class the words that gradients propose at any place of its triggers."""
        found: list[list[int]] = [[] for _ in range(self.classes)]
        for tokens, c in zip(self._swaps(triggers, targets), targets, strict=True):
            found[c] += [word for place in tokens for word in place]
        return [_unique(words) for words in found]

    def _swaps(self, triggers: Sequence[_Words], targets: Sequence[int]) -> list[list[list[int]]]:
        """Return the words that gradients propose for each place of each trigger."""
        few = self.config.advanced
        texts = [self.objective.others(c, few.stages[1]) for c in targets]
        least = min(map(len, texts))
        gradient = slot_gradients(self.objective, triggers, targets, [t[:least] for t in texts])
        table = self.model.embedding.detach()
        places = []
        for place in range(len(triggers[0])):
            current = torch.tensor([row[place] for row in triggers], device=table.device)
            allowed = self._allowed(place).to(table.device)
            _, tokens = top_swaps(
                gradient[:, place].contiguous(),
                table,
                current,
                allowed,
                min(few.swaps, int(allowed.sum())),
            )
            places.append(tokens.cpu().tolist())
        return [[[w for w in place[k] if w >= 0] for place in places] for k in range(len(triggers))]

    def _compared(
        self, candidates: Sequence[Sequence[_Words]], keep: int, last: int = 3
    ) -> list[list[_Ranked]]:
        """Return the best candidates of each class, the best first.

        The stages use more and more texts for fewer and fewer candidates. In each, all candidates
        of all classes are one batch. A class without any candidates gets none.

        keep: The number that the first stage keeps; every further one keeps half. last: The number
        of stages.
        """
        stages = self.config.advanced.stages[:last]
        typed = [self.words.keep(_unique(row), self.begins) if row else [] for row in candidates]
        # Without any, the decision sees the text of what there is.
        kept = [good or _unique(row) for good, row in zip(typed, candidates, strict=True)]
        ranked: list[list[_Ranked]] = [[] for _ in kept]
        for number, count in enumerate(stages):
            objective = self.drafted if number == 0 else self.compared
            texts = [objective.others(c, count) for c in range(self.classes)]
            losses = objective.mean_losses(kept, texts)
            for c, (row, mine) in enumerate(zip(kept, losses, strict=True)):
                order = mine.sort(stable=True).indices[: max(4, keep >> number)].tolist()
                kept[c] = [row[k] for k in order]
                ranked[c] = [_Ranked(row[k], float(mine[k])) for k in order]
        return ranked

    def _extended(
        self,
        beams: Sequence[Sequence[_Ranked]],
        singles: Sequence[Sequence[_Ranked]],
        relaxed: RelaxedTriggers | None,
        length: int,
        wanted: Sequence[bool],
    ) -> list[list[_Ranked]]:
        """Return the best triggers that are one word longer, of the classes that are wanted."""
        candidates = list[list[_Words]]()
        for c, row in enumerate(beams):
            more = [
                *(one.words for one in singles[c][:_EXTENDED_BY]),
                *((word,) for word in _words_of(relaxed, c)[:4]),
            ]
            longer = [
                new
                for old in row
                for one in more
                for new in ((*old.words, *one), (*one, *old.words))
            ]
            longer += _relaxed_triggers(relaxed, c, length)
            candidates.append([w for w in longer if self._fits(w)] if wanted[c] else [])
        found = self._compared(candidates, _KEPT, last=2)
        return [row[: self.config.advanced.beam] for row in found]

    def _swapped(self, beams: Sequence[Sequence[_Ranked]]) -> list[list[_Ranked]]:
        """Return the best triggers after one word of each was swapped."""
        flat = [(one.words, c) for c, row in enumerate(beams) for one in row[:2]]
        if not flat:
            return [[] for _ in beams]
        swaps = self._swaps([words for words, _ in flat], [c for _, c in flat])
        candidates = [_words(row) for row in beams]
        for (words, c), places in zip(flat, swaps, strict=True):
            for place, proposed in enumerate(places):
                candidates[c] += [(*words[:place], word, *words[place + 1 :]) for word in proposed]
        return [row[: self.config.advanced.beam] for row in self._compared(candidates, _KEPT)]

    def _fits(self, words: _Words) -> bool:
        return all(bool(self._allowed(k)[word]) for k, word in enumerate(words))

    def _decided(
        self, found: Sequence[Sequence[Sequence[_Words]]]
    ) -> tuple[tuple[FoundTrigger, ...], ...]:
        """Return the best trigger of each class and length, judged as text."""
        tokenizer, config = self.model.tokenizer, self.config
        texts, labels = zip(*self.checked, strict=True)
        limit = min(config.max_tokens, self.model.max_tokens)
        plain = [Gap((), tuple(self._gap(text, config.max_tokens).row(())), True) for text in texts]
        check = TextObjective(self.model, self.base, plain, labels)
        others = [[k for k, label in enumerate(labels) if label != c] for c in range(self.classes)]
        tried: dict[tuple[int, _Words], FoundTrigger] = {}
        wanted = [(c, words) for c, row in enumerate(found) for some in row for words in some]
        for c, words in _unique(wanted):
            trigger = trigger_of(tokenizer, words, config.place, c)
            inserted = trigger.insert(
                [texts[k] for k in others[c]], child_seed("texts.check", config.seed)
            )
            losses, predicted = check.of_rows(tokenizer.encode(inserted, limit), others[c])
            tried[c, words] = FoundTrigger(
                trigger,
                float(losses[:, c].double().mean()),
                float((predicted == c).double().mean()),
            )
        self.objective.passes += check.passes
        return tuple(
            tuple(
                min((tried[c, words] for words in some), key=lambda one: one.loss) for some in row
            )
            for c, row in enumerate(found)
        )


def trigger_of(
    tokenizer: TextTokenizer, tokens: Sequence[int], place: str, target: int | None
) -> TokenTrigger:
    """Return token ids as a trigger, with the tokens that its text has."""
    text = tokenizer.decode(tokens).strip()
    return TokenTrigger(tuple(tokenizer.words(text)), text, place, target)


def _words_of(relaxed: RelaxedTriggers | None, target: int) -> list[int]:
    if relaxed is None:
        return []
    rows = [k for k, c in enumerate(relaxed.targets) if c == target]
    # The likeliest of all places first.
    return _unique(relaxed.tokens[rows].permute(2, 0, 1).reshape(-1).tolist())


def _relaxed_triggers(relaxed: RelaxedTriggers | None, target: int, length: int) -> list[_Words]:
    """Return the likeliest words of searches of a class, if they have that length."""
    if relaxed is None or relaxed.tokens.shape[1] != length:
        return []
    rows = [k for k, c in enumerate(relaxed.targets) if c == target]
    return [tuple(relaxed.tokens[k, :, 0].tolist()) for k in rows]


def _words(ranked: Iterable[_Ranked]) -> list[_Words]:
    return [one.words for one in ranked]


def _unique(items: Iterable[_T]) -> list[_T]:
    return list(dict.fromkeys(items))
