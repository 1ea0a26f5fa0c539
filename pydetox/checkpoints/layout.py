"""Names of files: which ones hold weights, and which one of a folder is the checkpoint.

The order is that of the loaders people use, so that what is scanned is what they run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pydetox.errors import CheckpointError

CONFIG_NAME = "open_clip_config.json"
#: What tells the architecture, and how images are prepared, in a folder of transformers.
TRANSFORMERS_CONFIG_NAME = "config.json"
PROCESSOR_NAMES = ("preprocessor_config.json", "processor_config.json")
#: Says that transformers loads another model from the folder, changed by an adapter (peft).
ADAPTER_CONFIG_NAME = "adapter_config.json"
#: Files of a tokenizer.
TOKENIZER_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
#: How a causal model generates, and how a conversation becomes its input.
GENERATION_NAMES = ("generation_config.json", "chat_template.jinja", "chat_template.json")
#: What such a folder holds beside its weights, and a repaired one needs as well.
COMPANION_NAMES = (TRANSFORMERS_CONFIG_NAME, *PROCESSOR_NAMES, *TOKENIZER_NAMES)
#: Weights under a name of open_clip's own, best first: safetensors cannot hold code.
WEIGHT_NAMES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "open_clip_pytorch_model.pt",
)
#: What open_clip takes from a folder, best first (`_find_checkpoint_in_dir` in its factory.py).
#: It never takes a .pt.
_OPEN_CLIP_ORDER = (
    *WEIGHT_NAMES[:4],
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
#: What transformers takes from a folder, best first.
TRANSFORMERS_ORDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_OPEN_CLIP_SUFFIXES = (".safetensors", ".bin", ".pth")
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pth.tar")
_INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
# What trainings write beside the weights under such endings: DeepSpeed, transformers' Trainer and
# accelerate.
_TRAINING_STATE = re.compile(
    r"(?:bf16_|fp16_)?zero_pp_rank_\d+_mp_rank_\d+_optim_states\.pt"
    r"|(?:optimizer|scheduler|scaler)(?:_\d+)?\.(?:pt|bin)"
    r"|rng_state(?:_\d+)?\.pth|training_args\.bin"
)
# One of the parts in which DeepSpeed keeps the weights of a training with ZeRO stage 3.
_DIVIDED = re.compile(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt")
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}(?P<suffix>\.\w+)")


def is_weights_name(name: str) -> bool:
    """Whether a file of that name should hold weights, all of a checkpoint's or a part of them."""
    return name.lower().endswith(WEIGHT_SUFFIXES)


def is_shard_index_name(name: str) -> bool:
    """Whether a file of that name should be the index of a checkpoint in several files."""
    return name.lower().endswith(_INDEX_SUFFIXES)


def is_training_state_name(name: str) -> bool:
    """Whether a file of that name holds the state of an optimiser or a training, and no weights."""
    return _TRAINING_STATE.fullmatch(name) is not None


def is_divided_name(name: str) -> bool:
    """Whether a file of that name should hold a part of weights that DeepSpeed has divided."""
    return _DIVIDED.fullmatch(name) is not None


def index_of_shard(name: str) -> str | None:
    """Name of the index that a shard `model-00001-of-00002.safetensors` belongs to, or None."""
    match = _SHARD.fullmatch(name)
    return None if match is None else f"{match['stem']}{match['suffix']}.index.json"


def find_weights(path: Path, *, folder_expected: bool = False) -> Path:
    """Find the weights that a path means: itself, or the weights file (or shard index) in a folder.

    In a folder it is the file that open_clip or transformers would load; without such a name it is
    the only index of shards, or the only weights file.

    Raises:
        CheckpointError: There are none, or several that could be meant.
    """
    try:
        is_folder = path.is_dir()
        exists = path.exists()
        names = sorted(entry.name for entry in path.iterdir()) if is_folder else []
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: cannot be opened: {reason}") from error
    if not exists:
        raise CheckpointError(f"{path}: no such file or folder")
    if not is_folder:
        if folder_expected:
            raise CheckpointError(f"{path}: is a file, but local-dir: takes a folder")
        return path
    return path / _choose(path, names)


def _choose(folder: Path, names: Sequence[str]) -> str:
    ours = next((name for name in _OPEN_CLIP_ORDER if name in names), None)
    theirs = next((name for name in TRANSFORMERS_ORDER if name in names), None)
    if ours in WEIGHT_NAMES:
        return str(ours)
    own_index = f"{WEIGHT_NAMES[0]}.index.json"
    if own_index in names:
        return _alone(folder, own_index, names)
    if ours is not None and theirs is not None and ours != theirs:
        raise CheckpointError(
            f"{folder}: open_clip would load {ours}, transformers {theirs}; name the one you mean"
        )
    if ours is not None:
        return ours
    if theirs is not None:
        return _alone(folder, theirs, names) if CONFIG_NAME in names else theirs
    candidates = [name for name in names if is_shard_index_name(name)]
    candidates = candidates or [
        name for name in names if is_weights_name(name) and not is_training_state_name(name)
    ]
    if WEIGHT_NAMES[-1] in candidates:
        rivals = [name for name in candidates if name.endswith(_OPEN_CLIP_SUFFIXES)]
        candidates = [WEIGHT_NAMES[-1], *rivals]
    if not candidates:
        steps = [name for name in names if name.startswith("global_step")]
        hint = f"; DeepSpeed keeps them in a folder such as {steps[-1]}" if steps else ""
        raise CheckpointError(
            f"{folder}: holds no weights, expected {WEIGHT_NAMES[0]} or {WEIGHT_NAMES[2]}{hint}"
        )
    if len(candidates) > 1:
        raise CheckpointError(
            f"{folder}: holds {len(candidates)} weights files ({', '.join(candidates[:3])}); name "
            "the one you mean"
        )
    return _alone(folder, candidates[0], names) if CONFIG_NAME in names else candidates[0]


def _alone(folder: Path, chosen: str, names: Sequence[str]) -> str:
    """Return an index of shards if open_clip, which knows no such index, finds no other weights.

    Anything but an index is returned as well.
    """
    if is_shard_index_name(chosen):
        for name in names:
            if name.endswith(_OPEN_CLIP_SUFFIXES) and index_of_shard(name) != chosen:
                raise CheckpointError(
                    f"{folder}: open_clip would load {name}, others the shards of {chosen}; name "
                    "the one you mean"
                )
    return chosen
