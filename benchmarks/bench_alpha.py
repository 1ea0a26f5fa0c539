"""The search for alpha: 21 values over 2,000 images against 21 bare evaluations.

    python -m pytest benchmarks/bench_alpha.py

A bare evaluation predicts what the search has to know for one alpha: the classes of all clean
images and of the stamped ones, by a model that is there already. Search and evaluations take turns;
every search is compared with the mean of the evaluations before and after it, and the median of
these ratios counts. The model is the demo's mini CLIP with random weights, which makes everything
around the evaluations weigh most.

Freed memory stays with the process here. By default glibc gives it back to the system when nothing
small lies above it on the heap, which is a matter of luck, and activations are then cleared anew
for every layer: either side took up to 1.4 times as long in one run and not in the next.
"""

from __future__ import annotations

import ctypes
import statistics
from typing import Any

import pytest
import torch

from benchmarks.gpu.timing import once
from benchmarks.recording import holds, record
from pydetox.data import ImageSet
from pydetox.evaluation import predict
from pydetox.models import OpenClipModel
from pydetox.repair.alpha import search_coefficient
from pydetox.repair.configuration import AdvancedUnlearnConfig, UnlearnConfig
from pydetox.repair.task_vectors import TaskVector
from pydetox.research.attacks import PatchTrigger
from pydetox.research.demo import MINI_CLIP

THREADS = 2
ROUNDS = 9
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
IMAGES, CLASSES, TARGET = 2000, 10, 3


def test_coefficient_search(
    benchmark: Any, capsys: pytest.CaptureFixture[str], device: torch.device
) -> None:
    torch.set_num_threads(THREADS)
    libc = ctypes.CDLL(None)
    for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        assert libc.mallopt(parameter, 1 << 30) == 1
    generator = torch.Generator().manual_seed(0)
    model = OpenClipModel.from_config(MINI_CLIP, seed=0, name="mini").to(device)
    size = model.image_size
    pixels = torch.randint(0, 256, (IMAGES, 3, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, CLASSES, (IMAGES,), generator=generator)
    validation = ImageSet(pixels, labels)
    head = torch.nn.functional.normalize(
        torch.randn(CLASSES, model.embed_dim, generator=generator), dim=-1
    ).to(device)
    vector = TaskVector(
        {
            f"visual.{name}": 1e-3 * torch.randn(tensor.shape, generator=generator).to(device)
            for name, tensor in model.visual.state_dict().items()
        }
    )
    trigger = PatchTrigger(torch.full((3, 4, 4), 255, dtype=torch.uint8), 2, 2)
    # All candidates: how few of them decide depends on the vector.
    config = UnlearnConfig(advanced=AdvancedUnlearnConfig(alpha_stride=1))
    count = len(config.coefficients)
    own = predict(model, pixels, head)
    others = validation.subset(torch.nonzero((labels != TARGET) & (own != TARGET)).flatten())
    stamped = trigger(others.at_most(config.attacked_images, seed=0).images).to(device)
    shown = pixels.to(device)
    times: dict[str, list[float]] = {"search": [], "evaluations": []}

    def bare() -> None:
        for _ in range(count):
            predict(model, shown, head)
            predict(model, stamped, head)

    def whole() -> None:
        search_coefficient(model, vector, validation, [trigger], head, TARGET, config)

    def evaluate() -> None:
        times["evaluations"].append(once(bare, device))

    def search() -> None:
        times["search"].append(once(whole, device))

    search()
    evaluate()
    for measured in times.values():
        measured.clear()
    benchmark.pedantic(search, setup=evaluate, rounds=ROUNDS)
    evaluate()
    around = zip(times["evaluations"], times["evaluations"][1:], strict=False)
    ratio = statistics.median(
        2 * own / (before + after)
        for own, (before, after) in zip(times["search"], around, strict=True)
    )
    with capsys.disabled():
        print(
            f"\n\n{count} values of alpha over {IMAGES} images, {THREADS} threads: "
            f"{statistics.median(times['search']):.2f} s, {ratio:.3f} of {count} bare evaluations"
        )
    record(f"alpha{count}.over_eval", ratio)
    assert holds(f"alpha{count}.over_eval", ratio) is not False
