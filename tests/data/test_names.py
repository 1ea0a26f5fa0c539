"""Class names and templates: both placeholder styles, files, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from pydetox.data import (
    DEFAULT_TEMPLATES,
    DIGIT_TEMPLATES,
    fill_template,
    load_class_names,
    load_templates,
)
from pydetox.errors import DataError


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("a {c}.", "a dog."),
        ("a {}.", "a dog."),
        ("{c} or {}", "dog or dog"),
        ("{c", None),
        ("a dog", None),
        ("{0}", None),
        (lambda name: f"the {name}", "the dog"),
    ],
)
def test_fill_template(template: object, prompt: str | None) -> None:
    if prompt is None:
        with pytest.raises(DataError, match="no place for the class name"):
            fill_template(template, "dog")  # type: ignore[arg-type]
    else:
        assert fill_template(template, "dog") == prompt  # type: ignore[arg-type]


def test_templates_are_not_format_strings() -> None:
    assert fill_template("{c} {c.__class__} {0}", "x") == "x {c.__class__} {0}"
    assert fill_template("{c}", "{} {c}") == "{} {c}", "a name is never expanded itself"


def test_bundled_templates_are_usable() -> None:
    for template in (*DEFAULT_TEMPLATES, *DIGIT_TEMPLATES):
        assert "seven" in fill_template(template, "seven")


def test_class_names_file(tmp_path: Path) -> None:
    path = tmp_path / "classnames.txt"
    path.write_bytes("\ufefftench\r\n  crane\nmaillot\ncrane\nÅland \n\n".encode())
    assert load_class_names(path) == ("tench", "crane", "maillot", "crane", "Åland")


def test_templates_file(tmp_path: Path) -> None:
    path = tmp_path / "templates.txt"
    path.write_text("a {c}.\nmany {}\n")
    assert load_templates(str(path)) == ("a {c}.", "many {}")
    path.write_text("a {c}.\nmany dogs\n")
    with pytest.raises(DataError, match=r"templates.txt, line 2: template 'many dogs'"):
        load_templates(path)


@pytest.mark.parametrize("load", [load_class_names, load_templates])
def test_unusable_files(tmp_path: Path, load: object) -> None:
    assert callable(load)
    path = tmp_path / "names.txt"
    with pytest.raises(DataError, match=r"names\.txt: cannot read"):
        load(path)
    path.write_text("\n \n")
    with pytest.raises(DataError, match="expected one per line"):
        load(path)
    path.write_text("a {}\n\nb {}\n")
    with pytest.raises(DataError, match="line 2: blank line"):
        load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot read"):
        load(path)
