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

# Several workers share the cores.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    threads = max(1, (os.cpu_count() or 1) // int(workers))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))

import pytest
import torch


def missing_for_cuda() -> str | None:
    """What keeps pydetox's CUDA kernels from running here, or None."""
    from pydetox._build_info import build_info

    if not build_info()["cuda_built"]:
        return "pydetox was built without CUDA"
    return None if torch.cuda.is_available() else "torch sees no GPU"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    missing = missing_for_cuda()
    if missing is None:
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason=missing))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    skipped = terminalreporter.stats.get("skipped", [])  # of all workers
    count, missing = sum("cuda" in one.keywords for one in skipped), missing_for_cuda()
    reason = f" ({missing})" if count and missing else ""
    terminalreporter.write_line(f"cuda tests left out: {count}{reason}")
