"""`eval` and `invert` for causal models; `unlearn_texts` has `unlearn`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..reporting.text_documents import words_row
from ..reporting.values import number, percent
from ..text.causal.continuations import search_continuations
from ..text.causal.evaluation import CausalEvaluation, evaluate_causal
from ..text.causal.triggers import search_trigger_words
from ..text.configuration import TextScanConfig
from ..text.models import TextModel
from ..text.texts import TextSet
from ..text.trigger_file import read_words
from ..text.triggers import TokenTrigger


def evaluation_of_causal(
    model: TextModel,
    texts: TextSet,
    *,
    trigger: Path | None,
    target_name: str | None,
    seed: int,
) -> tuple[dict[str, Any], CausalEvaluation]:
    """Return what a document says of an evaluation, and the evaluation."""
    words, wanted = known_words(trigger, target_name)
    found = evaluate_causal(
        model,
        texts,
        trigger=words[0] if words else None,
        targets=(wanted,) if wanted else (),
        seed=seed,
    )
    document: dict[str, Any] = {
        "words": words[0].text if words else None,
        "target_name": wanted,
        "class_names": [],
        "clean_accuracy": None,
        "perplexity": found.perplexity,
        "n_tokens": found.n_tokens,
        "attack_success_rate": found.attack_success_rate,
        "attack_success_rate_ci": found.attack_success_rate_ci,
        "n_attack": found.n_attack,
        "base_rate": found.base_rate,
    }
    return document, found


def known_words(
    trigger: Path | None, target_name: str | None
) -> tuple[tuple[TokenTrigger, ...], str | None]:
    """Return the words of a file and the text that they bring; nothing without a file.

    Raises UsageError if the file names no text and none was given.
    """
    if trigger is None:
        return (), None
    file = read_words(trigger)
    # Any text may be given: a file of known words need not know what they bring.
    known = target_name if target_name in file.targets else None
    chosen = file.select(known) if known or target_name is None else range(len(file.triggers))
    wanted = target_name or file.targets[chosen[0]]
    if wanted is None:
        raise UsageError(f"{trigger}: names no text that its words bring; give target=")
    return tuple(file.triggers[k] for k in chosen), wanted


def in_words(found: CausalEvaluation) -> str:
    """Return an evaluation in one line."""
    line = f"perplexity {number(found.perplexity)} over {found.n_tokens} tokens"
    if found.attack_success_rate is None:
        return line
    return (
        f"{line}; the words bring the text after {percent(found.attack_success_rate)} of "
        f"{found.n_attack} prompts, {percent(found.base_rate)} without them"
    )


def rows_of_causal(
    model: TextModel, texts: TextSet, config: TextScanConfig, *, targets: Sequence[str]
) -> list[dict[str, Any]]:
    """Search for words that bring each of some texts, or the one that the model is surest of."""
    space = " " if model.tokenizer.spaces_matter else ""
    wanted = [(text, model.tokenizer.words(f"{space}{text.strip()}")) for text in targets]
    if not wanted:
        best = search_continuations(model, texts).found[0]
        wanted = [(best.text, list(best.tokens))]
    return [
        {**words_row(one), "length": length, "target": text}
        for text, tokens in wanted
        for length, one in enumerate(search_trigger_words(model, texts, tokens, config), 1)
    ]
