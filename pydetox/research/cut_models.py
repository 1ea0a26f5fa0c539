"""Models that are small enough to be tried in seconds: cut in depth, with random weights.

Layers repeat themselves, so two of them show whether names, shapes and the order of operations are
right. Widths, heads, patches and sizes of images stay as they are. A table of token embeddings
is cut where it has more than 100,000 rows: a row is looked up, whatever their number.
"""

from __future__ import annotations

import copy
import inspect
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ..checkpoints.layout import TOKENIZER_NAMES
from ..models import hub_towers
from ..rng import generator

LAYERS = 2
#: Larger tables of token embeddings are cut to `FEW_TOKENS` rows.
MOST_TOKENS = 100_000
FEW_TOKENS = 4096
_WORDS = ("a", "photo", "of", "cat", "dog", "owl", "two", "dogs")
_DEPTHS = ("num_hidden_layers", "num_layers", "encoder_layers")
#: A prime number, so that no two rows of a matrix repeat each other.
_POOL = 4_194_301


@dataclass(frozen=True)
class Cut:
    """A model that is cut.

    Attributes:
        config: open_clip's ``model_cfg``. It does not tell the depth of a tower of timm.
        words: What was cut, such as ``images 2/24, texts 2/12``; empty for nothing.
    """

    config: dict[str, Any]
    words: str


