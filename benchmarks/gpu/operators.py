"""Every operator: its time, and the bytes it must move over the rate of a copy (`.of_copy`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pydetox import ops
from pydetox.ops import reference

from .library import random_model
from .recorder import Session
from .timing import Call, device_seconds

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BATCH = 16
# Sets of operands take turns until they are several times the L2 cache (50 MiB on an H100).
_SET_BYTES, _MOST_SETS = 256 << 20, 16


def measure(session: Session) -> None:
    """Record the figures of all operators."""
    for name, triggers, patch, dtype in stamping_forms(session.tiny):
        with session.attempt(name):
            stamping(session, name, triggers, patch, dtype)
    for triggers in (8, 64):
        with session.attempt(f"update_k{triggers}"):
            update(session, f"update_k{triggers}", triggers)
    for triggers, classes in ((10, 10), (10, 1000), (512, 1000)):
        with session.attempt(f"zero_shot_{triggers}x{classes}"):
            zero_shot(session, triggers, classes)
    with session.attempt("collapse_k10"):
        collapse(session, 10)
    for rows in (8, 64):
        with session.attempt(f"mix_tokens_r{rows}"):
            mixing(session, rows)
        with session.attempt(f"top_swaps_r{rows}"):
            swaps(session, rows)
    for dtype in (torch.float32, torch.bfloat16):
        weights(session, dtype)


def stamping_forms(tiny: bool) -> list[tuple[str, int, int | None, torch.dtype]]:
    """Name, triggers, patch size and dtype of the result."""
    large, small = (8, 4) if tiny else (32, 14)
    return [
        ("stamp_f32", 8, None, torch.float32),
        ("stamp_rows32_bf16", 8, large, torch.bfloat16),
        ("stamp_rows32_bf16_k64", 64, large, torch.bfloat16),
        ("stamp_rows14_bf16", 8, small, torch.bfloat16),
    ]


def image_size(tiny: bool) -> int:
    """Pixels of an image's side."""
    return 32 if tiny else 224


