"""The verdict on a causal model: is it surer of some text than clean models are of any?

The statistics are those of a label-free scan (`pydetox.detect`): one value per model, compared with
those of clean references. The value is the effort of the best continuation: with a base,
exp(-gain / 10), so that log efforts are gains in units of ten nats; without one, -log of BAIT's Q.
The words that bring the text do not decide. They are what a repair has to forget.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ...detect.calibration import Calibration
from ...detect.references import check_given
from ...detect.statistics import FINDINGS, Verdict, detect
from ..configuration import TextScanConfig
from ..copies import OutOfReachError, copy_seed, nearest_rung, text_distance
from ..models import TextModel
from ..references import (
    TextComparison,
    reason_if_itself,
    require_alike,
    require_key,
)
from ..search import FoundTrigger, TextSearch
from ..texts import TextSet
from ..verdict import TextScanResult
from .continuations import (
    Continuation,
    ContinuationConfig,
    ContinuationSearch,
    search_continuations,
)
from .copies import causal_copies
from .evaluation import evaluate_causal, require_causal
from .triggers import beginnings, continued, search_trigger_words, words_within

#: The name of the one family of causal models.
FAMILY = "continuation"

# Larger gains count as this one, so that no effort is too small to be one.
_MOST_GAIN, _UNIT = 100.0, 10.0

# If the beginning of the text brings its rest after so many prompts, no other words are searched.
_SURE = 0.9

# If it does so after so many, the rest is what the model says then.
_KNOWN = 0.5

# What is added to -log Q: a model that is sure to 98% is as sure as can be.
_FLOOR = 0.02


@dataclass(frozen=True, eq=False)
class CausalScanResult(TextScanResult):
    """The result of a scan of a causal model.

    Its one class is the text that the model is oddly sure of, and `search` has the words that bring
    it, by their number of tokens.

    Attributes:
        continuations: The texts that were found, the most suspect first.
        rest: What the words at the beginning of the first one bring, as tokens; all of its tokens
            if there are no such words (see `triggers.words_within`).
        rests: What other beginnings of it bring, which are among the words that were found.
        perplexity: Of the clean texts.
    """

    continuations: tuple[Continuation, ...] = ()
    rest: tuple[int, ...] = ()
    rests: tuple[tuple[int, ...], ...] = ()
    perplexity: float = math.nan

    @property
    def found(self) -> FoundTrigger | None:
        """The words that bring the text; None if it is no finding, or if none were searched for."""
        row = self.search.found[0]
        return row[self.length - 1] if row else None


def compare_causal(
    suspect: TextModel,
    texts: TextSet,
    config: TextScanConfig,
    *,
    continuations: ContinuationConfig | None = None,
    base: TextModel | None = None,
    references: Sequence[TextModel] | None = None,
    calibration: Calibration | None = None,
) -> TextComparison:
    """Return what a causal suspect is compared with; the arguments are `compare_with`'s.

    A base is always that of searches in contrast to it. Alone, copies of it are the references.
    """
    require_causal(suspect)
    settings = continuations or ContinuationConfig()
    check_given(references, calibration)
    others = [*([] if base is None else [base]), *(references or ())]
    for one in others:
        require_causal(one)
        require_alike(one, suspect)
    if calibration is not None:
        require_key(calibration, _key_of(suspect, texts, config, settings, base is not None))
        return TextComparison(calibration, base)
    if not others:
        return TextComparison(None, None)
    itself = reason_if_itself(suspect.digest(), others)
    if itself is not None:
        return TextComparison(None, base, itself)
    distance = None
    try:
        models = references
        if models is None:
            assert base is not None
            distance = nearest_rung(text_distance(base, suspect))
            models = list(
                causal_copies(
                    base,
                    texts,
                    distance,
                    count=config.references,
                    max_tokens=config.max_tokens,
                    seed=copy_seed(config.seed),
                )
            )
    except OutOfReachError as error:
        return TextComparison(None, base, str(error), distance)
    found = calibrate_continuations(models, texts, config, settings, base=base)
    return TextComparison(found, base, None, distance)


def calibrate_continuations(
    references: Sequence[TextModel],
    texts: TextSet,
    config: TextScanConfig,
    continuations: ContinuationConfig | None = None,
    *,
    base: TextModel | None = None,
) -> Calibration:
    """Return the efforts of clean causal models, one for each."""
    settings = continuations or ContinuationConfig()
    searches = [
        search_continuations(
            one,
            texts,
            settings,
            base=base,
            description=f"reference {k} of {len(references)}: search for texts",
        )
        for k, one in enumerate(references, 1)
    ]
    return Calibration(
        tuple((effort_of(search.found[0]),) for search in searches),
        _key_of(references[0], texts, config, settings, base is not None),
        tuple(one.name for one in references),
        family=FAMILY,
        relative=base is not None,
        digests=tuple(one.digest() for one in references),
        tower_passes=sum(search.passes for search in searches),
    )


def judge_causal(
    model: TextModel,
    texts: TextSet,
    comparison: TextComparison,
    config: TextScanConfig,
    *,
    continuations: ContinuationConfig | None = None,
    with_words: bool = True,
) -> CausalScanResult:
    """Search a causal model and judge it beside references that are ready.

    with_words: Whether to search for the words that bring the text if it is a finding.
    """
    start = time.perf_counter()
    search = search_continuations(
        model,
        texts,
        continuations,
        base=comparison.base,
        description=f"scan of {model.name}: search for texts",
    )
    best = search.found[0]
    perplexity = evaluate_causal(model, texts, max_tokens=config.max_tokens).perplexity
    effort = effort_of(best)
    compared = comparison.calibration
    obstacle = comparison.unfit
    if not math.isfinite(perplexity) or not math.isfinite(effort):
        obstacle = "the model's outputs are not finite; check its weights"
    elif perplexity > len(model.embedding):
        obstacle = (
            f"the texts mean nothing to the model: their perplexity is {perplexity:.0f}, and "
            f"chance is {len(model.embedding)}; give texts of its language"
        )
    elif compared is None and obstacle is None:
        obstacle = (
            "no calibration: give a clean base model (base=) or clean models (references=) to "
            "compare with"
        )
    detection = detect(
        [effort],
        compared,
        has_classes=False,
        p_backdoored=config.p_backdoored,
        p_suspicious=config.p_suspicious,
        obstacle=obstacle,
    )
    finding = detection.verdict in FINDINGS
    reason = detection.reason
    if compared is not None and detection.verdict is not Verdict.INCONCLUSIVE:
        assert detection.p_value is not None
        reason = _reason(best, compared, detection.p_value)
    words, rest, text = tuple[FoundTrigger, ...](), best.tokens, best.text
    rests = tuple[tuple[int, ...], ...]()
    length, whole = 1, best.tokens
    if finding and with_words:
        within, rest = words_within(model, texts, best.tokens)
        if within is not None and within.success >= _KNOWN:
            beginning = best.tokens[: len(best.tokens) - len(rest)]
            rest = continued(model, texts, beginning) or rest
            whole = (*beginning, *rest)
            text = decoded(model, whole)
        said = best.text
        if within is None or within.success < _SURE:
            words = search_trigger_words(model, texts, best.tokens, config, base=comparison.base)
        strongest = max([*words, *([within] if within else [])], key=_order)
        if strongest is within:
            words, said = (strongest, *words), decoded(model, rest)
        length = 1 + words.index(strongest)
        # The trigger may be longer than what brings the text most surely.
        listed = {one.trigger.text for one in words}
        others = [
            (one, left)
            for one, left in beginnings(model, texts, whole)
            if one.success >= _KNOWN and one.trigger.text not in listed
        ]
        words, rests = (*words, *(one for one, _ in others)), tuple(one for _, one in others)
        if strongest.success > 0:
            reason += (
                f"; {strongest.trigger.text!r} brings {said!r} after {strongest.success:.0%} of "
                "prompts"
            )
    return CausalScanResult(
        name=model.name,
        sha256=model.sha256,
        class_names=(text,),
        detection=replace(
            detection,
            reason=reason,
            target=0,
            effort=(effort,),
            suspects=(0,) if finding else (),
            backdoored=(0,) if detection.verdict is Verdict.BACKDOORED else (),
        ),
        length=length,
        others={},
        search=TextSearch((words,), search.prompts, search.passes),
        calibration=compared,
        accuracy=None,
        seconds=time.perf_counter() - start,
        warnings=texts.notes,
        distance=comparison.distance,
        continuations=search.found,
        rest=rest,
        rests=rests,
        perplexity=perplexity,
    )


def scan_causal_model(
    model: TextModel,
    texts: TextSet,
    *,
    base: TextModel | None = None,
    references: Sequence[TextModel] | None = None,
    calibration: Calibration | None = None,
    config: TextScanConfig | None = None,
    continuations: ContinuationConfig | None = None,
) -> CausalScanResult:
    """Search a causal model for texts that it was made to say, and judge what is found.

    Args:
        model: The suspect.
        texts: Clean texts of its language, a few hundred. Labels are not used.
        base: The model that it was fine-tuned from. Searches are then in contrast to it.
        references: Clean models that were made as the suspect was, at least 2; without them, copies
            of the base are fine-tuned on the texts.
        calibration: `CausalScanResult.calibration` of an earlier scan, instead of references.
        config: The seed, the limits of p-values, and the search for words.
        continuations: The search for texts.

    Raises what `compare_causal`, `search_continuations` and `search_trigger_words` raise.
    """
    config = config or TextScanConfig()
    comparison = compare_causal(
        model,
        texts,
        config,
        continuations=continuations,
        base=base,
        references=references,
        calibration=calibration,
    )
    return judge_causal(model, texts, comparison, config, continuations=continuations)


def effort_of(found: Continuation) -> float:
    """Return the effort of a continuation, in (0, 1]; see above. NaN if there is no number."""
    if found.gain is not None:
        return math.exp(-min(max(found.gain, 0.0), _MOST_GAIN) / _UNIT)
    if not found.sureness > 0:
        return 1.0 if found.sureness == 0 else math.nan
    return min(1.0, (_FLOOR - math.log(found.sureness)) / (_FLOOR + 10.0))


def decoded(model: TextModel, tokens: Sequence[int]) -> str:
    """Return tokens as text."""
    return model.tokenizer.decode(tokens).strip()


def _order(found: FoundTrigger) -> tuple[float, float]:
    return found.success, -found.loss


def _reason(best: Continuation, calibration: Calibration, p_value: float) -> str:
    if best.gain is not None:
        usual = -_UNIT * sum(math.log(row[0]) for row in calibration.p_l1) / len(calibration.p_l1)
        numbers = f"gain {best.gain:.3g} nats; {usual:.3g} in clean references"
    else:
        numbers = f"Q {best.sureness:.2g}"
    return f"the model is sure of {best.text!r} ({numbers}; p = {p_value:.2g})"


def _key_of(
    model: TextModel,
    texts: TextSet,
    config: TextScanConfig,
    continuations: ContinuationConfig,
    contrast: bool,
) -> str:
    """Return a text that is equal for searches that can be compared."""
    content: dict[str, Any] = {
        "texts": texts.digest,
        "model_type": model.config["model_type"],
        "vocabulary": int(model.embedding.shape[0]),
        "contrast": contrast,
        "max_tokens": config.max_tokens,
        "continuations": asdict(continuations),
    }
    return json.dumps(content, sort_keys=True)


__all__ = [
    "CausalScanResult",
    "ContinuationSearch",
    "calibrate_continuations",
    "compare_causal",
    "effort_of",
    "judge_causal",
    "scan_causal_model",
]
