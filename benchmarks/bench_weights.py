"""Operators over the weights of ViT-B-32's image tower, against reading the same bytes.

    python -m pytest benchmarks/bench_weights.py

Weights are in float32, random, in memory. Ours, the floor (a plain sum over every tensor that is
read, or `torch.add(out=)` for the linear combination) and the usual way (dicts of differences) take
turns within one run; what is compared are medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import open_clip
import pytest
import torch
from torch import Tensor

from benchmarks.recording import holds, record
from pydetox.models import OpenClipModel
from pydetox.ops import (
    apply_task_vectors,
    weight_diff_gram,
    weight_diff_project,
    weight_diff_sketch,
)

THREADS = 2
ROUNDS = 7
SIZE = 4096
FIGURES = ["project16.over_read", "gram8.over_read", "apply.over_add", "sketch4096.over_read"]
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def towers() -> list[Weights]:
    """A base and 17 others."""
    config = open_clip.get_model_config("ViT-B-32")
    assert config is not None
    visual = OpenClipModel.from_config(config, seed=0, name="ViT-B-32").visual
    shapes = {name: tensor.shape for name, tensor in visual.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    return [
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for _ in range(18)
    ]


def read(towers: list[Weights]) -> None:
    for tower in towers:
        for tensor in tower.values():
            tensor.sum()


def gram_of_dicts(base: Weights, models: list[Weights]) -> Tensor:
    vectors = [{k: m[k] - base[k] for k in base} for m in models]
    return torch.tensor(
        [[sum(float((a[k] * b[k]).sum()) for k in a) for b in vectors] for a in vectors]
    )


def project_of_dicts(base: Weights, model: Weights, directions: list[Weights]) -> Tensor:
    vector = {k: model[k] - base[k] for k in base}
    return torch.tensor([sum(float((vector[k] * d[k]).sum()) for k in d) for d in directions])


def sketch_of_dicts(base: Weights, model: Weights, places: Weights, signs: Weights) -> Tensor:
    result = torch.zeros(SIZE)
    for k in base:
        result.index_add_(0, places[k], ((model[k] - base[k]) * signs[k]).flatten())
    return result


@pytest.mark.parametrize("figure", FIGURES)
def test_weights(
    figure: str,
    towers: list[Weights],
    benchmark: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.set_num_threads(THREADS)
    name = figure.partition(".")[0]
    base, *others = towers
    lists = [list(tower.values()) for tower in towers]
    names = list(base)
    result = [torch.empty_like(tensor) for tensor in lists[0]]
    places = {k: torch.randint(0, SIZE, (t.numel(),)) for k, t in base.items()}
    signs = {k: torch.randint(0, 2, t.shape).mul_(2).sub_(1).float() for k, t in base.items()}
    # What is read, ours, the floor, the usual way.
    runs: dict[str, tuple[Callable[[], object], Callable[[], object], Callable[[], object]]] = {
        "gram8": (
            lambda: weight_diff_gram(lists[0], lists[1:9]),
            lambda: read(towers[:9]),
            lambda: gram_of_dicts(base, others[:8]),
        ),
        "project16": (
            lambda: weight_diff_project(lists[0], lists[1], lists[2:18]),
            lambda: read(towers),
            lambda: project_of_dicts(base, others[0], others[1:]),
        ),
        "sketch4096": (
            lambda: weight_diff_sketch(lists[0], lists[1], names, seed=0, size=SIZE),
            lambda: read(towers[:2]),
            lambda: sketch_of_dicts(base, others[0], places, signs),
        ),
        "apply": (
            lambda: apply_task_vectors(result, [lists[1]], [[1e-9]], out=[result]),
            lambda: [
                torch.add(r, v, alpha=1e-9, out=r) for r, v in zip(result, lists[1], strict=True)
            ],
            lambda: {k: base[k] + 0.3 * others[0][k] for k in base},
        ),
    }
    for tensor, start in zip(result, lists[0], strict=True):
        tensor.copy_(start)
    ours, floor, usual = runs[name]
    times: dict[str, list[float]] = {"ours": [], "floor": [], "dicts": []}

    def timed(which: str, run: Callable[[], object]) -> None:
        start = time.perf_counter()
        run()
        times[which].append(time.perf_counter() - start)

    def take_turns() -> None:
        timed("floor", floor)
        timed("dicts", usual)

    take_turns()
    timed("ours", ours)
    for measured in times.values():
        measured.clear()
    benchmark.pedantic(lambda: timed("ours", ours), setup=take_turns, rounds=ROUNDS)
    median = {which: statistics.median(measured) for which, measured in times.items()}
    ratio = median["ours"] / median["floor"]
    benchmark.extra_info.update({f"{which}_seconds": value for which, value in median.items()})
    with capsys.disabled():
        print(
            f"\n\n{name}, {sum(t.numel() for t in base.values()) / 1e6:.1f} M weights, {THREADS} "
            f"threads: {median['ours'] * 1e3:.1f} ms, {ratio:.2f} x the floor "
            f"({median['floor'] * 1e3:.1f} ms), dicts take {median['dicts'] / median['ours']:.1f} x"
        )
    record(figure, ratio)
    record(f"{name}.vs_dicts", median["dicts"] / median["ours"])
    assert holds(figure, ratio)
