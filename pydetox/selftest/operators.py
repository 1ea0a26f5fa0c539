"""The cases of `pydetox doctor --selftest`: calls of every operator, and their plain form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .. import ops
from ..models.attention import choose_attention
from ..ops import reference

_MEAN, _STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


@dataclass(frozen=True)
class Case:
    """One call of one operator.

    operator: name in torch.ops.pydetox. what: sizes, in words. dtype: of inputs and result.
    run: called with the inputs on a device, returns results. plain: the same in plain PyTorch, in
    the dtype of the inputs it gets. inputs: on the CPU. moved: bytes to read and write at least.
    note: says of a device what ran there, where that is not always the same. allowed: the error
    that is allowed, relative to that of `plain` on the CPU.
    """

    operator: str
    what: str
    dtype: torch.dtype
    inputs: tuple[Any, ...]
    run: Callable[..., Sequence[Tensor]]
    plain: Callable[..., Sequence[Tensor]]
    moved: int
    note: Callable[[torch.device], str] = lambda device: ""
    allowed: float = 2.0


def cases() -> Iterator[Case]:
    """Every operator at an odd size and at one that is worth a bandwidth, and attention.

    Attention is torch's, but which kernel of it computes a frozen tower's is pinned here.
    """
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        yield from _stamping(2, 3, 3, 7, 5, None, dtype)
        yield from _stamping(8, 16, 3, 64, 64, 8, dtype)
        yield from _stamping(8, 16, 3, 64, 64, None, dtype, own=True)
        yield from _stamping(8, 16, 3, 64, 64, 8, dtype, box=(33, 31))
    for dtype in (torch.float32, torch.float64):
        for sizes in ((3, 5, 7, 4), (10, 16, 512, 1000)):
            yield from _objectives(*sizes, dtype)
        for sizes in ((3, 2, 7, 5), (8, 3, 64, 64)):
            yield _update(*sizes, dtype)
    for dtype, table in (
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float64),
    ):
        for searched in ((35, 701, 83), (16, 30522, 96)):
            yield from _tokens(*searched, dtype, table)
    for counts in ((5, 1, 7), (1 << 20, 70001)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            yield from _weights(counts, dtype)
    for dtype in (torch.float32, torch.bfloat16):
        for attended in ((2, 7, 3, 16), (16, 50, 12, 64)):
            yield _attention(*attended, dtype)


def _stamping(
    k: int,
    b: int,
    c: int,
    h: int,
    w: int,
    patch: int | None,
    dtype: torch.dtype,
    *,
    own: bool = False,
    box: tuple[int, int] | None = None,
) -> Iterator[Case]:
    """Make a case of stamping. own: each trigger has its own images. box: logits of a box."""
    generator = torch.Generator().manual_seed(0)
    shape = (k, b, c, h, w) if own else (b, c, h, w)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    logits_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    rows, columns = box or (h, w)
    mask = torch.randn(k, rows, columns, dtype=logits_dtype, generator=generator)
    pattern = torch.randn(k, c, rows, columns, dtype=logits_dtype, generator=generator)
    options: dict[str, Any] = {"mean": _MEAN, "std": _STD, "patch_size": patch}
    if box is not None:
        options["corners"] = [(i % (h - rows + 1), 5 * i % (w - columns + 1)) for i in range(k)]
    like = reference.stamp_triggers(images, mask, pattern, **options)
    gradient = torch.randn(like.shape, dtype=torch.float64, generator=generator).to(dtype)
    what = f"{k}x{b}x{c}x{h}x{w}" + ("" if patch is None else f", patches of {patch}")
    what += (", own images" if own else "") + ("" if box is None else f", box {rows}x{columns}")
    logits = mask.nbytes + pattern.nbytes

    def plain(images: Tensor, mask: Tensor, pattern: Tensor) -> Sequence[Tensor]:
        result = torch.float64 if mask.dtype == torch.float64 else dtype
        return (reference.stamp_triggers(images, mask, pattern, **options, dtype=result),)

    def plain_gradients(
        images: Tensor, mask: Tensor, pattern: Tensor, gradient: Tensor
    ) -> Sequence[Tensor]:
        leaves = mask.clone().requires_grad_(), pattern.clone().requires_grad_()
        stamped = reference.stamp_triggers(images, *leaves, **options)
        return torch.autograd.grad(stamped, leaves, gradient.to(stamped.dtype))

    def forward(images: Tensor, mask: Tensor, pattern: Tensor) -> Sequence[Tensor]:
        return (ops.stamp_triggers(images, mask, pattern, **options, dtype=dtype),)

    def backward(
        images: Tensor, mask: Tensor, pattern: Tensor, gradient: Tensor
    ) -> Sequence[Tensor]:
        leaves = mask.clone().requires_grad_(), pattern.clone().requires_grad_()
        stamped = ops.stamp_triggers(images, *leaves, **options, dtype=dtype)
        return torch.autograd.grad(stamped, leaves, gradient)

    def forward_out(images: Tensor, mask: Tensor, pattern: Tensor) -> Sequence[Tensor]:
        out = torch.empty(like.shape, dtype=dtype, device=images.device)
        return (ops.stamp_triggers(images, mask, pattern, **options, out=out),)

    def backward_out(
        images: Tensor, mask: Tensor, pattern: Tensor, gradient: Tensor
    ) -> Sequence[Tensor]:
        return ops.stamp_triggers_gradients(gradient, images, mask, pattern, **options)

    inputs = (images, mask, pattern)
    moved = images.nbytes + logits + gradient.nbytes
    yield Case("stamp_triggers", what, dtype, inputs, forward, plain, moved)
    yield Case("stamp_triggers_out", what, dtype, inputs, forward_out, plain, moved)
    inputs_of_gradient = (*inputs, gradient)
    moved = 2 * logits + (images.nbytes + gradient.nbytes) * (rows * columns) // (h * w)
    both = {"stamp_triggers_backward": backward, "stamp_triggers_backward_out": backward_out}
    for name, run in both.items():
        yield Case(name, what, logits_dtype, inputs_of_gradient, run, plain_gradients, moved)


def _objectives(k: int, b: int, d: int, c: int, dtype: torch.dtype) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(k, b, d, dtype=torch.float64, generator=generator) + 1
    head = normalize(torch.randn(c, d, dtype=torch.float64, generator=generator), dim=-1).to(dtype)
    targets = torch.randint(0, c, (k,), generator=generator)
    z = z.to(dtype)

    def collapse(module: Any, backward: bool) -> Callable[..., Sequence[Tensor]]:
        def run(z: Tensor) -> Sequence[Tensor]:
            leaf = z.clone().requires_grad_(backward)
            cosine = module.embedding_collapse(leaf)
            return torch.autograd.grad(cosine.sum(), leaf) if backward else (cosine,)

        return run

    def zero_shot(module: Any, backward: bool) -> Callable[..., Sequence[Tensor]]:
        def run(z: Tensor, head: Tensor, targets: Tensor) -> Sequence[Tensor]:
            leaf = z.clone().requires_grad_(backward)
            loss, success = module.zero_shot_loss(leaf, head, targets, 10.0)
            return torch.autograd.grad(loss.sum(), leaf) if backward else (loss, success)

        return run

    what = f"{k}x{b}x{d}"
    for suffix, backward in (("", False), ("_backward", True)):
        yield Case(
            f"embedding_collapse{suffix}",
            what,
            dtype,
            (z,),
            collapse(ops, backward),
            collapse(reference, backward),
            z.nbytes * (2 if backward else 1),
        )
        yield Case(
            f"zero_shot_loss{suffix}",
            f"{what}, {c} classes",
            dtype,
            (z, head, targets),
            zero_shot(ops, backward),
            zero_shot(reference, backward),
            z.nbytes * (2 if backward else 1) + head.nbytes,
        )


def _update(k: int, c: int, h: int, w: int, dtype: torch.dtype) -> Case:
    generator = torch.Generator().manual_seed(0)
    state = [
        torch.randn(k, *planes, h, w, dtype=torch.float64, generator=generator).to(dtype)
        for planes in ((), (c,))
        for _ in range(3)
    ]
    # Moments as they are after some steps: with a tiny second moment, a step is all rounding.
    second = [torch.ones_like(state[0]), torch.ones_like(state[3])]
    vector = torch.linspace(0.1, 0.3, k)

    def run(module: Any) -> Callable[..., Sequence[Tensor]]:
        def step(*given: Tensor) -> Sequence[Tensor]:
            mask, g, m, pattern, pg, pm, v, pv, vector = (t.clone() for t in given)
            steps = torch.full((k,), 3, device=mask.device)
            norms = module.trigger_update(
                (mask, pattern),
                (g, pg),
                (m, pm),
                (v, pv),
                cost=vector,
                learning_rate=vector,
                steps=steps,
                active=torch.ones(k, dtype=torch.bool, device=mask.device),
                betas=(0.5, 0.9),
                total_variation=vector / 4,
            )
            # Scaled to the size of the other results.
            return mask, pattern, m, pm, v, pv, norms / (h * w), steps / k

        return step

    return Case(
        "trigger_update",
        f"{k}x{c}x{h}x{w}",
        dtype,
        (*state, *second, vector),
        run(ops),
        run(reference),
        7 * sum(t.nbytes for t in second),
    )


def _tokens(r: int, v: int, d: int, dtype: torch.dtype, stored: torch.dtype) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((r, v), dtype), ((v, d), stored), ((r, d), dtype)
    logits, table, gradient = (
        torch.randn(shape, dtype=torch.float64, generator=generator).to(kind)
        for shape, kind in shapes
    )
    allowed = torch.rand(v, generator=generator) < 0.8
    what = f"{r}x{v:,}x{d}" + (", bfloat16 table" if stored == torch.bfloat16 else "")

    def run(name: str, module: Any) -> Callable[..., Sequence[Tensor]]:
        def call(
            logits: Tensor, table: Tensor, allowed: Tensor, gradient: Tensor, rates: Tensor
        ) -> Sequence[Tensor]:
            rows = torch.arange(r, device=logits.device)
            if name == "top_swaps":
                return (module.top_swaps(gradient, table, rows, allowed, min(v // 2, 50))[0],)
            leaf = logits.clone().requires_grad_(name == "mix_tokens_backward")
            if name != "mix_tokens_update":
                mixed = module.mix_tokens(leaf, table, 2.0, allowed)
                return (
                    torch.autograd.grad(mixed, leaf, gradient) if leaf.requires_grad else (mixed,)
                )
            moments = torch.zeros_like(leaf), torch.ones_like(leaf)
            mixture = ops.TokenMixture(*module.mix_tokens_forward(leaf, table, 2.0, allowed))
            places = (gradient, mixture, leaf, *moments, table, 2.0, allowed)
            how = {"learning_rate": rates, "steps": rows + 3}
            module.mix_tokens_update(*places, **how, active=rows != 1, betas=(0.5, 0.9))
            return leaf, *moments

        return call

    # Made here: a GPU divides by a number in another way than a CPU.
    rates = 0.1 + torch.arange(r, dtype=torch.float32) / 100
    inputs = (logits, table, allowed, gradient, rates)
    for name, moved in (
        ("mix_tokens", table.nbytes + logits.nbytes),
        ("mix_tokens_backward", 2 * table.nbytes + 3 * logits.nbytes),
        ("mix_tokens_update", 2 * table.nbytes + 7 * logits.nbytes),
        ("top_swaps", table.nbytes),
    ):
        yield Case(name, what, dtype, inputs, run(name, ops), run(name, reference), moved)


def _weights(counts: tuple[int, ...], dtype: torch.dtype) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    base, *others = (
        [torch.randn(n, dtype=torch.float64, generator=generator).to(dtype) for n in counts]
        for _ in range(4)
    )
    what = " + ".join(f"{n:,}" for n in counts)
    names = [str(n) for n in range(len(counts))]
    size = sum(t.nbytes for t in base)
    rows = torch.tensor([[0.5, -1.5, 2.0]], dtype=torch.float64)
    f64 = torch.float64
    yield Case(
        "weight_diff_gram",
        f"{what}, 3 models",
        f64,
        (base, others),
        lambda base, others: (ops.weight_diff_gram(base, others),),
        lambda base, others: (reference.weight_diff_gram(base, others),),
        4 * size,
    )
    yield Case(
        "weight_diff_project",
        f"{what}, 2 directions",
        f64,
        (base, others),
        lambda base, others: (ops.weight_diff_project(base, others[0], others[1:]),),
        lambda base, others: (reference.weight_diff_project(base, others[0], others[1:]),),
        4 * size,
    )
    yield Case(
        "weight_diff_sketch",
        f"{what}, to 4,096",
        f64,
        (base, others[0]),
        lambda base, other: (ops.weight_diff_sketch(base, other, names, seed=1),),
        lambda base, other: (reference.weight_diff_sketch(base, other, names, seed=1, size=4096),),
        2 * size,
    )
    side = 2 ** (max(counts).bit_length() // 2)  # about as many columns as rows
    matrices = [
        [t[: len(t) // side * side].reshape(-1, side) for t in m] for m in (base, others[0])
    ]
    factors = [torch.randn(side, 8, dtype=f64, generator=generator) for _ in counts]
    yield Case(
        "weight_diff_matmul",
        " + ".join(f"{len(t):,}x{side}" for t in matrices[0]) + ", 8 columns",
        f64,
        (*matrices, factors),
        lambda *inputs: ops.weight_diff_matmul(*inputs),
        lambda *inputs: reference.weight_diff_matmul(*inputs, side="right"),
        sum(2 * t.nbytes + 8 * 8 * len(t) for t in matrices[0]),
    )
    yield Case(
        "apply_task_vectors",
        f"{what}, 3 vectors",
        dtype,
        (base, others),
        lambda base, others: ops.apply_task_vectors(base, others, rows)[0],
        lambda base, others: reference.apply_task_vectors(base, others, rows)[0],
        5 * size,
    )


def _attention(images: int, tokens: int, heads: int, size: int, dtype: torch.dtype) -> Case:
    generator = torch.Generator().manual_seed(0)
    shape = (images, tokens, 3, heads, size)
    packed = torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)
    pull = torch.randn(images * tokens, heads * size, dtype=torch.float64, generator=generator)

    def run(packed: Tensor, pull: Tensor) -> Sequence[Tensor]:
        leaf = packed.clone().requires_grad_()
        mixed = choose_attention(packed.device, packed.dtype, size)(leaf)
        return mixed.detach(), *torch.autograd.grad(mixed, leaf, pull)

    def plain(packed: Tensor, pull: Tensor) -> Sequence[Tensor]:
        leaf = packed.clone().requires_grad_()
        query, key, value = leaf.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (query @ key.transpose(-1, -2) * size**-0.5).softmax(-1)
        mixed = (weights @ value).transpose(1, 2).reshape(pull.shape)
        return mixed.detach(), *torch.autograd.grad(mixed, leaf, pull)

    return Case(
        "attention",
        f"{images}x{tokens}, {heads} heads of {size}",
        dtype,
        (packed, pull.to(dtype)),
        run,
        plain,
        2 * packed.nbytes + 2 * images * tokens * heads * size * packed.element_size(),
        lambda device: choose_attention(device, dtype, size).description,
        allowed=4.0,
    )
