"""No import points up in the layering of docs/architecture.md, and no file is too long to read."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import pydetox

PACKAGE = Path(pydetox.__file__).parent
ARCHITECTURE = PACKAGE.parent / "docs" / "architecture.md"
LONGEST = 450
#: Files above that, whose owners split them; nothing is added here.
LONG: set[str] = {"ops/stamp.py"}

pytestmark = pytest.mark.skipif(
    not ARCHITECTURE.exists(), reason="an installed package has no docs"
)


def layers() -> dict[str, int]:
    """Each module or package and its layer, from the block of numbered lines in the document."""
    section = ARCHITECTURE.read_text(encoding="utf-8").partition("## Layers")[2]
    lines = re.findall(r"^ {4}( ?\d+)  (.+)$", section, re.MULTILINE)
    assert [int(number) for number, _ in lines] == list(range(1, len(lines) + 1))
    return {name: int(number) for number, names in lines for name in names.split()}


def entry(module: str, known: dict[str, int]) -> str | None:
    """The entry of the layering that a module belongs to: the longest that begins its name."""
    parts = module.split(".")
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((name for name in names if name in known), None)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name (below pydetox) of every module of pydetox that a file imports, anywhere."""
    package = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names if alias.name.startswith("pydetox.")]
            yield from ((node.lineno, name.removeprefix("pydetox.")) for name in found)
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = list(package[: len(package) - node.level + 1])
        elif node.module and node.module.split(".")[0] == "pydetox":
            base = []
        else:
            continue
        named = (node.module or "").removeprefix("pydetox").strip(".")
        base += named.split(".") if named else []
        for alias in node.names:
            # `from .package import module` and `from .module import name` look alike.
            yield node.lineno, ".".join([*base, alias.name])


def test_every_module_has_a_layer() -> None:
    known = layers()
    modules = [
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for path in PACKAGE.rglob("*.py")
        if path != PACKAGE / "__init__.py"
    ]
    assert [name for name in modules if entry(name, known) is None] == []
    unused = set(known) - {entry(name, known) for name in modules}
    assert unused == set()


def test_no_import_points_up() -> None:
    known = layers()
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        own = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if own == "__init__":
            continue  # its names are imported on first use
        mine = entry(own, known)
        assert mine is not None, own
        for line, name in imports(path):
            other = entry(name, known)
            if other is None or other == mine:
                continue
            if known[other] >= known[mine]:
                wrong.append(f"{path.relative_to(PACKAGE)}:{line}: {mine} imports {name}")
    assert wrong == []


def test_no_file_is_longer_than_one_can_read() -> None:
    lengths = {
        path.relative_to(PACKAGE).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in PACKAGE.rglob("*.py")
    }
    assert {name for name, length in lengths.items() if length > LONGEST} <= LONG
