"""Class names and prompt templates for zero-shot heads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from ..errors import DataError

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


def load_class_names(path: str | Path) -> tuple[str, ...]:
    """Read class names from a UTF-8 text file, one per line; line k (from 0) names label k.

    Repeated names are allowed (ImageNet has "crane" twice). Raises DataError for an unreadable or
    empty file and for a blank line between names, because it would shift every label after it.
    """
    return _read_lines(Path(path), "class names")


def load_templates(path: str | Path) -> tuple[str, ...]:
    """Read prompt templates from a UTF-8 text file, one per line, each holding "{c}" or "{}".

    Raises DataError for an unreadable or empty file, a blank line between templates, or a template
    without a place for the class name.
    """
    templates = _read_lines(Path(path), "templates")
    for number, template in enumerate(templates, start=1):
        if "{c}" not in template and "{}" not in template:
            raise DataError(
                f"{path}, line {number}: template {template!r} has no place for the class name; "
                'expected "{c}" or "{}"'
            )
    return templates


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
