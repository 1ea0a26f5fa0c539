"""The model card (README.md) of a written checkpoint.

Names and metrics may come from a stranger's file. They are shown as code spans, in which Markdown
has no meaning, with control characters escaped, so that no link, image or HTML can be smuggled into
a page that renders the card.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from pydetox.checkpoints.provenance import Provenance

_FRONT_MATTER = """---
library_name: {library}
pipeline_tag: {task}
tags:
- {tag}
- pydetox
---
"""

#: For each kind of text model: the task of its card, and the class that loads it.
_TEXT_MODELS = {
    "classifier": ("text-classification", "AutoModelForSequenceClassification"),
    "causal": ("text-generation", "AutoModelForCausalLM"),
    "tower": ("feature-extraction", "CLIPTextModelWithProjection"),
}


#: For each library: the name of its weights file, and how it loads a folder.
_LIBRARIES = {
    "open_clip": (
        "open_clip_model.safetensors",
        (
            "import open_clip",
            "",
            'model, preprocess = open_clip.create_model_from_pretrained("local-dir:THIS_FOLDER")',
        ),
    ),
    "pydetox": (
        "open_clip_model.safetensors",
        (
            "from pydetox.session import as_model",
            "",
            'model = as_model("THIS_FOLDER")  # model.visual is the image tower',
        ),
    ),
    "transformers": (
        "model.safetensors",
        (
            "from transformers import {model}, {processor}",
            "",
            'model = {model}.from_pretrained("THIS_FOLDER")',
            'processor = {processor}.from_pretrained("THIS_FOLDER")',
        ),
    ),
}

#: Of a model in transformers' layout: the classes that load model and processor.
_CLASSES = {
    "clip": ("CLIPModel", "CLIPProcessor"),
    "siglip": ("SiglipModel", "SiglipProcessor"),
    "siglip2": ("Siglip2Model", "Siglip2Processor"),
    "altclip": ("AltCLIPModel", "AltCLIPProcessor"),
    "chinese_clip": ("ChineseCLIPModel", "ChineseCLIPProcessor"),
    "clip_vision_model": ("CLIPVisionModelWithProjection", "CLIPImageProcessor"),
}


def code_span(text: object, *, in_table: bool = False) -> str:
    """``text`` as an inert Markdown code span of one line (CommonMark 0.31, section 6.1)."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    if in_table:
        shown = shown.replace("|", "\\|")  # the one character that tables see even inside code
    # Spaces keep backticks at the ends apart from the fence, and an empty span from being no span
    # at all.
    padded = shown if shown.strip(" ") and "`" not in shown else f" {shown} "
    fence = "`" * (longest + 1)
    return f"{fence}{padded if shown else ' '}{fence}"


def model_card(
    title: str,
    provenance: Provenance,
    architecture: Mapping[str, object],
    *,
    library: str = "open_clip",
) -> str:
    """Write a model card: what was done, from what, and what it changed.

    Args:
        title: Name of the checkpoint, usually of its folder.
        provenance: How it was made.
        architecture: Its model configuration (open_clip's ``model_cfg``).
        library: Whose layout the folder has: `open_clip`, `transformers`, or `pydetox` for image
            towers alone under open_clip's names.
    """
    weights_name, use = _LIBRARIES[library]
    model, processor = _CLASSES.get(str(architecture.get("layout", "clip")), _CLASSES["clip"])
    front = _FRONT_MATTER.format(library=library, task="zero-shot-image-classification", tag="clip")
    lines = [line.format(model=model, processor=processor) for line in use]
    return front + _card(title, provenance, architecture, weights_name, lines)


def text_model_card(
    title: str, provenance: Provenance, config: Mapping[str, object], *, kind: str
) -> str:
    """Write the model card of a text model in transformers' layout.

    Args:
        title: Name of the checkpoint, usually of its folder.
        provenance: How it was made.
        config: The content of its ``config.json``.
        kind: ``classifier``, ``causal`` or ``tower``.
    """
    task, model = _TEXT_MODELS[kind]
    front = _FRONT_MATTER.format(library="transformers", task=task, tag="text")
    use = [
        f"from transformers import AutoTokenizer, {model}",
        "",
        f'model = {model}.from_pretrained("THIS_FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
    ]
    return front + _card(title, provenance, config, "model.safetensors", use)


def _card(
    title: str,
    provenance: Provenance,
    architecture: Mapping[str, object],
    weights_name: str,
    use: Sequence[str],
) -> str:
    """Return a card without its front matter."""
    coefficient = provenance.scaling_coefficient
    recipe = [
        ("Method", provenance.method),
        ("Source checkpoint", provenance.source_name),
        ("SHA-256 of the source's weights", provenance.source_sha256),
        ("Scaling coefficient α", None if coefficient is None else repr(coefficient)),
        *((f"Seed of {code_span(name)}", n) for name, n in sorted(provenance.seeds.items())),
        *((code_span(name), _short(value)) for name, value in sorted(provenance.extra.items())),
        ("pydetox version", provenance.pydetox_version),
    ]
    lines = [
        f"# Model card for {code_span(title)}",
        "",
        f"Written by pydetox. The same recipe is in the metadata of `{weights_name}`.",
        "",
        "## Recipe",
        "",
        *(f"- {label}: {code_span(value)}" for label, value in recipe if value is not None),
        "",
    ]
    names = sorted({*provenance.before, *provenance.after})
    if names:
        lines += ["## Before and after", "", "| metric | before | after |", "|---|---|---|"]
        for name in names:
            before, after = (
                _number(provenance.before.get(name)),
                _number(provenance.after.get(name)),
            )
            lines.append(f"| {code_span(name, in_table=True)} | {before} | {after} |")
        lines.append("")
    lines += [
        "## Use",
        "",
        "```python",
        *use,
        "```",
        "",
        "## Architecture",
        "",
        code_span(_short(architecture, limit=4000)),
        "",
    ]
    return "\n".join(lines)


def _short(value: object, limit: int = 400) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= limit else f"{text[:limit]}…"


def _number(value: object) -> str:
    return "" if value is None else code_span(value, in_table=True)
