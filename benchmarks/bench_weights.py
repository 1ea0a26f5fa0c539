"""Weight differences of ViT-B-32's image tower in files, against reading the same bytes.

    python -m pytest benchmarks/bench_weights.py

18 safetensors files of 87.8M float32 weights, 351 MB each, random and different, in a temporary
folder and in the page cache (6.3 GB of disk and of free memory): nothing is read twice in a run,
so that no cache of the CPU serves a second reading. Ours (the operator on tensors that safetensors
has mapped), the floor (a plain sum over the same tensors, mapped in the same way), the streaming
form in bounded memory (`stream_*`: `pydetox.analysis.weight_space`) and the usual way (`load_file`,
then dicts of differences) take turns within one run; what is compared are medians. The linear
combination is in memory and in place, its floor is `torch.add(out=)`. The floor of `matmul32` is
what takes longer, reading the bytes or its float64 products alone.

Peaks of memory are measured in processes of their own: resident pages, mapped ones included, above
what was resident after the imports (VmHWM, set back through /proc/self/clear_refs).
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.gpu.timing import once
from benchmarks.recording import holds, record
from pydetox.analysis import weight_space
from pydetox.models import OpenClipModel
from pydetox.ops import (
    apply_task_vectors,
    weight_diff_gram,
    weight_diff_matmul,
    weight_diff_project,
    weight_diff_sketch,
)

THREADS = 2
ROUNDS = 7
ROUNDS_OF_DICTS = 3  # they take long, and their ratio has no bound
SIZE = 4096
WIDTH = 32
FIGURES = [
    "project16.over_read",
    "gram8.over_read",
    "apply.over_add",
    "sketch4096.over_read",
    "matmul32.over_floor",
]
NAMES = [figure.partition(".")[0] for figure in FIGURES]
STREAMED = ("project16", "gram8", "sketch4096")
#: How many of the files each reads.
FILES = {"project16": 18, "gram8": 9, "sketch4096": 2, "apply": 2, "matmul32": 2}
Weights = dict[str, Tensor]
Run = Callable[[], object]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """A base and 17 others."""
    config = open_clip.get_model_config("ViT-B-32")
    assert config is not None
    visual = OpenClipModel.from_config(config, seed=0, name="ViT-B-32").visual
    shapes = {name: tensor.shape for name, tensor in visual.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path_factory.mktemp("towers")
    paths = []
    for i in range(18):
        path = folder / f"{i}.safetensors"
        save_file({n: torch.randn(s, generator=generator) for n, s in shapes.items()}, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())  # or the disk is written to while we measure
        paths.append(path)
    yield paths
    shutil.rmtree(folder)  # pytest would keep those of the last three runs


def read(paths: list[Path]) -> None:
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  not a dict
                file.get_tensor(name).sum()


def mapped(paths: list[Path]) -> tuple[list[str], list[list[Tensor]]]:
    """Names, and each file's tensors in their order; nothing is read yet."""
    names: list[str] = []
    lists = []
    for path in paths:
        with safe_open(path, framework="pt") as file:
            names = names or sorted(file.keys())
            lists.append([file.get_tensor(name) for name in names])
    return names, lists


def gram_of_mapped(paths: list[Path]) -> Tensor:
    _, (base, *models) = mapped(paths)
    return weight_diff_gram(base, models)


def project_of_mapped(paths: list[Path]) -> Tensor:
    _, (base, model, *directions) = mapped(paths)
    return weight_diff_project(base, model, directions)


def sketch_of_mapped(paths: list[Path]) -> Tensor:
    names, (base, model) = mapped(paths)
    return weight_diff_sketch(base, model, names, seed=0, size=SIZE)


def gram_of_dicts(paths: list[Path]) -> Tensor:
    base, *models = map(load_file, paths)
    vectors = [{k: m[k] - base[k] for k in base} for m in models]
    return torch.tensor(
        [[sum(float((a[k] * b[k]).sum()) for k in a) for b in vectors] for a in vectors]
    )


def project_of_dicts(paths: list[Path]) -> Tensor:
    base, model, *directions = map(load_file, paths)
    vector = {k: model[k] - base[k] for k in base}
    return torch.tensor([sum(float((vector[k] * d[k]).sum()) for k in d) for d in directions])


def sketch_of_dicts(paths: list[Path]) -> Tensor:
    """A count sketch, whose places and signs are drawn tensor by tensor."""
    base, model = map(load_file, paths)
    vector = {k: model[k] - base[k] for k in base}
    generator = torch.Generator().manual_seed(0)
    result = torch.zeros(SIZE)
    for value in vector.values():
        places = torch.randint(0, SIZE, (value.numel(),), generator=generator)
        signs = torch.randint(0, 2, (value.numel(),), generator=generator).mul_(2).sub_(1)
        result.index_add_(0, places, value.flatten() * signs)
    return result


