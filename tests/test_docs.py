"""What the documentation shows exists: commands, options, names, and files that it includes."""

from __future__ import annotations

import ast
import re
import shlex
from importlib import import_module
from pathlib import Path

import click
import pytest

from pydetox.cli import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "RELEASING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(path: Path) -> list[list[str]]:
    """Return the words of every call of pydetox in the page's shell blocks."""
    found = []
    for block in blocks(path, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0].endswith("pydetox"):
                found.append(words[1:])
    return found


def check_command(words: list[str]) -> None:
    context = click.Context(cli)
    command = cli.get_command(context, words[0])
    assert command is not None, f"there is no command {words[0]!r}"
    known = {name for one in command.params for name in (*one.opts, *one.secondary_opts)}
    for word in words[1:]:
        if word.startswith("--"):
            assert word.partition("=")[0] in {*known, "--help"}, f"{words[0]} has no option {word}"


def check_code(code: str) -> None:
    """Compile the code, and look up what it imports from pydetox and takes from its modules."""
    modules: dict[str, object] = {}
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for one in node.names:
                if one.name.partition(".")[0] == "pydetox":
                    modules[one.asname or one.name] = import_module(one.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pydetox"):
            for one in node.names:
                try:
                    found = getattr(import_module(str(node.module)), one.name)
                except AttributeError:
                    found = import_module(f"{node.module}.{one.name}")
                modules[one.asname or one.name] = found
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = modules.get(node.value.id)
            if owner is not None:
                assert hasattr(owner, node.attr), f"{node.value.id} has no {node.attr!r}"


def test_included_code_is_marked_so_that_ruff_leaves_it_alone() -> None:
    # ruff format rewrites Python in Markdown, and takes the mark of an inclusion for subtractions.
    for page in PAGES:
        assert "--8 <" not in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_names_exist(page: Path) -> None:
    for words in commands(page):
        check_command(words)
    for code in blocks(page, "python"):
        check_code(code)
    for name in re.findall(r'^--8<-- "([^":]+)', page.read_text(encoding="utf-8"), re.MULTILINE):
        assert (ROOT / name).is_file(), name


def test_a_wrong_option_or_name_would_be_found() -> None:
    with pytest.raises(AssertionError, match="--shiny"):
        check_command(["scan", "--shiny"])
    with pytest.raises(AssertionError, match="no_such"):
        check_code("import pydetox\npydetox.no_such()")
    assert sum(len(commands(page)) for page in PAGES) > 30


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r": ([\w/.-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {str(path.relative_to(ROOT / "docs")) for path in PAGES if "docs" in path.parts}
    assert listed <= pages
    # A page that a branch has just added is built, and `make docs` names it.
    assert len(pages - listed) <= 3
