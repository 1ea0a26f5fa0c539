"""The page docs/models.md: what was measured of every architecture, in tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import open_clip

from ..checkpoints.classifier_names import BACKDOORBENCH
from ..checkpoints.transformers_layouts import LAYOUTS
from ..models.catalogue import ListedModel
from .architectures import Measured
from .cut_models import FEW_TOKENS, LAYERS, MOST_TOKENS


def _transformers_section(measured: Mapping[str, Measured]) -> list[str]:
    """Return the lines of the page about models that are not open_clip's."""
    classes = [(name, layout) for layout in LAYOUTS.values() for name in layout.classes]
    known = [name for name, _ in classes if name in measured]
    equal = sum(measured[name].problem is None for name in known)
    lines = [
        "## Models of transformers",
        "",
        "A folder with `config.json`, a processor's file and weights (`model.safetensors`, shards, "
        "or a `.bin`, which nothing unpickles) is read without transformers. A repaired model has "
        f"the same layout. Of {len(known)} classes that were measured, with the sizes that "
        f"transformers has by default, {equal} give transformers' own embeddings of images (and "
        "of texts, and are evaluated, where they have a text tower), are searched and unlearned "
        "for a step, and are written back as a folder that transformers reads with equal "
        "embeddings. They are cut, and get weights, texts and tokenizers, as said above. "
        "`tests/peers` also compares pixels.",
        "",
        "| class | images | texts | evaluated | unlearned | written back | cut | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, layout in classes:
        found = measured.get(name)
        texts = "" if layout.has_texts else "none"
        if found is None:
            row = ["read, not measured here", texts, *[""] * 5]
        elif found.problem is not None:
            row = [f"fails: {found.problem}", texts, *[""] * 4, f"{found.seconds:.1f}"]
        else:
            row = [f"{found.image_cosine:.6f}"]
            row += [texts if found.text_cosine is None else f"{found.text_cosine:.6f}"]
            row += [_evaluated(found), _yes(found.unlearned), _yes(found.written_back)]
            row += [found.cut, f"{found.seconds:.1f}"]
        lines.append("| " + " | ".join([f"`{name}`", *row]) + " |")
    return [
        *lines,
        "",
        "A model without texts is scanned label-free, or with a head of its own.",
        "",
        "A `Siglip2Model` takes images of any proportions. Here it takes square images of its "
        "largest size, and others are squashed.",
        "",
        "## Image towers and classifiers",
        "",
        "A file that holds an image tower alone (`visual.` and more, the same names without that "
        "prefix, or a model whose text transformer was deleted) is read with `--model`, and "
        "scanned with `--objective label-free`. Class names are needed nowhere.",
        "",
        "`--model timm:NAME`, `torchvision:NAME` and `backdoorbench:NAME` name a classifier, with "
        "`@SIZE` for images of another size, such as `timm:resnet18@32`. BackdoorBench's "
        "`attack_result.pt` and `defense_result.pt` are read as they are, and name their "
        f"architecture: {', '.join(f'`{name}`' for name in BACKDOORBENCH)}, or another of "
        "torchvision. The last layer is the head: class names must be those of the training, in "
        "its order. A repair leaves that layer as it is. A classifier whose answers are not those "
        "of one linear layer, or of a convolution of one pixel, is refused (distilled ones, "
        "CrossViT, VOLO, SqueezeNet).",
        "",
        "Images are prepared as timm's `create_transform` and the transform of torchvision's "
        "default weights do it for this name: scaled, and the middle cut out. The weights in a "
        "file need not be those, and therefore a warning names the values. `--resize-mode` takes "
        "the cut away. Arrays and pictures that have the model's size are neither scaled nor cut. "
        "For `torchvision:NAME@SIZE` with a size of your own, the shorter side is scaled to SIZE.",
        "",
    ]


def _yes(done: bool | None) -> str:
    return "" if done is None else "yes" if done else "no"


def _evaluated(found: Measured) -> str:
    return "yes, stand-in" if found.stand_in else _yes(found.evaluated)


def markdown_page(models: Sequence[ListedModel], measured: Mapping[str, Measured]) -> str:
    """Return the page that docs/models.md is."""
    count = sum(one.obstacle is None for one in models)
    ours = {one.name: measured[one.name] for one in models if one.name in measured}
    equal = sum(one.problem is None for one in ours.values())
    evaluated = sum(bool(one.evaluated) for one in ours.values())
    stand_ins = sum(one.stand_in for one in ours.values())
    unlearned = sum(bool(one.unlearned) for one in ours.values())
    most = max((one.gibibytes for one in measured.values()), default=0.0)
    seconds = sum(one.seconds for one in measured.values())
    lines = [
        "# Which models are read",
        "",
        f"open_clip {open_clip.__version__} has {len(models)} architectures; {count} of them are "
        "read. `pydetox models` lists them, and `pydetox models --measure --markdown FILE` wrote "
        "this page.",
        "",
        f"Of {len(ours)} that were measured, {equal} give open_clip's own embeddings of images and "
        "of texts (cosine at least 1 - 1e-5 in float32), are searched for a step, and are written "
        f"back as a folder that open_clip reads with equal embeddings. {evaluated} were evaluated, "
        f"and for {unlearned} a trigger vector was made in a step and subtracted from what is "
        f"written back. All rows of this page took {seconds / 60:.0f} minutes, and at most "
        f"{most:.1f} GiB of memory.",
        "",
        f"The weights are random, and models are cut to {LAYERS} layers in each transformer, and "
        f"{LAYERS} blocks in each stage of a ResNet, ConvNeXt, Swin or FastViT; the convolutions "
        "before the transformer of a ViTamin stay. A table of token embeddings with more than "
        f"{MOST_TOKENS:,} rows has {FEW_TOKENS}. Widths, heads, patches and sizes of images are "
        "whole. The column `cut` tells how many layers and rows of how many are left, as in "
        "`images 2/24`. What is left out repeats what is there, but this is no measurement of a "
        "whole model, and the seconds are those of the cut one.",
        "",
        "Texts are compared as random tokens. Images are evaluated with a tokenizer: CLIP's own, "
        f"or for {stand_ins} architectures a stand-in of a few words, beside the weights, for one "
        "of the hub (`yes, stand-in`); open_clip reads the same tokens with it. In use, such a "
        "model needs transformers, and its tokenizer beside the weights or in the hub's cache; a "
        "label-free scan needs neither. Text towers of transformers (`roberta-base` and others) "
        "need transformers in any case; here open_clip gets their configurations from a folder, "
        "not from the hub.",
        "",
        *_transformers_section(measured),
        "## open_clip's architectures",
        "",
        "| architecture | pixels | resize mode | tokenizer | images | texts | searched in "
        "| evaluated | unlearned | cut | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in models:
        row = [f"`{one.name}`", str(one.image_size), str(one.preprocessing["resize_mode"])]
        row.append("CLIP's" if one.tokenizer is None else f"`{one.tokenizer}`")
        found = measured.get(one.name)
        if one.obstacle is not None:
            row += [f"not read: {one.obstacle}", *[""] * 6]
        elif found is None:
            row += ["read, not measured here", *[""] * 6]
        elif found.problem is not None:
            row += [f"fails: {found.problem}", *[""] * 5, f"{found.seconds:.1f}"]
        else:
            text = "" if found.text_cosine is None else f"{found.text_cosine:.6f}"
            tower = found.tower.split(",")[0].split(":")[0]
            row += [f"{found.image_cosine:.6f}", text, tower, _evaluated(found)]
            row += [_yes(found.unlearned), found.cut, f"{found.seconds:.1f}"]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join([*lines, ""])
