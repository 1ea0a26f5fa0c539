"""Text towers of transformers in open_clip's architectures, built without the hub.

open_clip asks the hub for the configuration of such a tower. Here it is written down for the towers
that open_clip's architectures have, and open_clip builds the tower from it. The weights come from
the checkpoint.

Source: ``config.json`` of the repositories that `CONFIGURATIONS` names.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_BASE = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
_ROBERTA = {
    "model_type": "roberta",
    "vocab_size": 50265,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_XLM = {**_ROBERTA, "model_type": "xlm-roberta", "vocab_size": 250002}
_MT5 = {
    "model_type": "mt5",
    "vocab_size": 250112,
    "d_kv": 64,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32,
    "layer_norm_epsilon": 1e-6,
    "is_encoder_decoder": True,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
_NLLB = {
    "model_type": "m2m_100",
    "vocab_size": 256206,
    "d_model": 1024,
    "encoder_attention_heads": 16,
    "decoder_attention_heads": 16,
    "max_position_embeddings": 1024,
    "activation_function": "relu",
    "scale_embedding": True,
    "is_encoder_decoder": True,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}

#: By the name that open_clip's architectures have. Decoders are cut to a layer: open_clip builds
#: them and throws them away.
CONFIGURATIONS: Mapping[str, Mapping[str, Any]] = {
    "roberta-base": {**_ROBERTA, **_BASE},
    "xlm-roberta-base": {**_XLM, **_BASE},
    "xlm-roberta-large": {
        **_XLM,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    "google/mt5-base": {
        **_MT5,
        "d_model": 768,
        "d_ff": 2048,
        "num_layers": 12,
        "num_decoder_layers": 1,
        "num_heads": 12,
    },
    "google/mt5-xl": {
        **_MT5,
        "d_model": 2048,
        "d_ff": 5120,
        "num_layers": 24,
        "num_decoder_layers": 1,
        "num_heads": 32,
    },
    "facebook/nllb-200-distilled-600M": {
        **_NLLB,
        "encoder_layers": 12,
        "decoder_layers": 1,
        "encoder_ffn_dim": 4096,
        "decoder_ffn_dim": 4096,
    },
    "facebook/nllb-200-distilled-1.3B": {
        **_NLLB,
        "encoder_layers": 24,
        "decoder_layers": 1,
        "encoder_ffn_dim": 8192,
        "decoder_ffn_dim": 8192,
    },
}


def tower_obstacle(name: str) -> str | None:
    """Return why a text tower of that name is not built, or None if it is."""
    if name not in CONFIGURATIONS:
        return (
            f"its text tower is {name!r} of transformers, whose configuration only the hub has; "
            f"expected one of {', '.join(CONFIGURATIONS)}"
        )
    return None


def is_missing() -> bool:
    """Return whether transformers, which builds these towers, is not installed."""
    return find_spec("transformers") is None


def vocabulary_of(text: Mapping[str, Any]) -> int:
    """Return the number of tokens that a text tower knows. text: open_clip's ``text_cfg``."""
    tower = CONFIGURATIONS.get(str(text.get("hf_model_name")))
    given = text.get("vocab_size", 49408) if tower is None else tower["vocab_size"]
    return given if type(given) is int else 49408


@contextmanager
def built_here(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a copy of a ``model_cfg`` whose text tower open_clip builds without the hub.

    Within the block, `hf_model_name` is a folder that holds the tower's configuration alone.
    `layers` beside it cuts the tower, as for open_clip's own towers.
    """
    result = copy.deepcopy(dict(config))
    text = result.get("text_cfg", {})
    name = text.get("hf_model_name")
    if not name:
        yield result
        return
    tower = dict(CONFIGURATIONS[name])
    depth = next(k for k in ("num_hidden_layers", "num_layers", "encoder_layers") if k in tower)
    tower[depth] = min(tower[depth], text.pop("layers", tower[depth]))
    with tempfile.TemporaryDirectory(prefix="pydetox-tower-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(tower))
        text |= {"hf_model_name": folder, "hf_model_pretrained": False}
        yield result
