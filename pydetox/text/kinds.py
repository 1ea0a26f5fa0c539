"""What differs between the kinds of text models: how they are compared, judged and repaired."""

from __future__ import annotations

from collections.abc import Sequence

from ..detect.calibration import Calibration
from .causal.verdict import FAMILY as CONTINUATION
from .causal.verdict import compare_causal, judge_causal
from .configuration import TextScanConfig
from .files import TextKind
from .models import TextModel
from .references import TextComparison, compare_with
from .texts import TextData, TextSet, load_texts
from .towers.verdict import FAMILY as COLLAPSE
from .towers.verdict import compare_tower, judge_tower
from .verdict import TextScanResult, judge


def texts_for(
    model: TextModel, source: TextData, class_names: Sequence[str] | None = None
) -> TextSet:
    """Return texts as a model takes them: with its classes if it has any, else without labels."""
    if model.kind == "classifier":
        return load_texts(source, class_names=class_names or model.class_names)
    return without_labels(load_texts(source))


def without_labels(texts: TextSet) -> TextSet:
    """Return the same texts without labels."""
    return TextSet(texts.texts, source=texts.source, notes=texts.notes)


def compare_text_model(
    suspect: TextModel,
    texts: TextSet,
    config: TextScanConfig,
    *,
    base: TextModel | None = None,
    references: Sequence[TextModel] | None = None,
    calibration: Calibration | None = None,
) -> TextComparison:
    """Return what a text model of any kind is compared with; see `references.compare_with`."""
    if suspect.kind == "causal":
        return compare_causal(
            suspect, texts, config, base=base, references=references, calibration=calibration
        )
    if suspect.kind == "tower":
        return compare_tower(
            suspect, texts, config, base=base, references=references, calibration=calibration
        )
    return compare_with(
        suspect, texts, config, base=base, references=references, calibration=calibration
    )


def judge_text_model(
    model: TextModel, texts: TextSet, comparison: TextComparison, config: TextScanConfig
) -> TextScanResult:
    """Search a text model of any kind, and judge it beside references that are ready."""
    if model.kind == "causal":
        return judge_causal(model, texts, comparison, config)
    if model.kind == "tower":
        return judge_tower(model, texts, comparison, config)
    return judge(model, texts, comparison, config)


def kind_of_calibration(calibration: Calibration) -> TextKind:
    """Return the kind of the models that a calibration is of."""
    kinds: dict[str, TextKind] = {CONTINUATION: "causal", COLLAPSE: "tower"}
    return kinds.get(calibration.family, "classifier")
