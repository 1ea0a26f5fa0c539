"""The files of a text model in transformers' layout, read and checked before anything is built.

A `config.json` comes from a stranger. Of what transformers can do with one, pydetox takes the part
that builds a known architecture of given sizes, and refuses the rest: code of a repository
(`auto_map`), attention or expert kernels that are fetched from a hub, and quantised weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import Tensor

from ..checkpoints.architecture import check_finite
from ..checkpoints.identity import CheckpointIdentity, identify_checkpoint
from ..checkpoints.index import Finding, quote, refuse_ambiguous
from ..checkpoints.layout import (
    ADAPTER_CONFIG_NAME,
    COMPANION_NAMES,
    GENERATION_NAMES,
    TRANSFORMERS_CONFIG_NAME,
)
from ..checkpoints.provenance import METADATA_KEY, Provenance
from ..checkpoints.sources import open_weights
from ..checkpoints.transformers_files import read_companions, read_object
from ..checkpoints.weights import read_open
from ..errors import ArchitectureError, CheckpointError, UnsafeCheckpointError

#: What a text model computes: class scores of a text, scores of its next token, or its features.
TextKind: TypeAlias = Literal["classifier", "causal", "tower"]

_KINDS: tuple[tuple[str, TextKind], ...] = (
    ("ForSequenceClassification", "classifier"),
    ("ForCausalLM", "causal"),
    ("LMHeadModel", "causal"),
    ("CLIPTextModelWithProjection", "tower"),
    ("CLIPTextModel", "tower"),
)

# Vocabularies reach 260,000, and contexts 10 million; larger numbers only exhaust memory.
_MAX_NUMBER = 20_000_000
_MAX_LAYERS = 1_000

# Keys with which a configuration makes transformers fetch and run something, at any depth.
_CODE = ("auto_map", "custom_pipelines", "trust_remote_code")
_KERNELS = ("attn_implementation", "experts_implementation", "kernel_config", "use_kernels")


@dataclass(frozen=True, eq=False)
class TextFiles:
    """The files of one text model, read and checked.

    Attributes:
        kind: What the model computes.
        config: The content of `config.json`, without what names kernels.
        companions: Configuration and tokenizer as they came, by name.
        state_dict: The tensors of the file by name, on the CPU, in the dtypes of the file.
        name: The name that was given.
        path: The weights file, or the index of its shards.
        sha256: As in `Checkpoint`.
        metadata: The text metadata of a safetensors file.
        findings: Odd things about the weights file.
    """

    kind: TextKind
    config: dict[str, Any]
    companions: dict[str, bytes] = field(repr=False)
    state_dict: dict[str, Tensor] = field(repr=False)
    name: str
    path: Path
    sha256: str
    metadata: dict[str, str]
    findings: tuple[Finding, ...]

    @property
    def provenance(self) -> Provenance | None:
        """The record of how pydetox made it; None if it did not, as in `Checkpoint`."""
        text = self.metadata.get(METADATA_KEY)
        return None if text is None else Provenance.from_json(text)


def kind_of(config: Mapping[str, Any]) -> TextKind | None:
    """Return what the model of a `config.json` computes; None if it is no text model."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    return next((kind for ending, kind in _KINDS if name.endswith(ending)), None)


def is_text_model(
    source: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool = False,
) -> bool:
    """Return whether a checkpoint's name means a text model; nothing but `config.json` is read.

    The result is False for what cannot be read: reading it as a checkpoint says why.
    """
    try:
        identity = identify_checkpoint(source, cache_dir=cache_dir, offline=offline)
        config_file = identity.config_file
        if config_file is None or config_file.name != TRANSFORMERS_CONFIG_NAME:
            return False
        return kind_of(read_object(config_file)) is not None
    except (CheckpointError, OSError):
        return False


def read_text_files(
    source: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool = False,
) -> TextFiles:
    """Read a text model without executing anything in it.

    source: A folder in transformers' layout, its weights file, `local-dir:…`, or
    `hf-hub:org/repo[@revision]`. The other arguments are those of `load_checkpoint`.

    Raises:
        CheckpointError: It cannot be found, fetched or read.
        UnsafeCheckpointError: It is built to run code or to exhaust memory.
        ArchitectureError: It is no text model, or its weights are quantised, NaN or infinite.
    """
    identity, config, kind = _identified(source, cache_dir, offline)
    assert identity.config_file is not None
    if os.path.lexists(identity.config_file.with_name(ADAPTER_CONFIG_NAME)):
        raise ArchitectureError(
            f"{identity.config_file.parent}: there is an {ADAPTER_CONFIG_NAME}; merge the adapter "
            "(merge_and_unload() of peft) and save the result, or remove that file"
        )
    try:
        with open_weights(identity.weights) as weights:
            if weights.shards is not None:
                identity.check_shards(weights.shards.files)
            refuse_ambiguous(weights.findings)
            state_dict, digest = read_open(weights)
        check_finite(state_dict)
    except CheckpointError as error:
        raise type(error)(f"{identity.weights}: {error}") from error
    return TextFiles(
        kind=kind,
        config=config,
        companions=read_companions(
            identity.config_file.parent, (*COMPANION_NAMES, *GENERATION_NAMES)
        ),
        state_dict=state_dict,
        name=identity.reference,
        path=identity.weights,
        sha256=digest,
        metadata=weights.metadata,
        findings=weights.findings,
    )


