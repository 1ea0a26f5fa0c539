"""Files with triggers that are words: one JSON object, which `invert` writes and `eval` reads."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoints.index import quote
from ..checkpoints.transformers_files import read_object
from ..errors import CheckpointError, DataError, UsageError
from .triggers import PLACES, TokenTrigger, is_whole

SCHEMA = "pydetox.words/1"

_MOST_TRIGGERS = 10_000
_MOST_CHARACTERS = 10_000


@dataclass(frozen=True)
class WordsFile:
    """Triggers with the classes that they lead to.

    Attributes:
        triggers: The triggers. Their `target` is None: classes are known by name.
        targets: The name of each trigger's class; None if it is not known.
        rows: What is known of each beside that, such as its loss.
        extra: What is known of all of them.
    """

    triggers: tuple[TokenTrigger, ...]
    targets: tuple[str | None, ...]
    rows: tuple[Mapping[str, Any], ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the content of a file; equal contents give equal bytes."""
        rows = self.rows or ({},) * len(self.triggers)
        content = {
            "schema": SCHEMA,
            "triggers": [
                {
                    **row,
                    "text": one.text,
                    "tokens": list(one.tokens),
                    "place": one.place,
                    "target": target,
                }
                for one, target, row in zip(self.triggers, self.targets, rows, strict=True)
            ],
            **self.extra,
        }
        return f"{json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)}\n"

    def select(self, target: str | None) -> list[int]:
        """Return the triggers into a class; UsageError if there are none, or it is not clear which.

        target: The name of the class; None if all triggers lead to one.
        """
        named = sorted({name for name in self.targets if name is not None})
        if target is None:
            if len(named) > 1:
                raise UsageError(
                    f"the file has triggers into {len(named)} classes ({', '.join(named[:5])}); "
                    "name one with target="
                )
            return list(range(len(self.triggers)))
        chosen = [k for k, name in enumerate(self.targets) if name in (target, None)]
        if not chosen:
            raise UsageError(f"the file has no trigger into {target!r}; it has {named}")
        return chosen


def read_words(path: str | os.PathLike[str]) -> WordsFile:
    """Read a file of triggers; DataError for anything else.

    Only `text` counts: tokens are those of the model that the words are given to.
    """
    try:
        content = read_object(path)
        return _checked(content)
    except (CheckpointError, UsageError, DataError) as error:
        raise DataError(f"{Path(path)}: {error}") from error


def _checked(content: Mapping[str, Any]) -> WordsFile:
    rows = content.get("triggers")
    if content.get("schema") != SCHEMA or not isinstance(rows, list) or not rows:
        raise DataError(f"is no file of words (schema {SCHEMA}) with at least one trigger")
    if len(rows) > _MOST_TRIGGERS:
        raise DataError(f"has {len(rows)} triggers; expected at most {_MOST_TRIGGERS}")
    triggers: list[TokenTrigger] = []
    targets: list[str | None] = []
    for number, row in enumerate(rows):
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str) or not 0 < len(text) <= _MOST_CHARACTERS:
            raise DataError(f"trigger {number}: text is {quote(text)}; expected words")
        if not is_whole(text):
            raise DataError(f"trigger {number}: text has half of a surrogate pair; expected words")
        place, target = row.get("place", "start"), row.get("target")
        if place not in PLACES:
            raise DataError(f"trigger {number}: place is {quote(place)}; expected one of {PLACES}")
        if target is not None and not isinstance(target, str):
            raise DataError(f"trigger {number}: target is {quote(target)}; expected a class name")
        tokens: Sequence[Any] = row.get("tokens", ())
        whole = isinstance(tokens, list) and all(type(t) is int and t >= 0 for t in tokens)
        triggers.append(TokenTrigger(tuple(tokens) if whole else (), text, place))
        targets.append(target)
    return WordsFile(tuple(triggers), tuple(targets))
