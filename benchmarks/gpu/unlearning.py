"""A trigger vector and the search for alpha: times, and how far a device is off the CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import normalize

import pydetox
from pydetox import ImageSet
from pydetox.repair.alpha import search_coefficient
from pydetox.repair.configuration import UnlearnConfig
from pydetox.repair.task_vectors import TaskVector
from pydetox.repair.trigger_vector import trigger_vector
from pydetox.research.attacks import PatchTrigger

from .library import random_model
from .recorder import Session
from .timing import once

CLASSES = 10


def material(
    session: Session, model: pydetox.OpenClipModel, count: int
) -> tuple[ImageSet, torch.Tensor, PatchTrigger]:
    """Return images with labels, a head on the model's device, and a trigger."""
    size = model.image_size
    pixels = torch.randint(
        0, 256, (count, 3, size, size), dtype=torch.uint8, generator=session.generator
    )
    labels = torch.arange(count) % CLASSES
    head = torch.randn(CLASSES, model.embed_dim, generator=session.generator)
    trigger = PatchTrigger(torch.full((3, 4, 4), 255, dtype=torch.uint8), 2, 2)
    images = ImageSet(pixels, labels, tuple(f"thing {k}" for k in range(CLASSES)))
    return images, normalize(head, dim=-1).to(model.device), trigger


def measure(session: Session) -> None:
    """Record the seconds of both parts on ViT-B-32, and a small vector's distance to the CPU's."""
    with session.attempt("unlearn.vector_off"):
        agreement(session)
    model = random_model("ViT-B-32", session.device, tiny=session.tiny)
    images, head, trigger = material(session, model, 64 if session.tiny else 1000)
    steps = 2 if session.tiny else 40
    config = UnlearnConfig(steps=steps)
    if session.tiny:
        few = replace(config.advanced, surrogates=16)
        config = replace(config, coefficients=(0.0, 1.0), advanced=few)
    found: list[TaskVector] = []

    def vector() -> None:
        found.append(trigger_vector(model, images.images, [trigger], head, 0, config))

    session.record("unlearn.vector_ms_per_step", once(vector, session.device) * 1e3 / steps)

    def alphas() -> None:
        search_coefficient(model, found[-1], images, [trigger], head, 0, config)

    session.record("unlearn.alpha_s", once(alphas, session.device))
    session.record("unlearn.alphas", len(config.coefficients))


def agreement(session: Session) -> None:
    """Record |vector - CPU's| / |CPU's| of a small model after a few steps; products are TF32."""
    vectors: list[dict[str, Any]] = []
    for place in (session.device, torch.device("cpu")):
        session.generator.manual_seed(1)
        model = random_model("small", place, tiny=True)
        images, head, trigger = material(session, model, 64)
        config = UnlearnConfig(steps=4, batch_size=16)
        config = replace(config, advanced=replace(config.advanced, surrogates=16))
        found = trigger_vector(model, images.images, [trigger], head, 0, config)
        vectors.append({name: value.cpu().double() for name, value in found.tensors.items()})
    here, there = vectors
    off = sum(float((here[k] - there[k]).square().sum()) for k in there) ** 0.5
    size = sum(float(value.square().sum()) for value in there.values()) ** 0.5
    session.record("unlearn.vector_off", off / size)
