"""What is measured, in order of value, and which bounds the figures have to keep."""

from __future__ import annotations

from dataclasses import dataclass

#: Seconds for everything; what does not fit is left out and listed.
LIMIT = 530.0
#: The share that proving correctness may take of them; timing begins then, alone on the machine.
CORRECTNESS_SHARE = 0.4
#: Kept free at the end for the table and the logs.
RESERVE = 4.0


@dataclass(frozen=True)
class Stage:
    """A group of figures, measured together.

    Attributes:
        name: Also of the module `benchmarks.gpu.NAME` or of a function in it; see `stages`.
        about: What is measured, in words.
        expected: Seconds that it takes on an H100; it is left out when less is left.
        limit: Seconds after which its process is stopped; the next stages get a new one.
    """

    name: str
    about: str
    expected: float
    limit: float


STAGES = (
    Stage("ceilings", "what the device can do: copies and matrix products", 10, 40),
    Stage("operators", "every operator against a copy of the bytes it must move", 50, 120),
    Stage("steps", "a step of the search on ViT-B-32", 35, 90),
    Stage("graphs", "steps as CUDA graphs: results and times, with and without", 25, 90),
    Stage("decree", "DECREE's loop, one trigger at a time", 10, 60),
    Stage("demo", "the demo's suspects: verdicts of this device and of the CPU", 40, 120),
    Stage("scan_b32", "a scan of ten classes, two families, 150 steps on ViT-B-32", 25, 90),
    Stage("memory", "work that does not fit: it goes on with less at once", 10, 60),
    Stage("unlearning", "a trigger vector and the search for alpha on ViT-B-32", 20, 60),
    Stage("precision", "TF32 in prediction and training: time, and what it changes", 10, 60),
    Stage("attention", "the attention kernels that torch can choose from", 20, 60),
    Stage("profile", "where the time of a step goes", 15, 60),
    Stage("steps_l14", "a step of the search on ViT-L-14", 30, 90),
    Stage("scan_l14", "a scan of ten classes, two families, 150 steps on ViT-L-14", 110, 220),
    Stage("compiled", "torch.compile of the plain code, beside the operators", 60, 150),
    Stage("sharing", "a scan of six ViT-B-32 with one, two and three workers", 70, 180),
)

#: Figure: (`<=` or `>=`, bound), for one NVIDIA H100. A figure that misses is published as it is.
BOUNDS: dict[str, tuple[str, float]] = {
    **{
        f"stamp_{layout}.{direction}_of_copy": (">=", 0.8)
        for layout in ("f32", "rows32_bf16", "rows32_bf16_k64", "rows14_bf16")
        for direction in ("forward", "backward")
    },
    **{f"update_k{count}.of_copy": (">=", 0.75) for count in (8, 64)},
    **{
        f"{operator}_{dtype}.of_copy": (">=", 0.7)
        for operator in ("gram8", "project16", "sketch4096", "apply")
        for dtype in ("float32", "bfloat16")
    },
    "step_b32_bf16_k10.over_products": ("<=", 1.7),
    "step_b32_bf16_k10_graph.over_products": ("<=", 1.4),
    "step_b32_bf16_k10.vs_decree": (">=", 10.0),
    "demo.verdicts_equal": (">=", 1.0),
    "memory.search.goes_on": (">=", 1.0),
    "memory.prediction.goes_on": (">=", 1.0),
    "memory.training.goes_on": (">=", 1.0),
    "scan_b32.seconds": ("<=", 6.0),
    "scan_l14.seconds": ("<=", 90.0),
}


def holds(figure: str, value: float) -> bool | None:
    """Whether a figure keeps its bound; None if it has none."""
    if figure not in BOUNDS:
        return None
    sign, bound = BOUNDS[figure]
    return value <= bound if sign == "<=" else value >= bound
