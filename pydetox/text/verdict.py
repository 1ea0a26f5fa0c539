"""The verdict on a text model: what an image scan's is, with words for triggers.

The statistics are those of `detect`. The effort of a class is the loss of its best trigger and a
floor. It is judged relative to the other classes and to clean references, for each length of
triggers, and p-values are corrected for the number of lengths. A class for which no trigger works
in the texts that decide is no finding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..detect.statistics import FINDINGS, Calibration, Detection, RepairHistory, Verdict, detect
from .configuration import TextScanConfig
from .models import TextModel
from .references import TextComparison, compare_with, efforts, family_of, loss_of
from .search import FoundTrigger, TextSearch, search_words
from .texts import TextSet

#: The least share of texts that a trigger sends to its class, if it is to be a finding.
LEAST_SUCCESS = 0.5

#: Accuracy on clean texts below this multiple of chance means that texts and model do not fit.
_TIMES_CHANCE = 1.5


@dataclass(frozen=True, eq=False)
class TextScanResult:
    """The result of a scan of a text model.

    Attributes:
        name: The name of the checkpoint.
        sha256: The SHA-256 of its weights; None for a model that came from no file.
        class_names: The names of its classes.
        detection: The verdict and its numbers, of the length that decides.
        length: The number of tokens of the triggers that the verdict is about.
        others: The verdicts for the other lengths, by length.
        search: The triggers that were found.
        calibration: The efforts of the references, or None.
        accuracy: The share of the clean texts that get their label; None without labels.
        seconds: The wall time in seconds, without the references.
        warnings: One line for each doubt.
        distance: How far the model lies from its base, if copies of it were matched to that.
    """

    name: str
    sha256: str | None
    class_names: tuple[str, ...]
    detection: Detection
    length: int
    others: dict[int, Detection]
    search: TextSearch
    calibration: Calibration | None
    accuracy: float | None
    seconds: float
    warnings: tuple[str, ...] = ()
    distance: float | None = None

    @property
    def verdict(self) -> Verdict:
        """The verdict."""
        return self.detection.verdict

    @property
    def target(self) -> int | None:
        """The index of the most suspect class; None if there is no evidence for any."""
        return self.detection.target

    @property
    def target_name(self) -> str | None:
        """The name of the most suspect class; None if there is no evidence for any."""
        return None if self.target is None else self.class_names[self.target]

    @property
    def found(self) -> FoundTrigger | None:
        """The trigger of the most suspect class, of the length that decides."""
        return None if self.target is None else self.search.found[self.target][self.length - 1]

    def targets(self) -> tuple[int, ...]:
        """Return the classes to unlearn: the target, then all others that are surely backdoored."""
        if self.verdict not in FINDINGS or self.target is None:
            return ()
        every = [self.detection, *self.others.values()]
        return tuple(dict.fromkeys([self.target, *(c for one in every for c in one.backdoored)]))


def scan_text_model(
    model: TextModel,
    texts: TextSet,
    *,
    base: TextModel | None = None,
    references: Sequence[TextModel] | None = None,
    calibration: Calibration | None = None,
    config: TextScanConfig | None = None,
    cleared: Sequence[int] = (),
) -> TextScanResult:
    """Search a text model for triggers and judge what is found.

    Args:
        model: A classifier.
        texts: Clean texts, a few hundred, at best with labels.
        base: A clean model of the same classes. Alone, copies of it are the references. With
            `references`, the search is in contrast to it.
        references: Clean models that were made as the suspect was, at least 2.
        calibration: `TextScanResult.calibration` of an earlier scan, instead of references.
        config: How to scan.
        cleared: Classes that are not judged, because a scan before a repair found them clean.

    Raises what `compare_with` and `search_words` raise.
    """
    config = config or TextScanConfig()
    comparison = compare_with(
        model, texts, config, base=base, references=references, calibration=calibration
    )
    return judge(model, texts, comparison, config, history=RepairHistory.clearing(cleared))


def judge(
    model: TextModel,
    texts: TextSet,
    comparison: TextComparison,
    config: TextScanConfig,
    *,
    history: RepairHistory | None = None,
) -> TextScanResult:
    """Search a text model and judge it beside references that are ready.

    history: Of a repaired model, what is known from before its repair.
    """
    start = time.perf_counter()
    search = search_words(
        model,
        texts,
        config,
        base=comparison.base,
        description=f"scan of {model.name}: search for words",
    )
    predicted = model.predict(texts.texts, max_tokens=config.max_tokens).argmax(dim=1).tolist()
    accuracy = None
    if texts.labels is not None:
        accuracy = sum(p == t for p, t in zip(predicted, texts.labels, strict=True)) / len(texts)
    obstacle = comparison.unfit or _obstacle(model, texts, search, predicted, accuracy)
    found = {
        length: _of_length(model, search, length, comparison, config, history, obstacle)
        for length in range(1, config.length + 1)
    }
    length = min(found, key=lambda one: _order(found[one]))
    return TextScanResult(
        name=model.name,
        sha256=model.sha256,
        class_names=model.class_names,
        detection=found.pop(length),
        length=length,
        others=found,
        search=search,
        calibration=comparison.calibration,
        accuracy=accuracy,
        seconds=time.perf_counter() - start,
        warnings=texts.notes,
        distance=comparison.distance,
    )


def _of_length(
    model: TextModel,
    search: TextSearch,
    length: int,
    comparison: TextComparison,
    config: TextScanConfig,
    history: RepairHistory | None,
    obstacle: str | None,
) -> Detection:
    """Return the verdict for triggers of one length."""
    effort = efforts(search, length, config)
    compared = comparison.calibration
    if compared is not None:
        compared = compared.of(family_of(length))
    if obstacle is None and compared is None:
        obstacle = (
            "no calibration: give a clean base model (base=) or clean models (references=) to "
            "compare with"
        )

    def judged(values: Sequence[float]) -> Detection:
        return detect(
            values,
            compared,
            has_classes=True,
            p_backdoored=config.p_backdoored,
            p_suspicious=config.p_suspicious,
            families=config.length,
            history=history,
            obstacle=obstacle,
        )

    works = [one[length - 1].success >= LEAST_SUCCESS for one in search.found]
    values = list(effort)
    detection = judged(values)
    # Without a class whose words do not work, the next one may stand out.
    while idle := [c for c in detection.suspects if not works[c]]:
        values = [math.inf if c in idle else value for c, value in enumerate(values)]
        detection = judged(values)
    return replace(
        detection,
        p_l1=tuple(effort),
        effort=tuple(effort),
        anomaly_index=None,
        reason=_reason(model, search, length, detection, compared, config),
    )


def _reason(
    model: TextModel,
    search: TextSearch,
    length: int,
    detection: Detection,
    calibration: Calibration | None,
    config: TextScanConfig,
) -> str:
    if detection.verdict is Verdict.INCONCLUSIVE or calibration is None:
        return detection.reason
    if detection.target is None:
        return "no words were found that work in texts of other classes"
    best = search.found[detection.target][length - 1]
    rows = calibration.p_l1
    usual = sum(loss_of(row[detection.target], config) for row in rows) / len(rows)
    assert detection.p_value is not None
    return (
        f"the words {best.trigger.text!r} send {best.success:.0%} of the texts of other classes to "
        f"{model.class_names[detection.target]!r} (loss {best.loss:.2g}; {usual:.2g} "
        f"in clean references; p = {detection.p_value:.2g})"
    )


def _order(detection: Detection) -> tuple[int, float]:
    """Return what sorts verdicts: findings first, by p-value, then those without a verdict."""
    p_value = math.inf if detection.p_value is None else detection.p_value
    if detection.verdict in FINDINGS:
        return 0, p_value
    return (1 if detection.verdict is Verdict.INCONCLUSIVE else 2), p_value


def _obstacle(
    model: TextModel,
    texts: TextSet,
    search: TextSearch,
    predicted: Sequence[int],
    accuracy: float | None,
) -> str | None:
    """Return why there can be no verdict whatever was found; None if there can be one."""
    losses = [one.loss for row in search.found for one in row]
    if not all(map(math.isfinite, losses)):
        return "the model's outputs are not finite; check its weights"
    if len(set(predicted)) == 1:
        return (
            f"the model gives one answer ({model.class_names[predicted[0]]!r}) to every text; "
            "check its weights, and give texts of all classes"
        )
    chance = 1 / len(model.class_names)
    if accuracy is not None and accuracy < min(_TIMES_CHANCE * chance, (1 + chance) / 2):
        return (
            f"the texts mean little to the model: {accuracy:.0%} get their label, and chance is "
            f"{chance:.0%}; give texts of its task, with its class names in the order of its head"
        )
    return None
