"""Work that does not fit into the memory: it has to go on with less at once, or end clearly.

On a GPU, the process may take little more memory than it has. On a CPU, the towers pretend to run
out of memory beyond a few images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import normalize

from pydetox import ImageSet
from pydetox.errors import DeviceMemoryError
from pydetox.evaluation import predict
from pydetox.training import TrainConfig, train_on_prompts

from .library import few_at_once, halved, random_model, targeted_search
from .recorder import Session

#: Bytes beyond what is taken already: for some images of ViT-B-32, and for not even one.
SOME, NONE = 2 << 30, 1 << 20
IMAGES = 1024


def measure(session: Session) -> None:
    """Record whether search, prediction and training go on, and what is said where none can."""
    model = random_model("ViT-B-32", session.device, tiny=session.tiny)
    count = 64 if session.tiny else IMAGES
    pixels = session.images(count, 3, model.image_size, model.image_size)
    head = normalize(session.randn(10, model.embed_dim), dim=-1)
    names = tuple(f"thing {k}" for k in range(10))
    data = ImageSet(pixels.cpu(), torch.arange(count) % 10, names)
    expected = predict(model, pixels, head, batch_size=16)

    def search() -> int:
        step = targeted_search(
            model, count // 16, session.generator, precision="float32", max_batch=count
        )
        step()
        return halved(step)

    def prediction() -> int:
        found = predict(model, pixels, head, batch_size=count)
        return int((found != expected).sum())

    def training() -> int:
        config = TrainConfig(epochs=1, learning_rate=1e-5, batch_size=count)
        train_on_prompts(model, data, ["a {c}"], config)
        return 0

    work: dict[str, Callable[[], int]] = {
        "search": search,
        "prediction": prediction,
        "training": training,
    }
    for name, run in work.items():
        with session.attempt(f"memory.{name}"), little_memory(session, SOME, 8):
            value = run()
            session.record(f"memory.{name}.goes_on", 1)
            if name == "search":
                session.record("memory.search.halved", value)
            if name == "prediction":
                session.record("memory.prediction.changed", value)
    with session.attempt("memory.none"), little_memory(session, NONE, 0):
        try:
            predict(model, pixels, head, batch_size=count)
            session.record("memory.none.said", "nothing: it fitted")
        except DeviceMemoryError as error:
            session.record("memory.none.said", str(error))


@contextmanager
def little_memory(session: Session, extra: int, images: int) -> Iterator[None]:
    """Let this process take only so many bytes more, on a CPU so many images at once."""
    if not session.gpu:
        with few_at_once(images):
            yield
        return
    cuda: Any = torch.cuda
    cuda.empty_cache()
    total = cuda.get_device_properties(session.device).total_memory
    taken = cuda.memory_reserved(session.device)
    before = cuda.get_per_process_memory_fraction(session.device)
    cuda.set_per_process_memory_fraction(min(1.0, (taken + extra) / total), session.device)
    try:
        yield
    finally:
        cuda.set_per_process_memory_fraction(before, session.device)
