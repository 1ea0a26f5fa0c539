"""The layout of `transformers.CLIPModel`, and the same weights under open_clip's names.

Both libraries compute the same function; they differ in names, in the orientation of the two
projections, and in whether query, key and value are one matrix or three. Renaming moves no bit of a
weight, so that what goes in as a folder of transformers comes out as one (`to_transformers`).

AltCLIP, ChineseCLIP and image towers alone (`CLIPVisionModelWithProjection`, `CLIPVisionModel`)
have the image tower of CLIPModel: `vision_part` and `vision_rules` serve them too.

Sources: the configurations' defaults and the tensors' names are those of
`transformers/models/clip/configuration_clip.py` and `modeling_clip.py`; open_clip's are those of
`open_clip/model.py` and `transformer.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from pydetox.checkpoints.index import quote
from pydetox.checkpoints.renaming import Rule, affine, attention, rename, renamed, renamed_back
from pydetox.errors import ArchitectureError

Config = dict[str, Any]

#: What a configuration file leaves out because it is the default.
VISION_DEFAULTS: Config = {
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

#: The tokenizer of MetaClip2Model where a folder has none.
_METACLIP = "facebook/metaclip-2-worldwide-huge-quickgelu"

_TANH: Config = {"act_kwargs": {"approximate": "tanh"}}
#: What open_clip's configuration of a tower has for an activation of transformers.
ACTIVATIONS: dict[str, Config] = {
    "quick_gelu": {},
    "gelu": {},
    "gelu_pytorch_tanh": _TANH,
    "gelu_new": _TANH,
}


def is_clip_config(config: Mapping[str, Any]) -> bool:
    """Return whether a `config.json` of transformers describes a CLIPModel with both towers."""
    return config.get("model_type") == "clip" and (
        "vision_config" in config or "CLIPModel" in (config.get("architectures") or ())
    )


def to_model_config(config: Mapping[str, Any]) -> Config:
    """Return open_clip's ``model_cfg`` for the content of a CLIPModel's ``config.json``.

    Raises:
        ArchitectureError: It describes something that open_clip's CLIP cannot be.
    """
    vision = part_of(config, "vision_config", VISION_DEFAULTS)
    text = part_of(config, "text_config", _TEXT_DEFAULTS)
    if vision["hidden_act"] != text["hidden_act"]:
        raise ArchitectureError(
            f"its towers have the activations {quote(vision['hidden_act'])} and "
            f"{quote(text['hidden_act'])}; open_clip's CLIP has one for both"
        )
    vision_cfg = vision_part(vision)
    text_cfg = text_part(text, vision["hidden_act"])
    # transformers pools at the first end token; open_clip's default pools at the largest id. They
    # are the same where the end token is the last of the vocabulary.
    end = text["eos_token_id"]
    if end not in (_LEGACY_EOS, text["vocab_size"] - 1):
        text_cfg |= {"pool_type": "eos", "eos_id": end}
    return {
        "embed_dim": config.get("projection_dim", 512),
        "vision_cfg": vision_cfg,
        "text_cfg": text_cfg,
        **quick_gelu(vision),
    }


def to_metaclip_config(config: Mapping[str, Any]) -> Config:
    """Return open_clip's ``model_cfg`` for the ``config.json`` of a MetaClip2Model.

    It is a CLIPModel whose texts another tokenizer makes, and which pools at the first end token
    whatever that token's id is. Raises what `to_model_config` raises.
    """
    result = to_model_config(config)
    end = part_of(config, "text_config", _TEXT_DEFAULTS)["eos_token_id"]
    result["text_cfg"] |= {"pool_type": "eos", "eos_id": end, "hf_tokenizer_name": _METACLIP}
    return result


def vision_part(vision: Mapping[str, Any]) -> Config:
    """Return open_clip's ``vision_cfg`` of a CLIP's image tower; `part_of` has the argument."""
    if vision["num_channels"] != 3:
        raise ArchitectureError(
            f"its vision_config has {vision['num_channels']} channels; expected 3"
        )
    return {
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "width": vision["hidden_size"],
        "layers": vision["num_hidden_layers"],
        "head_width": head_width("vision_config", vision),
        "mlp_ratio": mlp_ratio("vision_config", vision),
        **activation_of(vision["hidden_act"]),
        **_norm(vision),
    }


def text_part(text: Mapping[str, Any], activation: str) -> Config:
    """Return open_clip's ``text_cfg`` of a text tower in CLIP's layout."""
    head_width("text_config", text)
    return {
        "context_length": text["max_position_embeddings"],
        "vocab_size": text["vocab_size"],
        "width": text["hidden_size"],
        "heads": text["num_attention_heads"],
        "layers": text["num_hidden_layers"],
        "mlp_ratio": mlp_ratio("text_config", text),
        **activation_of(activation),
        **_norm(text),
    }


def quick_gelu(vision: Mapping[str, Any]) -> Config:
    """Return what a ``model_cfg`` has beside its towers if their activation is QuickGELU."""
    return {"quick_gelu": True} if vision["hidden_act"] == "quick_gelu" else {}


def activation_of(name: str) -> Config:
    """Return what a tower's configuration has for an activation, ArchitectureError for others."""
    if name not in ACTIVATIONS:
        raise ArchitectureError(
            f"its activation is {quote(name)}; expected one of {', '.join(ACTIVATIONS)}"
        )
    return dict(ACTIVATIONS[name])


