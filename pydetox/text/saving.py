"""Writing text models as folders that `from_pretrained` of transformers loads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..atomic import atomic_directory
from ..checkpoints.architecture import check_finite
from ..checkpoints.card import text_model_card
from ..checkpoints.layout import GENERATION_NAMES, TOKENIZER_NAMES, TRANSFORMERS_CONFIG_NAME
from ..checkpoints.provenance import METADATA_KEY, Provenance
from ..checkpoints.writing import CARD_NAME, TRANSFORMERS_WEIGHTS_NAME, write_safetensors
from .files import TextKind

#: What the folder of a text model holds; only such a folder is ever replaced.
TEXT_MODEL_FILES = (
    TRANSFORMERS_WEIGHTS_NAME,
    CARD_NAME,
    TRANSFORMERS_CONFIG_NAME,
    *TOKENIZER_NAMES,
    *GENERATION_NAMES,
)


def save_text_files(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    companions: Mapping[str, bytes],
    config: Mapping[str, Any],
    kind: TextKind,
    provenance: Provenance,
    overwrite: bool = False,
) -> Path:
    """Write the folder of a text model; see `models.save_text_model` for arguments and errors."""
    check_finite(tensors)
    target = Path(directory)
    metadata = {"format": "pt", METADATA_KEY: provenance.to_json()}
    names = (TRANSFORMERS_CONFIG_NAME, *TOKENIZER_NAMES, *GENERATION_NAMES)
    beside = {name: companions[name] for name in names if name in companions}
    beside[CARD_NAME] = text_model_card(
        target.resolve().name, provenance, config, kind=kind
    ).encode()
    with atomic_directory(target, overwrite=overwrite, replaceable=TEXT_MODEL_FILES) as folder:
        for name, content in beside.items():
            (folder / name).write_bytes(content)
        with (folder / TRANSFORMERS_WEIGHTS_NAME).open("wb") as file:
            write_safetensors(file, tensors, metadata)
    return target
