"""What a stranger's `tokenizer.json` could do to the library that reads it, and how that is kept.

The `tokenizers` library executes nothing in a file. But its normalizers may replace a character by
a long text, again and again, so that a few words grow until the memory is full. And where it is
given what it does not expect, it panics: this is a BaseException, which `except Exception` does not
catch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import ArchitectureError

#: The longest text that a step may insert, and how many times longer all steps together may make a
#: text. Those of real tokenizers insert a character or two, and together at most double it.
_LONGEST, _GROWTH = 64, 1024.0


def check_tokenizer_json(content: bytes) -> None:
    """Refuse a `tokenizer.json` whose steps let a text grow beyond all bounds.

    Everything else that is wrong with the file is for the library to say. Raises ArchitectureError.
    """
    try:
        whole = json.loads(content.decode("utf-8"))
        steps = {key: list(_steps(whole.get(key))) for key in ("normalizer", "decoder")}
    except (ValueError, RecursionError, AttributeError):
        return
    for key, found in steps.items():
        growth = 1.0
        for text, replaced in found:
            if len(text) > _LONGEST:
                raise ArchitectureError(
                    f"its tokenizer.json has a {key} that inserts {len(text):,} characters; "
                    f"expected at most {_LONGEST}"
                )
            growth *= max(1.0, len(text) / replaced if replaced else 1.0 + len(text))
            if growth > _GROWTH:
                raise ArchitectureError(
                    f"its tokenizer.json has a {key} that can make a text more than {_GROWTH:,.0f} "
                    "times as long, which would fill the memory"
                )


def guarded(call: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return a function of the tokenizers library whose failures are ArchitectureErrors.

    name: The name of the model, for the message.
    """

    def guarded_call(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except ArchitectureError:
            raise
        except BaseException as error:
            if not is_failure(error):
                raise
            raise ArchitectureError(f"{name}: its tokenizer fails: {reason_of(error)}") from None

    return guarded_call


def is_failure(error: BaseException) -> bool:
    """Return whether an error is one of the library's own, its panics included."""
    if isinstance(error, MemoryError):
        return False
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def reason_of(error: BaseException) -> str:
    """Return what an error says in one short line."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def _steps(node: Any) -> Iterator[tuple[str, int]]:
    """Yield what each step inserts, and the length of what it replaces: 0 where it may be empty."""
    if isinstance(node, list):
        for one in node:
            yield from _steps(one)
    if not isinstance(node, dict):
        return
    if node.get("type") == "Replace" and isinstance(node.get("content"), str):
        pattern = node.get("pattern")
        literal = pattern.get("String") if isinstance(pattern, dict) else pattern
        yield node["content"], len(literal) if isinstance(literal, str) else 0
    elif node.get("type") == "Prepend" and isinstance(node.get("prepend"), str):
        yield node["prepend"], len(node["prepend"])  # once: it adds, and multiplies nothing
    else:
        for one in node.values():
            yield from _steps(one)
