"""The layout of `transformers.CLIPModel`, and the same weights under open_clip's names.

Both libraries compute the same function; they differ in names, in the orientation of the two
projections, and in whether query, key and value are one matrix or three. Renaming moves no bit of a
weight, so that what goes in as a folder of transformers comes out as one (`to_transformers`).

Sources: the configurations' defaults and the tensors' names are those of
`transformers/models/clip/configuration_clip.py` and `modeling_clip.py`; open_clip's are those of
`open_clip/model.py` and `transformer.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from pydetox.checkpoints.index import WeightsFile, quote
from pydetox.checkpoints.layout import COMPANION_NAMES
from pydetox.errors import ArchitectureError, CheckpointError, UnsafeCheckpointError

Config = dict[str, Any]

#: What a configuration file leaves out because it is the default.
_VISION_DEFAULTS: Config = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_TEXT_DEFAULTS: Config = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}

#: `eos_token_id` of configurations that were written before the field meant anything. transformers
#: then takes the largest token id of a text, as open_clip does.
_LEGACY_EOS = 2

#: PIL's numbers of the filters that open_clip knows by name.
_RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}

#: The largest of those in public repositories have a few megabytes.
_MAX_COMPANION_BYTES = 64 << 20
_MAX_CONFIG_BYTES = 1 << 20

_Change = Literal["same", "transposed", "joined"]


@dataclass(frozen=True)
class _Rule:
    """One tensor of open_clip's: its name, the names it has in transformers, and what is done."""

    ours: str
    theirs: tuple[str, ...]
    change: _Change = "same"


def read_clip_config(config_file: str | os.PathLike[str]) -> Config:
    """Return open_clip's ``model_cfg`` for the ``config.json`` of a CLIPModel.

    Raises:
        ArchitectureError: It is no JSON object, the model is no CLIPModel, or open_clip cannot
            build it.
        UnsafeCheckpointError: It asks for remote code.
    """
    try:
        config = read_object(config_file)
        if not is_clip_config(config):
            raise ArchitectureError(
                f"describes {_described(config)}; pydetox reads CLIPModel of transformers, and "
                f"open_clip's layout{_instead(config)}"
            )
        return to_model_config(config)
    except CheckpointError as error:
        raise type(error)(f"{os.fspath(config_file)}: {error}") from error


def read_processor(processor_file: str | os.PathLike[str], image_size: int) -> Config:
    """Return open_clip's ``preprocess_cfg`` for a ``preprocessor_config.json``.

    Raises:
        ArchitectureError: It is no JSON object, or prepares images as open_clip cannot.
    """
    try:
        return to_preprocess_config(read_object(processor_file), image_size)
    except CheckpointError as error:
        raise type(error)(f"{os.fspath(processor_file)}: {error}") from error


def read_companions(folder: Path, names: Sequence[str] = COMPANION_NAMES) -> dict[str, bytes]:
    """Return the files beside the weights that a repaired folder needs as well, by name.

    names: the files that are looked for.

    Raises:
        CheckpointError: One of them cannot be read.
        UnsafeCheckpointError: One of them is far larger than any such file.
    """
    found = {}
    for name in names:
        path = folder / name
        if not os.path.lexists(path):
            continue
        try:
            with WeightsFile(path) as file:
                if file.size > _MAX_COMPANION_BYTES:
                    raise UnsafeCheckpointError(
                        f"has {file.size} bytes; expected at most {_MAX_COMPANION_BYTES}"
                    )
                found[name] = bytes(file.read_at(0, file.size, "the file"))
        except CheckpointError as error:
            raise type(error)(f"{path}: {error}") from error
    return found


def is_clip_config(config: Mapping[str, Any]) -> bool:
    """Return whether a `config.json` of transformers describes a CLIPModel with both towers."""
    return config.get("model_type") == "clip" and (
        "vision_config" in config or "CLIPModel" in (config.get("architectures") or ())
    )


