"""A search whose steps are CUDA graphs, against the same search without: results and times.

On a CPU there are no graphs. The code is tried, and `graphs.replayed` is 0.
"""

from __future__ import annotations

from typing import Any

import torch

from .library import random_model, state_of, targeted_search
from .recorder import Session
from .steps import BATCH, triggers_of
from .timing import once, paced_seconds

#: Steps after which results are compared. The first one of a search is taken plainly.
COMPARED, COMPARED_TINY = (4, 20), (2, 4)


def measure(session: Session) -> None:
    """Record how far a search with graphs is off one without, and the times of their steps."""
    model = random_model("ViT-B-32", session.device, tiny=session.tiny)
    few, many = triggers_of(session, 10), triggers_of(session, 64)
    for precision in ("bfloat16", "float32"):
        with session.attempt(f"graphs.{precision}"):
            compare(session, model, few, precision)
    for count, label in ((1, "k1"), (few, "k10"), (many, "k64")):
        for suffix in ("", "_whole"):
            name = f"step_b32_bf16_{label}{suffix}_graph"
            with session.attempt(name):
                timed(session, name, model, count, whole=bool(suffix))
                floor = session.figures.get(f"products_b32_bf16_{label}.ms")
                if floor is not None:
                    ours = float(session.figures[f"{name}.step_ms"])
                    session.record(f"{name}.over_products", ours / float(floor))
                plain = session.figures.get(f"step_b32_bf16_{label}{suffix}.step_ms")
                if plain is not None:
                    ours = float(session.figures[f"{name}.step_ms"])
                    session.record(f"{name}.vs_plain", float(plain) / ours)


def compare(session: Session, model: Any, triggers: int, precision: str) -> None:
    """Record the largest difference of a trigger's mask, relative to how far it has moved.

    Kernels of attention add up in no fixed order. Two searches without graphs differ, too: by
    `graphs.PRECISION.plain_apart_N`.
    """
    seeds = [session.generator.get_state()] * 3
    compared = COMPARED_TINY if session.tiny else COMPARED
    found: list[list[torch.Tensor]] = []
    for graph, state in zip((False, False, True), seeds, strict=True):
        session.generator.set_state(state)
        step = targeted_search(model, triggers, session.generator, graph=graph, precision=precision)
        masks = [state_of(step)[0].clone()]
        for number in range(compared[-1]):
            step()
            if number + 1 in compared:
                masks.append(state_of(step)[0].clone())
        found.append(masks)
        if graph:
            _, replayed, note = state_of(step)
            session.record(f"graphs.{precision}.replayed", replayed)
            session.record(f"graphs.{precision}.how", note or "a CPU has no graphs")
            if session.gpu and not replayed:
                raise RuntimeError(note)
    first, second, graphed = found
    for number, steps in enumerate(compared, 1):
        moved = (first[number] - first[0]).flatten(1).norm(dim=1)
        for other, name in ((second, "plain_apart"), (graphed, "graph_apart")):
            off = (other[number] - first[number]).flatten(1).norm(dim=1)
            session.record(f"graphs.{precision}.{name}_{steps}", float((off / moved).max()))


def timed(session: Session, name: str, model: Any, triggers: int, *, whole: bool) -> None:
    """Record a step as a graph; RuntimeError on a GPU whose steps did not become one."""
    options = {"max_batch": triggers * BATCH} if whole else {}
    step = targeted_search(
        model, triggers, session.generator, graph=True, precision="bfloat16", **options
    )
    seconds = [once(step, session.device) for _ in range(2)]  # plainly, and recorded
    session.record(f"{name}.record_s", seconds[1])
    took = paced_seconds(step, session.device, tiny=session.tiny)
    _, replayed, note = state_of(step)
    if session.gpu and not replayed:
        raise RuntimeError(note)  # what was timed are plain steps
    session.record(f"{name}.step_ms", took * 1e3)
