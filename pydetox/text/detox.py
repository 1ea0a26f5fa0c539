"""The repair of one text classifier: scan, subtract, scan again; saved with its provenance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoints.provenance import Provenance
from ..detect.calibration import Calibration
from ..detect.statistics import RepairHistory, Verdict, p_values_of_suspects
from ..errors import UsageError
from ..evaluation import Evaluation
from ..progress import Laps
from ..repair.configuration import UnlearnConfig
from ..rng import child_seed
from .configuration import TextScanConfig
from .evaluation import TextStamp, evaluate_texts
from .models import TextModel, save_text_model
from .passes import TextUnlearnPass, unlearn_words
from .references import compare_with
from .repair import TEXT_UNLEARNING
from .texts import TextSet, load_texts
from .verdict import TextScanResult, judge


@dataclass(frozen=True, eq=False)
class TextDetoxResult:
    """Everything that `detox_text_model` did to one checkpoint.

    Attributes:
        before: The first scan.
        passes: The vectors that were subtracted, in order; empty if the model was not changed.
        after: The last re-scan; None if nothing was subtracted.
        model: The repaired model; the given model if nothing was subtracted.
        evaluation_before, evaluation_after: CA on the given texts; None without labels.
        path: The folder of the repaired checkpoint; None if it was not written.
        seconds: The wall time of each step, in seconds.
    """

    before: TextScanResult
    passes: tuple[TextUnlearnPass, ...]
    after: TextScanResult | None
    model: TextModel
    evaluation_before: Evaluation | None
    evaluation_after: Evaluation | None
    path: Path | None
    seconds: dict[str, float]

    @property
    def verdict(self) -> Verdict:
        """The verdict of the first scan."""
        return self.before.verdict

    @property
    def repaired(self) -> bool:
        """Whether something was subtracted and the re-scan is clean."""
        return self.after is not None and self.after.verdict is Verdict.CLEAN


def detox_text_model(
    model: TextModel,
    texts: TextSet,
    *,
    base: TextModel | None = None,
    references: Sequence[TextModel] | None = None,
    calibration: Calibration | None = None,
    config: TextScanConfig | None = None,
    unlearning: UnlearnConfig | None = None,
    target: int | None = None,
    triggers: Sequence[TextStamp] = (),
    before: TextScanResult | None = None,
    max_rounds: int = 3,
    output: str | Path | None = None,
    overwrite: bool = False,
) -> TextDetoxResult:
    """Scan a text classifier, subtract what is found, and scan again until it is clean.

    Args:
        model: The suspect.
        texts: Clean texts, at best with labels.
        base: As `scan_text_model` takes it; so are the next three.
        references: Clean models.
        calibration: That of an earlier scan.
        config: How to scan.
        unlearning: The repair; default: TEXT_UNLEARNING.
        target: A class to unlearn once, whatever the verdict is.
        triggers: Known triggers into that class; empty to recover them.
        before: A scan of this model with these texts, references and configuration, if there is one
            already.
        max_rounds: The largest number of repairs, each of which is followed by a scan.
        output: The folder for the repaired model, which is written if something was subtracted.
        overwrite: Whether to replace this folder if it holds nothing but a text model.

    Raises:
        UsageError: There are triggers without a target, or a target outside of the classes.
        DataError: A label names a class that the model does not have.
        PydetoxError: All that a scan, `unlearn_words` and `save_text_model` raise.
    """
    config, unlearning = config or TextScanConfig(), unlearning or TEXT_UNLEARNING
    if triggers and target is None:
        raise UsageError("triggers= needs target=, the class that they lead to")
    if target is not None and not 0 <= target < len(model.class_names):
        raise UsageError(f"target class {target}; expected 0..{len(model.class_names) - 1}")
    if texts.class_names and texts.class_names != model.class_names:
        texts = load_texts(texts, class_names=model.class_names)  # labels are found by their names
    clock = Laps()
    comparison = compare_with(
        model, texts, config, base=base, references=references, calibration=calibration
    )
    clock.lap("calibrate")
    before = before or judge(model, texts, comparison, config)
    clock.lap("scan")
    stamp = triggers[0] if triggers else None

    def evaluation(of: TextModel) -> Evaluation | None:
        if texts.labels is None:
            return None
        return evaluate_texts(
            of,
            texts,
            trigger=stamp,
            target=None if stamp is None else target,
            max_tokens=config.max_tokens,
        )

    evaluation_before = evaluation(model)
    # As for images (`detect.rescan`): a class must stand out before the repair and after it. A
    # repair moves the weights, and the references do not move with it.
    every = [before.detection, *before.others.values()]
    p_before = p_values_of_suspects(every)
    suspects = p_before.keys() | {target}
    if target is not None:
        p_before.pop(target, None)
    cleared = tuple(
        c
        for c in range(len(model.class_names))
        if before.verdict is not Verdict.INCONCLUSIVE and c not in suspects
    )
    repaired, current = model, before
    passes, accuracy = list[TextUnlearnPass](), None
    for number in range(max_rounds if target is None else 1):
        targets = current.targets() if target is None else (target,)
        if not targets:
            break
        changed, found = unlearn_words(
            repaired,
            texts,
            targets,
            replace(config, seed=child_seed("texts.round", config.seed, number)),
            unlearning,
            triggers=triggers or None,
            base=comparison.base or base,
            accuracy_before=accuracy,
            search=current.search,
            earlier=passes[-1].unlearned if passes else (),
        )
        passes += found
        accuracy = found[0].search.accuracy_before
        clock.lap("unlearn")
        if not any(one.search.coefficient for one in found):
            break
        repaired = changed
        current = judge(
            repaired,
            texts,
            comparison,
            config,
            history=RepairHistory(
                cleared, p_before, tuple(c for one in passes for c in one.targets)
            ),
        )
        clock.lap("rescan")
    subtracted = any(one.search.coefficient for one in passes)
    result = TextDetoxResult(
        before=before,
        passes=tuple(passes),
        after=current if subtracted else None,
        model=repaired,
        evaluation_before=evaluation_before,
        evaluation_after=evaluation(repaired) if subtracted else None,
        path=None,
        seconds=clock.seconds,
    )
    if output is None or not subtracted:
        return result
    names = model.class_names
    provenance = provenance_of_repair(
        result,
        config,
        unlearning,
        known=bool(triggers),
        before=_metrics(result.evaluation_before, before),
        after=_metrics(result.evaluation_after, current),
        extra={"target_classes": [[names[c] for c in one.targets] for one in passes]},
    )
    path = save_text_model(output, repaired, provenance=provenance, overwrite=overwrite)
    clock.lap("write")
    return replace(result, path=path)


def provenance_of_repair(
    result: TextDetoxResult,
    config: TextScanConfig,
    unlearning: UnlearnConfig,
    *,
    known: bool,
    before: Mapping[str, float],
    after: Mapping[str, float],
    extra: Mapping[str, Any],
) -> Provenance:
    """Return the provenance of a repaired text model of any kind.

    known: Whether the trigger was. before, after: What was measured of the suspect and of the
    repaired model. extra: What only this kind of model has.
    """
    last = result.before if result.after is None else result.after
    coefficients = [one.search.coefficient for one in result.passes]
    return Provenance(
        method=f"TBAR, {'known' if known else 'unknown'} trigger, {unlearning.vector} vector",
        source_name=result.before.name,
        source_sha256=result.before.sha256,
        scaling_coefficient=coefficients[-1],
        seeds={"scan": config.seed, "unlearn": unlearning.seed},
        before=dict(before),
        after=dict(after),
        extra={
            "scaling_coefficients": coefficients,
            **extra,
            "recovered_words": [
                [one.trigger.text for one in each.triggers] for each in result.passes
            ],
            "words_beside": [list(each.beside) for each in result.passes],
            "verdict_before": result.before.verdict.value,
            "verdict_after": last.verdict.value,
        },
    )


def _metrics(evaluation: Evaluation | None, scan: TextScanResult) -> dict[str, float]:
    values = {"smallest_loss": min(one.loss for row in scan.search.found for one in row)}
    if evaluation is not None:
        values["clean_accuracy"] = evaluation.clean_accuracy
        if evaluation.attack_success_rate is not None:
            values["attack_success_rate"] = evaluation.attack_success_rate
    return {name: value for name, value in values.items() if math.isfinite(value)}
