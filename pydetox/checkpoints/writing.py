"""Writing checkpoints that open_clip or transformers, and pydetox, can read."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from pydetox.atomic import atomic_directory, atomic_file
from pydetox.checkpoints.architecture import (
    CONFIG_NAME,
    Config,
    check_finite,
    check_model_config,
    check_preprocess_config,
)
from pydetox.checkpoints.card import model_card
from pydetox.checkpoints.index import ITEM_SIZES, quote
from pydetox.checkpoints.layout import (
    COMPANION_NAMES,
    TOKENIZER_NAMES,
    TRANSFORMERS_CONFIG_NAME,
    WEIGHT_NAMES,
)
from pydetox.checkpoints.provenance import METADATA_KEY, Provenance
from pydetox.checkpoints.safetensors_index import DTYPE_CODES
from pydetox.checkpoints.transformers_layouts import to_transformers
from pydetox.errors import ArchitectureError, UsageError

WEIGHTS_NAME = WEIGHT_NAMES[0]
TRANSFORMERS_WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "README.md"


#: What the folder of a checkpoint holds; only such a folder is ever replaced.
CHECKPOINT_FILES = (
    WEIGHTS_NAME,
    CONFIG_NAME,
    CARD_NAME,
    TRANSFORMERS_WEIGHTS_NAME,
    *COMPANION_NAMES,
)


def save_checkpoint(
    directory: str | os.PathLike[str],
    state_dict: Mapping[str, torch.Tensor],
    *,
    model_config: Config,
    preprocess_config: Config | None,
    provenance: Provenance,
    companions: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint as a folder in the layout of its source, complete or not at all.

    In open_clip's layout, the folder gets ``open_clip_model.safetensors`` (with the provenance in
    its metadata), ``open_clip_config.json`` and ``README.md``, a model card. Equal arguments give
    equal bytes. Read it with :func:`pydetox.checkpoints.load_checkpoint` or
    ``open_clip.create_model_from_pretrained("local-dir:…")``. In transformers' layout it gets
    ``model.safetensors`` with the names of CLIPModel, the given companions and the card:
    ``CLIPModel.from_pretrained`` and ``CLIPProcessor.from_pretrained`` read it.

    Args:
        directory: The folder to create. Missing parents are created, too.
        state_dict: The tensors by name, on any device, of any layout in memory. They may share
            memory; each is written as a separate tensor.
        model_config: open_clip's ``model_cfg``.
        preprocess_config: open_clip's ``preprocess_cfg`` (``mean``, ``std``, ``interpolation``,
            ``resize_mode``). Its ``library`` is not written: open_clip prepares images itself.
        provenance: How the weights were made.
        companions: The attribute of that name of the source :class:`Checkpoint`. With a
            ``config.json`` among them, the folder is written in transformers' layout.
        overwrite: Whether to replace the folder if it holds nothing but such a checkpoint.

    Returns:
        The path of the folder.

    Raises:
        ArchitectureError: The configuration is incomplete, or weights are NaN or infinite.
        UsageError: An entry is no dense tensor, or the provenance is no JSON.
        OutputError: The folder exists or cannot be written.
    """
    check_model_config(model_config)
    check_preprocess_config(preprocess_config)
    check_finite(_dense_tensors(state_dict))
    config: Config = {"model_cfg": model_config}
    if preprocess_config is not None:
        config["preprocess_cfg"] = {k: v for k, v in preprocess_config.items() if k != "library"}
    try:
        config_text = json.dumps(config, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArchitectureError(f"the configuration cannot be written as JSON: {error}") from error
    metadata = {"format": "pt", METADATA_KEY: provenance.to_json()}
    target = Path(directory)
    library = "pydetox" if "layout" in model_config else "open_clip"
    if TRANSFORMERS_CONFIG_NAME in (companions or {}):
        library = "transformers"
    card = model_card(target.resolve().name, provenance, model_config, library=library)
    companions = companions or {}
    beside = {name: companions[name] for name in TOKENIZER_NAMES if name in companions}
    beside[CONFIG_NAME] = f"{config_text}\n".encode()
    weights_name = WEIGHTS_NAME
    if TRANSFORMERS_CONFIG_NAME in companions:
        beside = {name: companions[name] for name in COMPANION_NAMES if name in companions}
        weights_name = TRANSFORMERS_WEIGHTS_NAME
        state_dict = to_transformers(state_dict, model_config)
    beside[CARD_NAME] = card.encode()
    with atomic_directory(target, overwrite=overwrite, replaceable=CHECKPOINT_FILES) as folder:
        for name, content in beside.items():
            (folder / name).write_bytes(content)
        with (folder / weights_name).open("wb") as file:
            write_safetensors(file, state_dict, metadata)
    return target


def save_weights(
    path: str | os.PathLike[str],
    state_dict: Mapping[str, torch.Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the weights alone, as ``.safetensors`` or as the ``.pt`` of open_clip's training.

    The latter is ``{"state_dict": …}``, written by ``torch.save``.

    Args:
        path: The file; its extension decides the format.
        state_dict: Name to tensor.
        metadata: Text to store along, for ``.safetensors`` only.
        overwrite: Replace an existing file.

    Raises:
        UsageError: The extension is another one, an entry is no dense tensor, or ``metadata`` is
            given for a ``.pt``.
        OutputError: The file exists or cannot be written.
    """
    tensors = _dense_tensors(state_dict)
    suffix = Path(path).suffix.lower()
    if suffix not in (".safetensors", ".pt"):
        raise UsageError(f"{os.fspath(path)}: expected a name ending in .safetensors or .pt")
    if suffix == ".pt" and metadata:
        raise UsageError(f"{os.fspath(path)}: a .pt file holds no metadata; use .safetensors")
    with atomic_file(path, overwrite=overwrite) as file:
        if suffix == ".safetensors":
            write_safetensors(file, tensors, metadata or {})
        else:
            # Through memory: given the file itself, torch hides the reason of a failed write.
            buffer = io.BytesIO()
            own = {
                name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()
            }
            torch.save({"state_dict": own}, buffer)
            file.write(buffer.getbuffer())
    return Path(path)


def _dense_tensors(state_dict: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    if not state_dict:
        raise UsageError("the state dict to be written holds no tensors")
    for name, tensor in state_dict.items():
        if not isinstance(tensor, torch.Tensor):
            raise UsageError(f"entry {quote(name)} is a {type(tensor).__name__}, expected a tensor")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise UsageError(f"tensor {quote(name)}: expected a dense tensor with data")
        not_text = any("\ud800" <= character <= "\udfff" for character in name)
        if name == "__metadata__" or not_text or _code(tensor) is None:
            raise UsageError(
                f"tensor {quote(name)}: its name or dtype {tensor.dtype} cannot be stored"
            )
    return state_dict


def _code(tensor: torch.Tensor) -> str | None:
    return DTYPE_CODES.get(str(tensor.dtype).removeprefix("torch."))


def safetensors_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, list[str]]:
    """Make what a safetensors file begins with; see ``safetensors_index`` for the format.

    Args:
        tensors: Name to dtype (torch's name of it) and shape.
        metadata: Text to store along.

    Returns:
        The bytes, and the names in the order in which the tensors' bytes must follow.
    """
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    # Widest elements first: then every tensor is aligned to its own element size.
    order = sorted(tensors, key=lambda name: (-ITEM_SIZES[tensors[name][0]], name))
    position = 0
    for name in order:
        dtype, shape = tensors[name]
        end = position + math.prod(shape) * ITEM_SIZES[dtype]
        header[name] = {
            "dtype": DTYPE_CODES[dtype],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw, order


def write_safetensors(
    file: BinaryIO, state_dict: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file. state_dict: Name to dense tensor. metadata: Text to store along.

    The library's own writer puts the metadata in a random order, so that the same model would never
    hash the same twice.
    """
    header, order = safetensors_header(
        {
            name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            for name, tensor in state_dict.items()
        },
        metadata,
    )
    file.write(header)
    for name in order:
        # Conjugate and negative views keep their sign in a flag, not in their bytes.
        dense = state_dict[name].detach().cpu().resolve_conj().resolve_neg()
        # contiguous() is content with any stride of a dimension of size 1; view() is not.
        dense = dense.clone(memory_format=torch.contiguous_format)
        file.write(dense.reshape(-1).view(torch.uint8).numpy().data)
