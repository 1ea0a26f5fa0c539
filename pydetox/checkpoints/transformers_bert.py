"""The layouts of `transformers.AltCLIPModel` and `ChineseCLIPModel`: CLIP's images, BERT's texts.

The image tower is CLIP's (`transformers_clip`). The text tower is an encoder of BERT's kind (Devlin
et al., arXiv 1810.04805), whose first token is the text: BERT in ChineseCLIP, and XLM-RoBERTa with
a normalisation and a linear layer above it in AltCLIP. `models.towers` computes both with torch's
own layers.

Sources: `transformers/models/altclip` and `chinese_clip`, `modeling_*.py` and `configuration_*.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydetox.checkpoints.renaming import Rule, affine, attention, rename
from pydetox.checkpoints.transformers_clip import (
    VISION_DEFAULTS,
    head_width,
    part_of,
    quick_gelu,
    vision_part,
    vision_rules,
)
from pydetox.errors import ArchitectureError

Config = dict[str, Any]

_TEXT_DEFAULTS: dict[str, Config] = {
    "altclip": {
        "vocab_size": 250002,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "pad_token_id": 1,
        "project_dim": 768,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
    },
    "chinese_clip": {
        "vocab_size": 30522,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "pad_token_id": 0,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
    },
}
_PROJECTION = {"altclip": 768, "chinese_clip": 512}
#: The lengths that these models were trained with; their tables of positions are longer.
_LENGTHS = {"altclip": 77, "chinese_clip": 52}
#: Tokenizers for folders that hold none.
_TOKENIZERS = {"altclip": "BAAI/AltCLIP", "chinese_clip": "OFA-Sys/chinese-clip-vit-base-patch16"}


def to_model_config(config: Mapping[str, Any]) -> Config:
    """Return a ``model_cfg`` for the ``config.json`` of an AltCLIPModel or ChineseCLIPModel.

    Raises:
        ArchitectureError: Its text tower is none that is built here.
    """
    kind = str(config["model_type"])
    vision = part_of(config, "vision_config", VISION_DEFAULTS)
    text = part_of(config, "text_config", _TEXT_DEFAULTS[kind])
    given = config.get("text_config") or {}
    if given.get("position_embedding_type", "absolute") != "absolute":
        raise ArchitectureError("its text_config has relative positions; expected absolute ones")
    if text["hidden_act"] != "gelu":
        raise ArchitectureError(
            f"its text_config has the activation {text['hidden_act']!r}; expected 'gelu'"
        )
    head_width("text_config", text)
    first = text["pad_token_id"] + 1 if kind == "altclip" else 0
    text_cfg = {
        "context_length": min(_LENGTHS[kind], text["max_position_embeddings"] - first),
        "vocab_size": text["vocab_size"],
        "width": text["hidden_size"],
        "heads": text["num_attention_heads"],
        "layers": text["num_hidden_layers"],
        "mlp_width": text["intermediate_size"],
        "positions": text["max_position_embeddings"],
        "types": text["type_vocab_size"],
        "pad_id": text["pad_token_id"],
        "epsilon": text["layer_norm_eps"],
        "hf_tokenizer_name": _TOKENIZERS[kind],
    }
    if kind == "altclip":
        text_cfg |= {"transformed_width": text["project_dim"]}
    return {
        "embed_dim": config.get("projection_dim", _PROJECTION[kind]),
        "layout": kind,
        "vision_cfg": vision_part(vision),
        "text_cfg": text_cfg,
        **quick_gelu(vision),
    }


def rules(model_config: Mapping[str, Any]) -> Iterator[Rule]:
    """Yield every tensor of the model, as files have them."""
    text, alt = model_config["text_cfg"], model_config["layout"] == "altclip"
    model = "text_model.roberta" if alt else "text_model"
    yield rename("logit_scale", "logit_scale")
    for here, there in (
        ("tokens", "word_embeddings"),
        ("positions", "position_embeddings"),
        ("types", "token_type_embeddings"),
    ):
        yield rename(f"text.{here}.weight", f"{model}.embeddings.{there}.weight")
    yield from affine("text.norm", f"{model}.embeddings.LayerNorm")
    for i in range(text["layers"]):
        own, other = f"text.layers.{i}", f"{model}.encoder.layer.{i}"
        query, key, value = (f"{other}.attention.self.{w}" for w in ("query", "key", "value"))
        yield from attention(f"{own}.self_attn.in_proj", (query, key, value))
        for here, there in (
            ("self_attn.out_proj", "attention.output.dense"),
            ("norm1", "attention.output.LayerNorm"),
            ("linear1", "intermediate.dense"),
            ("linear2", "output.dense"),
            ("norm2", "output.LayerNorm"),
        ):
            yield from affine(f"{own}.{here}", f"{other}.{there}")
    if alt:
        yield from affine("text.last_norm", "text_model.pre_LN")
        yield from affine("text.transformation", "text_model.transformation")
    yield from vision_rules(model_config["vision_cfg"])
    yield rename("text.projection.weight", "text_projection.weight")