def products_of(weights: int, device: torch.device) -> Run:
    """Return what does as many float64 products as `matmul32`, as fast as torch does any.

    The matrices are square and stay in a cache: this is the time that the products alone take.
    """
    size = 512
    left, right, out = (torch.randn(size, size, dtype=torch.float64).to(device) for _ in range(3))

    def multiply() -> None:
        for _ in range(weights * WIDTH // size**3):
            torch.mm(left, right, out=out)

    return multiply


def on_device(name: str, paths: list[Path], device: torch.device) -> dict[str, Run]:
    """Return ours, the floor and dicts on tensors that lie on a GPU already: no file is read."""
    dicts = [{k: t.to(device) for k, t in load_file(p).items()} for p in paths[: FILES[name]]]
    names = sorted(dicts[0])
    base, *models = ([one[n] for n in names] for one in dicts)
    if name == "apply":
        result = [t.clone() for t in base]
        return {
            "ours": lambda: apply_task_vectors(result, [models[0]], [[1e-9]], out=[result]),
            "floor": lambda: [
                torch.add(r, v, alpha=1e-9, out=r) for r, v in zip(result, models[0], strict=True)
            ],
            "dicts": lambda: {k: dicts[0][k] + 0.3 * dicts[1][k] for k in dicts[0]},
        }
    if name == "matmul32":
        lists = [[t for t in tensors if t.ndim > 1] for tensors in (base, models[0])]
        thin = [torch.randn(t[0].numel(), WIDTH, dtype=torch.float64).to(device) for t in lists[0]]
        return {
            "ours": lambda: weight_diff_matmul(lists[0], lists[1], thin),
            "floor": lambda: [t.sum() for tensors in lists for t in tensors],
            "products": products_of(sum(t.numel() for t in lists[0]), device),
            "dicts": lambda: [
                (b - a).flatten(1).double() @ f for a, b, f in zip(*lists, thin, strict=True)
            ],
        }
    ours: dict[str, Run] = {
        "gram8": lambda: weight_diff_gram(base, models),
        "project16": lambda: weight_diff_project(base, models[0], models[1:]),
        "sketch4096": lambda: weight_diff_sketch(base, models[0], names, seed=0, size=SIZE),
    }

    def vectors(others: list[Weights]) -> list[Weights]:
        return [{k: m[k] - dicts[0][k] for k in m} for m in others]

    def products(of: list[Weights], by: list[Weights]) -> Run:
        return lambda: [[sum((a[k] * b[k]).sum() for k in a) for b in by] for a in of]

    usual: dict[str, Run] = {
        "gram8": lambda: products(*[vectors(dicts[1:])] * 2)(),
        "project16": lambda: products(vectors(dicts[1:2]), dicts[2:])(),
        "sketch4096": lambda: vectors(dicts[1:]),  # without the sketch itself
    }
    return {
        "ours": ours[name],
        "floor": lambda: [t.sum() for one in dicts for t in one.values()],
        "dicts": usual[name],
    }


def runs(name: str, paths: list[Path]) -> dict[str, Run]:
    """Ours, the streaming form, if there is one, the floor and the usual way.

    What `apply` and `matmul32` work on is loaded here.
    """
    paths = paths[: FILES[name]]
    base, *models = paths
    if name == "apply":
        weights = {k: t.clone() for k, t in load_file(base).items()}
        change = {k: t.clone() for k, t in load_file(models[0]).items()}
        result, vector = list(weights.values()), list(change.values())
        return {
            "ours": lambda: apply_task_vectors(result, [vector], [[1e-9]], out=[result]),
            "floor": lambda: [
                torch.add(r, v, alpha=1e-9, out=r) for r, v in zip(result, vector, strict=True)
            ],
            "dicts": lambda: {k: weights[k] + 0.3 * change[k] for k in weights},
        }
    if name == "matmul32":
        lists = [[t.clone() for t in load_file(p).values() if t.ndim > 1] for p in paths]
        thin = [torch.randn(t[0].numel(), WIDTH, dtype=torch.float64) for t in lists[0]]
        return {
            "ours": lambda: weight_diff_matmul(lists[0], lists[1], thin),
            "floor": lambda: [t.sum() for tensors in lists for t in tensors],
            "products": products_of(sum(t.numel() for t in lists[0]), torch.device("cpu")),
            "dicts": lambda: [
                (b - a).flatten(1).double() @ f for a, b, f in zip(*lists, thin, strict=True)
            ],
        }
    ours: dict[str, Run] = {
        "gram8": lambda: gram_of_mapped(paths),
        "project16": lambda: project_of_mapped(paths),
        "sketch4096": lambda: sketch_of_mapped(paths),
    }
    stream: dict[str, Run] = {
        "gram8": lambda: weight_space.gram(base, models),
        "project16": lambda: weight_space.project(base, models[0], models[1:]),
        "sketch4096": lambda: weight_space.sketch(base, models[0], seed=0, size=SIZE),
    }
    dicts: dict[str, Run] = {
        "gram8": lambda: gram_of_dicts(paths),
        "project16": lambda: project_of_dicts(paths),
        "sketch4096": lambda: sketch_of_dicts(paths),
    }
    return {
        "ours": ours[name],
        "stream": stream[name],
        "floor": lambda: read(paths),
        "dicts": dicts[name],
    }


@pytest.mark.parametrize("figure", FIGURES)
def test_time(
    figure: str,
    files: list[Path],
    benchmark: Any,
    capsys: pytest.CaptureFixture[str],
    device: torch.device,
) -> None:
    torch.set_num_threads(THREADS)
    name = figure.partition(".")[0]
    ways = runs(name, files) if device.type == "cpu" else on_device(name, files, device)
    times: dict[str, list[float]] = {which: [] for which in ways}

    def timed(which: str) -> None:
        times[which].append(once(ways[which], device))

    def take_turns() -> None:
        timed("floor")
        if "products" in ways:
            timed("products")
        if "stream" in ways:
            timed("stream")
        if len(times["dicts"]) < ROUNDS_OF_DICTS:
            timed("dicts")

    timed("floor")
    timed("ours")
    for measured in times.values():
        measured.clear()
    benchmark.pedantic(lambda: timed("ours"), setup=take_turns, rounds=ROUNDS)
    median = {which: statistics.median(measured) for which, measured in times.items()}
    # What takes longer, reading the bytes or the products alone, bounds an operator from below.
    floor = max(median["floor"], median.get("products", 0.0))
    ratio = median["ours"] / floor
    benchmark.extra_info.update({f"{which}_seconds": value for which, value in median.items()})
    with capsys.disabled():
        print(
            f"\n\n{name}, {THREADS} threads: {median['ours'] * 1e3:.1f} ms, {ratio:.2f} x the "
            f"floor ({floor * 1e3:.1f} ms), dicts take "
            f"{median['dicts'] / median['ours']:.1f} x"
        )
        if "stream" in median:
            print(f"  in bounded memory: {median['stream'] / median['floor']:.2f} x the floor")
    if "products" in median:
        record(f"{name}.over_read", median["ours"] / median["floor"])
    if "stream" in median:
        record(f"stream_{figure}", median["stream"] / median["floor"])
    record(figure, ratio)
    record(f"{name}.vs_dicts", median["dicts"] / median["ours"])
    assert holds(figure, ratio) is not False


def test_memory(
    files: list[Path], capsys: pytest.CaptureFixture[str], device: torch.device
) -> None:
    if device.type != "cpu":
        pytest.skip("measures the memory of the host")
    peaks = {
        (name, which): measured_peak(name, which, files)
        for name in NAMES
        for which in ("stream" if name in STREAMED else "ours", "dicts")
    }
    ours = {name: peak for (name, which), peak in peaks.items() if which != "dicts"}
    for name in NAMES:
        # Below a mebibyte is noise.
        record(f"{name}.vs_dicts_memory", peaks[name, "dicts"] / max(ours[name], 1.0))
        with capsys.disabled():
            print(f"\n{name}: {ours[name]:.1f} MiB, dicts take {peaks[name, 'dicts']:.0f}", end="")
    extra = max(ours[name] for name in STREAMED)
    record("stream.extra_mib", extra)
    assert holds("stream.extra_mib", extra) is not False


def measured_peak(name: str, which: str, paths: list[Path]) -> float:
    """What a process that does this alone takes at most, in MiB, above what it begins with."""
    command = [sys.executable, "-m", "benchmarks.bench_weights", name, which, *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(result.stdout)


def own_peak(run: Run) -> float:
    def kibibytes(field: str) -> int:
        found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1])

    Path("/proc/self/clear_refs").write_text("5")
    before = kibibytes("VmRSS")
    run()
    return (kibibytes("VmHWM") - before) / 1024


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    print(own_peak(runs(sys.argv[1], [Path(path) for path in sys.argv[3:]])[sys.argv[2]]))
