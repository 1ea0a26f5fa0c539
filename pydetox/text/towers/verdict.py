"""The verdict on a text tower: does a trigger collapse it more than any does clean towers?

As in a label-free scan of images, there is one value per model, compared with those of clean
references by the statistics of `pydetox.detect`. The value is the effort 1 - collapse of the best
trigger, the share of the captions' spread that it leaves, at most 1.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...detect.calibration import Calibration
from ...detect.references import check_given
from ...detect.statistics import FINDINGS, Verdict, detect
from ...models import OpenClipModel
from ..configuration import TextScanConfig
from ..models import TextModel
from ..references import TextComparison, reason_if_itself, require_key
from ..search import FoundTrigger, TextSearch
from ..texts import TextSet
from ..verdict import TextScanResult
from .encoder import TextTower, require_same_shape
from .search import TowerTrigger, search_tower

#: The name of the one family of text towers.
FAMILY = "collapse"

#: The name of the one class: a collapse leads to no class.
ANY_TEXT = "any text"

#: The least share of captions that a trigger has to send its way, if it is to be a finding.
LEAST_SUCCESS = 0.5

_LEAST_EFFORT = 1e-3


@dataclass(frozen=True, eq=False)
class TowerScanResult(TextScanResult):
    """The result of a scan of a text tower.

    Attributes:
        triggers: The triggers that were found, the most suspect first.
    """

    triggers: tuple[TowerTrigger, ...] = ()


def compare_tower(
    suspect: TextModel | OpenClipModel,
    texts: TextSet,
    config: TextScanConfig,
    *,
    base: TextModel | OpenClipModel | None = None,
    references: Sequence[TextModel | OpenClipModel] | None = None,
    calibration: Calibration | None = None,
) -> TextComparison:
    """Return what a suspect tower is compared with; the arguments are `compare_with`'s.

    A base is that of searches in contrast to it. Alone, it makes no verdict.
    """
    check_given(references, calibration)
    tower = TextTower(suspect)
    others = [TextTower(one) for one in [*([] if base is None else [base]), *(references or ())]]
    for one in others:
        require_same_shape(one, tower)
    in_contrast = None if base is None else TextTower(base)
    if calibration is not None:
        require_key(calibration, _key_of(tower, texts, config, base is not None))
        return TextComparison(calibration, _text_model(base))
    if not references:
        return TextComparison(None, _text_model(base))
    itself = reason_if_itself(tower.digest(), others, "text tower")
    if itself is not None:
        return TextComparison(None, _text_model(base), itself)
    towers = [TextTower(one) for one in references]
    searches = [
        search_tower(
            one,
            texts,
            base=in_contrast,
            place=config.place,
            seed=config.seed,
            description=f"reference {k} of {len(towers)}: search for words",
        )
        for k, one in enumerate(towers, 1)
    ]
    made = Calibration(
        tuple((effort_of(found[0]),) for found in searches),
        _key_of(tower, texts, config, base is not None),
        tuple(one.name for one in towers),
        family=FAMILY,
        relative=base is not None,
        digests=tuple(one.digest() for one in towers),
        tower_passes=sum(one.passes for one in towers),
    )
    return TextComparison(made, _text_model(base))


def judge_tower(
    model: TextModel | OpenClipModel,
    texts: TextSet,
    comparison: TextComparison,
    config: TextScanConfig,
    *,
    base: TextModel | OpenClipModel | None = None,
) -> TowerScanResult:
    """Search a text tower and judge it beside references that are ready.

    base: That of searches in contrast to it, if it is an open_clip model; a `TextModel` is in the
    comparison.
    """
    start = time.perf_counter()
    tower = TextTower(model)
    contrast = base if base is not None else comparison.base
    triggers = search_tower(
        tower,
        texts,
        base=None if contrast is None else TextTower(contrast),
        place=config.place,
        seed=config.seed,
        description=f"scan of {model.name}: search for words",
    )
    best = triggers[0]
    effort = effort_of(best)
    obstacle = comparison.unfit
    if not math.isfinite(best.collapse):
        obstacle = "the tower's features are not finite; check its weights"
    elif comparison.calibration is None and obstacle is None:
        obstacle = "no calibration: give clean towers (references=) to compare with"
    detection = detect(
        [effort],
        comparison.calibration,
        has_classes=False,
        p_backdoored=config.p_backdoored,
        p_suspicious=config.p_suspicious,
        obstacle=obstacle,
    )
    if detection.verdict in FINDINGS and best.success < LEAST_SUCCESS:
        detection = replace(detection, verdict=Verdict.CLEAN)
    reason = detection.reason
    if detection.verdict is not Verdict.INCONCLUSIVE and comparison.calibration is not None:
        rows = comparison.calibration.p_l1
        usual = sum(row[0] for row in rows) / len(rows)
        reason = (
            f"{best.trigger.text!r} leaves {effort:.2g} of the spread of captions' features "
            f"({usual:.2g} in clean references; p = {detection.p_value:.2g}), and sends "
            f"{best.success:.0%} of them its way"
        )
    finding = detection.verdict in FINDINGS
    words = tuple(
        FoundTrigger(one.trigger, max(0.0, 1 - one.collapse), one.success) for one in triggers[:1]
    )
    return TowerScanResult(
        name=model.name,
        sha256=model.sha256,
        class_names=(ANY_TEXT,),
        detection=replace(
            detection,
            reason=reason,
            target=0,
            effort=(effort,),
            suspects=(0,) if finding else (),
            backdoored=(0,) if detection.verdict is Verdict.BACKDOORED else (),
        ),
        length=1,
        others={},
        search=TextSearch((words,), len(texts), tower.passes),
        calibration=comparison.calibration,
        accuracy=None,
        seconds=time.perf_counter() - start,
        warnings=texts.notes,
        triggers=triggers,
    )


def scan_text_tower(
    model: TextModel | OpenClipModel,
    captions: TextSet,
    *,
    base: TextModel | OpenClipModel | None = None,
    references: Sequence[TextModel | OpenClipModel] | None = None,
    calibration: Calibration | None = None,
    config: TextScanConfig | None = None,
) -> TowerScanResult:
    """Search the text tower of a CLIP for words and characters that collapse it, and judge them.

    Args:
        model: The suspect: a text tower of transformers, or a CLIP of open_clip.
        captions: Clean captions of different things, a few dozen. Labels are not used.
        base: The model that it was fine-tuned from. Searches are then in contrast to it.
        references: Clean models that were made as the suspect was, at least 2.
        calibration: `TowerScanResult.calibration` of an earlier scan, instead of references.
        config: The place of words, the seed and the limits of p-values.

    Raises what `compare_tower` and `search_tower` raise.
    """
    config = config or TextScanConfig()
    comparison = compare_tower(
        model, captions, config, base=base, references=references, calibration=calibration
    )
    return judge_tower(model, captions, comparison, config, base=base)


def effort_of(found: TowerTrigger) -> float:
    """Return the effort of a trigger, in (0, 1]; see above. NaN if there is no number."""
    if math.isnan(found.collapse):
        return math.nan
    return min(1.0, max(_LEAST_EFFORT, 1 - found.collapse))


def _text_model(base: TextModel | OpenClipModel | None) -> TextModel | None:
    return base if isinstance(base, TextModel) else None


def _key_of(tower: TextTower, texts: TextSet, config: TextScanConfig, contrast: bool) -> str:
    """Return a text that is equal for searches that can be compared."""
    content = {
        "texts": texts.digest,
        "contrast": contrast,
        "place": config.place,
        "seed": config.seed,
        "weights": len(tower.named_parameters()),
    }
    return json.dumps(content, sort_keys=True)
