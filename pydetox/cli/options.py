"""The options that several commands share.

Defaults stand here as numbers, not taken from the configuration classes, because those need torch;
a test keeps the two equal.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])
Decorator = Callable[[F], F]

FILE = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)
SEED = click.IntRange(min=0, max=2**32 - 1)
RATE = click.FloatRange(min=0, min_open=True, max=1)


def _all(*decorators: Callable[[Any], Any]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        decorated: Any = function
        for decorator in reversed(decorators):
            decorated = decorator(decorated)
        result: F = decorated
        return result

    return decorate


seed = click.option(
    "--seed", type=SEED, default=0, metavar="N", help="Seed of all random choices; 0 or above."
)

image_options = _all(
    click.option(
        "--images",
        required=True,
        metavar="SPEC",
        help="Clean images, a few hundred: a folder, a .npz file, `digits` or `fashion-mnist`.",
    ),
    click.option(
        "--class-names",
        type=FILE,
        metavar="FILE",
        help="Text file with one class name per line, in the order of the labels. "
        "Without it, the names that the images bring.",
    ),
    click.option(
        "--templates",
        type=FILE,
        metavar="FILE",
        help="Text file with one prompt per line, the class name as {c} or {}. "
        "Without it, built-in prompts.",
    ),
    click.option(
        "--max-images",
        type=COUNT,
        metavar="N",
        help="Use a random sample of that many images. Without it, all of them.",
    ),
    click.option(
        "--resize",
        is_flag=True,
        show_default=False,
        help="Scale and crop images of a .npz file that have another size (folders always are).",
    ),
)

model_options = _all(
    click.option(
        "--model",
        metavar="NAME|JSON",
        help="Architecture, where a checkpoint does not tell: open_clip's name or a JSON file.",
    ),
    click.option(
        "--offline",
        is_flag=True,
        show_default=False,
        help="Use only what is on this machine; open no connection.",
    ),
)

search_options = _all(
    click.option(
        "--steps", type=COUNT, default=150, metavar="N", help="Steps of each search, at most."
    ),
    click.option(
        "--batch-size", type=COUNT, default=16, metavar="N", help="Images in a step of a search."
    ),
    click.option(
        "--precision",
        type=click.Choice(["auto", "float32", "bfloat16"]),
        default="auto",
        help="Number format of the image tower in a search: auto is bfloat16 for a vision "
        "transformer on a GPU that has it, else float32.",
    ),
    seed,
)

objective = click.option(
    "--objective",
    type=click.Choice(["targeted", "label-free"]),
    default="targeted",
    help="Look for a trigger into each class, or for one that makes all images alike.",
)


def restarts(text: str) -> Callable[[F], F]:
    """Return the option --restarts; text: what there are N of."""
    return click.option(
        "--restarts", type=COUNT, default=1, metavar="N", help=f"Searches {text}; the best counts."
    )


calibration_options = _all(
    click.option(
        "--base",
        metavar="REF",
        help="A clean model to compare with: the one the suspects were fine-tuned from, at best.",
    ),
    click.option(
        "--reference-model",
        "reference_models",
        multiple=True,
        metavar="REF",
        help="A clean model made as the suspects were, to compare with instead of copies of "
        "--base; at least 2. With --base, triggers are searched that the base does not obey.",
    ),
    click.option(
        "--calibration",
        "calibration_file",
        type=FILE,
        metavar="FILE",
        help="Compare with a calibration that `scan --save-calibration` wrote. With --base, if it "
        "was made in contrast to that.",
    ),
    click.option(
        "--references",
        type=click.IntRange(min=2),
        default=3,
        metavar="N",
        help="With --base alone: clean models to compare with, it and N - 1 fine-tuned copies.",
    ),
    click.option(
        "--reference-epochs",
        type=COUNT,
        default=3,
        metavar="N",
        help="With --base alone: epochs of that fine-tuning, about as many as a suspect has had.",
    ),
    click.option(
        "--reference-learning-rate",
        type=RATE,
        default=1e-5,
        metavar="X",
        help="With --base alone: the learning rate of that fine-tuning.",
    ),
    click.option(
        "--keep-all",
        is_flag=True,
        show_default=False,
        help="Search all classes to the end, also those that can no longer be the outlier.",
    ),
)

device = click.option(
    "--device", default="cpu", metavar="NAME", help="Where to compute: cpu, cuda or cuda:1."
)

machine_options = _all(
    click.option(
        "--threads", type=COUNT, metavar="N", help="CPU threads. Without it, torch decides."
    ),
    device,
)

format_option = click.option(
    "--format",
    "format_",
    type=click.Choice(["text", "json"]),
    default="text",
    help="Format of the result on stdout.",
)

run_format_option = click.option(
    "--format",
    "format_",
    type=click.Choice(["text", "json", "sarif", "html"]),
    default="text",
    help="Format of the result on stdout.",
)

report_option = click.option(
    "--report", type=FILE, metavar="FILE", help="Write a report as one HTML file, too."
)
