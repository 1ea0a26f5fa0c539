"""The models of transformers that are read: their configurations, and their weights' names.

A ``model_cfg`` of one of them has `layout`, the `model_type` of its ``config.json``. CLIPModel has
none: open_clip itself builds it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pydetox.checkpoints import transformers_bert, transformers_clip, transformers_siglip
from pydetox.checkpoints.architecture import check_model_config
from pydetox.checkpoints.index import quote
from pydetox.checkpoints.renaming import Rule, renamed, renamed_back
from pydetox.checkpoints.transformers_clip import (
    VISION_DEFAULTS,
    checked,
    clip_rules,
    is_clip_config,
    quick_gelu,
    vision_part,
    vision_rules,
    without_counts,
)
from pydetox.checkpoints.transformers_files import read_object
from pydetox.errors import ArchitectureError, CheckpointError, UnsafeCheckpointError

Config = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """One kind of model.

    Attributes:
        classes: The names of its classes in transformers.
        to_model_config: Makes a ``model_cfg`` of the content of its ``config.json``.
        rules: Yields the tensors of the model of a ``model_cfg``.
        has_texts: Whether it has a text tower.
    """

    classes: tuple[str, ...]
    to_model_config: Callable[[Mapping[str, Any]], Config]
    rules: Callable[[Mapping[str, Any]], Iterator[Rule]]
    has_texts: bool = True


def _image_tower_config(config: Mapping[str, Any]) -> Config:
    """Return a ``model_cfg`` for an image tower of CLIP's kind, with a projection or without."""
    vision = checked(config, "config", VISION_DEFAULTS)
    names = [str(name) for name in config.get("architectures") or ()]
    bare = bool(names) and not names[0].endswith("WithProjection")
    bare = bare or config.get("model_type") == "chinese_clip_vision_model"
    return {
        "embed_dim": vision["hidden_size"] if bare else config.get("projection_dim", 512),
        "layout": "clip_vision_model",
        "vision_cfg": {**vision_part(vision), "projection": not bare},
        "text_cfg": {},
        **quick_gelu(vision),
    }


def _image_tower_rules(model_config: Mapping[str, Any]) -> Iterator[Rule]:
    vision = model_config["vision_cfg"]
    return vision_rules(vision, projection=vision["projection"])


#: By `model_type`.
LAYOUTS: Mapping[str, Layout] = {
    "clip": Layout(("CLIPModel",), transformers_clip.to_model_config, clip_rules),
    "siglip": Layout(
        ("SiglipModel",), transformers_siglip.to_model_config, transformers_siglip.rules
    ),
    "siglip2": Layout(
        ("Siglip2Model",), transformers_siglip.to_model_config, transformers_siglip.rules
    ),
    "altclip": Layout(
        ("AltCLIPModel",), transformers_bert.to_model_config, transformers_bert.rules
    ),
    "chinese_clip": Layout(
        ("ChineseCLIPModel",), transformers_bert.to_model_config, transformers_bert.rules
    ),
    "clip_vision_model": Layout(
        ("CLIPVisionModelWithProjection", "CLIPVisionModel"),
        _image_tower_config,
        _image_tower_rules,
        has_texts=False,
    ),
    "chinese_clip_vision_model": Layout(
        ("ChineseCLIPVisionModel",), _image_tower_config, _image_tower_rules, has_texts=False
    ),
    "metaclip_2": Layout(("MetaClip2Model",), transformers_clip.to_metaclip_config, clip_rules),
    "metaclip_2_vision_model": Layout(
        ("MetaClip2VisionModelWithProjection", "MetaClip2VisionModel"),
        _image_tower_config,
        _image_tower_rules,
        has_texts=False,
    ),
    "siglip_vision_model": Layout(
        ("SiglipVisionModel",),
        transformers_siglip.to_image_tower_config,
        transformers_siglip.image_tower_rules,
        has_texts=False,
    ),
    "siglip2_vision_model": Layout(
        ("Siglip2VisionModel",),
        transformers_siglip.to_image_tower_config,
        transformers_siglip.image_tower_rules,
        has_texts=False,
    ),
}


def read_transformers_config(config_file: str | os.PathLike[str]) -> Config:
    """Return the ``model_cfg`` for a ``config.json`` of transformers.

    Raises:
        ArchitectureError: It is no JSON object, or describes a model that is not read.
        UnsafeCheckpointError: It asks for remote code.
    """
    try:
        config = read_object(config_file)
        kind = config.get("model_type")
        layout = LAYOUTS.get(kind) if isinstance(kind, str) else None
        names = config.get("architectures")
        names = [n for n in names if isinstance(n, str)] if isinstance(names, list) else []
        other = bool(names) and layout is not None and not set(layout.classes) & set(names)
        if layout is None or other or (kind == "clip" and not is_clip_config(config)):
            known = ", ".join(name for one in LAYOUTS.values() for name in one.classes)
            raise ArchitectureError(
                f"describes {_described(config)}; pydetox reads these models of transformers: "
                f"{known}; and open_clip's layout"
            )
        if config.get("auto_map") or config.get("trust_remote_code"):
            raise UnsafeCheckpointError("its config.json asks for code of its own (auto_map)")
        model_config = layout.to_model_config(config)
        check_model_config(model_config)
        return model_config
    except CheckpointError as error:
        raise type(error)(f"{os.fspath(config_file)}: {error}") from error


def from_transformers(
    state: Mapping[str, torch.Tensor], model_config: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Return a model's tensors under our names; raises what `renamed` raises.

    state: Name to tensor, as in transformers. model_config: That of its configuration.
    """
    return renamed(_older_names(without_counts(state)), _rules(model_config))


def _older_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weights under the names that all releases of transformers read.

    Release 5 saves image towers alone without `vision_model.` before their names, and an
    AltCLIPModel with `layer` for `layers` in its image tower.
    """
    if "embeddings.patch_embedding.weight" in state:
        return {f"vision_model.{name}": value for name, value in state.items()}
    new, old = "vision_model.encoder.layer.", "vision_model.encoder.layers."
    result = {}
    for name, value in state.items():
        older = old + name.removeprefix(new) if name.startswith(new) else name
        if older != name and older in state:
            raise ArchitectureError(f"tensors {quote(name)} and {quote(older)} are one to loaders")
        result[older] = value
    return result


def to_transformers(
    state: Mapping[str, torch.Tensor], model_config: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Return our tensors under transformers' names: the inverse of `from_transformers`.

    Raises KeyError for a tensor that is missing.
    """
    return renamed_back(state, _rules(model_config))


def _rules(model_config: Mapping[str, Any]) -> Iterator[Rule]:
    return LAYOUTS[model_config.get("layout", "clip")].rules(model_config)


def _described(config: Config) -> str:
    """Return what kind of model a configuration describes, for a message."""
    names = config.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        return f"a {quote(names[0])}"
    kind = config.get("model_type")
    return "no model" if kind is None else f"a model of type {quote(kind)}"
