"""How long it takes to index a file of ViT-B-32 size in the sandbox, and without it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch

from benchmarks.recording import record
from pydetox.checkpoints import save_weights
from pydetox.checkpoints.index import FileIndex, WeightsFile
from pydetox.checkpoints.sandbox import index_in_sandbox
from pydetox.checkpoints.weights import index_file


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32"))
    return {name: torch.zeros(t.shape) for name, t in model.state_dict().items()}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_index(
    tmp_path: Path, state: dict[str, torch.Tensor], suffix: str, device: torch.device
) -> None:
    if device.type != "cpu":
        pytest.skip("no device indexes a file")
    path = tmp_path / f"model.{suffix}"
    if suffix == "pt":
        torch.save({"epoch": 1, "state_dict": state}, path)
    else:
        save_weights(path, state)
    assert 600e6 < path.stat().st_size < 610e6

    def seconds(index: Callable[[WeightsFile], FileIndex]) -> float:
        start = time.perf_counter()
        with WeightsFile(path) as file:
            found = index(file)
        assert len(found.tensors) == len(state)
        return time.perf_counter() - start

    seconds(index_in_sandbox)  # starts the server
    for figure, index in (("ms", index_in_sandbox), ("in_process_ms", index_file)):
        median = statistics.median(seconds(index) for _ in range(21))
        record(f"index_{suffix}.{figure}", 1e3 * median)
