"""Every architecture of open_clip, tried: equal to open_clip's embeddings, searched, written back.

The weights are random, and transformers are cut to two layers, so that the largest fit into memory:
what is compared is names, shapes, order of operations and preprocessing.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..checkpoints import Provenance, load_checkpoint, save_checkpoint
from ..checkpoints.architecture import named_config
from ..checkpoints.classifier_names import BACKDOORBENCH
from ..checkpoints.preprocessing import preparation_of
from ..checkpoints.transformers_layouts import LAYOUTS
from ..data import ImageSet
from ..errors import ArchitectureError, DataError, explain
from ..evaluation import evaluate
from ..inversion import CollapseObjective, InversionConfig, invert
from ..models import OpenClipModel
from ..models.catalogue import ListedModel
from ..repair.configuration import UnlearnConfig
from ..repair.subtraction import subtract
from ..repair.trigger_vector import trigger_vector

_LAYERS = 2
#: Larger models, cut as they are, do not fit into 16 GiB of memory twice.
_MOST_WEIGHTS = 1_600_000_000
#: Larger image towers are not trained here: gradients and moments take three times as much again.
_MOST_TRAINED = 150_000_000
_NAMES = ("cat", "dog", "owl")
#: Embeddings that are the same in float32 up to rounding have at least this cosine.
LEAST_COSINE = 1 - 1e-5


@dataclass(frozen=True)
class Measured:
    """What was measured of one architecture.

    Attributes:
        image_cosine: The smallest cosine of an image's embedding with open_clip's.
        text_cosine: The same of texts; None where the tokenizer is not on this machine.
        searched: Whether a step of a label-free search ran.
        written_back: Whether what open_clip reads from the written folder gives equal embeddings.
        tower: What the search ran on.
        parameters: Of the model as it was measured.
        seconds: Of everything.
        problem: What went wrong, in one line; None if nothing did.
        skipped: Why nothing was measured; None if it was.
        evaluated: Whether images were classified by class names; None where the tokenizer is not
            on this machine or there are no texts.
        unlearned: Whether a trigger vector was made and subtracted, and the result is what was
            written back; None for an image tower that is too large to be trained here.
    """

    image_cosine: float
    text_cosine: float | None
    searched: bool
    written_back: bool
    tower: str
    parameters: int
    seconds: float
    problem: str | None = None
    skipped: str | None = None
    evaluated: bool | None = None
    unlearned: bool | None = None

    def in_words(self) -> str:
        """Return the result in a few words."""
        if self.problem is not None:
            return f"fails: {self.problem}"
        if self.skipped is not None:
            return self.skipped
        texts = "" if self.text_cosine is None else f", texts {self.text_cosine:.6f}"
        done = ["evaluated"] if self.evaluated else []
        done += ["searched", *(["unlearned"] if self.unlearned else []), "written back"]
        return f"images {self.image_cosine:.6f}{texts}, {', '.join(done)}"


def read_rows(path: Path) -> dict[str, Measured]:
    """Return the rows of an earlier, perhaps interrupted, run: name to what was measured.

    path: A file of JSON lines as `write_row` makes it. It need not exist. Raises DataError if it
    is something else.
    """
    if not path.exists():
        return {}
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            name = str(row.pop("name"))
            found[name] = Measured(**row)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}, line {number}: is no row of an earlier run; remove the file"
            ) from error
    return found


def write_row(path: Path, name: str, row: Measured) -> None:
    """Add a row to such a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"name": name, **asdict(row)}) + "\n")


def in_own_process(measure: Callable[[str], Measured], name: str) -> Measured:
    """Return what `measure` finds in a process of its own.

    What one model leaves behind takes no memory from the next. Raises DataError if the process
    was ended, as the system does when memory is short; that says nothing about the architecture.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        try:
            return executor.submit(measure, name).result()
        except BrokenProcessPool as error:
            raise DataError(
                f"{name}: the process that measured it was ended; if memory was short, try again "
                "where more is free"
            ) from error


def weights_of(name: str) -> int:
    """Return the number of weights of an architecture of open_clip as it is measured."""
    with torch.device("meta"):
        model = OpenClipModel.from_config(shortened(named_config(name)), seed=0, name=name)
    return model.num_parameters


def measure_model(name: str) -> Measured:
    """Build an architecture twice, by open_clip and from a file of its weights, and compare."""
    start = time.perf_counter()
    try:
        return _measure(name, start)
    except Exception as error:  # noqa: BLE001 - a row of the table, whatever it was
        line = explain(error)
        if line is None:
            line = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return Measured(0.0, None, False, False, "", 0, time.perf_counter() - start, line)


def shortened(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ``model_cfg`` whose transformers have at most two layers."""
    result = copy.deepcopy(dict(config))
    if result["text_cfg"].get("hf_model_name"):
        result["text_cfg"]["layers"] = _LAYERS
    for part in ("vision_cfg", "text_cfg", "multimodal_cfg"):
        layers = result.get(part, {}).get("layers")
        if isinstance(layers, int):
            result[part]["layers"] = min(layers, _LAYERS)
    return result


