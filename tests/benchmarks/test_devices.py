"""Every benchmark takes `--device`, and what it measures runs on a pretended GPU."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import (
    bench_inversion_step,
    bench_objectives,
    bench_stamp,
    bench_targeted,
    bench_tokens,
    bench_weights,
    recording,
)
from pydetox import ops
from pydetox.inversion import InversionConfig
from pydetox.models import attention, memory
from pydetox.ops import reference, stamp_triggers
from tests.mini import CLASS_NAMES, mini_images, mini_model
from tests.pretended import OnDevice, PretendedGpu

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
#: Arithmetic of plain numbers and of files, and what reads results: no device computes anything.
WITHOUT = {"false_alarms.py", "compat.py", "cuda_report.py", "sass.py", "tutorial.py"}


def options_of(path: Path) -> set[str]:
    strings = (
        node.value
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    return {text for text in strings if text.startswith("--")}


@pytest.mark.parametrize(
    "path",
    [p for p in sorted(FOLDER.glob("*.py")) if "__main__" in p.read_text(encoding="utf-8")],
    ids=lambda path: path.name,
)
def test_every_program_takes_a_device(path: Path) -> None:
    passes_on = path.name == "bench_defenses.py"  # options of `pydetox bench`
    measures_alone = path.name == "bench_weights.py"  # a process that pytest starts
    if path.name not in WITHOUT and not passes_on and not measures_alone:
        assert "--device" in options_of(path)


def test_every_pytest_benchmark_takes_the_device() -> None:
    for path in sorted(FOLDER.glob("bench_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                names = {argument.arg for argument in node.args.args}
                assert "device" in names, f"{path.name}: {node.name}"


def test_figures_of_a_gpu_are_kept_apart_and_have_no_bounds_of_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "FOLDER", tmp_path)
    monkeypatch.setattr(recording, "_figures", {})
    monkeypatch.setattr(recording, "_device", torch.device("cpu"))
    monkeypatch.setattr(recording, "machine", lambda: {"device": "Some GPU", "torch": "2"})
    assert recording.holds("stamp_224.over_copy", 9.0) is False
    recording.measure_on(torch.device("cuda", 0))
    assert recording.holds("stamp_224.over_copy", 9.0) is None
    recording.record("stamp_224.over_copy", 9.0)
    recording.write_summary()
    assert (tmp_path / "cuda" / "summary.json").is_file()
    assert not (tmp_path / "summary.json").exists()
    from benchmarks import report

    assert "| figure on Some GPU | measured |" in report.tables("cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "_free_on_gpu", lambda device: 1 << 30)
    monkeypatch.setattr(attention, "_chosen", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with PretendedGpu() as pretended:
        yield pretended


def test_operands_lie_on_the_device(gpu: PretendedGpu, tmp_path: Path) -> None:
    cuda = torch.device("cuda", 0)
    p = bench_stamp.Problem.make(2, 2, 16, device=cuda)
    for stamp in (stamp_triggers, reference.stamp_triggers):
        assert all(isinstance(one, OnDevice) for one in p.forward_and_backward(stamp))
    assert isinstance(bench_objectives.embeddings(cuda), OnDevice)
    tokens = bench_tokens.Problem(9, 4, 2, cuda, torch.bfloat16, 0.9)
    for module in (ops, reference):
        assert all(isinstance(one, OnDevice) for one in tokens.mix(module))
    for run in tokens.floors().values():
        run()
    model = mini_model().to(cuda)
    bench_inversion_step.products(model.visual, 2, torch.float32)()
    generator = torch.Generator().manual_seed(0)
    paths = [tmp_path / f"{k}.safetensors" for k in range(18)]
    for path in paths:
        save_file({n: torch.randn(3, 2, generator=generator) for n in "ab"}, path)
    for name in bench_weights.NAMES:
        for run in bench_weights.on_device(name, paths, cuda).values():
            run()


def test_the_published_way_runs_on_the_device(gpu: PretendedGpu) -> None:
    model = mini_model().to("cuda")
    model.clip.requires_grad_(False)
    head = model.zero_shot_head(CLASS_NAMES, ["a {c}"])
    config = InversionConfig(steps=2, batch_size=2, success_threshold=0.5)
    sizes = bench_targeted.one_after_another(model, mini_images().images, head, config)
    assert len(sizes) == 3
