"""One step of trigger inversion against its parts and its rivals.

    python -m pytest benchmarks/bench_inversion_step.py

What takes turns with our step, within one run; medians are compared:

* `tower`: the forward pass and the gradient of the input, on a batch that is stamped already, as
  `pydetox.models.frozen` runs them. No step can do without.
* `module`: the same in open_clip's own module, in float32.
* `gemm`: the tower's products alone, in the step's precision: every linear layer of every block,
  rows times weights and gradient times weights, as two-dimensional products of plain PyTorch. (Ours
  leaves most of the last block out; these do not.)
* `decree`: a step of DECREE's loop (benchmarks/decree.py), one trigger, in float32.

Small steps are timed five in a row, and so are their rivals: in a search a step follows another,
and finds its memory in the caches. The weights are random: the arithmetic is the same.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import timm
import torch
from torch import Tensor

from benchmarks.decree import Decree
from benchmarks.gpu.timing import once
from benchmarks.recording import holds, record
from pydetox.inversion import CollapseObjective, InversionConfig, InversionSearch
from pydetox.models import OpenClipModel
from pydetox.models.frozen import PRECISIONS, freeze
from pydetox.ops.reference import to_patch_rows
from pydetox.research.demo import MINI_CLIP

THREADS = 2
BATCH = 16
IN_A_ROW = {"mini": 5, "vit_b32": 1}


def products(tower: Any, images: int, dtype: torch.dtype) -> Callable[[], None]:
    """The linear layers of open_clip's VisionTransformer, forward and to the input."""
    tokens = images * tower.positional_embedding.shape[0]
    weights = [(images * (tower.positional_embedding.shape[0] - 1), tower.conv1.weight.flatten(1))]
    for block in tower.transformer.resblocks:
        layers = [block.attn.in_proj_weight, block.attn.out_proj.weight]
        layers += [block.mlp.c_fc.weight, block.mlp.c_proj.weight]
        weights += [(tokens, weight) for weight in layers]
    weights.append((images, tower.proj.T))
    operands = [
        (
            torch.randn(rows, w.shape[1]).to(w.device, dtype),
            w.detach().to(dtype),
            torch.randn(rows, w.shape[0]).to(w.device, dtype),
        )
        for rows, w in weights
    ]

    def run() -> None:
        for x, weight, gradient in operands:
            x @ weight.T
            gradient @ weight

    return run