def _measure(name: str, start: float) -> Measured:
    config = shortened(named_config(name))
    weights = weights_of(name)
    if weights > _MOST_WEIGHTS:
        line = f"not measured: {weights / 1e9:.1f} billion weights, even so"
        return Measured(1.0, None, False, False, "", weights, 0.0, None, line)
    theirs = OpenClipModel.from_config(config, seed=0, name=name).clip
    size = int(config["vision_cfg"]["image_size"])
    pixels = torch.rand((2, 3, size, size), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory(prefix="pydetox-models-") as folder:
        first, second = Path(folder) / "first", Path(folder) / "second"
        given: dict[str, Any] = {
            "model_config": config,
            "preprocess_config": preparation_of(name).config or None,
            "provenance": Provenance(method="random weights"),
        }
        save_checkpoint(first, theirs.state_dict(), **given)
        model = OpenClipModel.from_checkpoint(load_checkpoint(first), consume=True)
        with torch.no_grad():
            normalized = model.normalize(pixels)
            images = cosine(model.encode_normalized(normalized), _embed(theirs, normalized))
        texts = _text_cosine(model, theirs)
        del theirs
        images_of_bytes = (pixels * 255).to(torch.uint8)
        tried = try_out(model, images_of_bytes, has_tokenizer=texts is not None)
        model = tried.model
        save_checkpoint(second, model.storage_state_dict(), **given)
        if config["text_cfg"].get("hf_model_name"):  # open_clip would ask the hub for the tower
            again: Any = OpenClipModel.from_checkpoint(load_checkpoint(second)).clip
        else:
            again, _, _ = open_clip.create_model_and_transforms(f"local-dir:{second}")
        with torch.no_grad():
            back = cosine(_embed(again.eval(), normalized), model.encode_normalized(normalized))
    return tried.measured(images, texts, back, time.perf_counter() - start)


@dataclass(frozen=True, eq=False)
class Tried:
    """A model after a step of a search, an evaluation and a step of unlearning.

    Attributes:
        model: The model, with a trigger vector subtracted if `unlearned`.
        tower: What the search ran on.
        evaluated: See `Measured`.
        unlearned: See `Measured`.
    """

    model: OpenClipModel
    tower: str
    evaluated: bool | None
    unlearned: bool | None

    def measured(self, images: float, texts: float | None, back: float, seconds: float) -> Measured:
        """Return what was measured, given the cosines of images, texts and the written folder."""
        problem = None
        if min(images, back, 1.0 if texts is None else texts) < LEAST_COSINE:
            problem = f"not equal: images {images:.6f}, texts {texts}, written back {back:.6f}"
        return Measured(
            images,
            texts,
            True,
            back >= LEAST_COSINE,
            self.tower,
            self.model.num_parameters,
            seconds,
            problem,
            evaluated=self.evaluated,
            unlearned=self.unlearned,
        )


def try_out(model: OpenClipModel, images: Tensor, *, has_tokenizer: bool) -> Tried:
    """Search for a step, classify images by class names, subtract a trigger vector of one step.

    images: uint8 [N, 3, H, W]. has_tokenizer: Whether texts can be made; otherwise random
    directions stand for the classes of the unlearning.
    """
    tower = invert(model, images, CollapseObjective(), InversionConfig(steps=1, batch_size=2)).tower
    evaluated: bool | None = None
    head = torch.randn((len(_NAMES), model.embed_dim), generator=torch.Generator().manual_seed(1))
    head = torch.nn.functional.normalize(head, dim=-1)
    if has_tokenizer:
        head = model.zero_shot_head(_NAMES, ("a photo of a {c}",))
        evaluate(
            model, ImageSet(images, torch.arange(len(images)), _NAMES), head, batch_size=len(images)
        )
        evaluated = True  # it ran to its end; random weights give no accuracy to compare with
    if sum(p.numel() for p in model.visual.parameters()) > _MOST_TRAINED:
        return Tried(model, tower, evaluated, None)
    config = UnlearnConfig(steps=1, batch_size=2, retention=0.0)
    vector = trigger_vector(model, images, [lambda x: 255 - x], head, 0, config)
    repaired = subtract(model, vector, 0.5)
    moved = 0 < vector.norm() < float("inf")
    return Tried(repaired, tower, evaluated, moved)


def _embed(clip: Any, normalized: Tensor) -> Tensor:
    found = clip.visual(normalized)
    result: Tensor = found[0] if isinstance(found, tuple) else found
    return result


def cosine(first: Tensor, second: Tensor) -> float:
    """Return the smallest cosine of rows [N, D] of both."""
    return float(cosine_similarity(first.double(), second.double()).min())


def _text_cosine(model: OpenClipModel, theirs: Any) -> float | None:
    try:
        tokens = model.tokenize(["a photo of a cat", "two dogs"])
    except ArchitectureError:
        return None  # its tokenizer is not on this machine
    with torch.no_grad():
        return cosine(model.encode_tokens(tokens), theirs.encode_text(tokens))


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
        f"transformers has by default, random weights and {_LAYERS} layers, {equal} give "
        "transformers' own embeddings of images and texts, are evaluated, searched and unlearned "
        "for a step, and are written back as a folder that transformers reads with equal "
        "embeddings. `tests/peers` also compares pixels.",
        "",
        "| class | images | texts | evaluated | unlearned | written back | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, layout in classes:
        found = measured.get(name)
        texts = "" if layout.has_texts else "none"
        if found is None:
            row = ["read, not measured here", texts, "", "", "", ""]
        elif found.problem is not None:
            row = [f"fails: {found.problem}", texts, "", "", "", f"{found.seconds:.1f}"]
        else:
            row = [f"{found.image_cosine:.6f}"]
            row += [texts if found.text_cosine is None else f"{found.text_cosine:.6f}"]
            row += [_yes(found.evaluated), _yes(found.unlearned), _yes(found.written_back)]
            row += [f"{found.seconds:.1f}"]
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
        "its order. A repair leaves that layer as it is.",
        "",
    ]


