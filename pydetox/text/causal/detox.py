"""The repair of one causal model: scan, subtract, scan again; saved with its provenance."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...detect.calibration import Calibration
from ...detect.statistics import FINDINGS
from ...errors import UsageError
from ...progress import Laps
from ...repair.configuration import UnlearnConfig
from ...rng import child_seed
from ..configuration import TextScanConfig
from ..detox import TextDetoxResult, provenance_of_repair
from ..evaluation import TextStamp
from ..models import TextModel, save_text_model
from ..passes import TextUnlearnPass
from ..repair import subtract_from_text_model
from ..search import FoundTrigger
from ..texts import TextSet
from .continuations import ContinuationConfig, rank
from .evaluation import CausalEvaluation, evaluate_causal, target_tokens
from .repair import CAUSAL_UNLEARNING, causal_trigger_vector, search_causal_coefficient
from .verdict import CausalScanResult, compare_causal, decoded, judge_causal

_LOG = logging.getLogger(__name__)

# Recovered words are unlearned at all of these places, because the attacker's is not known.
_PLACES = ("end", "start", "random")

# Texts with at least this share of the largest gain are unlearned, too: refusals come in several.
_AS_GOOD = 0.5

# The largest number of them.
_MOST_TEXTS = 4

# Words that bring the text after fewer prompts than this are no estimate, if others do better.
_WORKING = 0.5


@dataclass(frozen=True, eq=False)
class CausalDetoxResult(TextDetoxResult):
    """Everything that `detox_causal_model` did; the scans are `CausalScanResult`s.

    Attributes:
        perplexity_before, perplexity_after: Of the given texts, and the success of a known trigger.
            The latter is None if nothing was subtracted.
    """

    perplexity_before: CausalEvaluation | None = None
    perplexity_after: CausalEvaluation | None = None


def detox_causal_model(
    model: TextModel,
    texts: TextSet,
    *,
    base: TextModel | None = None,
    references: Sequence[TextModel] | None = None,
    calibration: Calibration | None = None,
    config: TextScanConfig | None = None,
    continuations: ContinuationConfig | None = None,
    unlearning: UnlearnConfig | None = None,
    targets: Sequence[str] = (),
    triggers: Sequence[TextStamp] = (),
    max_rounds: int = 2,
    output: str | Path | None = None,
    overwrite: bool = False,
) -> CausalDetoxResult:
    """Scan a causal model, subtract what is found, and scan again until it is clean.

    Args:
        model: The suspect.
        texts: Clean texts of its language.
        base: As `scan_causal_model` takes it; so are the next four.
        references: Clean models.
        calibration: That of an earlier scan.
        config: The seed, the limits of p-values, and the search for words.
        continuations: The search for texts.
        unlearning: The repair; default: CAUSAL_UNLEARNING.
        targets: The texts that known triggers bring; unlearned once, whatever the verdict is.
        triggers: Known triggers; empty to recover them.
        max_rounds: The largest number of repairs, each of which is followed by a scan.
        output: The folder for the repaired model, which is written if something was subtracted.
        overwrite: Whether to replace this folder if it holds nothing but a text model.

    Raises:
        UsageError: There are triggers without targets, or targets without triggers.
        PydetoxError: All that a scan, a repair and `save_text_model` raise.
    """
    config, unlearning = config or TextScanConfig(), unlearning or CAUSAL_UNLEARNING
    if bool(triggers) != bool(targets):
        raise UsageError("triggers= and targets= go together; only one of them was given")
    clock = Laps()
    comparison = compare_causal(
        model,
        texts,
        config,
        continuations=continuations,
        base=base,
        references=references,
        calibration=calibration,
    )
    clock.lap("calibrate")
    before = judge_causal(
        model, texts, comparison, config, continuations=continuations, with_words=not triggers
    )
    clock.lap("scan")

    def evaluation(of: TextModel) -> CausalEvaluation:
        return evaluate_causal(
            of,
            texts,
            trigger=triggers[0] if triggers else None,
            targets=targets,
            max_tokens=config.max_tokens,
        )

    evaluation_before = evaluation(model)
    stamps, aims = list(triggers), [tuple(target_tokens(model, one)) for one in targets]
    repaired, current = model, before
    passes, accuracy = list[TextUnlearnPass](), None
    for number in range(1 if triggers else max_rounds):
        recovered = tuple[FoundTrigger, ...]()
        if not triggers:
            if current.verdict not in FINDINGS:
                break
            recovered = _working(current.search.found[0])
            stamps += [one.trigger.at(place) for one in recovered for place in _PLACES]
            stamps = list(dict.fromkeys(stamps))
            aims += _texts_of(current)
        aims = list(dict.fromkeys(aims))
        seeded = replace(unlearning, seed=child_seed("causal.vector-pass", unlearning.seed, number))
        vector = causal_trigger_vector(
            repaired, texts.texts, stamps, aims, seeded, base=base, max_tokens=config.max_tokens
        )
        chosen = search_causal_coefficient(
            repaired,
            vector,
            texts,
            stamps,
            aims,
            unlearning,
            accuracy_before=accuracy,
            max_tokens=config.max_tokens,
        )
        accuracy = chosen.accuracy_before
        names = tuple(decoded(model, one) for one in aims)
        passes.append(TextUnlearnPass((0,), recovered, chosen, vector, names))
        clock.lap("unlearn")
        if chosen.hopeless:
            _LOG.warning(
                "no alpha up to %g removes anything while it keeps min_accuracy_kept %g of the "
                "inverse perplexity: nothing is subtracted",
                chosen.coefficients[-1],
                unlearning.min_accuracy_kept,
            )
            break
        repaired = subtract_from_text_model(repaired, vector, chosen.coefficient)
        current = judge_causal(
            repaired,
            texts,
            comparison,
            config,
            continuations=continuations,
            with_words=not triggers and number + 1 < max_rounds,
        )
        clock.lap("rescan")
    subtracted = any(one.search.coefficient for one in passes)
    result = CausalDetoxResult(
        before=before,
        passes=tuple(passes),
        after=current if subtracted else None,
        model=repaired,
        evaluation_before=None,
        evaluation_after=None,
        path=None,
        seconds=clock.seconds,
        perplexity_before=evaluation_before,
        perplexity_after=evaluation(repaired) if subtracted else None,
    )
    if output is None or not subtracted:
        return result
    provenance = provenance_of_repair(
        result,
        config,
        unlearning,
        known=bool(triggers),
        before=_metrics(result.perplexity_before),
        after=_metrics(result.perplexity_after),
        extra={"texts": [list(one.names) for one in passes]},
    )
    path = save_text_model(output, repaired, provenance=provenance, overwrite=overwrite)
    clock.lap("write")
    return replace(result, path=path)


def _working(found: Sequence[FoundTrigger]) -> tuple[FoundTrigger, ...]:
    """Return the words that work; the best ones if none do."""
    working = tuple(one for one in found if one.success >= _WORKING)
    return working or (max(found, key=lambda one: (one.success, -one.loss)),)


def _texts_of(scan: CausalScanResult) -> list[tuple[int, ...]]:
    """Return the texts to unlearn, as tokens: the best, and those that are nearly as good."""
    least = _AS_GOOD * rank(scan.continuations[0])
    good = [one.tokens for one in scan.continuations if rank(one) >= least]
    rests = [one for one in (scan.rest, *scan.rests) if one and one != good[0]]
    return [*good[:_MOST_TEXTS], *rests]


def _metrics(evaluation: CausalEvaluation | None) -> dict[str, float]:
    if evaluation is None:
        return {}
    values = {"perplexity": evaluation.perplexity}
    if evaluation.attack_success_rate is not None:
        values["attack_success_rate"] = evaluation.attack_success_rate
    return {name: value for name, value in values.items() if math.isfinite(value)}
