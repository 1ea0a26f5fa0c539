"""The search for alpha: 21 values over 2,000 images against 21 bare evaluations.

    python -m pytest benchmarks/bench_alpha.py

A bare evaluation predicts what the search has to know for one alpha: the classes of all clean
images and of the stamped ones, by a model that is there already. Search and evaluations take turns;
medians are compared. The model is the demo's mini CLIP with random weights, which makes everything
around the evaluations weigh most.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch

from benchmarks.recording import holds, record
from pydetox.attacks import PatchTrigger
from pydetox.data import ImageSet
from pydetox.demo import MINI_CLIP
from pydetox.evaluation import predict
from pydetox.models import OpenClipModel
from pydetox.task_vectors import TaskVector
from pydetox.unlearning import UnlearnConfig, search_coefficient

THREADS = 2
ROUNDS = 5
IMAGES, CLASSES, TARGET = 2000, 10, 3


def test_coefficient_search(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(THREADS)
    generator = torch.Generator().manual_seed(0)
    model = OpenClipModel.from_config(MINI_CLIP, seed=0, name="mini")
    size = model.image_size
    pixels = torch.randint(0, 256, (IMAGES, 3, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, CLASSES, (IMAGES,), generator=generator)
    validation = ImageSet(pixels, labels)
    head = torch.nn.functional.normalize(
        torch.randn(CLASSES, model.embed_dim, generator=generator), dim=-1
    )
    vector = TaskVector(
        {
            f"visual.{name}": 1e-3 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in model.visual.state_dict().items()
        }
    )
    trigger = PatchTrigger(torch.full((3, 4, 4), 255, dtype=torch.uint8), 2, 2)
    config = UnlearnConfig()
    count = len(config.coefficients)
    own = predict(model, pixels, head)
    stamped = trigger(pixels[(labels != TARGET) & (own != TARGET)][: config.attacked_images])
    times: dict[str, list[float]] = {"search": [], "evaluations": []}

    def evaluate() -> None:
        start = time.perf_counter()
        for _ in range(count):
            predict(model, pixels, head)
            predict(model, stamped, head)
        times["evaluations"].append(time.perf_counter() - start)

    def search() -> None:
        start = time.perf_counter()
        search_coefficient(model, vector, validation, [trigger], head, TARGET, config)
        times["search"].append(time.perf_counter() - start)

    search()
    evaluate()
    for measured in times.values():
        measured.clear()
    benchmark.pedantic(search, setup=evaluate, rounds=ROUNDS)
    median = {which: statistics.median(measured) for which, measured in times.items()}
    ratio = median["search"] / median["evaluations"]
    with capsys.disabled():
        print(
            f"\n\n{count} values of alpha over {IMAGES} images, {THREADS} threads: "
            f"{median['search']:.2f} s, {ratio:.3f} of {count} bare evaluations"
        )
    record(f"alpha{count}.over_eval", ratio)
    assert holds(f"alpha{count}.over_eval", ratio)
