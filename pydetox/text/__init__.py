"""Text models: finding and judging triggers that are words instead of pixels.

A text model (:mod:`models`) is a sequence classifier, a causal model or the text tower of a CLIP,
in the layout of transformers. Its files are read like all checkpoints, and no code in them runs.
Clean texts come from :mod:`texts`. A trigger is a few tokens at a place in a text
(:mod:`triggers`).

transformers and tokenizers are an extra, ``pip install "pydetox[text]"``. They are imported when
the first text model is loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .models import TextModel, TokenBatch, is_text_model, load_text_model, save_text_model
    from .texts import TextSet, load_texts
    from .triggers import PLACES, TokenTrigger

_HOME = {
    "PLACES": "triggers",
    "TextModel": "models",
    "TextSet": "texts",
    "TokenBatch": "models",
    "TokenTrigger": "triggers",
    "is_text_model": "models",
    "load_text_model": "models",
    "load_texts": "texts",
    "save_text_model": "models",
}

__all__ = [
    "PLACES",
    "TextModel",
    "TextSet",
    "TokenBatch",
    "TokenTrigger",
    "is_text_model",
    "load_text_model",
    "load_texts",
    "save_text_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
