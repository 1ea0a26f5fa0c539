"""What every test gets: quiet threads; `cuda` tests left out and counted where they cannot run."""

from __future__ import annotations

import os

# Before torch is imported. Idle OpenMP threads sleep instead of spinning: with more threads wanted
# than cores there are, spinning ones keep the working one waiting.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("KMP_BLOCKTIME", "0")
# torch.compile compiles in this process: no pool of workers, which outlives the test that made it.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Tests read stderr line by line, and a busy machine takes any time.
os.environ["PYDETOX_PROGRESS_SECONDS"] = "inf"

import pytest
import torch

left_out = pytest.StashKey[str]()


def missing_for_cuda() -> str | None:
    """What keeps pydetox's CUDA kernels from running here, or None."""
    from pydetox._build_info import build_info

    if not build_info()["cuda_built"]:
        return "pydetox was built without CUDA"
    return None if torch.cuda.is_available() else "torch sees no GPU"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    missing = missing_for_cuda()
    left = [item for item in items if missing and item.get_closest_marker("cuda")]
    for item in left:
        item.add_marker(pytest.mark.skip(reason=str(missing)))
    config.stash[left_out] = f"{len(left)} ({missing})" if left else "0"


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    terminalreporter.write_line(f"cuda tests left out: {config.stash.get(left_out, 0)}")