@pytest.mark.parametrize(
    ("name", "triggers", "precision", "rounds"),
    [
        ("vit_b32", 1, "float32", 7),
        ("vit_b32", 1, "bfloat16", 9),
        ("vit_b32", 4, "float32", 5),
        ("mini", 1, "float32", 20),
        ("mini", 10, "float32", 20),
    ],
)
def test_inversion_step(
    name: str,
    triggers: int,
    precision: str,
    rounds: int,
    benchmark: Any,
    capsys: pytest.CaptureFixture[str],
    device: torch.device,
) -> None:
    torch.set_num_threads(THREADS)
    config = MINI_CLIP if name == "mini" else open_clip.get_model_config("ViT-B-32")
    assert config is not None
    model = OpenClipModel.from_config(config, seed=0, name=name).to(device)
    size, count = model.image_size, triggers * BATCH
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (BATCH, 3, size, size), dtype=torch.uint8, generator=generator)
    steps = IN_A_ROW[name] * (rounds + 1)
    search = InversionSearch(
        model,
        images,
        CollapseObjective(),
        # No search may converge and leave the batch.
        InversionConfig(steps=steps, batch_size=BATCH, precision=precision, patience=steps),
        restarts=triggers,
    )
    stamped = torch.randn(count, 3, size, size, generator=generator).to(device).requires_grad_()
    direction = torch.randn(count, model.embed_dim, generator=generator).to(device)
    images = images.to(device)
    tower = freeze(model.visual, precision)
    assert tower.patch_size is not None
    rows = to_patch_rows(stamped.detach(), tower.patch_size).to(tower.dtype).requires_grad_()

    def differentiate(run: Callable[[Tensor], Tensor], inputs: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(run(inputs), inputs, direction)

    others = {
        "tower": differentiate(tower, rows),
        "module": differentiate(model.encode_normalized, stamped),
        "gemm": products(model.visual, count, PRECISIONS[precision]),
    }
    if triggers == 1:
        # A copy: DECREE's gradients of the weights are not to slow down anybody else.
        decree = Decree(model.clone().visual, 3, size, model.mean, model.std, device=device)
        others["decree"] = lambda: decree.step(images)
    times: dict[str, list[float]] = {"step": [], **{which: [] for which in others}}

    def timed(which: str, run: Callable[[], object]) -> None:
        def several() -> None:
            for _ in range(IN_A_ROW[name]):
                run()

        times[which].append(once(several, device) / IN_A_ROW[name])

    def take_turns() -> None:
        for which, run in others.items():
            timed(which, run)

    def step() -> None:
        timed("step", search.step)

    step()
    take_turns()
    for measured in times.values():
        measured.clear()
    benchmark.pedantic(step, setup=take_turns, rounds=rounds)

    median = {which: statistics.median(measured) for which, measured in times.items()}
    benchmark.extra_info.update({f"{which}_seconds": value for which, value in median.items()})
    over = {which: median["step"] / median[which] for which in others}
    with capsys.disabled():
        print(
            f"\n\n{name}, {precision}, {size} px, batch {BATCH}, K = {triggers}, {THREADS} "
            f"threads: step {median['step'] * 1e3:.1f} ms"
        )
        for which, ratio in over.items():
            print(f"  {which:7} {median[which] * 1e3:8.1f} ms   the step is {ratio:.2f} of it")
    case = f"step_{name}" if name == "mini" else f"step_{name}_{short(precision)}"
    figures = {
        f"{case}.k{triggers}.over_module": over["module"],
        f"{case}.k{triggers}.overhead": over["tower"] - 1,
    }
    if "decree" in over:
        figures[f"{case}.vs_decree"] = 1 / over["decree"]
        if name != "mini":
            figures[f"{case}.over_gemm"] = over["gemm"]
    elif precision == "float32":
        figures[f"step_{name}.overhead"] = over["tower"] - 1
    for figure, value in figures.items():
        record(figure, value)
    missed = [figure for figure, value in figures.items() if holds(figure, value) is False]
    assert not missed


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["RN50", "efficientnet_lite0"])
def test_convolutional_tower(
    name: str,
    precision: str,
    benchmark: Any,
    capsys: pytest.CaptureFixture[str],
    device: torch.device,
) -> None:
    """The passes of a convolutional tower in a search, against those of its module."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    made = open_clip.create_model(name).visual if name == "RN50" else timm.create_model(name)
    module = made.eval().requires_grad_(False).to(device)
    tower = freeze(module, precision, image_size=224)
    images = torch.randn(4, 3, 224, 224).to(device)
    inputs = {"tower": images.to(tower.dtype).requires_grad_(), "module": images.requires_grad_()}
    runs = {"tower": tower, "module": module}
    times: dict[str, list[float]] = {"tower": [], "module": []}

    def timed(which: str) -> None:
        def both() -> None:
            torch.autograd.grad(runs[which](inputs[which]).sum(), inputs[which])

        times[which].append(once(both, device))

    for which in runs:
        timed(which)
        times[which].clear()
    benchmark.pedantic(lambda: timed("tower"), setup=lambda: timed("module"), rounds=5)
    median = {which: statistics.median(measured) for which, measured in times.items()}
    ratio = median["tower"] / median["module"]
    with capsys.disabled():
        print(f"\n\n{name}, 4 images, {THREADS} threads: {ratio:.2f} of its module's passes")
        print(f"  {tower.description}")
    record(f"conv_{name.lower()}_{short(precision)}.over_module", ratio)


def short(precision: str) -> str:
    return {"float32": "fp32", "bfloat16": "bf16"}[precision]
