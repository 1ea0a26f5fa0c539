"""The layouts of `transformers.SiglipModel` and `Siglip2Model`, for open_clip's and timm's modules.

The image tower is timm's vision transformer that pools by attention, as in open_clip's models of
SigLIP. The text tower is open_clip's. Siglip2Model takes rows of patches with a mask; here it takes
square images of as many patches as it has positions, for which both compute the same function.

Sources: `transformers/models/siglip/modeling_siglip.py`, `siglip2/modeling_siglip2.py` and their
configurations; timm's `vision_transformer.py` and `attention_pool.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pydetox.checkpoints.index import quote
from pydetox.checkpoints.renaming import Rule, affine, attention, rename
from pydetox.checkpoints.transformers_clip import (
    activation_of,
    checked,
    head_width,
    layer_rules,
    mlp_ratio,
    part_of,
    text_part,
)
from pydetox.errors import ArchitectureError

Config = dict[str, Any]

_VISION_DEFAULTS: Config = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_TEXT_DEFAULTS: Config = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 64,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
#: Tokenizers for folders that hold none, by the size of the vocabulary.
_TOKENIZERS = {32000: "google/siglip-base-patch16-224", 256000: "google/siglip2-base-patch16-224"}


def to_model_config(config: Mapping[str, Any]) -> Config:
    """Return a ``model_cfg`` for the ``config.json`` of a SiglipModel or Siglip2Model.

    Raises:
        ArchitectureError: The two towers do not fit each other, or it is no such model.
    """
    vision = part_of(config, "vision_config", _vision_defaults(config))
    text = part_of(config, "text_config", _TEXT_DEFAULTS)
    image_tower = _vision_part(config, config.get("vision_config") or {}, vision)
    width = vision["hidden_size"]
    size = (config.get("text_config") or {}).get("projection_size", text["hidden_size"])
    if size != width:
        raise ArchitectureError(
            f"its texts have {quote(size)} dimensions and its images {width}; expected the same"
        )
    return {
        "embed_dim": width,
        "layout": config["model_type"],
        "vision_cfg": image_tower,
        "text_cfg": {
            **text_part(text, text["hidden_act"]),
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "hf_tokenizer_name": _TOKENIZERS.get(text["vocab_size"], _TOKENIZERS[32000]),
        },
        **({"quick_gelu": True} if text["hidden_act"] == "quick_gelu" else {}),
    }


def to_image_tower_config(config: Mapping[str, Any]) -> Config:
    """Return a ``model_cfg`` for a SiglipVisionModel or Siglip2VisionModel; raises as above."""
    vision = checked(config, "config", _vision_defaults(config))
    return {
        "embed_dim": vision["hidden_size"],
        "layout": config["model_type"],
        "vision_cfg": _vision_part(config, config, vision),
        "text_cfg": {},
    }


def _is_flexible(kind: str) -> bool:
    return kind.startswith("siglip2")


def _vision_defaults(config: Mapping[str, Any]) -> Config:
    flexible = _is_flexible(config["model_type"])
    return {**_VISION_DEFAULTS, **({"num_patches": 256} if flexible else {})}


def _vision_part(
    config: Mapping[str, Any], given: Mapping[str, Any], vision: Mapping[str, Any]
) -> Config:
    """Return the ``vision_cfg``. given: The object of the image tower. vision: With defaults."""
    if given.get("vision_use_head", True) is not True:
        raise ArchitectureError("its vision_config has vision_use_head off; expected it to be on")
    if vision["num_channels"] != 3:
        raise ArchitectureError(
            f"its vision_config has {vision['num_channels']} channels; expected 3"
        )
    image_size = vision["image_size"]
    if _is_flexible(config["model_type"]):
        side = math.isqrt(vision["num_patches"])
        if side**2 != vision["num_patches"]:
            raise ArchitectureError(
                f"its vision_config has {vision['num_patches']} patches; expected a square number"
            )
        image_size = side * vision["patch_size"]
    activation_of(vision["hidden_act"])
    width = vision["hidden_size"]
    return {
        "image_size": image_size,
        "patch_size": vision["patch_size"],
        "width": width,
        "layers": vision["num_hidden_layers"],
        "heads": width // head_width("vision_config", vision),
        "mlp_ratio": mlp_ratio("vision_config", vision),
        "activation": vision["hidden_act"],
        "epsilon": vision["layer_norm_eps"],
    }


def rules(model_config: Mapping[str, Any]) -> Iterator[Rule]:
    """Yield every tensor of a model with both towers."""
    text = model_config["text_cfg"]
    yield rename("logit_scale", "logit_scale")
    yield rename("logit_bias", "logit_bias")
    table = "text_model.embeddings"
    yield rename("text.token_embedding.weight", f"{table}.token_embedding.weight")
    yield rename("text.positional_embedding", f"{table}.position_embedding.weight")
    yield from layer_rules("text.transformer.resblocks", "text_model", text["layers"])
    yield from affine("text.ln_final", "text_model.final_layer_norm")
    yield from affine("text.text_projection", "text_model.head")
    yield from image_tower_rules(model_config)


def image_tower_rules(model_config: Mapping[str, Any]) -> Iterator[Rule]:
    """Yield every tensor of the image tower."""
    vision = model_config["vision_cfg"]
    trunk, table = "visual.trunk", "vision_model.embeddings"
    patches = (f"{trunk}.patch_embed.proj.weight",), (f"{table}.patch_embedding.weight",)
    if _is_flexible(model_config["layout"]):
        yield Rule(*patches, "patches", patch=vision["patch_size"])
    else:
        yield Rule(*patches)
    yield rename(f"{trunk}.patch_embed.proj.bias", f"{table}.patch_embedding.bias")
    yield rename(f"{trunk}.pos_embed", f"{table}.position_embedding.weight", "leading")
    for i in range(vision["layers"]):
        own, other = f"{trunk}.blocks.{i}", f"vision_model.encoder.layers.{i}"
        query, key, value = (f"{other}.self_attn.{which}_proj" for which in "qkv")
        yield from attention(f"{own}.attn.qkv", (query, key, value), ".")
        for here, there in (
            ("attn.proj", "self_attn.out_proj"),
            ("norm1", "layer_norm1"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
            ("norm2", "layer_norm2"),
        ):
            yield from affine(f"{own}.{here}", f"{other}.{there}")
    yield from affine(f"{trunk}.norm", "vision_model.post_layernorm")
    pool, head = f"{trunk}.attn_pool", "vision_model.head"
    yield rename(f"{pool}.latent", f"{head}.probe")
    for kind in ("weight", "bias"):
        yield Rule(
            (f"{pool}.q.{kind}", f"{pool}.kv.{kind}"),
            (f"{head}.attention.in_proj_{kind}",),
            shares=(1, 2),
        )
    for here, there in (
        ("proj", "attention.out_proj"),
        ("norm", "layernorm"),
        ("mlp.fc1", "mlp.fc1"),
        ("mlp.fc2", "mlp.fc2"),
    ):
        yield from affine(f"{pool}.{here}", f"{head}.{there}")