def _yes(done: bool | None) -> str:
    return "" if done is None else "yes" if done else "no"


def markdown_page(models: Sequence[ListedModel], measured: Mapping[str, Measured]) -> str:
    """Return the page that docs/models.md is."""
    count = sum(one.obstacle is None for one in models)
    measured = {name: one for name, one in measured.items() if one.skipped is None}
    ours = {one.name: measured[one.name] for one in models if one.name in measured}
    equal = sum(one.problem is None for one in ours.values())
    texts = sum(one.text_cosine is not None for one in ours.values())
    unlearned = sum(bool(one.unlearned) for one in ours.values())
    lines = [
        "# Which models are read",
        "",
        f"open_clip {open_clip.__version__} has {len(models)} architectures; {count} of them are "
        "read. `pydetox models` lists them, and `pydetox models --measure --markdown FILE` wrote "
        "this page.",
        "",
        f"Of {len(ours)} that were measured, with random weights and transformers cut to "
        f"{_LAYERS} layers, {equal} give open_clip's own embeddings (cosine at least 1 - 1e-5 in "
        "float32), are searched for a step, and are written back as a folder that open_clip "
        f"reads with equal embeddings. For {unlearned}, whose image towers have at most "
        f"{_MOST_TRAINED // 10**6} million weights, what is written back has a trigger vector "
        f"subtracted. Texts were compared, and images evaluated, for {texts}: the tokenizers of "
        "the others come from the hub. Such a model needs transformers, and its tokenizer beside "
        "the weights or in the hub's cache; a label-free scan needs neither. Text towers of "
        "transformers (`roberta-base` and others) need transformers in any case.",
        "",
        *_transformers_section(measured),
        "## open_clip's architectures",
        "",
        "| architecture | pixels | resize mode | tokenizer | images | texts | searched in "
        "| unlearned | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in models:
        row = [f"`{one.name}`", str(one.image_size), str(one.preprocessing["resize_mode"])]
        row.append("CLIP's" if one.tokenizer is None else f"`{one.tokenizer}`")
        found = measured.get(one.name)
        if one.obstacle is not None:
            row += [f"not read: {one.obstacle}", "", "", "", ""]
        elif found is None:
            row += ["read, not measured here", "", "", "", ""]
        elif found.problem is not None:
            row += [f"fails: {found.problem}", "", "", "", f"{found.seconds:.1f}"]
        else:
            text = "" if found.text_cosine is None else f"{found.text_cosine:.6f}"
            tower = found.tower.split(",")[0].split(":")[0]
            row += [f"{found.image_cosine:.6f}", text, tower, _yes(found.unlearned)]
            row += [f"{found.seconds:.1f}"]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join([*lines, ""])
