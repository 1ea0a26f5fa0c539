"""Text models: finding and judging triggers that are words instead of pixels.

A text model (:mod:`models`) is a sequence classifier, a causal model or the text tower of a CLIP,
in the layout of transformers. Its files are read like all checkpoints, and no code in them runs.
Clean texts come from :mod:`texts`. A trigger is a few tokens at a place in a text
(:mod:`triggers`). :mod:`search` finds the best ones into each class, and :mod:`verdict` judges them
beside those of clean models (:mod:`references`). :mod:`causal` and :mod:`towers` do so for the
other two kinds of models.

transformers and tokenizers are an extra, ``pip install "pydetox[text]"``. They are imported when
the first text model is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..lazy import known_names, load_name

if TYPE_CHECKING:
    from .causal.detox import detox_causal_model
    from .causal.verdict import scan_causal_model
    from .configuration import TextScanConfig
    from .models import TextModel, TokenBatch, is_text_model, load_text_model, save_text_model
    from .references import calibrate_words
    from .search import TextSearch, search_words
    from .texts import TextSet, load_texts
    from .towers.detox import detox_text_tower
    from .towers.verdict import scan_text_tower
    from .trigger_file import WordsFile, read_words
    from .triggers import PLACES, TokenTrigger
    from .verdict import TextScanResult, scan_text_model

_HOME = {
    "PLACES": "triggers",
    "TextModel": "models",
    "TextScanConfig": "configuration",
    "TextScanResult": "verdict",
    "TextSearch": "search",
    "TextSet": "texts",
    "TokenBatch": "models",
    "TokenTrigger": "triggers",
    "WordsFile": "trigger_file",
    "calibrate_words": "references",
    "detox_causal_model": "causal.detox",
    "detox_text_tower": "towers.detox",
    "is_text_model": "models",
    "load_text_model": "models",
    "load_texts": "texts",
    "read_words": "trigger_file",
    "save_text_model": "models",
    "scan_causal_model": "causal.verdict",
    "scan_text_model": "verdict",
    "scan_text_tower": "towers.verdict",
    "search_words": "search",
}

__all__ = [
    "PLACES",
    "TextModel",
    "TextScanConfig",
    "TextScanResult",
    "TextSearch",
    "TextSet",
    "TokenBatch",
    "TokenTrigger",
    "WordsFile",
    "calibrate_words",
    "detox_causal_model",
    "detox_text_tower",
    "is_text_model",
    "load_text_model",
    "load_texts",
    "read_words",
    "save_text_model",
    "scan_causal_model",
    "scan_text_model",
    "scan_text_tower",
    "search_words",
]


def __getattr__(name: str) -> Any:
    return load_name(__name__, _HOME, name)


def __dir__() -> list[str]:
    return known_names(__name__, _HOME)
