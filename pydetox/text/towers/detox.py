"""The repair of one text tower: scan, subtract, scan again; saved with its provenance."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ...detect.calibration import Calibration
from ...detect.statistics import FINDINGS
from ...errors import UsageError
from ...models import OpenClipModel
from ...progress import Laps
from ...repair.configuration import UnlearnConfig
from ...rng import child_seed
from ..configuration import TextScanConfig
from ..detox import TextDetoxResult, provenance_of_repair
from ..evaluation import TextStamp
from ..models import TextModel, save_text_model
from ..passes import TextUnlearnPass
from ..search import FoundTrigger
from ..texts import TextSet
from ..triggers import TokenTrigger
from .encoder import TextTower
from .repair import (
    TOWER_UNLEARNING,
    TowerCandidates,
    search_tower_coefficient,
    tower_trigger_vector,
    worst_success,
)
from .search import AnyCharacter, CharacterTrigger, TowerTrigger, characters_like
from .verdict import ANY_TEXT, TowerScanResult, compare_tower, effort_of, judge_tower

_LOG = logging.getLogger(__name__)

# How often captions with one of several characters are drawn.
_DRAWN = 2

# Recovered words are unlearned at these places, because the attacker's is not known.
_PLACES = ("end", "start", "random")

_STAYS = "%s: no alpha removes %s as well within the limits; the repair before stays"

# Triggers that leave at most this multiple of the spread that the best one leaves are unlearned.
# Others resemble it: unlearning them as well costs accuracy and removes no more.
_AS_GOOD = 1.5


def detox_text_tower(
    model: TextModel | OpenClipModel,
    captions: TextSet,
    *,
    base: TextModel | OpenClipModel | None = None,
    references: Sequence[TextModel | OpenClipModel] | None = None,
    calibration: Calibration | None = None,
    config: TextScanConfig | None = None,
    unlearning: UnlearnConfig | None = None,
    max_rounds: int = 2,
    output: str | Path | None = None,
    overwrite: bool = False,
) -> tuple[TextDetoxResult, TextModel | OpenClipModel]:
    """Scan a text tower, subtract what is found, and scan again until it is clean.

    The arguments are those of `scan_text_tower` and `detox_text_model`. Returns the result and the
    repaired model, which is of the kind of the given one.

    Raises:
        UsageError: There is an output, and the model is no text tower of transformers.
        PydetoxError: All that a scan, a repair and `save_text_model` raise.
    """
    config, unlearning = config or TextScanConfig(), unlearning or TOWER_UNLEARNING
    if output is not None and not isinstance(model, TextModel):
        raise UsageError(
            "output= writes text towers of transformers; save_checkpoint writes the CLIP of "
            "open_clip that this function returns"
        )
    clock = Laps()
    comparison = compare_tower(
        model, captions, config, base=base, references=references, calibration=calibration
    )
    clock.lap("calibrate")
    before = judge_tower(model, captions, comparison, config, base=base)
    clock.lap("scan")
    repaired, current = model, before
    passes = list[TextUnlearnPass]()
    found = list[TowerTrigger]()
    stamps = list[tuple[TextStamp, Tensor]]()
    original = TextTower(model)
    clean = TextTower(base) if base is not None and unlearning.leads_to_base else None
    for number in range(max_rounds):
        if current.verdict not in FINDINGS:
            break
        # A vector toward the base is for all triggers so far, and takes the place of the last one.
        tower = TextTower(repaired) if clean is None else original
        new, earlier, alike = _good(current), list(stamps), list[CharacterTrigger]()
        found += new
        if clean is None:
            stamps = _stamps(found)
        else:
            if isinstance(new[0].trigger, CharacterTrigger):
                alike += characters_like(TextTower(repaired), new[0], captions, seed=config.seed)
            stamps += _stamps_of_one_way(new, alike)
        triggers, directions = [one for one, _ in stamps], [one for _, one in stamps]
        seeded = replace(unlearning, seed=child_seed("towers.vector-pass", unlearning.seed, number))
        vector = tower_trigger_vector(
            tower, captions.texts, triggers, seeded, original=original, base=clean
        )
        chosen = search_tower_coefficient(
            tower,
            vector,
            captions.texts,
            triggers,
            directions,
            unlearning,
            original=original,
            base=clean,
        )
        clock.lap("unlearn")
        words = tuple(FoundTrigger(one.trigger, 1 - one.collapse, one.success) for one in new)
        beside = tuple(one.text for one in alike if one not in [each.trigger for each in new])
        replacing = clean is not None and bool(passes)  # this vector is for all triggers so far
        if chosen.hopeless:  # it subtracts nothing, so there is nothing to scan
            if replacing:
                _LOG.warning(_STAYS, model.name, _told(new))
            else:
                passes.append(TextUnlearnPass((0,), words, chosen, vector, (ANY_TEXT,), beside))
            break
        candidate = TowerCandidates(tower, vector).at(chosen.coefficient).model
        judged = judge_tower(candidate, captions, comparison, config, base=base)
        clock.lap("rescan")
        if replacing:

            def left(
                one: TextModel | OpenClipModel, known: list[tuple[TextStamp, Tensor]]
            ) -> float:
                return worst_success(
                    TextTower(one), captions.texts, known, original=original, base=clean
                )

            worse = left(candidate, earlier) > max(
                left(repaired, earlier), unlearning.max_attack_success
            )
            if worse or (judged.verdict in FINDINGS and not chosen.reached):
                _LOG.warning(_STAYS, model.name, _told(new))
                break
            last = passes.pop()
            words, beside = (*last.triggers, *words), (*last.beside, *beside)
        passes.append(TextUnlearnPass((0,), words, chosen, vector, (ANY_TEXT,), beside))
        repaired, current = candidate, judged
    subtracted = any(one.search.coefficient for one in passes)
    result = TextDetoxResult(
        before=before,
        passes=tuple(passes),
        after=current if subtracted else None,
        model=repaired,  # type: ignore[arg-type]
        evaluation_before=None,
        evaluation_after=None,
        path=None,
        seconds=clock.seconds,
    )
    if output is not None and subtracted and isinstance(repaired, TextModel):
        provenance = provenance_of_repair(
            result, config, unlearning, known=False, before={}, after={}, extra={}
        )
        path = save_text_model(output, repaired, provenance=provenance, overwrite=overwrite)
        clock.lap("write")
        result = replace(result, path=path)
    return result, repaired


def _good(scan: TowerScanResult) -> list[TowerTrigger]:
    """Return the best trigger, and those that are nearly as good."""
    most = _AS_GOOD * effort_of(scan.triggers[0])
    return [one for one in scan.triggers if effort_of(one) <= most]


def _told(found: Sequence[TowerTrigger]) -> str:
    return ", ".join(repr(one.trigger.text) for one in found)


def _stamps(found: Sequence[TowerTrigger]) -> list[tuple[TextStamp, Tensor]]:
    """Return triggers at each place, with the directions that they lead to."""
    return [(stamp, one.direction) for one in found for stamp in _at_places(one.trigger)]


def _stamps_of_one_way(
    found: Sequence[TowerTrigger], alike: Sequence[CharacterTrigger]
) -> list[tuple[TextStamp, Tensor]]:
    """Return what a vector toward the base unlearns for the triggers of one scan, the best first.

    If the best one is a character, all others that lead the same way are one trigger beside it. If
    it is a word, they are left to the next scan: a vector that unlearns them as well leaves more of
    the word.
    """
    best = found[0]
    if not isinstance(best.trigger, CharacterTrigger):
        return _stamps(found)
    others = [one.trigger for one in found[1:] if isinstance(one.trigger, CharacterTrigger)]
    words = [one for one in found[1:] if not isinstance(one.trigger, CharacterTrigger)]
    drawn = tuple(dict.fromkeys([*others, *alike]))
    any_one = [(AnyCharacter(drawn), best.direction)] * _DRAWN if drawn else []
    return [*_stamps([best, *words]), *any_one]


def _at_places(trigger: TokenTrigger) -> list[TokenTrigger]:
    if isinstance(trigger, CharacterTrigger):
        return [trigger]
    return [trigger.at(place) for place in dict.fromkeys([trigger.place, *_PLACES])]
