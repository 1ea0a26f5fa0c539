"""Class names and prompt templates for zero-shot heads."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from ..errors import DataError
from ..reporting.serialize import unique_keys
from .named_lists import ClassPrompt, class_prompts, known_lists, named_class_names, named_templates

#: A prompt with a place for the class name, written "{c}" (CLIP_benchmark) or "{}" (open_clip), or
#: a function from class name to prompt (open_clip).
Template: TypeAlias = str | Callable[[str], str]

DEFAULT_TEMPLATES: tuple[str, ...] = (
    "a photo of a {c}.",
    "a close-up photo of a {c}.",
    "a blurry photo of a {c}.",
    "a drawing of a {c}.",
    "a picture showing one {c}.",
    "there is a {c} in this image.",
)

DIGIT_TEMPLATES: tuple[str, ...] = (
    "a photo of the digit {c}.",
    "a handwritten {c}.",
    "the number {c}.",
    "a blurry image of the number {c}.",
)


def fill_template(template: Template, class_name: str) -> str:
    """Return the prompt for one class.

    Raises DataError for a text template that has no place for the name. Only "{c}" and "{}" are
    replaced; `str.format` is not used, because a template file is input from outside and format
    strings can read attributes.
    """
    if callable(template):
        return template(class_name)
    if "{c}" not in template and "{}" not in template:
        raise DataError(
            f'template {template!r} has no place for the class name; expected "{{c}}" or "{{}}"'
        )
    # One pass over the pieces, so that a class name that itself contains "{}" is left alone.
    return class_name.join(part for piece in template.split("{c}") for part in piece.split("{}"))


def fill_templates(templates: Sequence[Template], class_name: str) -> list[str]:
    """Return the prompts for one class; raises as `fill_template`.

    Templates that give one text count once. Prompts of each class (`ClassPrompt`) count as often as
    the class has them, as in CLIP_benchmark: CuPL's list has some of them twice.
    """
    found: dict[tuple[str, int], str] = {}
    for template in templates:
        prompt = fill_template(template, class_name)
        own = template.place(class_name) if isinstance(template, ClassPrompt) else -1
        found[prompt, own] = prompt
    return list(found.values())


def given_names(class_names: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return class names that a program gives as a tuple; None for None.

    Raises DataError for one text, whose letters would count as names, and for what is no text.
    """
    if class_names is None:
        return None
    if isinstance(class_names, str | bytes | os.PathLike):
        raise DataError(
            f"class_names is {str(class_names)!r:.60}; expected a list of names: read a file with "
            "load_class_names, or put a single name into a list"
        )
    names = tuple(class_names)
    wrong = next((name for name in names if not isinstance(name, str)), None)
    if wrong is not None:
        raise DataError(f"class_names holds {wrong!r:.60}; expected texts")
    return names


def given_templates(templates: Sequence[Template]) -> tuple[Template, ...]:
    """Return templates that a program gives as a tuple; DataError for one text or path."""
    if isinstance(templates, str | bytes | os.PathLike):
        raise DataError(
            f"templates is {str(templates)!r:.60}; expected a list of prompts: read a file with "
            "load_templates, or put a single prompt into a list"
        )
    return tuple(templates)


def load_class_names(path: str | Path) -> tuple[str, ...]:
    """Read class names: from a text file, one per line, or from a JSON file, or by name.

    Line k (from 0) names label k. A JSON file holds a list of names. If there is no such file, the
    text may name a list: `imagenet` is that of open_clip, and others are those of CLIP_benchmark,
    if this package is installed (`pets`, `vtab/flowers`, ...).

    Repeated names are allowed (ImageNet has "crane" twice). Raises DataError for an unreadable or
    empty file and for a blank line between names, because it would shift every label after it.
    """
    found = _by_name(path, named_class_names, "class names")
    if found is not None:
        return found
    if Path(path).suffix.lower() == ".json":
        content = _read_json(Path(path), "class names")
        if not (isinstance(content, list) and content and all(isinstance(x, str) for x in content)):
            raise DataError(f"{path}: expected a JSON list of class names")
        return tuple(content)
    return _read_lines(Path(path), "class names")


def load_templates(path: str | Path) -> tuple[Template, ...]:
    """Read prompt templates: from a text file, one per line, or from a JSON file, or by name.

    Each holds "{c}" or "{}" in place of the class name. A JSON file holds a list of templates, or
    an object that has a list of whole prompts for each class name (as CuPL has). If there is no
    such file, the text may name a list, as in `load_class_names`: `imagenet`, `imagenet-simple`,
    and those of CLIP_benchmark.

    Raises DataError for an unreadable or empty file, a blank line between templates, a template
    without a place for the class name, a whole prompt with one, or a class that is there twice.
    """
    found = _by_name(path, named_templates, "templates")
    if found is not None:
        return found
    if Path(path).suffix.lower() == ".json":
        content = _read_json(Path(path), "templates")
        if isinstance(content, dict):
            _refuse_places(content, path)
            return class_prompts(content, str(path))
        if not (isinstance(content, list) and content and all(isinstance(x, str) for x in content)):
            raise DataError(
                f"{path}: expected a JSON list of templates, or an object with a list of prompts "
                "for each class"
            )
        for template in content:
            fill_template(template, "")  # raises for one without a place for the name
        return tuple(content)
    templates = _read_lines(Path(path), "templates")
    for number, template in enumerate(templates, start=1):
        if "{c}" not in template and "{}" not in template:
            raise DataError(
                f"{path}, line {number}: template {template!r} has no place for the class name; "
                'expected "{c}" or "{}"'
            )
    return templates


def _refuse_places(content: Mapping[str, Any], path: str | Path) -> None:
    """Raise DataError for a prompt of a class that looks like a template, and would stay so."""
    for name, prompts in content.items():
        for prompt in prompts if isinstance(prompts, list) else ():
            if isinstance(prompt, str) and ("{c}" in prompt or "{}" in prompt):
                raise DataError(
                    f"{path}: class {name!r}: prompt {prompt!r} has a place for a class name; "
                    "expected whole prompts, with the name in them"
                )


_Found = TypeVar("_Found")


def _by_name(
    path: str | Path, look_up: Callable[[str], tuple[_Found, ...] | None], what: str
) -> tuple[_Found, ...] | None:
    """Return a list that a text names; None for a file. DataError for neither."""
    text = str(path)
    if os.path.lexists(text):
        return None
    found = look_up(text)
    if found is None and not Path(text).suffix:
        raise DataError(
            f"{text}: no such file, and no list of {what} of that name; known are {known_lists()}"
        )
    return found


def _read_json(path: Path, what: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique_keys)
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot read {what}: {error}") from error


def _read_lines(path: Path, what: str) -> tuple[str, ...]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read {what}: {error}") from error
    lines = [line.strip() for line in text.rstrip().split("\n")]
    if lines == [""]:
        raise DataError(f"{path}: no {what} in it; expected one per line")
    for number, line in enumerate(lines, start=1):
        if not line:
            raise DataError(
                f"{path}, line {number}: blank line between {what}; expected one per line"
            )
    return tuple(lines)
