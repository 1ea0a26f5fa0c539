"""The options that several commands share.

Defaults stand here as numbers, not taken from the configuration classes, because those need torch;
a test keeps the two equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from .formats import COUNT as COUNT
from .formats import FILE as FILE
from .formats import format_option as format_option
from .formats import lora_rank_of as lora_rank_of
from .formats import output_format_options as output_format_options
from .formats import output_option as output_option
from .formats import report_option as report_option
from .formats import run_format_option as run_format_option
from .formats import table_format_option as table_format_option

F = TypeVar("F", bound=Callable[..., Any])
Decorator = Callable[[F], F]

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
    "--seed", type=SEED, default=0, metavar="N", help="The seed of all random choices."
)

_IMAGES = (
    "A few hundred clean images: a folder, a .npz, .csv, .tar or .parquet file, `digits`, "
    "`fashion-mnist`, or a data set of torchvision such as `cifar10=FOLDER`."
)

_about_images = _all(
    click.option(
        "--class-names",
        metavar="FILE|NAME",
        help="Text file with one class name per line, in the order of the labels, or the name of a "
        "list: `imagenet` and, with CLIP_benchmark, its data sets. Without it, the class names "
        "come with the images.",
    ),
    click.option(
        "--templates",
        metavar="FILE|NAME",
        help="Text file with one prompt per line, with {c} or {} in place of the class name, a "
        "JSON file with the prompts of each class, or the name of a list as for --class-names. "
        "Without it, built-in prompts are used.",
    ),
    click.option(
        "--max-images",
        type=COUNT,
        metavar="N",
        help="Size of a random sample of the images. Without it, all images are used.",
    ),
    click.option(
        "--resize",
        is_flag=True,
        show_default=False,
        help="Scale images of a .npz file that have another size (folders always are).",
    ),
    click.option(
        "--strict",
        is_flag=True,
        show_default=False,
        help="Refuse images of which something is left out that could have been meant: files that "
        "cannot be read, class folders without images.",
    ),
)


image_options = _all(
    click.option("--images", required=True, metavar="SPEC", help=_IMAGES), _about_images
)

#: Of commands that take text models as well.
data_options = _all(
    click.option("--images", metavar="SPEC", help=_IMAGES),
    click.option(
        "--texts",
        metavar="SPEC",
        help="For text models: a few hundred clean texts. A .jsonl or .csv file with `text` and "
        "`label`, a file with one text per line, or a folder with one folder of .txt files per "
        "class.",
    ),
    _about_images,
)

text_options = _all(
    click.option(
        "--max-texts",
        type=click.IntRange(min=4),
        metavar="N",
        help="For text models: the size of a random sample of the texts. Without it, 96.",
    ),
    click.option(
        "--trigger-length",
        type=click.IntRange(min=1, max=8),
        default=3,
        metavar="N",
        help="For text models: the largest number of tokens of a trigger.",
    ),
    click.option(
        "--place",
        type=click.Choice(["start", "end", "random", "after-first-sentence"]),
        default="start",
        help="For text models: where a trigger stands in a text.",
    ),
)

weights_key = click.option(
    "--weights-key",
    metavar="KEY",
    help="The set of weights that is meant, if a pickled file holds several: a key such as "
    "state_dict or ema/model, or . for the outermost dictionary.",
)


def _channels(
    ctx: click.Context, param: click.Parameter, value: Any
) -> tuple[float, float, float] | None:
    """Read one number or three, such as 0.5 or 0.48,0.46,0.41 (or a list, in --config)."""
    if value is None:
        return None
    parts = value if isinstance(value, list | tuple) else str(value).split(",")
    try:
        numbers = [float(part) for part in parts]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) == 1:
        numbers *= 3
    above = 0 if param.name == "image_std" else -math.inf
    if len(numbers) == 3 and all(above < x < math.inf for x in numbers):
        return numbers[0], numbers[1], numbers[2]
    raise click.BadParameter(f"{value!r}; expected such as 0.5 or 0.48,0.46,0.41", ctx, param)


model_options = _all(
    click.option(
        "--model",
        metavar="NAME|JSON",
        help="The architecture, if a checkpoint does not name it: open_clip's name, a JSON file, "
        "or a classifier: timm:NAME, torchvision:NAME or backdoorbench:NAME, with @SIZE if needed. "
        "Images are then prepared as for open_clip's pretrained weights of that name.",
    ),
    click.option(
        "--image-mean",
        callback=_channels,
        metavar="R,G,B",
        help="The mean of the images' channels, as one number or three. It overrides all other "
        "sources.",
    ),
    click.option(
        "--image-std",
        callback=_channels,
        metavar="R,G,B",
        help="The standard deviation of the images' channels. It overrides all other sources.",
    ),
    click.option(
        "--interpolation",
        type=click.Choice(["bicubic", "bilinear", "nearest", "lanczos"]),
        help="The filter that scales images. It overrides all other sources.",
    ),
    click.option(
        "--resize-mode",
        type=click.Choice(["shortest", "longest", "squash"]),
        help="How images become square: scale the shorter side and crop, scale the longer side and "
        "pad, or scale both sides. It overrides all other sources.",
    ),
    weights_key,
    click.option(
        "--offline",
        is_flag=True,
        show_default=False,
        help="Use only files on this machine, and open no connection.",
    ),
)

presets = _all(
    click.option(
        "--quick",
        is_flag=True,
        show_default=False,
        help="Take less time and find less: smaller values of the options for the search and the "
        "repair. An option that is given explicitly wins.",
    ),
    click.option(
        "--thorough",
        is_flag=True,
        show_default=False,
        help="Take more time and find more: larger values of these options.",
    ),
)


def apply_preset(given: dict[str, Any], *presets: Mapping[str, Mapping[str, Any]]) -> None:
    """Take the flags of `presets` out of the options, and set what they stand for.

    presets: By the name of the flag, the values of options. Options that were given keep theirs.
    Raises click.UsageError for both flags.
    """
    ctx = click.get_current_context()
    chosen = [name for name in ("quick", "thorough") if given.pop(name)]
    if len(chosen) > 1:
        raise click.UsageError("--quick and --thorough exclude each other", ctx)
    for name in chosen:
        for preset in presets:
            for key, value in preset[name].items():
                if ctx.get_parameter_source(key) in (None, ParameterSource.DEFAULT):
                    given[key] = value


def _families(ctx: click.Context, param: click.Parameter, value: Any) -> tuple[str, ...]:
    """Read families of triggers, such as patch,blend (or a list, in --config)."""
    names = tuple(value) if isinstance(value, list | tuple) else tuple(str(value).split(","))
    if not names or len(set(names)) < len(names) or not set(names) <= {"patch", "blend"}:
        raise click.BadParameter(f"{value!r}; expected patch, blend or patch,blend", ctx, param)
    return names


families = click.option(
    "--families",
    type=click.UNPROCESSED,
    callback=_families,
    default="patch,blend",
    metavar="NAMES",
    help="The families of triggers to search for: patch, blend or both.",
)

search_options = _all(
    click.option(
        "--steps",
        type=COUNT,
        default=150,
        metavar="N",
        help="The largest number of steps of each search.",
    ),
    click.option(
        "--batch-size",
        type=COUNT,
        default=16,
        metavar="N",
        help="The number of images in a step of a search.",
    ),
    click.option(
        "--precision",
        type=click.Choice(["auto", "float32", "bfloat16"]),
        default="auto",
        help="The precision of the image tower in a search. auto is bfloat16 for a vision "
        "transformer on a GPU that has it, else float32.",
    ),
    seed,
)

objective = click.option(
    "--objective",
    type=click.Choice(["targeted", "label-free"]),
    default="targeted",
    help="Search for a trigger into each class, or for one that sends all images in one direction. "
    "Without it, images in one folder without class names are searched label-free.",
)


def choose_objective(given: dict[str, Any]) -> None:
    """Search label-free where nobody said otherwise and the images have no class names.

    This is said on stderr.
    """
    from ..data import ImageSource

    source = click.get_current_context().get_parameter_source("objective")
    if source not in (None, ParameterSource.DEFAULT) or given["class_names"] is not None:
        return
    if ImageSource(given["images"]).is_unnamed():
        given["objective"] = "label-free"
        click.echo(
            f"{given['images']} has no class names, so the search is label-free: for one trigger "
            "that sends all images in one direction. With --class-names FILE, which needs no "
            "labels, it looks for one into each class, and tells which one a backdoor leads to",
            err=True,
        )
    if given["objective"] == "label-free" and click.get_current_context().params.get("quick"):
        click.echo(
            "the steps of --quick may be too few for a label-free search: if no trigger works in "
            "the references, there is no verdict",
            err=True,
        )


def restarts(text: str) -> Callable[[F], F]:
    """Return the option --restarts; text: what there are N of."""
    return click.option(
        "--restarts", type=COUNT, default=1, metavar="N", help=f"Searches {text}; the best counts."
    )


def rate_or_auto(ctx: click.Context, param: click.Parameter, value: Any) -> float | None:
    """Read a learning rate; None for `auto`."""
    if value is None or value == "auto":
        return None
    try:
        return float(RATE.convert(value, param, ctx))
    except click.BadParameter as error:
        raise click.BadParameter(f"{value!r}; expected auto, or 0 < X <= 1", ctx, param) from error


base_model = click.option(
    "--base-model",
    metavar="NAME|JSON",
    help="The architecture of --base, if it does not name its own and --model is another one.",
)

calibration_options = _all(
    click.option(
        "--base",
        metavar="REF",
        help="A clean model to compare with, at best the one that the suspects were fine-tuned "
        "from.",
    ),
    base_model,
    click.option(
        "--reference-model",
        "reference_models",
        multiple=True,
        metavar="REF",
        help="A clean model that was made as the suspects were. Give at least two; they replace "
        "the copies of --base. With --base, the search looks for triggers that do not work in"
        " the base.",
    ),
    click.option(
        "--calibration",
        "calibration_file",
        type=FILE,
        metavar="FILE",
        help="A calibration that `scan --save-calibration` wrote, to compare with. If it was made "
        "in contrast to a base, give this --base as well.",
    ),
    click.option(
        "--references",
        type=click.IntRange(min=2),
        default=3,
        metavar="N",
        help="With --base alone: the number of clean models to compare with. They are copies of "
        "the base that are fine-tuned on the images, as many at each of the two distances around "
        "that of the suspect.",
    ),
    click.option(
        "--reference-learning-rate",
        callback=rate_or_auto,
        default="auto",
        metavar="X|auto",
        help="With --base alone: the learning rate of this fine-tuning. auto fine-tunes each copy "
        "until its weights have moved about as far from the base as those of the suspect.",
    ),
    click.option(
        "--reference-epochs",
        type=COUNT,
        metavar="N",
        help="With --reference-learning-rate: the number of epochs of this fine-tuning, about as "
        "many as for a suspect. Without it, 3.",
    ),
    click.option(
        "--positive-control",
        is_flag=True,
        show_default=False,
        help="Plant a patch in a copy of a model that is found clean, scan the copy, and say "
        "whether the scan finds it. This doubles the time of a clean model.",
    ),
    click.option(
        "--keep-all",
        is_flag=True,
        show_default=False,
        help="Search all classes to the end, including those that can no longer be the outlier.",
    ),
)

device = click.option(
    "--device", default="cpu", metavar="NAME", help="Where to compute: cpu, cuda or cuda:1."
)

machine_options = _all(
    click.option(
        "--threads",
        type=COUNT,
        metavar="N",
        help="The number of CPU threads. Without it, torch decides.",
    ),
    device,
)