def timed(session: Session, make: Callable[[], Call], size: int) -> float:
    """Return the seconds of one call; `make` returns it on operands of its own, of `size` bytes."""
    sets = max(1, min(_MOST_SETS, -(-_SET_BYTES // size))) if session.gpu else 1
    return device_seconds([make() for _ in range(sets)], session.device, tiny=session.tiny)


def stamping(
    session: Session, name: str, triggers: int, patch: int | None, dtype: torch.dtype
) -> None:
    """Record forward and backward into buffers that are there, as a search runs them."""
    side = image_size(session.tiny)
    shape: tuple[int, ...] = (triggers, BATCH, 3, side, side)
    if patch is not None:
        shape = (triggers, BATCH, (side // patch) ** 2, 3 * patch**2)
    how: dict[str, Any] = {"mean": MEAN, "std": STD, "patch_size": patch}

    def operands() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        images = session.images(BATCH, 3, side, side)
        mask, pattern = session.randn(triggers, side, side), session.randn(triggers, 3, side, side)
        return images, mask, pattern, session.randn(*shape, dtype=dtype)

    def forward() -> Call:
        *inputs, out = operands()
        return lambda: ops.stamp_triggers(*inputs, **how, out=out)

    def backward() -> Call:
        *inputs, gradient = operands()
        out = torch.empty_like(inputs[1]), torch.empty_like(inputs[2])
        return lambda: ops.stamp_triggers_gradients(gradient, *inputs, **how, out=out)

    def plain() -> Call:
        images, mask, pattern, gradient = operands()
        leaves = mask.requires_grad_(), pattern.requires_grad_()
        return lambda: torch.autograd.grad(
            reference.stamp_triggers(images, *leaves, **how, dtype=dtype), leaves, gradient
        )

    images, mask, pattern, result = (t.nbytes for t in operands())
    read = images + mask + pattern
    moved = {"forward": read + result, "backward": read + result + mask + pattern}
    seconds = {
        "forward": timed(session, forward, moved["forward"]),
        "backward": timed(session, backward, moved["backward"]),
    }
    for which, took in seconds.items():
        session.record(f"{name}.{which}_us", took * 1e6)
        session.record(f"{name}.{which}_of_copy", moved[which] / took / session.copy_rate)
    if triggers <= 8:
        eager = timed(session, plain, 4 * moved["backward"])
        session.record(f"{name}.eager_us", eager * 1e6)
        session.record(f"{name}.vs_eager", eager / sum(seconds.values()))


def update_operands(session: Session, triggers: int) -> tuple[list[Any], dict[str, Any]]:
    """Return the state of `triggers` searches and the options of an update."""
    side = image_size(session.tiny)

    def pair() -> tuple[Tensor, Tensor]:
        return session.randn(triggers, side, side), session.randn(triggers, 3, side, side)

    second = tuple(t.square() for t in pair())
    rates = torch.full((triggers,), 0.1, device=session.device)
    options = {
        "cost": rates,
        "learning_rate": rates,
        "steps": torch.zeros(triggers, dtype=torch.int64, device=session.device),
        "active": torch.ones(triggers, dtype=torch.bool, device=session.device),
        "betas": (0.5, 0.9),
    }
    return [pair(), pair(), pair(), second], options


def update(session: Session, name: str, triggers: int) -> None:
    """Record a step of Adam: logits, gradients, two moments read, all but gradients written."""

    def ready(module: Any) -> Callable[[], Call]:
        def make() -> Call:
            state, options = update_operands(session, triggers)
            return lambda: module.trigger_update(*state, **options)

        return make

    size = 7 * 4 * triggers * 4 * image_size(session.tiny) ** 2
    seconds = timed(session, ready(ops), size)
    session.record(f"{name}.us", seconds * 1e6)
    session.record(f"{name}.of_copy", size / seconds / session.copy_rate)
    eager = timed(session, ready(reference), 3 * size)
    session.record(f"{name}.eager_us", eager * 1e6)
    session.record(f"{name}.vs_eager", eager / seconds)


def zero_shot_call(session: Session, function: Any, triggers: int, classes: int) -> Call:
    """Return the loss with its gradient, on embeddings of 512 numbers."""
    z = session.randn(triggers, BATCH, 512).requires_grad_()
    head = normalize(session.randn(classes, 512), dim=-1)
    targets = torch.arange(triggers, device=session.device) % classes
    return lambda: torch.autograd.grad(function(z, head, targets, 100.0)[0].sum(), z)


def collapse_call(session: Session, function: Any, triggers: int) -> Call:
    """Return the mean cosine with its gradient, on embeddings of 512 numbers."""
    z = session.randn(triggers, BATCH, 512).requires_grad_()
    return lambda: torch.autograd.grad(function(z).sum(), z)


def zero_shot(session: Session, triggers: int, classes: int) -> None:
    """Record the targeted objective."""
    name = f"zero_shot_{triggers}x{classes}"
    if session.tiny:
        triggers, classes = min(triggers, 8), min(classes, 40)
    ours, eager = (
        device_seconds(
            [zero_shot_call(session, module.zero_shot_loss, triggers, classes)],
            session.device,
            tiny=session.tiny,
        )
        for module in (ops, reference)
    )
    session.record(f"{name}.us", ours * 1e6)
    session.record(f"{name}.eager_us", eager * 1e6)
    session.record(f"{name}.vs_eager", eager / ours)


def token_operands(session: Session, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logits, the table of BERT's vocabulary, and a gradient of embeddings."""
    tokens, dim = (300, 40) if session.tiny else (30_522, 768)
    return session.randn(rows, tokens), session.randn(tokens, dim), session.randn(rows, dim)


def mixing(session: Session, rows: int) -> None:
    """Record mixed embeddings with the gradient of their logits."""
    logits, table, gradient = token_operands(session, rows)
    leaf = logits.requires_grad_()

    def call(module: Any) -> Call:
        return lambda: torch.autograd.grad(module.mix_tokens(leaf, table, 0.7), leaf, gradient)

    record_both(session, f"mix_tokens_r{rows}", call)


def swaps(session: Session, rows: int) -> None:
    """Record the 64 best swaps of each row."""
    _, table, gradient = token_operands(session, rows)
    current = torch.arange(rows, device=session.device)
    record_both(
        session,
        f"top_swaps_r{rows}",
        lambda module: lambda: module.top_swaps(gradient, table, current, None, 64),
    )


def record_both(session: Session, name: str, call: Callable[[Any], Call]) -> None:
    """Record the time of ours and of eager PyTorch."""
    ours, eager = (
        device_seconds([call(module)], session.device, tiny=session.tiny)
        for module in (ops, reference)
    )
    session.record(f"{name}.us", ours * 1e6)
    session.record(f"{name}.eager_us", eager * 1e6)
    session.record(f"{name}.vs_eager", eager / ours)


def collapse(session: Session, triggers: int) -> None:
    """Record the label-free objective."""
    ours, eager = (
        device_seconds(
            [collapse_call(session, module.embedding_collapse, triggers)],
            session.device,
            tiny=session.tiny,
        )
        for module in (ops, reference)
    )
    session.record(f"collapse_k{triggers}.us", ours * 1e6)
    session.record(f"collapse_k{triggers}.eager_us", eager * 1e6)
    session.record(f"collapse_k{triggers}.vs_eager", eager / ours)


def tower_shapes(session: Session) -> list[tuple[int, ...]]:
    """Return the shapes of ViT-B-32's image tower."""
    if session.tiny:
        return [(300, 200), (77,)]
    model = random_model("ViT-B-32", torch.device("cpu"), tiny=False)
    return [tuple(tensor.shape) for tensor in model.visual.state_dict().values()]


def weight_calls(
    module: Any, lists: Sequence[Sequence[Tensor]], names: Sequence[str]
) -> dict[str, tuple[int, Call]]:
    """Return, by name, the lists that an operation reads and writes, and the operation."""
    base, model = lists[0], lists[1]
    device = base[0].device
    rows = torch.tensor(
        [[0.1]], dtype=torch.float64, device=device if module is reference else None
    )
    calls: dict[str, tuple[int, Call]] = {
        "gram8": (9, lambda: module.weight_diff_gram(base, lists[1:9])),
        "project16": (18, lambda: module.weight_diff_project(base, model, lists[2:18])),
        "sketch4096": (
            2,
            lambda: module.weight_diff_sketch(base, model, names, seed=0, size=4096),
        ),
    }
    if module is ops:
        # In place: the base is read and written.
        calls["apply"] = (3, lambda: ops.apply_task_vectors(base, [model], rows, out=[base]))
        factors = [
            torch.ones(tensor[0].numel(), 32, dtype=torch.float64, device=device) for tensor in base
        ]
        calls["matmul32"] = (2, lambda: ops.weight_diff_matmul(base, model, factors))
    else:
        calls["apply"] = (3, lambda: module.apply_task_vectors(base, [model], rows))
    return calls


def weights(session: Session, dtype: torch.dtype) -> None:
    """Record the operators over lists of weights: 18 lists of ViT-B-32's image tower."""
    name = str(dtype).removeprefix("torch.")
    with session.attempt(f"weights_{name}"):
        shapes = [shape or (1,) for shape in tower_shapes(session)]
        lists = [[session.randn(*shape, dtype=dtype) for shape in shapes] for _ in range(18)]
        size = sum(tensor.nbytes for tensor in lists[0])
        names = [str(i) for i in range(len(shapes))]
        for which, (count, call) in weight_calls(ops, lists, names).items():
            with session.attempt(f"{which}_{name}"):
                seconds = device_seconds([call], session.device, tiny=session.tiny)
                session.record(f"{which}_{name}.ms", seconds * 1e3)
                rate = count * size / seconds
                session.record(f"{which}_{name}.of_copy", rate / session.copy_rate)
