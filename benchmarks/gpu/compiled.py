"""torch.compile of the plain code, on the same operands as the operators."""

from __future__ import annotations

from typing import Any

import torch

from pydetox.ops import reference

from .library import freeze, random_model
from .operators import (
    BATCH,
    MEAN,
    STD,
    collapse_call,
    image_size,
    update_operands,
    weight_calls,
    zero_shot_call,
)
from .recorder import Session
from .steps import triggers_of
from .timing import Call, device_seconds, once


def timed(session: Session, name: str, call: Call, ours: float | None, unit: float = 1e6) -> None:
    """Record the compilation and a call, and that over ours, in the unit of `ours`."""
    session.record(f"{name}.compile_s", once(call, session.device))
    seconds = device_seconds([call], session.device, tiny=session.tiny)
    session.record(f"{name}.compiled_{'us' if unit == 1e6 else 'ms'}", seconds * unit)
    if ours:
        session.record(f"{name}.vs_compiled", seconds * unit / ours)


def measure(session: Session) -> None:
    """Record every operator's plain code, compiled; tiny: one of them."""

    def ours(*names: str) -> float | None:
        values = [session.figures.get(name) for name in names]
        return sum(float(v) for v in values if v) if all(values) else None

    with session.attempt("stamp_f32"):
        call = stamping_call(session)
        timed(session, "stamp_f32", call, ours("stamp_f32.forward_us", "stamp_f32.backward_us"))
    if session.tiny:
        return
    compiled: Any = torch.compile
    with session.attempt("update_k8"):
        state, options = update_operands(session, 8)
        function = compiled(reference.trigger_update, dynamic=False)
        timed(session, "update_k8", lambda: function(*state, **options), ours("update_k8.us"))
    with session.attempt("zero_shot_10x1000"):
        function = compiled(reference.zero_shot_loss, dynamic=False)
        call = zero_shot_call(session, function, 10, 1000)
        timed(session, "zero_shot_10x1000", call, ours("zero_shot_10x1000.us"))
    with session.attempt("collapse_k10"):
        function = compiled(reference.embedding_collapse, dynamic=False)
        timed(
            session, "collapse_k10", collapse_call(session, function, 10), ours("collapse_k10.us")
        )
    weights(session)
    tower(session)


def stamping_call(session: Session) -> Call:
    """Return forward and backward of the stamping."""
    side = image_size(session.tiny)
    images = session.images(BATCH, 3, side, side)
    mask, pattern = session.randn(8, side, side), session.randn(8, 3, side, side)
    gradient = session.randn(8, BATCH, 3, side, side)
    function: Any = torch.compile(reference.stamp_triggers, dynamic=False)
    leaves = mask.requires_grad_(), pattern.requires_grad_()
    return lambda: torch.autograd.grad(
        function(images, *leaves, mean=MEAN, std=STD), leaves, gradient
    )


def weights(session: Session) -> None:
    """Record the operators over weights on one large tensor; the sketch has no compiled form."""
    count = 18
    lists = [[session.randn(1 << 26)] for _ in range(count)]
    size = lists[0][0].nbytes
    for name, (read, call) in weight_calls(reference, lists, ["0"]).items():
        if name == "sketch4096":
            continue
        with session.attempt(f"{name}_float32"):
            function: Any = torch.compile(call, dynamic=False)
            once(function, session.device)
            seconds = device_seconds([function], session.device)
            rate = read * size / seconds
            session.record(f"{name}_float32.compiled_of_copy", rate / session.copy_rate)


def tower(session: Session) -> None:
    """Record the image tower of ViT-B-32, eager and compiled, forward and to the input."""
    model = random_model("ViT-B-32", session.device, tiny=False)
    frozen = freeze(model.visual, "bfloat16")
    patch, images = frozen.patch_size, triggers_of(session, 10) * BATCH
    if patch is None:
        raise ValueError("the tower of ViT-B-32 does not take patch rows")
    rows = session.randn(
        images, (model.image_size // patch) ** 2, 3 * patch**2, dtype=torch.bfloat16
    ).requires_grad_()
    direction = session.randn(images, model.embed_dim)

    def run(x: torch.Tensor) -> torch.Tensor:
        return frozen(x)

    eager = device_seconds(
        [lambda: torch.autograd.grad(run(rows), rows, direction)], session.device
    )
    session.record("tower_b32.eager_ms", eager * 1e3)
    with session.attempt("tower_b32"):
        function: Any = torch.compile(run, dynamic=False)
        call: Call = lambda: torch.autograd.grad(function(rows), rows, direction)  # noqa: E731
        timed(session, "tower_b32", call, eager * 1e3, unit=1e3)
