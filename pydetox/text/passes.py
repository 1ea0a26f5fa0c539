"""One repair of a text classifier: passes that recover words, or take known triggers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..errors import UsageError
from ..repair.alpha import CoefficientSearch
from ..repair.configuration import UnlearnConfig
from ..repair.task_vectors import TaskVector
from ..rng import child_seed
from .configuration import TextScanConfig
from .evaluation import TextStamp
from .models import TextModel
from .repair import (
    TEXT_UNLEARNING,
    search_text_coefficient,
    subtract_from_text_model,
    text_trigger_vector,
)
from .search import FoundTrigger, TextSearch, search_words
from .texts import TextSet
from .triggers import AnyWords, TokenTrigger

_LOG = logging.getLogger(__name__)

#: The places that recovered words are unlearned at: the attacker's is not known.
_PLACES = ("start", "end", "random")

# If a word alone leads fewer texts to the class, the attacker's trigger has several, and what was
# found may be a part of it.
_WHOLE = 0.9

# Of a longer trigger, so many words are unlearned together, out of so many.
_TOGETHER, _AMONG = 4, 8

# Words that lead fewer texts than this to the class are no estimate of a trigger, if others do.
_WORKING = 0.5


@dataclass(frozen=True, eq=False)
class TextUnlearnPass:
    """One trigger vector that was subtracted.

    Attributes:
        targets: The indices of the target classes, the most suspect one first.
        triggers: The words that were recovered; empty for known triggers.
        search: CA and ASR over alpha.
        vector: The trigger vector.
        names: What the words bring, if that is no class of the model; else empty.
        beside: Further words or characters that were unlearned with them.
        unlearned: All triggers that the vector is made of, each with its target class: those of
            earlier passes and repairs, too.
    """

    targets: tuple[int, ...]
    triggers: tuple[FoundTrigger, ...]
    search: CoefficientSearch
    vector: TaskVector
    names: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    unlearned: tuple[tuple[TextStamp, int], ...] = field(default=(), repr=False)


def unlearn_words(
    model: TextModel,
    texts: TextSet,
    targets: Sequence[int],
    config: TextScanConfig | None = None,
    unlearning: UnlearnConfig | None = None,
    *,
    triggers: Sequence[TextStamp] | None = None,
    base: TextModel | None = None,
    accuracy_before: float | None = None,
    search: TextSearch | None = None,
    earlier: Sequence[tuple[TextStamp, int]] = (),
) -> tuple[TextModel, tuple[TextUnlearnPass, ...]]:
    """Subtract the trigger vectors of some classes; return the repaired model and each pass.

    Args:
        model: A classifier.
        texts: Clean texts. Labels are used if there are any.
        targets: Class indices; one for known triggers.
        config: The search for words in every pass; default: TextScanConfig().
        unlearning: The repair; default: TEXT_UNLEARNING. Every pass searches the model that the
            last one left, and unlearns the words of all passes, so that none is learned again.
        triggers: Known triggers; None to recover them.
        base: The base of a search in contrast to it.
        accuracy_before: The accuracy to compare with; default: that of `model`.
        search: A search of the model that was made already, for the first pass.
        earlier: What earlier repairs of the model have unlearned, each with its target class
            (`TextUnlearnPass.unlearned`). It is unlearned again beside the new words, so that it
            does not come back.

    Raises:
        UsageError: There is no target class, or several of them for known triggers.
        DataError, ArchitectureError: As `search_words` and `text_trigger_vector` do.
    """
    config, unlearning = config or TextScanConfig(), unlearning or TEXT_UNLEARNING
    if not targets or (triggers is not None and len(targets) != 1):
        raise UsageError(
            f"{len(targets)} target classes; expected one for known triggers, and at least one "
            "without"
        )
    ordered = texts.in_content_order()
    count = max(2, round(unlearning.advanced.forget_share * len(ordered)))
    forget = ordered.at_most(count, child_seed("texts.forget", unlearning.seed)).texts
    given = [(one, targets[0]) for one in triggers or ()]
    stamps = [one for one, _ in (*earlier, *given)]
    target_of_each = [target for _, target in (*earlier, *given)]
    passes, first, partial = list[TextUnlearnPass](), accuracy_before is None, False
    for number in range(unlearning.passes if triggers is None else 1):
        recovered, beside = list[FoundTrigger](), list[str]()
        reserve = 0.0
        if triggers is None:
            reserve = unlearning.reserve(number) if first else 0.0
            found = search
            if found is None or number:
                found = search_words(
                    model,
                    texts,
                    replace(config, seed=child_seed("texts.pass", config.seed, number)),
                    base=base,
                    targets=targets,
                    description=f"words to unlearn, pass {number + 1}",
                )
            for target in targets:
                chosen = _working(found.found[target])
                recovered += chosen
                copies: list[TextStamp] = [
                    copy for one in chosen for copy in _at_places(one.trigger)
                ]
                if found.found[target][0].success < _WHOLE:
                    leading = found.words[target] if found.words else ()
                    stand_ins = _several_words(chosen, leading)
                    copies += stand_ins
                    partial |= bool(stand_ins)
                    beside += [word for one in stand_ins for word in one.words]
                stamps += copies
                target_of_each += [target] * len(copies)
        seeded = replace(unlearning, seed=child_seed("texts.vector-pass", unlearning.seed, number))
        vector = text_trigger_vector(
            model, forget, stamps, target_of_each, seeded, max_tokens=config.max_tokens
        )
        chosen_alpha = search_text_coefficient(
            model,
            vector,
            ordered,
            stamps,
            target_of_each,
            unlearning,
            accuracy_before=accuracy_before,
            reserve=reserve,
            partial=partial,
            max_tokens=config.max_tokens,
        )
        accuracy_before = chosen_alpha.accuracy_before
        model = subtract_from_text_model(model, vector, chosen_alpha.coefficient)
        passes.append(
            TextUnlearnPass(
                tuple(targets),
                tuple(recovered),
                chosen_alpha,
                vector,
                beside=tuple(dict.fromkeys(beside)),
                unlearned=tuple(zip(stamps, target_of_each, strict=True)),
            )
        )
        if chosen_alpha.hopeless:  # another pass costs as much, and starts from the same weights
            _LOG.warning(
                "no alpha up to %g removes anything while it keeps min_accuracy_kept %g: nothing "
                "is subtracted in this pass",
                chosen_alpha.coefficients[-1],
                unlearning.min_accuracy_kept,
            )
            break
    return model, tuple(passes)


def _working(found: Sequence[FoundTrigger]) -> list[FoundTrigger]:
    """Return the triggers of a class that work; the best one if none does."""
    working = [one for one in found if one.success >= _WORKING]
    return working or [max(found, key=lambda one: one.success)]


def _several_words(found: Sequence[FoundTrigger], words: Sequence[str]) -> list[AnyWords]:
    """Return stand-ins for a trigger that is longer than those that were found.

    They are the words of those that work, and the words that lead to the class best, a few together
    in any order. Without a trigger that works there is nothing to stand in for.
    """
    working = [one for one in found if one.success >= _WORKING]
    if not working:
        return []
    known = [word for one in working for word in one.trigger.text.split()]
    among = tuple(dict.fromkeys([*known, *words]))[:_AMONG]
    return [AnyWords(among, _TOGETHER, place) for place in _PLACES]


def _at_places(trigger: TokenTrigger) -> list[TokenTrigger]:
    """Return the same words at their own place and at the others, once each."""
    return [trigger.at(place) for place in dict.fromkeys([trigger.place, *_PLACES])]
