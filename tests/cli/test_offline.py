"""`--offline` opens no connection and looks up no host: from the interpreter's audit events."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, socket, sys

def guard(event, arguments):
    if event in ("socket.__new__", "socket.sendmsg"):  # the sandbox's socket pair leads nowhere
        family = arguments[1] if event == "socket.__new__" else arguments[0].family
        if family == socket.AF_UNIX:
            return
    if event.startswith("socket."):
        os.write(2, f"network: {event} {arguments[1:]}\\n".encode())
        os._exit(99)

sys.addaudithook(guard)
from pydetox.cli import cli
sys.exit(cli.main(sys.argv[1:], standalone_mode=False))
"""


def run_guarded(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HOME": str(home)},
    )


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["hf-hub:org/repo", "ViT-B-32,laion2b_s34b_b79k"])
def test_what_is_not_here_is_an_error(tmp_path: Path, folder: Path, reference: str) -> None:
    images = str(folder / "images.npz")
    done = run_guarded("scan", reference, "--images", images, "--offline", home=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "is in the local cache, and offline was asked for" in done.stderr


def test_inspect_opens_none(tmp_path: Path, folder: Path) -> None:
    assert run_guarded("inspect", str(folder / "base"), home=tmp_path).returncode == 0


def test_the_guard_works(tmp_path: Path) -> None:
    program = PROGRAM.replace("from pydetox.cli import cli", "socket.socket()")
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 99
