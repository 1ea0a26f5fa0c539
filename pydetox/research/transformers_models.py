"""Every model of transformers that is read, tried: equal embeddings, searched, written back.

transformers itself is the truth, and must be installed. The models have the sizes that their
configurations have by default, random weights, two layers in each tower, and a table of token
embeddings of at most 100,000 rows.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints import Provenance, load_checkpoint, save_checkpoint
from ..checkpoints.transformers_layouts import LAYOUTS
from ..errors import explain
from ..models import OpenClipModel
from ..models.building import NoRandomNumbers
from .architectures import Measured, cosine, try_out
from .cut_models import (
    FEW_TOKENS,
    LAYERS,
    MOST_TOKENS,
    depth_in_words,
    fill,
    images_of,
    stand_in_tokenizer,
)

_TEXT_LENGTH = 12


def classes() -> dict[str, str]:
    """Return the classes of transformers that are read, with the `model_type` of each."""
    return {name: kind for kind, layout in LAYOUTS.items() for name in layout.classes}


def is_installed() -> bool:
    """Return whether transformers is installed."""
    return find_spec("transformers") is not None


def measure_class(name: str) -> Measured:
    """Compare a class of transformers with what is read of a folder that it wrote."""
    start = time.perf_counter()
    try:
        return _measure(name, start)
    except Exception as error:  # noqa: BLE001 - a row of the table, whatever it was
        line = explain(error)
        if line is None:
            line = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return Measured(0.0, None, False, False, "", 0, time.perf_counter() - start, line)


def _measure(name: str, start: float) -> Measured:
    transformers: Any = import_module("transformers")
    kind = classes()[name]
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as place:
        torch.manual_seed(0)
        first, second = Path(place) / "first", Path(place) / "second"
        theirs, words = _made(transformers, name)
        theirs.save_pretrained(first)
        _write_processor(transformers, kind, theirs.config, first)
        stand_in = LAYOUTS[kind].has_texts and kind != "clip"
        if stand_in:
            for file, content in stand_in_tokenizer().items():
                (first / file).write_bytes(content)
        model = OpenClipModel.from_checkpoint(load_checkpoint(first), consume=True)
        images = images_of(name, model.image_size)
        pixels = model.normalize(model.pixels(images))
        with torch.no_grad():
            seen = cosine(model.encode_normalized(pixels), _images(theirs, kind, pixels))
            texts = _text_cosine(model, theirs, kind) if LAYOUTS[kind].has_texts else None
        del theirs
        tried = try_out(model, images, has_tokenizer=texts is not None)
        save_checkpoint(
            second,
            tried.model.storage_state_dict(),
            model_config=model.model_config,
            preprocess_config=model.preprocess_config or None,
            provenance=Provenance(method="random weights"),
            companions=model.companions,
        )
        again = getattr(transformers, name).from_pretrained(second).eval()
        with torch.no_grad():
            back = cosine(tried.model.encode_normalized(pixels), _images(again, kind, pixels))
    found = tried.measured(seen, texts, back, time.perf_counter() - start)
    return replace(found, cut=words, stand_in=stand_in and bool(tried.evaluated))


def _made(transformers: Any, name: str) -> tuple[Any, str]:
    """Return a model with random weights that hide no exchange of two tensors, and what is cut."""
    cls = getattr(transformers, name)
    config = cls.config_class()
    words = []
    towers = {"images": getattr(config, "vision_config", config)}
    towers |= {"texts": config.text_config} if hasattr(config, "text_config") else {}
    for part, tower in towers.items():
        words.append(depth_in_words(part, (tower.num_hidden_layers,)))
        tower.num_hidden_layers = min(tower.num_hidden_layers, LAYERS)
        tokens = getattr(tower, "vocab_size", 0)
        if tokens > MOST_TOKENS:
            words.append(f"tokens {FEW_TOKENS}/{tokens}")
            tower.vocab_size = FEW_TOKENS
    with NoRandomNumbers():
        model = cls(config).eval().requires_grad_(False)
    fill(model, name)
    return model, ", ".join(filter(None, words))


def _write_processor(transformers: Any, kind: str, config: Any, folder: Path) -> None:
    vision = getattr(config, "vision_config", config)
    given: dict[str, Any] = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]}
    size = getattr(vision, "image_size", 224)
    if kind.startswith("siglip2"):
        name = "Siglip2ImageProcessor"
        given |= {"max_num_patches": vision.num_patches, "patch_size": vision.patch_size}
    elif kind.startswith("siglip"):
        name = "SiglipImageProcessor"
        given |= {"size": {"height": size, "width": size}}
    else:
        name = "ChineseCLIPImageProcessor" if kind.startswith("chinese") else "CLIPImageProcessor"
        given |= {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    getattr(transformers, name)(**given).save_pretrained(folder)


def _images(model: Any, kind: str, pixels: Tensor) -> Tensor:
    """Return the embeddings of normalised images [N, 3, H, W] that transformers computes."""
    tower = getattr(model, "vision_model", model)
    if kind.startswith("siglip2"):
        patch = getattr(model.config, "vision_config", model.config).patch_size
        count, side = len(pixels), pixels.shape[2] // patch
        rows = pixels.view(count, 3, side, patch, side, patch).permute(0, 2, 4, 3, 5, 1)
        seen = tower(
            rows.reshape(count, side * side, -1),
            pixel_attention_mask=torch.ones(count, side * side, dtype=torch.long),
            spatial_shapes=torch.tensor([[side, side]] * count),
        ).pooler_output
    else:
        seen = tower(pixel_values=pixels).pooler_output
    projection = getattr(model, "visual_projection", None)
    result: Tensor = projection(seen) if isinstance(projection, nn.Module) else seen
    return result


def _text_cosine(model: OpenClipModel, theirs: Any, kind: str) -> float:
    tokens = torch.randint(5, 40, (3, model.model_config["text_cfg"].get("context_length", 12)))
    if kind in ("altclip", "chinese_clip"):
        tokens = tokens[:, :_TEXT_LENGTH]
    elif not kind.startswith("siglip"):  # an end, and nothing behind it counts
        end = theirs.config.text_config.eos_token_id
        tokens[:, _TEXT_LENGTH], tokens[:, _TEXT_LENGTH + 1 :] = end, 0
    given: Mapping[str, Tensor] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    found = theirs.text_model(**given)
    seen = found[0][:, 0] if kind == "chinese_clip" else found.pooler_output
    if hasattr(theirs, "text_projection"):
        seen = theirs.text_projection(seen)
    return cosine(model.encode_tokens(tokens), seen)
