"""Defences for text classifiers behind one interface, as `research.defenses` has for images."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...errors import ArchitectureError, UsageError
from ...repair.configuration import UnlearnConfig
from ...rng import child_seed
from ...text.configuration import TextScanConfig
from ...text.evaluation import TextStamp
from ...text.models import TextModel
from ...text.passes import unlearn_words
from ...text.repair import TEXT_UNLEARNING
from ...text.texts import TextSet
from .training import TextTraining, fine_tune


@dataclass(frozen=True, eq=False)
class TextDefenderData:
    """Everything that a defence may use, the same for every method of a comparison.

    Attributes:
        texts: Clean texts with labels.
        validation: Clean texts with labels that settings are chosen on.
        trigger: The trigger, for a defence that knows it.
        target: The class that it leads to.
        unlearning: The repair by trigger vectors.
        training: The fine-tuning of defences that fine-tune, and the length of texts.
    """

    texts: TextSet
    validation: TextSet
    trigger: TextStamp | None = None
    target: int | None = None
    unlearning: UnlearnConfig = field(default_factory=lambda: TEXT_UNLEARNING)
    training: TextTraining = field(default_factory=TextTraining)


@dataclass(frozen=True, eq=False)
class TextOutcome:
    """The result of a defence.

    Attributes:
        model: The repaired model, which is a new one, or the given one behind a filter.
        seconds: The wall time.
        cleaned: Of a defence that filters inputs: every text goes through it before the model.
        details: Details of this method for reports.
    """

    model: TextModel
    seconds: float
    cleaned: Callable[[Sequence[str]], list[str]] | None = None
    details: dict[str, Any] = field(default_factory=dict)


class TextDefense(Protocol):
    """One method of repairing a text classifier.

    Attributes:
        name: The name in tables.
        needs_trigger: Whether the method needs the trigger and the target.
    """

    @property
    def name(self) -> str:
        """The name in tables."""
        ...

    @property
    def needs_trigger(self) -> bool:
        """Whether the method needs the trigger and the target."""
        ...

    def defend(self, model: TextModel, data: TextDefenderData) -> TextOutcome:
        """Return a repaired copy; the given model is not changed."""
        ...


def _training(data: TextDefenderData, name: str) -> TextTraining:
    """Return the fine-tuning of a defence, with an order of the texts of its own."""
    return replace(data.training, seed=child_seed("texts.defense", data.training.seed, name))


@dataclass(frozen=True)
class KnownVector:
    """pydetox with the trigger known: one trigger vector of kind `forget`."""

    name: str = "known"
    needs_trigger: bool = True

    def defend(self, model: TextModel, data: TextDefenderData) -> TextOutcome:
        """Return the repaired model; details: alpha, and whether it keeps all limits."""
        if data.trigger is None or data.target is None:
            raise UsageError(f"{self.name}: it needs the trigger, and none was given")
        start = time.perf_counter()
        repaired, (one,) = unlearn_words(
            model,
            data.texts,
            [data.target],
            TextScanConfig(max_tokens=data.training.max_tokens),
            data.unlearning,
            triggers=[data.trigger],
        )
        details = {"alpha": one.search.coefficient, "reached": one.search.reached}
        return TextOutcome(repaired, time.perf_counter() - start, None, details)


@dataclass(frozen=True)
class FineTuning:
    """Fine-tuning of all weights on clean texts."""

    name: str = "fine-tuning"
    needs_trigger: bool = False

    def defend(self, model: TextModel, data: TextDefenderData) -> TextOutcome:
        """Return the fine-tuned model."""
        start = time.perf_counter()
        tuned = fine_tune(model, data.texts, _training(data, self.name), description=self.name)
        return TextOutcome(tuned, time.perf_counter() - start)


@dataclass(frozen=True)
class FinePruning:
    """Fine-pruning (Liu, Dolan-Gavitt, Garg, RAID 2018) on the MLPs of a BERT.

    The hidden units of the last blocks that clean texts use least, by their mean absolute
    activation, lose their weights; then the model is fine-tuned.

    Attributes:
        share: The share of the hidden units of a block that are removed, in [0, 1).
        blocks: The number of blocks, counted from the last.
    """

    name: str = "fine-pruning"
    needs_trigger: bool = False
    share: float = 0.5
    blocks: int = 2

    def defend(self, model: TextModel, data: TextDefenderData) -> TextOutcome:
        """Return the pruned and fine-tuned model; details["pruned"]: the units of each block.

        Raises ArchitectureError for a model without BERT's blocks.
        """
        start = time.perf_counter()
        pruned = model.copy()
        removed = self._prune(pruned, data)

        def keep_removed(tuned: TextModel) -> None:
            for name, units in removed.items():
                _clear(tuned.module, name, units)

        tuned = fine_tune(
            pruned,
            data.texts,
            _training(data, self.name),
            after_step=keep_removed,
            description=self.name,
        )
        details = {"pruned": {name: len(units) for name, units in removed.items()}}
        return TextOutcome(tuned, time.perf_counter() - start, None, details)

    @torch.no_grad()
    def _prune(self, model: TextModel, data: TextDefenderData) -> dict[str, Tensor]:
        found = [
            name.removesuffix(".intermediate")
            for name, module in model.module.named_modules()
            if name.endswith(".intermediate") and hasattr(module, "dense")
        ]
        if not found:
            raise ArchitectureError(
                f"{model.name}: it has no blocks with intermediate.dense, as BERT has; "
                "fine-pruning needs them"
            )
        activity: dict[str, Tensor] = {}
        hooks = []
        for name in found[-self.blocks :]:

            def watch(_: nn.Module, __: object, hidden: Tensor, name: str = name) -> None:
                seen = hidden.abs().double().flatten(0, -2).sum(dim=0)
                activity[name] = activity.get(name, torch.zeros_like(seen)) + seen

            hooks.append(
                model.module.get_submodule(f"{name}.intermediate").register_forward_hook(watch)
            )
        try:
            model.predict(data.texts.texts, max_tokens=data.training.max_tokens)
        finally:
            for hook in hooks:
                hook.remove()
        removed = {}
        for name, seen in activity.items():
            units = seen.argsort(stable=True)[: int(self.share * len(seen))]
            _clear(model.module, name, units)
            removed[name] = units
        return removed


@torch.no_grad()
def _clear(module: nn.Module, block: str, units: Tensor) -> None:
    """Set the weights into and out of the hidden units of a block to zero."""
    first = module.get_submodule(f"{block}.intermediate.dense")
    last = module.get_submodule(f"{block}.output.dense")
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    first.weight[units] = 0
    first.bias[units] = 0
    last.weight[:, units] = 0


@dataclass(frozen=True)
class RareEmbeddings:
    """Embeddings of tokens that clean texts do not have become the mean of all embeddings.

    A backdoor of a rare word loses the word (the defence that Kurita et al. 2020, section 5,
    inspires); one of usual words does not. The labels are not used.
    """

    name: str = "rare-embeddings"
    needs_trigger: bool = False

    def defend(self, model: TextModel, data: TextDefenderData) -> TextOutcome:
        """Return the changed model; details["tokens"]: how many lost their embedding."""
        start = time.perf_counter()
        changed = model.copy()
        used = set(model.tokenizer.special)
        for row in model.tokenizer.encode(
            data.texts.texts, min(data.training.max_tokens, model.max_tokens)
        ):
            used.update(row)
        rows = int(model.embedding.shape[0])
        rare = [token for token in range(rows) if token not in used]
        with torch.no_grad():
            changed.embedding[rare] = changed.embedding.mean(dim=0)
        return TextOutcome(changed, time.perf_counter() - start, None, {"tokens": len(rare)})


@dataclass(frozen=True)
class Onion:
    """ONION: words whose removal makes a text much likelier are removed before the model sees it.

    Source: Qi et al., "ONION: A Simple and Effective Defense Against Textual Backdoor Attacks"
    (EMNLP 2021). They score with GPT-2. Here a trigram model of words with absolute discounting,
    made of the clean texts, stands for it, because no pretrained language model comes with a
    package manager. The threshold is the smallest that keeps the given share of the accuracy on
    the validation texts.

    Attributes:
        kept: The share of the accuracy on validation texts to keep.
        thresholds: What the drop of the mean surprise, in nats, is compared with, ascending.
    """

    name: str = "onion"
    needs_trigger: bool = False
    kept: float = 0.97
    thresholds: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8)

    def defend(self, model: TextModel, data: TextDefenderData) -> TextOutcome:
        """Return the same model behind the filter; details["threshold"]: the chosen one."""
        start = time.perf_counter()
        scores = Trigrams(data.texts.texts)
        labels = torch.tensor(data.validation.labels)

        def accuracy(texts: Sequence[str]) -> float:
            found = model.predict(texts, max_tokens=data.training.max_tokens).argmax(dim=1)
            return float((found == labels).double().mean())

        least = self.kept * accuracy(data.validation.texts)
        chosen = self.thresholds[-1]
        for threshold in self.thresholds:
            if accuracy([scores.cleaned(text, threshold) for text in data.validation.texts]) >= (
                least
            ):
                chosen = threshold
                break

        def cleaned(texts: Sequence[str]) -> list[str]:
            return [scores.cleaned(text, chosen) for text in texts]

        return TextOutcome(model, time.perf_counter() - start, cleaned, {"threshold": chosen})


class Trigrams:
    """A trigram model of words with absolute discounting (Ney, Essen, Kneser 1994), backing off.

    texts: What it is made of. Words are in lower case; unknown ones share the discounted mass.
    """

    _DISCOUNT = 0.75

    def __init__(self, texts: Sequence[str]) -> None:
        self._counts: list[dict[tuple[str, ...], Counter[str]]] = [{}, {}, {}]
        vocabulary: set[str] = set()
        for text in texts:
            words = self.words(text)
            vocabulary.update(words)
            padded = ["<s>", "<s>", *words]
            for k in range(2, len(padded)):
                for order in range(3):
                    context = tuple(padded[k - order : k])
                    self._counts[order].setdefault(context, Counter())[padded[k]] += 1
        self._size = len(vocabulary) + 1

    @staticmethod
    def words(text: str) -> list[str]:
        """Return the words of a text, split at white space, without punctuation around them."""
        return [re.sub(r"^\W+|\W+$", "", word).lower() or word for word in text.split()]

    def surprise(self, words: Sequence[str]) -> float:
        """Return the mean of -log p over the words, in nats; 0 for no words."""
        padded = ["<s>", "<s>", *words]
        total = math.fsum(
            -math.log(self.probability(padded[k], tuple(padded[k - 2 : k])))
            for k in range(2, len(padded))
        )
        return total / len(words) if words else 0.0

    def probability(self, word: str, context: tuple[str, ...]) -> float:
        """Return p(word | context), above 0; it adds up to 1 over all words and an unknown one."""
        below = 1 / self._size if not context else self.probability(word, context[1:])
        counts = self._counts[len(context)].get(context)
        if counts is None:
            return below
        total = counts.total()
        left = self._DISCOUNT * len(counts) / total
        return max(counts[word] - self._DISCOUNT, 0) / total + left * below

    def cleaned(self, text: str, threshold: float) -> str:
        """Return a text without the words whose removal lowers its surprise by more than that.

        A text keeps at least one word.
        """
        shown, words = text.split(), self.words(text)
        before = self.surprise(words)
        kept = [
            word
            for k, word in enumerate(shown)
            if before - self.surprise([*words[:k], *words[k + 1 :]]) <= threshold
        ]
        return " ".join(kept or shown[:1])


#: All defences by name.
DEFENSES: dict[str, TextDefense] = {
    one.name: one for one in (KnownVector(), FineTuning(), FinePruning(), RareEmbeddings(), Onion())
}
