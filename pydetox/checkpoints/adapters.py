"""LoRA adapters of peft, merged into the weights that they were trained for.

An adapter folder holds ``adapter_config.json`` and, for some matrices W of a base, two small ones:
A [r, in] and B [out, r]. The merged matrix is W + s B A with s = alpha / r, or alpha / sqrt(r) for
rank-stabilised LoRA.

Sources: Hu et al., "LoRA", arXiv 2106.09685; Kalajdzievski, arXiv 2312.03732; the layout is that of
peft's `LoraConfig` and `save_pretrained`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pydetox.checkpoints.index import quote
from pydetox.checkpoints.layout import ADAPTER_CONFIG_NAME
from pydetox.checkpoints.transformers_files import read_object
from pydetox.errors import ArchitectureError, CheckpointError

_PREFIX = "base_model.model."
#: Options of `LoraConfig` that change what an adapter computes, with the values of plain LoRA.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none", "all"),
    "use_dora": (False,),
    "fan_in_fan_out": (False,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "layer_replication": ([],),
    "trainable_token_indices": ([],),
    "lora_bias": (False,),
    # The others change the weights of the base at loading, or need what is known in training alone.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica", "lora_ga"),
    "target_parameters": ([],),
    "alora_invocation_tokens": (),
    "use_qalora": (False,),
    "use_bdlora": (False,),
    "arrow_config": (),
    "kasa_config": (),
    "monteclora_config": (),
}


def adapter_scale(folder: Path) -> float:
    """Return s, the factor of B A, of an adapter folder.

    Raises:
        ArchitectureError: It is no plain LoRA; the message has the option that makes it another.
    """
    path = folder / ADAPTER_CONFIG_NAME
    try:
        config = read_object(path)
        kind = config.get("peft_type")
        if kind != "LORA":
            raise ArchitectureError(f"has peft_type = {quote(kind)}; expected plain LoRA")
        for key, plain in _PLAIN.items():
            value = config.get(key)
            if value is not None and value not in plain:
                raise ArchitectureError(
                    f"has {key} = {quote(value)}; expected plain LoRA: merge it with peft "
                    "(merge_and_unload()) and save the result"
                )
        rank, alpha = config.get("r"), config.get("lora_alpha")
        if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
            raise ArchitectureError(
                f"has r = {quote(rank)} and lora_alpha = {quote(alpha)}; expected numbers"
            )
        root = math.sqrt(rank) if config.get("use_rslora") else rank
        return float(alpha) / root
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from error


def merge_adapter(
    adapter: Mapping[str, Tensor], base: Mapping[str, Tensor], scale: float
) -> dict[str, Tensor]:
    """Return the weights of a base with an adapter merged into them, in the base's dtypes.

    Biases and modules that the adapter stores in full take the place of the base's.

    adapter: Name to tensor, as in ``adapter_model.safetensors``. base: Name to tensor. scale: That
    of `adapter_scale`. Products are computed in float32, or in float64 for weights in float64.

    Raises:
        ArchitectureError: The adapter has a tensor that is no A or B of a matrix of the base, and
            no tensor of the base either.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for name, value in adapter.items():
        plain = name.removeprefix(_PREFIX)
        for which in "AB":
            module, found, rest = plain.partition(f".lora_{which}.")
            if found and rest in ("weight", "default.weight"):
                pairs.setdefault(f"{module}.weight", {})[which] = value
                break
        else:
            own = _name_in_base(plain)
            if own not in base or base[own].shape != value.shape or ".lora_" in plain:
                raise ArchitectureError(
                    f"tensor {quote(name)}: expected lora_A and lora_B of linear layers, or biases "
                    "and whole modules of the base"
                )
            whole[own] = value
    if not pairs and not whole:
        raise ArchitectureError("the adapter holds no tensors")
    result = dict(base) | {k: v.to(base[k].dtype) for k, v in whole.items()}
    for name, pair in pairs.items():
        weight = base.get(name)
        if weight is None:
            raise ArchitectureError(
                f"the base has no tensor {quote(name)}, which the adapter changes; expected the "
                "model that it was trained for"
            )
        down, up = pair.get("A"), pair.get("B")
        fits = (
            down is not None
            and up is not None
            and down.ndim == up.ndim == weight.ndim == 2
            and (up.shape[0], down.shape[1]) == tuple(weight.shape)
            and up.shape[1] == down.shape[0]
        )
        if not fits or down is None or up is None:
            shapes = {k: list(v.shape) for k, v in pair.items()}
            raise ArchitectureError(
                f"the adapter has {shapes} for {quote(name)} {list(weight.shape)}; expected A "
                "[r, in] and B [out, r]"
            )
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        change = scale * (up.to(wide) @ down.to(wide))
        result[name] = (weight.to(wide) + change).to(weight.dtype)
    return result


def _name_in_base(name: str) -> str:
    """Return the base's name of a tensor that an adapter stores in full."""
    for wrapped in (".base_layer.", ".modules_to_save.default.", ".modules_to_save."):
        name = name.replace(wrapped, ".")
    return name
