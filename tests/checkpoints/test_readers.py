"""Reader by reader: what becomes of every file of the corpora (see `readers.py`)."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pydetox.checkpoints import sandbox
from pydetox.checkpoints.index import AMBIGUOUS_RULES
from tests.checkpoints.deceptive_corpus import DECEPTIVE
from tests.checkpoints.honest_corpus import HONEST
from tests.checkpoints.readers import FILES, TABLE, Row, picklescan, versions

LOADERS = ("torch", "open_clip", "timm")
CONTENT = json.loads(TABLE.read_text())
ROWS: dict[str, Row] = {row["name"]: row for row in CONTENT["files"]}


@pytest.fixture(scope="module")
def found() -> dict[str, Row]:
    """The table as it is made now, in a child: loaders get hostile files."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.checkpoints.readers"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {row["name"]: row for row in json.loads(done.stdout)["files"]}


def test_the_table_names_every_file() -> None:
    assert list(ROWS) == list(FILES)
    assert len(ROWS) >= 200
    assert len(HONEST) >= 100
    assert sum(ROWS[case.name]["pydetox"] != "read" for case in HONEST) <= 3


@pytest.mark.parametrize("name", FILES, ids=ascii)
def test_each_reader(name: str, found: dict[str, Row]) -> None:
    now, expected = found[name], ROWS[name]
    assert (now["pydetox"], now["says"]) == (expected["pydetox"], expected["says"])
    if now["pydetox"] != "read":
        assert len(now["says"]) == 1
    elif not any(says.startswith(tuple(AMBIGUOUS_RULES)) for says in now["says"]):
        assert "other" not in [now[reader] for reader in LOADERS]
    if CONTENT["versions"] == versions():  # elsewhere they may read more or less, never others
        assert {r: now[r] for r in LOADERS} == {r: expected[r] for r in LOADERS}


def test_most_deceptive_files_are_read_by_some_loader() -> None:
    """A refusal of what nobody else reads would show nothing."""
    read = [
        case.name
        for case in DECEPTIVE
        if {ROWS[case.name][reader] for reader in LOADERS} & {"some", "same", "other"}
    ]
    assert len(read) > len(DECEPTIVE) / 2


def test_picklescan(tmp_path: Path) -> None:
    pytest.importorskip("picklescan")
    if importlib.metadata.version("picklescan") != "1.0.5":
        pytest.skip("the table was made with picklescan 1.0.5")
    for row in ROWS.values():
        if row["picklescan"] != "-":
            folder = tmp_path / str(len(list(tmp_path.iterdir())))
            folder.mkdir()
            assert picklescan(FILES[row["name"]](folder)) == row["picklescan"], row["name"]


# Opened before the hook is there: what is left to do must need nothing at all.
AUDIT = """
import json, os, sys
sys.path.append(sys.argv[1])
from pydetox.checkpoints.formats import index_file
from pydetox.checkpoints import sandbox
from pydetox.checkpoints.index import WeightsFile
from pydetox.checkpoints.index_json import to_json
from pydetox.errors import CheckpointError
opened = [(path, os.open(path, os.O_RDONLY)) for path in sys.argv[2:]]
path, events = "", []
sys.addaudithook(lambda name, args: name == "builtins.id" or events.append((path, name)))
read = 0
for path, descriptor in opened:
    try:
        to_json(index_file(WeightsFile(path, descriptor)))
        read += 1
    except CheckpointError:
        pass
found, path = list(events), ""
print(json.dumps([read, found]))
"""


def test_nothing_is_imported_opened_or_run_while_a_file_is_indexed(tmp_path: Path) -> None:
    paths = []
    for number, build in enumerate(FILES.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = build(folder)
        if path.is_file() and path.suffix != ".json":
            paths.append(str(path))
    command = [sys.executable, "-I", "-S", "-c", AUDIT, str(sandbox._ROOT), *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    read, events = json.loads(done.stdout)
    # Some are refused later, for what their weights are.
    assert read >= sum(row["pydetox"] == "read" for row in ROWS.values())
    assert events == []
