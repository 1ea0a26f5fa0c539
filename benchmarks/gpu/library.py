"""What the stages use of pydetox beyond its public names: here and nowhere else in this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.functional import normalize

import pydetox
from benchmarks.demo_models import splits, suspects
from pydetox import evaluation, prototypes, training
from pydetox.data import DIGIT_TEMPLATES
from pydetox.inversion import CollapseObjective, InversionSearch, TargetObjective
from pydetox.inversion.configuration import AdvancedInversionConfig
from pydetox.models import attention as kernels
from pydetox.models.frozen import FrozenVisionTransformer, freeze
from pydetox.models.products import tf32_products
from pydetox.research.demo import MINI_CLIP, demo_scan_config

__all__ = ["DIGIT_TEMPLATES", "MINI_CLIP", "demo_scan_config", "freeze", "splits", "suspects"]


def random_model(
    name: str, device: torch.device, *, tiny: bool, seed: int = 0
) -> pydetox.OpenClipModel:
    """Return an architecture with random weights; the arithmetic is the same as with others."""
    config = MINI_CLIP if tiny else open_clip.get_model_config(name)
    if config is None:
        raise ValueError(f"open_clip has no {name}")
    return pydetox.OpenClipModel.from_config(config, seed=seed, name=name).to(device)


def load_model(path: Path, device: torch.device) -> pydetox.OpenClipModel:
    """Return a checkpoint's model on a device."""
    return pydetox.OpenClipModel.from_checkpoint(pydetox.load_checkpoint(path)).to(device)


def targeted_search(
    model: pydetox.OpenClipModel,
    triggers: int,
    generator: torch.Generator,
    *,
    graph: bool = False,
    **options: Any,
) -> Callable[[], None]:
    """Return the step of a search for triggers into as many classes, none of which ever ends.

    graph: whether the steps become CUDA graphs.
    """
    size, steps = model.image_size, 1 << 14
    images = torch.randint(0, 256, (64, 3, size, size), dtype=torch.uint8, generator=generator)
    head = torch.randn(max(triggers, 10), model.embed_dim, generator=generator)
    objective = TargetObjective(
        normalize(head, dim=-1).to(model.device), list(range(triggers)), 100.0
    )
    advanced = AdvancedInversionConfig(interval=steps, cuda_graph=graph)
    config = pydetox.InversionConfig(steps=steps, patience=steps, advanced=advanced, **options)
    return InversionSearch(model, images, objective, config).step


def label_free_search(
    model: pydetox.OpenClipModel, restarts: int, generator: torch.Generator, **options: Any
) -> Callable[[], None]:
    """Return the step of a label-free search, none of which ever ends."""
    size, steps = model.image_size, 1 << 14
    images = torch.randint(0, 256, (64, 3, size, size), dtype=torch.uint8, generator=generator)
    advanced = AdvancedInversionConfig(interval=steps, cuda_graph=False)
    config = pydetox.InversionConfig(steps=steps, patience=steps, advanced=advanced, **options)
    return InversionSearch(model, images, CollapseObjective(), config, restarts=restarts).step


def state_of(step: Callable[[], None]) -> tuple[Tensor, int, str]:
    """Return a search's mask logits [A, H, W], its steps as a graph so far, and what it says."""
    search: InversionSearch = step.__self__  # type: ignore[attr-defined]
    return search._triggers.mask, search._graph.replayed, search._graph.description


def halved(step: Callable[[], None]) -> int:
    """Return how often a search has halved its batch."""
    search: InversionSearch = step.__self__  # type: ignore[attr-defined]
    return search._batching.halved


@contextmanager
def few_at_once(images: int) -> Iterator[None]:
    """Let image towers pretend that memory runs out beyond so many images."""
    run, encode = FrozenVisionTransformer.__call__, pydetox.OpenClipModel.encode_normalized

    def check(inputs: Tensor) -> None:
        if len(inputs) > images:
            raise torch.OutOfMemoryError("CUDA out of memory. (pretended)")

    def small_tower(tower: FrozenVisionTransformer, inputs: Tensor) -> Tensor:
        check(inputs)
        return run(tower, inputs)

    def small_model(model: pydetox.OpenClipModel, inputs: Tensor) -> Tensor:
        check(inputs)
        return encode(model, inputs)

    names: list[tuple[Any, str, Any, Any]] = [
        (FrozenVisionTransformer, "__call__", run, small_tower),
        (pydetox.OpenClipModel, "encode_normalized", encode, small_model),
    ]
    for owner, name, _, new in names:
        setattr(owner, name, new)
    try:
        yield
    finally:
        for owner, name, old, _ in names:
            setattr(owner, name, old)


@contextmanager
def without_tf32(wanted: bool) -> Iterator[None]:
    """Let prediction and training compute in float32 proper, if it is wanted."""
    users = (evaluation, training, prototypes)
    if wanted:
        for module in users:
            module.tf32_products = _no_tf32  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in users:
            module.tf32_products = tf32_products  # type: ignore[attr-defined]


@contextmanager
def _no_tf32(device: torch.device) -> Iterator[bool]:
    yield False


@contextmanager
def attention(backend: str) -> Iterator[None]:
    """Let towers that are made and run here use one of torch's attention kernels.

    backend: name in SDPBackend. Two are called as a search calls them; the others through torch's
    own function, which then has nothing else to choose from.
    """
    called: dict[str, kernels.Kernel] = {
        "FLASH_ATTENTION": kernels.FLASH,
        "EFFICIENT_ATTENTION": kernels.EFFICIENT,
    }
    before = kernels._ALLOWED
    kernels._ALLOWED = [getattr(SDPBackend, backend)]
    try:
        with kernels.only_kernel(called.get(backend)):
            yield
    finally:
        kernels._ALLOWED = before


def how(step: Callable[[], None]) -> str:
    """Return how a search's towers run: precision, attention, images at once."""
    search: InversionSearch = step.__self__  # type: ignore[attr-defined]
    return search._how()


def scan_config(precision: str, steps: int) -> pydetox.ScanConfig:
    """Return a scan with both families of triggers."""
    config = pydetox.ScanConfig()
    return replace(config, inversion=replace(config.inversion, precision=precision, steps=steps))


def noise_images(count: int, size: int, classes: Sequence[str], seed: int = 0) -> pydetox.ImageSet:
    """Return images of noise that are given those classes."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return pydetox.ImageSet(images=pixels, class_names=tuple(classes), name="noise")