def require_text_model(
    source: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool = False,
) -> None:
    """Raise what `read_text_files` raises for a name that means no text model; read no weights."""
    _identified(source, cache_dir, offline)


def _identified(
    source: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None, offline: bool
) -> tuple[CheckpointIdentity, dict[str, Any], TextKind]:
    """Return the files of a text model, its configuration and what it computes."""
    identity = identify_checkpoint(source, cache_dir=cache_dir, offline=offline)
    config = _read_config(identity)
    kind = kind_of(config)
    if kind is None:
        raise ArchitectureError(
            f"{identity.config_file}: architectures = {quote(config.get('architectures'))} is no "
            "text model; expected a …ForSequenceClassification, a …ForCausalLM, or the text tower "
            "of a CLIP"
        )
    return identity, config, kind


def _read_config(identity: CheckpointIdentity) -> dict[str, Any]:
    path = identity.config_file
    if path is None or path.name != TRANSFORMERS_CONFIG_NAME or not os.path.lexists(path):
        raise ArchitectureError(
            f"{identity.reference}: there is no {TRANSFORMERS_CONFIG_NAME} beside its weights, and "
            "a text model needs the one of its repository"
        )
    try:
        config = read_object(path)
        check_text_config(config)
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from error
    return {key: value for key, value in config.items() if not _names_kernels(key)}


def check_text_config(config: Mapping[str, Any]) -> None:
    """Refuse a configuration that asks for code, kernels of a hub or absurd sizes.

    Raises:
        UnsafeCheckpointError: It does.
        ArchitectureError: The weights that it describes are quantised, or a part is misshapen.
    """
    if not isinstance(config.get("model_type"), str):
        raise ArchitectureError("has no model_type; expected transformers' name of an architecture")
    if config.get("quantization_config") is not None:
        raise ArchitectureError(
            "its weights are quantised (quantization_config); dequantise the model and save it"
        )
    if config.get("problem_type") in ("multi_label_classification", "regression"):
        raise ArchitectureError(
            f"its problem_type is {config['problem_type']!r}; pydetox reads classifiers that give "
            "each text one class"
        )
    if config.get("is_encoder_decoder") is True:
        raise ArchitectureError(
            "is an encoder with a decoder; pydetox reads encoders, and decoders alone"
        )
    _check_part(config, "")


def _check_part(part: object, where: str) -> None:
    if isinstance(part, dict):
        for key, value in part.items():
            path = f"{where}.{key}" if where else str(key)
            if key in _CODE and value:
                raise UnsafeCheckpointError(
                    f"{path} asks for code of its repository, which pydetox never runs"
                )
            if _names_kernels(key) and value is not None and not _is_plain_kernel(value):
                raise UnsafeCheckpointError(
                    f"{path} = {quote(value)} asks for kernels of a hub, which pydetox never runs"
                )
            layers = isinstance(key, str) and "layers" in key
            if isinstance(value, int) and not isinstance(value, bool):
                most = _MAX_LAYERS if layers else _MAX_NUMBER
                if abs(value) > most:
                    raise UnsafeCheckpointError(f"{path} is {value}; expected at most {most}")
            _check_part(value, path)
    elif isinstance(part, list):
        for index, value in enumerate(part):
            _check_part(value, f"{where}[{index}]")


def _names_kernels(key: object) -> bool:
    return isinstance(key, str) and any(name in key for name in _KERNELS)


def _is_plain_kernel(value: object) -> bool:
    """Whether a value names what torch itself has; pydetox chooses for itself all the same."""
    return value in (
        "eager",
        "sdpa",
        "flex_attention",
        "flash_attention_2",
        "flash_attention_3",
        "grouped_mm",
        "batched_mm",
        False,
        "",
    )


def config_text(config: Mapping[str, Any]) -> str:
    """Return a configuration as JSON with sorted keys, for comparisons and digests."""
    return json.dumps(config, sort_keys=True)