def to_model_config(config: Mapping[str, Any]) -> Config:
    """Return open_clip's ``model_cfg`` for the content of a CLIPModel's ``config.json``.

    Raises:
        ArchitectureError: It describes something that open_clip's CLIP cannot be.
        UnsafeCheckpointError: It asks for remote code.
    """
    if config.get("auto_map") or config.get("trust_remote_code"):
        raise UnsafeCheckpointError("its config.json asks for code of its own (auto_map)")
    vision = _part(config, "vision_config", _VISION_DEFAULTS)
    text = _part(config, "text_config", _TEXT_DEFAULTS)
    if vision["num_channels"] != 3:
        raise ArchitectureError(
            f"its vision_config has {vision['num_channels']} channels; expected 3"
        )
    if vision["hidden_act"] != text["hidden_act"]:
        raise ArchitectureError(
            f"its towers have the activations {quote(vision['hidden_act'])} and "
            f"{quote(text['hidden_act'])}; open_clip's CLIP has one for both"
        )
    activation = vision["hidden_act"]
    tanh = {"act_kwargs": {"approximate": "tanh"}}
    extra = {"quick_gelu": {}, "gelu": {}, "gelu_pytorch_tanh": tanh, "gelu_new": tanh}
    if activation not in extra:
        raise ArchitectureError(
            f"its activation is {quote(activation)}; expected one of {', '.join(extra)}"
        )
    vision_cfg: Config = {
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "width": vision["hidden_size"],
        "layers": vision["num_hidden_layers"],
        "head_width": _head_width("vision_config", vision),
        "mlp_ratio": _ratio("vision_config", vision),
        **extra[activation],
    }
    text_cfg: Config = {
        "context_length": text["max_position_embeddings"],
        "vocab_size": text["vocab_size"],
        "width": text["hidden_size"],
        "heads": text["num_attention_heads"],
        "layers": text["num_hidden_layers"],
        "mlp_ratio": _ratio("text_config", text),
        **extra[activation],
    }
    _head_width("text_config", text)
    for part, own in (("vision_config", vision_cfg), ("text_config", text_cfg)):
        epsilon = (vision if part == "vision_config" else text)["layer_norm_eps"]
        if epsilon != 1e-5:
            own["norm_kwargs"] = {"eps": epsilon}
    # transformers pools at the first end token; open_clip's default pools at the largest id. They
    # are the same where the end token is the last of the vocabulary.
    end = text["eos_token_id"]
    if end not in (_LEGACY_EOS, text["vocab_size"] - 1):
        text_cfg |= {"pool_type": "eos", "eos_id": end}
    result: Config = {
        "embed_dim": config.get("projection_dim", 512),
        "vision_cfg": vision_cfg,
        "text_cfg": text_cfg,
    }
    if activation == "quick_gelu":
        result["quick_gelu"] = True
    return result


def to_preprocess_config(config: Mapping[str, Any], image_size: int) -> Config:
    """Return open_clip's ``preprocess_cfg`` for the content of a ``preprocessor_config.json``.

    config: that file's object, or the `image_processor` of a ``processor_config.json``.
    image_size: what the model takes, in pixels.

    Raises:
        ArchitectureError: It prepares images in a way that open_clip's transform does not have.
    """
    config = config.get("image_processor", config)
    for step in ("do_resize", "do_normalize", "do_rescale"):
        if config.get(step, True) is not True:
            raise ArchitectureError(f"its image processor has {step} off; expected it to be on")
    factor = config.get("rescale_factor", 1 / 255)
    if abs(factor * 255 - 1) > 1e-6:
        raise ArchitectureError(f"its image processor scales by {factor}; expected 1/255")
    number = config.get("resample", 3)
    if number not in _RESAMPLING:
        raise ArchitectureError(
            f"its image processor resizes with PIL's filter {number}; expected one of "
            + ", ".join(f"{key} ({name})" for key, name in _RESAMPLING.items())
        )
    size = config.get("size", {"shortest_edge": 224})
    size = {"shortest_edge": size} if isinstance(size, int) else dict(size)
    crop = config.get("crop_size", {"height": 224, "width": 224})
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else dict(crop)
    square = {"height": image_size, "width": image_size}
    crops = config.get("do_center_crop", True) is True
    if size == square and (not crops or crop == square):
        resize_mode = "squash"  # both sides, whatever the proportions; a crop then changes nothing
    elif size == {"shortest_edge": image_size} and crops and crop == square:
        resize_mode = "shortest"
    else:
        raise ArchitectureError(
            f"its image processor resizes to {size}"
            + (f" and crops to {crop}" if crops else "")
            + f"; expected the shorter side and the crop to be {image_size}, or both sides"
        )
    return {
        "mean": list(config.get("image_mean", (0.48145466, 0.4578275, 0.40821073))),
        "std": list(config.get("image_std", (0.26862954, 0.26130258, 0.27577711))),
        "interpolation": _RESAMPLING[number],
        "resize_mode": resize_mode,
    }


