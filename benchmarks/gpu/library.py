"""What the stages use of pydetox beyond its public names: here and nowhere else in this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor
from torch.nn.functional import normalize

import pydetox
from benchmarks.demo_models import splits, suspects
from pydetox.data import DIGIT_TEMPLATES
from pydetox.inversion import CollapseObjective, InversionSearch, TargetObjective
from pydetox.inversion.configuration import AdvancedInversionConfig
from pydetox.models import attention as kernels
from pydetox.models.frozen import freeze
from pydetox.research.demo import MINI_CLIP, demo_scan_config

__all__ = ["DIGIT_TEMPLATES", "MINI_CLIP", "demo_scan_config", "freeze", "splits", "suspects"]

#: Names that a field of InversionConfig for CUDA graphs may have.
_GRAPH_FIELDS = ("graph", "cuda_graph", "graphs", "cuda_graphs")


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


def graph_field() -> str | None:
    """Return the option of a search that makes it use CUDA graphs, None if it has none."""
    names = {field.name for field in fields(pydetox.InversionConfig)}
    return next((name for name in _GRAPH_FIELDS if name in names), None)


def targeted_search(
    model: pydetox.OpenClipModel,
    triggers: int,
    generator: torch.Generator,
    *,
    graph: bool = False,
    **options: Any,
) -> Callable[[], None]:
    """Return the step of a search for triggers into as many classes, none of which ever ends.

    graph: with CUDA graphs: the library's own, or, where it has none, a capture of each chunk's
    gradients around it.
    """
    size, steps = model.image_size, 1 << 14
    images = torch.randint(0, 256, (64, 3, size, size), dtype=torch.uint8, generator=generator)
    head = torch.randn(max(triggers, 10), model.embed_dim, generator=generator)
    objective = TargetObjective(
        normalize(head, dim=-1).to(model.device), list(range(triggers)), 100.0
    )
    name = graph_field()
    if name is not None:
        options[name] = graph
    advanced = AdvancedInversionConfig(interval=steps)
    config = pydetox.InversionConfig(steps=steps, patience=steps, advanced=advanced, **options)
    search = InversionSearch(model, images, objective, config)
    if graph and name is None:
        _capture_gradients(search)
    return search.step


def label_free_search(
    model: pydetox.OpenClipModel, restarts: int, generator: torch.Generator, **options: Any
) -> Callable[[], None]:
    """Return the step of a label-free search, none of which ever ends."""
    size, steps = model.image_size, 1 << 14
    images = torch.randint(0, 256, (64, 3, size, size), dtype=torch.uint8, generator=generator)
    advanced = AdvancedInversionConfig(interval=steps)
    config = pydetox.InversionConfig(steps=steps, patience=steps, advanced=advanced, **options)
    return InversionSearch(model, images, CollapseObjective(), config, restarts=restarts).step


def _capture_gradients(search: InversionSearch) -> None:
    """Make a search replay a CUDA graph of every chunk's gradients."""
    plain: Callable[[Tensor, slice, int], Tensor] = search._differentiate
    captured: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
    clean: list[Tensor] = []

    def replay(images: Tensor, chunk: slice, at_once: int) -> Tensor:
        if not clean:
            clean.append(torch.empty_like(images))
        clean[0].copy_(images)
        key = (chunk.start, chunk.stop)
        if key not in captured:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    plain(clean[0], chunk, at_once)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                success = plain(clean[0], chunk, at_once)
            captured[key] = graph, success
        graph, success = captured[key]
        graph.replay()
        return success

    search._differentiate = replay  # type: ignore[method-assign]


@contextmanager
def attention(backend: str) -> Iterator[None]:
    """Let towers that are made and run here use one of torch's attention kernels.

    backend: name in SDPBackend. Two are called as a search calls them; the others through torch's
    own function, which then has nothing else to choose from.
    """
    called = {
        "FLASH_ATTENTION": kernels.FLASH,
        "EFFICIENT_ATTENTION": kernels.EFFICIENT,
    }
    before = kernels._ALLOWED
    kernels._ALLOWED = [getattr(kernels.SDPBackend, backend)]
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
