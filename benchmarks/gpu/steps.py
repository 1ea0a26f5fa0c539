"""A step of the search against the matrix products that it cannot do without, and DECREE's loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

import pydetox
from benchmarks.decree import Decree

from .library import attention, how, random_model, state_of, targeted_search
from .recorder import Session
from .timing import Call, device_seconds, once, paced_seconds

BATCH = 16
BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")


def triggers_of(session: Session, wanted: int) -> int:
    """Return how many triggers are searched for together."""
    return min(wanted, 4) if session.tiny else wanted


def step(
    session: Session, name: str, model: pydetox.OpenClipModel, triggers: int, **options: Any
) -> float:
    """Record a step of a search and the time that the first one takes; return the former.

    RuntimeError if its steps were to become a CUDA graph and did not.
    """
    run = targeted_search(model, triggers, session.generator, **options)
    session.record(f"{name}.first_step_s", once(run, session.device))
    seconds = paced_seconds(run, session.device, tiny=session.tiny)
    if options.get("graph"):
        _, replayed, note = state_of(run)
        if session.gpu and not replayed:
            raise RuntimeError(note)  # what was timed are plain steps
    session.record(f"{name}.step_ms", seconds * 1e3)
    session.record(f"{name}.how", how(run))  # after it: memory may have run out
    session.record(f"{name}.images_per_second", triggers * BATCH / seconds)
    return seconds


def products(
    model: pydetox.OpenClipModel, images: int, dtype: torch.dtype
) -> tuple[list[Call], int]:
    """Return the tower's linear layers as products, forward and to the input, and their FLOPs.

    The calls take turns over operands of their own, one call for each layer and direction.
    """
    tower: Any = model.visual  # of open_clip: not all of its parts have types
    tokens = int(tower.positional_embedding.shape[0])
    layers = [(images * (tokens - 1), tower.conv1.weight.flatten(1))]
    for block in tower.transformer.resblocks:
        weights = [block.attn.in_proj_weight, block.attn.out_proj.weight]
        weights += [block.mlp.c_fc.weight, block.mlp.c_proj.weight]
        layers += [(images * tokens, weight) for weight in weights]
    device, flops, calls = model.device, 0, list[Call]()
    kept: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}
    for rows, weight in layers:
        outputs, inputs = weight.shape
        shape = (rows, outputs, inputs)
        if shape not in kept:
            kept[shape] = (
                torch.randn(rows, inputs, device=device, dtype=dtype),
                torch.randn(rows, outputs, device=device, dtype=dtype),
            )
        x, gradient = kept[shape]
        w = weight.detach().to(dtype)
        calls += [partial(torch.matmul, x, w.T), partial(torch.matmul, gradient, w)]
        flops += 4 * rows * weight.numel()
    return calls, flops


def products_seconds(
    session: Session, name: str, model: pydetox.OpenClipModel, images: int, dtype: torch.dtype
) -> float:
    """Record and return what the products of one step take the device."""
    calls, flops = products(model, images, dtype)

    def run() -> None:
        for call in calls:
            call()

    seconds = device_seconds([run], session.device, tiny=session.tiny)
    session.record(f"{name}.ms", seconds * 1e3)
    session.record(f"{name}.tflops", flops / seconds / 1e12)
    return seconds


def vit_b32(session: Session) -> None:
    """Record ViT-B-32: bfloat16 for few and many triggers, and float32; no graphs."""
    model = random_model("ViT-B-32", session.device, tiny=session.tiny)
    few, many = triggers_of(session, 10), triggers_of(session, 64)
    floors: dict[str, float] = {}
    forms = ((few, "k10"), (many, "k64"), (1, "k1"))
    for count, label in forms:
        with session.attempt(f"products_b32_bf16_{label}"):
            floors[label] = products_seconds(
                session, f"products_b32_bf16_{label}", model, count * BATCH, torch.bfloat16
            )
    # As it comes, and in one chunk whatever memory that takes.
    run_variants(session, model, forms, floors, [("", False), ("_whole", True)])
    before = torch.get_float32_matmul_precision()
    for precision in ("highest", "high") if session.gpu else ("highest",):
        name = "step_b32_fp32_k10" if precision == "highest" else "step_b32_tf32_k10"
        torch.set_float32_matmul_precision(precision)
        try:
            with session.attempt(name):
                step(session, name, model, few, precision="float32")
        finally:
            torch.set_float32_matmul_precision(before)


def run_variants(
    session: Session,
    model: pydetox.OpenClipModel,
    forms: Sequence[tuple[int, str]],
    floors: Mapping[str, float],
    variants: Sequence[tuple[str, bool]],
) -> None:
    """Record steps in bfloat16: for numbers of triggers, each as (suffix, in one chunk)."""
    for count, label in forms:
        for suffix, whole in variants:
            name = f"step_b32_bf16_{label}{suffix}"
            options: dict[str, Any] = {"max_batch": count * BATCH} if whole else {}
            with session.attempt(name):
                seconds = step(session, name, model, count, precision="bfloat16", **options)
                if label in floors:
                    session.record(f"{name}.over_products", seconds / floors[label])


def decree(session: Session) -> None:
    """Record DECREE's loop on the same device, and how much faster a trigger's step is here."""
    model = random_model("ViT-B-32", session.device, tiny=session.tiny)
    size = model.image_size
    loop = Decree(model.clone().visual, 3, size, model.mean, model.std, device=session.device)
    images = session.images(BATCH, 3, size, size)
    seconds = paced_seconds(lambda: loop.step(images), session.device, tiny=session.tiny)
    session.record("decree.step_ms", seconds * 1e3)
    few, many = triggers_of(session, 10), triggers_of(session, 64)
    for count, label in ((1, "k1"), (few, "k10"), (many, "k64")):
        for suffix in ("", "_whole", "_graph", "_whole_graph"):
            name = f"step_b32_bf16_{label}{suffix}"
            ours = session.figures.get(f"{name}.step_ms")
            if ours is not None:
                session.record(f"{name}.vs_decree", seconds * 1e3 * count / float(ours))


def attention_backends(session: Session) -> None:
    """Record a step with each of torch's attention kernels, of ViT-B-32 and for ten triggers."""
    model = random_model("ViT-B-32", session.device, tiny=session.tiny)
    count = triggers_of(session, 10)
    for backend in BACKENDS if session.gpu else ("MATH",):
        name = f"step_b32_bf16_k10_{backend.removesuffix('_ATTENTION').lower()}"
        # As a graph: without one, the launches take longer than the kernels.
        with session.attempt(name), attention(backend):
            step(session, name, model, count, precision="bfloat16", graph=session.gpu)


def vit_l14(session: Session) -> None:
    """Record ViT-L-14: bfloat16 for ten triggers, as it comes, in one chunk and with graphs."""
    model = random_model("ViT-L-14", session.device, tiny=session.tiny)
    count = triggers_of(session, 10)
    floor = None
    with session.attempt("products_l14_bf16_k10"):
        floor = products_seconds(
            session, "products_l14_bf16_k10", model, count * BATCH, torch.bfloat16
        )
    whole: dict[str, Any] = {"max_batch": count * BATCH}
    variants: list[tuple[str, dict[str, Any]]] = [("", {}), ("_whole", whole)]
    if session.gpu:
        variants.append(("_whole_graph", {**whole, "graph": True}))
    for suffix, options in variants:
        name = f"step_l14_bf16_k10{suffix}"
        with session.attempt(name):
            seconds = step(session, name, model, count, precision="bfloat16", **options)
            if floor is not None:
                session.record(f"{name}.over_products", seconds / floor)
