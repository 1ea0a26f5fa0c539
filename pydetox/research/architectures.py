"""Every architecture of open_clip, tried: equal to open_clip's embeddings, searched, written back.

The weights are random, and models are cut in depth (`cut_models`), so that each takes seconds: what
is compared is names, shapes, order of operations and preprocessing.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..checkpoints import Provenance, load_checkpoint, save_checkpoint
from ..checkpoints.architecture import named_config
from ..checkpoints.preprocessing import preparation_of
from ..data import ImageSet
from ..errors import DataError, explain
from ..evaluation import evaluate
from ..inversion import CollapseObjective, InversionConfig, invert
from ..models import OpenClipModel
from ..models.building import NoRandomNumbers, build
from ..repair.configuration import UnlearnConfig
from ..repair.subtraction import subtract
from ..repair.trigger_vector import trigger_vector
from .cut_models import cut, fill, images_of, stand_in_of, token_ids, without_the_hub

_NAMES = ("cat", "dog", "owl")
_PROMPTS = ("a photo of a cat", "two dogs")
#: Half of the architectures need it. Where it is not installed, it is left out.
_SLOW_IMPORT = "transformers.models.auto.tokenization_auto"
#: Embeddings that are the same in float32 up to rounding have at least this cosine.
LEAST_COSINE = 1 - 1e-5


@dataclass(frozen=True)
class Measured:
    """What was measured of one architecture.

    Attributes:
        image_cosine: The smallest cosine of an image's embedding with the library's own.
        text_cosine: The same of texts of random tokens; None without a text tower.
        searched: Whether a step of a label-free search ran.
        written_back: Whether what the library reads from the written folder gives equal
            embeddings.
        tower: What the search ran on.
        parameters: Of the model as it was measured.
        seconds: Of everything.
        problem: What went wrong, in one line; None if nothing did.
        evaluated: Whether images were classified by class names; None without a text tower or a
            tokenizer.
        unlearned: Whether a trigger vector was made and subtracted, and the result is what was
            written back.
        cut: What was left out of the model, such as ``images 2/24, texts 2/12``.
        stand_in: Whether a small tokenizer stood for one of the hub.
        gibibytes: The most memory that its process had.
    """

    image_cosine: float
    text_cosine: float | None
    searched: bool
    written_back: bool
    tower: str
    parameters: int
    seconds: float
    problem: str | None = None
    evaluated: bool | None = None
    unlearned: bool | None = None
    cut: str = ""
    stand_in: bool = False
    gibibytes: float = 0.0

    def in_words(self) -> str:
        """Return the result in a few words."""
        if self.problem is not None:
            return f"fails: {self.problem}"
        texts = "" if self.text_cosine is None else f", texts {self.text_cosine:.6f}"
        done = ["evaluated"] if self.evaluated else []
        done += ["searched", *(["unlearned"] if self.unlearned else []), "written back"]
        small = f" (cut: {self.cut})" if self.cut else ""
        return f"images {self.image_cosine:.6f}{texts}, {', '.join(done)}{small}"


def read_rows(path: Path) -> dict[str, Measured]:
    """Return the rows of an earlier, perhaps interrupted, run: name to what was measured.

    path: A file of JSON lines as `write_row` makes it. It need not exist. Raises DataError if it
    is something else.
    """
    if not path.exists():
        return {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is no file of rows of an earlier run ({error})") from error
    found = {}
    for number, line in enumerate(lines, start=1):
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
    context.set_forkserver_preload([__name__, f"{__package__}.transformers_models", _SLOW_IMPORT])
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        try:
            return executor.submit(measure, name).result()
        except BrokenProcessPool as error:
            raise DataError(
                f"{name}: the process that measured it was ended; if memory was short, try again "
                "where more is free"
            ) from error


def measure_model(name: str) -> Measured:
    """Compare an architecture of open_clip with what is read of a file of its weights.

    What is written back is read by open_clip's own ``create_model_and_transforms``.
    """
    start = time.perf_counter()
    try:
        return _measure(name, start)
    except Exception as error:  # noqa: BLE001 - a row of the table, whatever it was
        line = explain(error)
        if line is None:
            line = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return Measured(0.0, None, False, False, "", 0, time.perf_counter() - start, line)


def _measure(name: str, start: float) -> Measured:
    whole = named_config(name)
    with cut(whole) as made, tempfile.TemporaryDirectory(prefix="pydetox-models-") as place:
        config, text = made.config, made.config["text_cfg"]
        theirs: Any = build(config, None, name).eval().requires_grad_(False)
        fill(theirs, name)
        first, second = Path(place) / "first", Path(place) / "second"
        files = stand_in_of(text)
        given: dict[str, Any] = {
            "model_config": config,
            "preprocess_config": preparation_of(name).config or None,
            "provenance": Provenance(method="random weights"),
            "companions": files,
        }
        save_checkpoint(first, theirs.state_dict(), **given)
        model = OpenClipModel.from_checkpoint(load_checkpoint(first), consume=True)
        shutil.rmtree(first)
        shown = images_of(name, model.image_size)
        normalized, tokens = model.normalize(model.pixels(shown)), token_ids(name, text)
        with torch.no_grad():
            images = cosine(model.encode_normalized(normalized), _embed(theirs, normalized))
            texts = cosine(model.encode_tokens(tokens), theirs.encode_text(tokens))
        del theirs
        wants_files = bool(text.get("hf_tokenizer_name"))
        tried = try_out(model, shown, has_tokenizer=bool(files) or not wants_files)
        model = tried.model
        save_checkpoint(second, model.storage_state_dict(), **given)
        with NoRandomNumbers(), without_the_hub(config, second):
            again: Any
            again, _, _ = open_clip.create_model_and_transforms(f"local-dir:{second}")
            if tried.evaluated:
                words = open_clip.get_tokenizer(f"local-dir:{second}")(list(_PROMPTS))
        if tried.evaluated and not torch.equal(words, model.tokenize(_PROMPTS)):
            raise DataError(f"{name}: open_clip's tokenizer gives other tokens")
        again.eval()
        with torch.no_grad():
            back = min(
                cosine(_embed(again, normalized), model.encode_normalized(normalized)),
                cosine(again.encode_text(tokens), model.encode_tokens(tokens)),
            )
    found = tried.measured(images, texts, back, time.perf_counter() - start)
    return replace(found, cut=made.words, stand_in=bool(files) and bool(tried.evaluated))


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
            gibibytes=_most_memory(),
        )


def _most_memory() -> float:
    """Return the most memory that this process had, in GiB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, else KiB


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
        evaluate(model, ImageSet(images, torch.arange(len(images)), _NAMES), head, batch_size=2)
        evaluated = True  # it ran to its end; random weights give no accuracy to compare with
    config = UnlearnConfig(steps=1, batch_size=1, retention=0.0)
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
