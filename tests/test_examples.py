"""The examples run, and print what they are there to show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, folder: Path) -> str:
    """Run an example from another folder, as a reader may, and return its stdout."""
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(
        [sys.executable, EXAMPLES / name],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def shares(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"([\d.]+)%", line)]


def test_operators(tmp_path: Path) -> None:
    lines = run("operators.py", tmp_path).splitlines()
    before, after = shares(lines[0])
    assert before < 40
    assert after > 90
    assert lines[-1] == "half of the way: 0.500"


@pytest.mark.slow
def test_scan_registry(tmp_path: Path) -> None:
    output = run("scan_registry.py", tmp_path)
    assert "hostile.pt: error" in output
    assert "must never run" not in output
    # Untrained models give one answer to all images, so that no verdict is possible.
    assert output.count(": inconclusive") == 3
    assert "4 results" in output


@pytest.mark.slow
def test_own_attack_and_defence(tmp_path: Path) -> None:
    victim, first, _ = map(shares, run("own_attack_and_defence.py", tmp_path).splitlines())
    assert victim[1] > 80
    assert first[1] < 10
    assert first[0] > victim[0] - 5


@pytest.mark.slow
def test_find_and_remove(tmp_path: Path) -> None:
    verdict, repaired, before, after = run("find_and_remove.py", tmp_path).splitlines()
    assert verdict == "verdict: backdoored, target: seven"
    assert repaired == "repaired: True"
    assert shares(before)[1] > 80
    assert shares(after)[1] < 15
    assert shares(after)[0] > shares(before)[0] - 5


@pytest.mark.slow
def test_the_notebook() -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(EXAMPLES / "where_a_backdoor_sits.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "commit it without outputs"
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": EXAMPLES.parent}}
    ).execute()
    texts = [
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream" and output.name == "stdout"
    ]
    before, after = (shares(line)[1] for line in "".join(texts).splitlines() if "ASR" in line)
    assert before > 80
    assert after < 10