def _norm(part: Mapping[str, Any]) -> Config:
    epsilon = part["layer_norm_eps"]
    return {} if epsilon == 1e-5 else {"norm_kwargs": {"eps": epsilon}}


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
    return renamed(without_counts(state), clip_rules(model_config))


def to_transformers(
    state: Mapping[str, torch.Tensor], model_config: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Return open_clip's tensors under the names of CLIPModel: the inverse of `to_open_clip`.

    Raises KeyError for a tensor that is missing.
    """
    return renamed_back(state, clip_rules(model_config))


def without_counts(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weights without the position numbers that old files hold."""
    return {k: v for k, v in state.items() if not k.endswith("embeddings.position_ids")}


def clip_rules(model_config: Mapping[str, Any]) -> Iterator[Rule]:
    """Yield every tensor of a CLIPModel, in transformers' order."""
    text = model_config["text_cfg"]
    yield rename("logit_scale", "logit_scale")
    table = "text_model.embeddings"
    yield rename("token_embedding.weight", f"{table}.token_embedding.weight")
    yield rename("positional_embedding", f"{table}.position_embedding.weight")
    yield from layer_rules("transformer.resblocks", "text_model", text["layers"])
    yield from affine("ln_final", "text_model.final_layer_norm")
    yield from vision_rules(model_config["vision_cfg"])
    yield rename("text_projection", "text_projection.weight", "transposed")


def vision_rules(vision: Mapping[str, Any], *, projection: bool = True) -> Iterator[Rule]:
    """Yield every tensor of a CLIP's image tower. projection: Whether it has the last matrix."""
    table = "vision_model.embeddings"
    yield rename("visual.class_embedding", f"{table}.class_embedding")
    yield rename("visual.conv1.weight", f"{table}.patch_embedding.weight")
    yield rename("visual.positional_embedding", f"{table}.position_embedding.weight")
    yield from affine("visual.ln_pre", "vision_model.pre_layrnorm")  # their spelling
    yield from layer_rules("visual.transformer.resblocks", "vision_model", vision["layers"])
    yield from affine("visual.ln_post", "vision_model.post_layernorm")
    if projection:
        yield rename("visual.proj", "visual_projection.weight", "transposed")


def layer_rules(ours: str, theirs: str, count: int) -> Iterator[Rule]:
    """Yield the tensors of `count` of open_clip's blocks, and of CLIPModel's layers."""
    for i in range(count):
        own, other = f"{ours}.{i}", f"{theirs}.encoder.layers.{i}"
        query, key, value = (f"{other}.self_attn.{which}_proj" for which in "qkv")
        yield from attention(f"{own}.attn.in_proj", (query, key, value))
        for here, there in (
            ("attn.out_proj", "self_attn.out_proj"),
            ("ln_1", "layer_norm1"),
            ("mlp.c_fc", "mlp.fc1"),
            ("mlp.c_proj", "mlp.fc2"),
            ("ln_2", "layer_norm2"),
        ):
            yield from affine(f"{own}.{here}", f"{other}.{there}")


def part_of(config: Mapping[str, Any], name: str, defaults: Config) -> Config:
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
    return checked(given, name, defaults)


def checked(given: Mapping[str, Any], name: str, defaults: Config) -> Config:
    """Return what a configuration gives for the keys of `defaults`, each of its default's type.

    Raises ArchitectureError for a value of another type, and for one that is too small.
    """
    merged: Config = {key: given.get(key, value) for key, value in defaults.items()}
    for key, default in defaults.items():
        value: Any = merged[key]
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        if type(value) not in kinds or (not isinstance(value, str) and not value >= 0):
            raise ArchitectureError(
                f"its {name} has {key} = {quote(value)}; expected a number or name like {default!r}"
            )
        may_be_zero = key.endswith("_token_id") or key in ("hidden_act", "layer_norm_eps")
        if not may_be_zero and not value >= 1:
            raise ArchitectureError(f"its {name} has {key} = {value}; expected at least 1")
    return merged


def head_width(name: str, part: Mapping[str, Any]) -> int:
    """Return the width of an attention head."""
    width, heads = part["hidden_size"], part["num_attention_heads"]
    if width % heads:
        raise ArchitectureError(f"its {name} has {heads} heads for a width of {width}")
    return int(width // heads)


def mlp_ratio(name: str, part: Mapping[str, Any]) -> float:
    """Return the width of a layer's inside over its own; open_clip computes it back, rounded."""
    ratio = part["intermediate_size"] / part["hidden_size"]
    if int(part["hidden_size"] * ratio) != part["intermediate_size"]:
        raise ArchitectureError(
            f"its {name} has intermediate_size {part['intermediate_size']} for a width of "
            f"{part['hidden_size']}, which open_clip cannot build"
        )
    return float(ratio)
