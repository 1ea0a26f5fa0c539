"""Other people's libraries, each run in a process of its own: their versions are not ours to mix.

`make peers` installs them beside the environment, not into it: open_clip would import transformers
at every start.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PEERS = Path(os.environ.get("PYDETOX_PEERS", Path(sys.prefix) / "peers"))


@pytest.fixture(scope="session")
def peer():
    """Run a script of this folder with the peers on its path; returns its standard output.

    A test that `needs` packages that are not among the peers is skipped.
    """
    if not PEERS.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"{PEERS} is missing: run `make peers`")
        pytest.skip("the peers are not installed: run `make peers`")

    def run(script: str, *arguments: object, needs: tuple[str, ...] = ()) -> str:
        for package in needs:
            if not any((PEERS / name).exists() for name in (package, f"{package}.py")):
                pytest.skip(f"{package} is not among the peers: run `make peers`")
        environment = {**os.environ, "PYTHONPATH": str(PEERS), "HF_HUB_OFFLINE": "1"}
        result = subprocess.run(
            [sys.executable, Path(__file__).parent / script, *map(str, arguments)],
            capture_output=True,
            text=True,
            env=environment,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run
