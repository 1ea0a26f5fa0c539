"""Messages of the library name arguments; the command line shows options instead."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from click import Option

import pydetox
from pydetox.cli import cli
from pydetox.cli.wording import OPTIONS, in_options

from .conftest import Run

ROOT = Path(pydetox.__file__).parent

#: Layers other than the library, whose messages are for people who type commands.
CLI_SIDE = ("cli", "research", "selftest")
#: A file with options of other programs.
KNOWN = {"ops/_library.py"}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("give base=", "give --base"),
        ("give base=, references= or both", "give --base, --reference-model or both"),
        (
            "no class names; give some (class_names=) or",
            "no class names; give some (--class-names) or",
        ),
        ("found base=3 and database=", "found base=3 and database="),
        ("name one with model=.", "name one with --model."),
        ("took more than 3 s (timeout=)", "took more than 3 s (--timeout)"),
    ],
)
def test_arguments_become_options(message: str, expected: str) -> None:
    assert in_options(message) == expected


def test_every_option_of_the_translation_is_one_of_some_command() -> None:
    names = {
        option
        for name in cli.list_commands(None)  # type: ignore[arg-type]
        for parameter in cli.get_command(None, name).params  # type: ignore[arg-type,union-attr]
        if isinstance(parameter, Option)
        for option in parameter.opts
    }
    assert set(OPTIONS.values()) <= names


def test_messages_of_the_library_name_no_options() -> None:
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(CLI_SIDE) or name in KNOWN:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            # Every text counts, not only those of raise: a reason of a verdict is a message, too.
            if isinstance(node, ast.Constant) and id(node) not in docstrings:
                text = str(node.value)
                if re.search(r"(^|[\s(])--[a-z]", text):
                    found.append(f"{name}:{node.lineno}: {text}")
    assert found == []


def test_warnings_about_references_name_options(
    run: Run, folder: Path, images: tuple[str, str], models: tuple[str, ...]
) -> None:
    model = ("--model", folder / "config.json")
    result = run("scan", folder / "base", *images, *models, *model, "--no-inversion")
    lines = result.stderr.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("warning: ")
        assert "--image-mean, --image-std, --interpolation and --resize-mode tell them" in line
        assert "image_mean=" not in line