def to_open_clip(
    state: Mapping[str, torch.Tensor], model_config: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Return a CLIPModel's tensors under open_clip's names.

    state: name to tensor, as in transformers. `position_ids`, which old files hold, are counts and
    are left out. model_config: of `to_model_config`.

    Raises:
        ArchitectureError: A tensor is missing, or there is one that the configuration has no place
            for, or query, key and value differ in dtype.
    """
    state = {k: v for k, v in state.items() if not k.endswith("embeddings.position_ids")}
    rules = list(_rules(model_config))
    wanted = [name for rule in rules for name in rule.theirs]
    missing = [name for name in wanted if name not in state]
    extra = sorted(state.keys() - set(wanted))
    if missing or extra:
        kinds = (("missing", missing), ("unexpected", extra))
        raise ArchitectureError(
            "the weights are not those of its configuration: "
            + "; ".join(
                f"{len(names)} {kind} ({', '.join(map(quote, names[:3]))}"
                f"{', …' if len(names) > 3 else ''})"
                for kind, names in kinds
                if names
            )
        )
    result = {}
    for rule in rules:
        parts = [state[name] for name in rule.theirs]
        if len({part.dtype for part in parts}) > 1:
            raise ArchitectureError(
                f"tensor {quote(rule.theirs[0])}: query, key and value have different dtypes"
            )
        if rule.change == "joined":
            result[rule.ours] = torch.cat(parts)
        elif rule.change == "transposed":
            if parts[0].ndim != 2:
                raise ArchitectureError(f"tensor {quote(rule.theirs[0])}: expected a matrix")
            result[rule.ours] = parts[0].T.contiguous()
        else:
            result[rule.ours] = parts[0]
    return result


def to_transformers(
    state: Mapping[str, torch.Tensor], model_config: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Return open_clip's tensors under the names of CLIPModel: the inverse of `to_open_clip`.

    Raises KeyError for a tensor that is missing.
    """
    result: dict[str, torch.Tensor] = {}
    for rule in _rules(model_config):
        value = state[rule.ours]
        if rule.change == "joined":
            parts = value.chunk(len(rule.theirs))
            result |= {n: p.contiguous() for n, p in zip(rule.theirs, parts, strict=True)}
        else:
            result[rule.theirs[0]] = value.T.contiguous() if rule.change == "transposed" else value
    return result


def read_object(path: str | os.PathLike[str]) -> Config:
    """Return the JSON object of a configuration file.

    Raises ArchitectureError for anything else, CheckpointError if the file cannot be read.
    """
    with WeightsFile(path) as file:
        if file.size > _MAX_CONFIG_BYTES:
            raise ArchitectureError(
                f"has {file.size} bytes; a configuration has at most {_MAX_CONFIG_BYTES}"
            )
        raw = file.read_at(0, file.size, "the configuration")
    try:
        content = json.loads(bytes(raw).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArchitectureError(f"is not a JSON file ({error})") from None
    if not isinstance(content, dict):
        raise ArchitectureError("is not a JSON object")
    return content


def _described(config: Config) -> str:
    """Return what kind of model a configuration describes, for a message."""
    names = config.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        return f"a {quote(names[0])}"
    kind = config.get("model_type")
    return "no model" if kind is None else f"a model of type {quote(kind)}"


def _instead(config: Config) -> str:
    """Return what to use in place of a model that is not read, or an empty text."""
    kind = str(config.get("model_type"))
    if kind.startswith("siglip"):
        return " (which has the models of SigLIP as well, with weights of its own)"
    if kind == "clip_vision_model" or "CLIPVision" in str(config.get("architectures")):
        return " (this is an image tower alone, without the texts that classes are named by)"
    return ""


def _rules(model_config: Mapping[str, Any]) -> Iterator[_Rule]:
    """Yield every tensor of the model, in transformers' order."""
    vision, text = model_config["vision_cfg"], model_config["text_cfg"]
    yield _Rule("logit_scale", ("logit_scale",))
    table = "text_model.embeddings"
    yield _Rule("token_embedding.weight", (f"{table}.token_embedding.weight",))
    yield _Rule("positional_embedding", (f"{table}.position_embedding.weight",))
    yield from _layers("transformer.resblocks", "text_model", text["layers"])
    yield from _affine("ln_final", "text_model.final_layer_norm")
    table = "vision_model.embeddings"
    yield _Rule("visual.class_embedding", (f"{table}.class_embedding",))
    yield _Rule("visual.conv1.weight", (f"{table}.patch_embedding.weight",))
    yield _Rule("visual.positional_embedding", (f"{table}.position_embedding.weight",))
    yield from _affine("visual.ln_pre", "vision_model.pre_layrnorm")  # their spelling
    yield from _layers("visual.transformer.resblocks", "vision_model", vision["layers"])
    yield from _affine("visual.ln_post", "vision_model.post_layernorm")
    yield _Rule("visual.proj", ("visual_projection.weight",), "transposed")
    yield _Rule("text_projection", ("text_projection.weight",), "transposed")


def _layers(ours: str, theirs: str, count: int) -> Iterator[_Rule]:
    for i in range(count):
        own, other = f"{ours}.{i}", f"{theirs}.encoder.layers.{i}"
        for kind in ("weight", "bias"):
            three = tuple(f"{other}.self_attn.{which}_proj.{kind}" for which in "qkv")
            yield _Rule(f"{own}.attn.in_proj_{kind}", three, "joined")
        for here, there in (
            ("attn.out_proj", "self_attn.out_proj"),
            ("ln_1", "layer_norm1"),
            ("mlp.c_fc", "mlp.fc1"),
            ("mlp.c_proj", "mlp.fc2"),
            ("ln_2", "layer_norm2"),
        ):
            yield from _affine(f"{own}.{here}", f"{other}.{there}")


def _affine(ours: str, theirs: str) -> Iterator[_Rule]:
    for kind in ("weight", "bias"):
        yield _Rule(f"{ours}.{kind}", (f"{theirs}.{kind}",))


def _part(config: Mapping[str, Any], name: str, defaults: Config) -> Config:
    """Return one tower's configuration: defaults, then what the file says.

    Files of old releases have it twice, and transformers lets `vision_config_dict` win.
    """
    given: Config = {}
    for key in (name, f"{name}_dict"):
        part = config.get(key)
        if part is None:
            continue
        if not isinstance(part, dict):
            raise ArchitectureError(f"its config.json has no object {key!r}")
        given |= part
    merged: Config = {key: given.get(key, value) for key, value in defaults.items()}
    for key, default in defaults.items():
        value: Any = merged[key]
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        if type(value) not in kinds or (not isinstance(value, str) and not value >= 0):
            raise ArchitectureError(
                f"its {name} has {key} = {quote(value)}; expected a number or name like {default!r}"
            )
        if key not in ("eos_token_id", "hidden_act", "layer_norm_eps") and not value >= 1:
            raise ArchitectureError(f"its {name} has {key} = {value}; expected at least 1")
    return merged


def _head_width(name: str, part: Config) -> int:
    width, heads = part["hidden_size"], part["num_attention_heads"]
    if width % heads:
        raise ArchitectureError(f"its {name} has {heads} heads for a width of {width}")
    return int(width // heads)


def _ratio(name: str, part: Config) -> float:
    """Return the width of a layer's inside over its own; open_clip computes it back, rounded."""
    ratio = part["intermediate_size"] / part["hidden_size"]
    if int(part["hidden_size"] * ratio) != part["intermediate_size"]:
        raise ArchitectureError(
            f"its {name} has intermediate_size {part['intermediate_size']} for a width of "
            f"{part['hidden_size']}, which open_clip cannot build"
        )
    return float(ratio)