def shortened(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ``model_cfg`` whose own transformers have at most two layers.

    Stages of a ResNet have at most two blocks. Towers of timm stay as they are: see `cut`.
    """
    result = copy.deepcopy(dict(config))
    if result["text_cfg"].get("hf_model_name"):
        result["text_cfg"]["layers"] = LAYERS
    for part in ("vision_cfg", "text_cfg", "multimodal_cfg"):
        layers = result.get(part, {}).get("layers")
        if isinstance(layers, int):
            result[part]["layers"] = min(layers, LAYERS)
        elif isinstance(layers, list):
            result[part]["layers"] = [min(one, LAYERS) for one in layers]
    return result


@contextmanager
def cut(config: Mapping[str, Any]) -> Iterator[Cut]:
    """Yield a model that is cut; within the block, timm and the towers of transformers are so too.

    config: open_clip's ``model_cfg``, whole. Within the block, ``timm.create_model`` makes towers
    of at most two blocks (in each stage), for pydetox and open_clip alike.
    """
    result = shortened(config)
    said = []
    vision, text = config["vision_cfg"], config["text_cfg"]
    if vision.get("timm_model_name"):
        said.append(("images", _timm_depth(vision["timm_model_name"])[1]))
    else:
        said.append(("images", _as_tuple(vision.get("layers", 12))))
    towers = dict(hub_towers.CONFIGURATIONS)
    name = text.get("hf_model_name")
    if name:
        tower = towers[name]
        said.append(("texts", (next(int(tower[key]) for key in _DEPTHS if key in tower),)))
        tokens = int(tower["vocab_size"])
        if tokens > MOST_TOKENS:
            towers[name] = {**tower, "vocab_size": FEW_TOKENS}
    else:
        said.append(("texts", _as_tuple(text.get("layers", 12))))
        tokens = int(text.get("vocab_size", 0))
        if tokens > MOST_TOKENS:
            result["text_cfg"]["vocab_size"] = FEW_TOKENS
    if "multimodal_cfg" in config:
        said.append(("captions", _as_tuple(config["multimodal_cfg"].get("layers", 12))))
    words = [line for part, depth in said if (line := depth_in_words(part, depth))]
    if tokens > MOST_TOKENS:
        words.append(f"tokens {FEW_TOKENS}/{tokens}")
    with (
        patch.object(hub_towers, "CONFIGURATIONS", towers),
        patch.object(timm, "create_model", _create_cut),
    ):
        yield Cut(result, ", ".join(words))


def depth_in_words(part: str, depth: tuple[int, ...]) -> str:
    """Return how a tower of that many layers (in each stage) is cut; empty if it is not."""
    kept = tuple(min(one, LAYERS) for one in depth)
    if kept == depth:
        return ""
    return f"{part} {'+'.join(map(str, kept))}/{'+'.join(map(str, depth))}"


def _as_tuple(layers: Any) -> tuple[int, ...]:
    return tuple(layers) if isinstance(layers, (list, tuple)) else (int(layers),)


_create = timm.create_model


@cache
def _timm_depth(name: str) -> tuple[str, tuple[int, ...]]:
    """Return the argument of a model of timm that tells its depth, and its blocks in each stage."""
    with torch.device("meta"):
        trunk: Any = _create(name)
    known = inspect.signature(type(trunk).__init__).parameters
    keyword = next(one for one in ("depth", "depths", "layers") if one in known)
    if keyword == "depth":
        return keyword, (len(trunk.blocks),)
    stages = trunk.stages if hasattr(trunk, "stages") else trunk.layers
    return keyword, tuple(len(stage.blocks) for stage in stages)


def _create_cut(name: str, *args: Any, **kwargs: Any) -> Any:
    keyword, depth = _timm_depth(name)
    few = tuple(min(one, LAYERS) for one in depth)
    kwargs[keyword] = few[0] if keyword == "depth" else few
    return _create(name, *args, **kwargs)


def stream(name: str, purpose: str) -> np.random.Generator:
    """Return the random numbers of a model that is tried."""
    return generator("research.models", 0, name, purpose)


@torch.no_grad()
def fill(model: nn.Module, name: str) -> None:
    """Give weights random values, such that activations keep their size and nothing is zero.

    Libraries start biases at 0, norms at 1 and scales of layers near 0, which would hide an
    exchange of two of them. Numbers come from a pool, because a large model takes long to draw.
    A factor of logits stays as it is. name: Names the values.
    """
    rng = stream(name, "weights")
    pool = torch.from_numpy(rng.standard_normal(_POOL, dtype=np.float32))
    statistics = [
        b for b in model.named_buffers() if b[0].endswith(("running_mean", "running_var"))
    ]
    for key, tensor in (*model.named_parameters(), *statistics):
        if tensor.numel() == 1 or not tensor.is_floating_point():
            continue
        shape = [length for length in tensor.shape if length > 1]
        around = 0.0
        if len(shape) < 2:
            scale = 0.1
            around = 1.0 if key.endswith(("weight", "var")) or "gamma" in key else 0.0
        elif tensor.ndim < 4 and ("embed" in key or key.endswith("cls_token")):
            scale = 0.5  # of positions and tokens, as large as what is added to them
        else:
            scale = (shape[0] / tensor.numel()) ** 0.5
        flat, start, done = tensor.view(-1), int(rng.integers(_POOL)), 0
        while done < len(flat):
            part = pool[start : start + len(flat) - done]
            flat[done : done + len(part)] = part
            start, done = 0, done + len(part)
        flat.mul_(scale)
        if around:
            flat.add_(around).clamp_(min=0.5)


def images_of(name: str, size: int) -> Tensor:
    """Return two images uint8 [2, 3, size, size] that look different: coarse colours and noise."""
    rng = stream(name, "images")
    coarse = torch.from_numpy(rng.random((2, 3, 5, 5), dtype=np.float32))
    noise = torch.from_numpy(rng.random((2, 3, size, size), dtype=np.float32))
    smooth = interpolate(coarse, size=(size, size), mode="bilinear")
    return ((0.8 * smooth + 0.2 * noise) * 255).to(torch.uint8)


def _special(text: Mapping[str, Any]) -> tuple[int, int]:
    """Return the tokens that pad and end a text. text: open_clip's ``text_cfg``."""
    tower = hub_towers.CONFIGURATIONS.get(str(text.get("hf_model_name")))
    if tower is not None:
        return int(tower["pad_token_id"]), int(tower["eos_token_id"])
    return int(text.get("pad_id", 0)), int(text.get("eos_id", 2))


def token_ids(name: str, text: Mapping[str, Any]) -> Tensor:
    """Return random texts of three lengths as token ids int64 [3, context_length].

    text: open_clip's ``text_cfg``. Each text has an end, and the padding behind it.
    """
    pad, end = _special(text)
    length, known = int(text.get("context_length", 77)), hub_towers.vocabulary_of(text)
    if not text.get("hf_model_name") and text.get("pool_type", "argmax") == "argmax":
        end = known - 1
    tokens = torch.from_numpy(stream(name, "tokens").integers(3, known - 1, (3, length)))
    for row, stop in zip(tokens, (length - 1, length // 2, 3), strict=True):
        row[stop], row[stop + 1 :] = end, pad
    return tokens


def stand_in_tokenizer(pad: int = 1, end: int = 2) -> dict[str, bytes]:
    """Return the files of a tokenizer that knows a few words, by name.

    It stands for a tokenizer of the hub, and wants transformers. pad, end: The tokens that pad and
    end a text.
    """
    transformers: Any = import_module("transformers")
    tokenizers: Any = import_module("tokenizers")
    vocabulary = {"<pad>": pad, "</s>": end}
    free = iter(sorted(set(range(len(_WORDS) + 4)) - {pad, end}))
    vocabulary |= {token: next(free) for token in ("<s>", "<unk>", *_WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", vocabulary["<s>"]), ("</s>", end)]
    )
    names = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
    names |= {"pad_token": "<pad>", "unk_token": "<unk>"}
    with tempfile.TemporaryDirectory(prefix="pydetox-tokenizer-") as place:
        folder = Path(place)
        transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)
        return {
            one.name: one.read_bytes() for one in folder.iterdir() if one.name in TOKENIZER_NAMES
        }


def stand_in_of(text: Mapping[str, Any]) -> dict[str, bytes]:
    """Return such files for a ``text_cfg`` whose tokenizer comes from the hub; else none."""
    if not text.get("hf_tokenizer_name") or hub_towers.is_missing():
        return {}
    return stand_in_tokenizer(*_special(text))


@contextmanager
def without_the_hub(config: Mapping[str, Any], folder: Path) -> Iterator[None]:
    """Within the block, open_clip reads a written folder without asking the hub for its text tower.

    The folder's configuration names another folder then, which has the configuration of the tower.
    """
    if not config["text_cfg"].get("hf_model_name"):
        yield
        return
    path = folder / "open_clip_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    with hub_towers.built_here(config) as plain:
        path.write_text(json.dumps({**content, "model_cfg": plain}), encoding="utf-8")
        yield
