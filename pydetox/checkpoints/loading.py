"""From a checkpoint's name to its checked weights: :func:`load_checkpoint`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pydetox.checkpoints.architecture import (
    CONFIG_NAME,
    Config,
    check_finite,
    nonfinite_findings,
)
from pydetox.checkpoints.identity import (
    CheckpointIdentity,
    content_digest,
    identify_checkpoint,
)
from pydetox.checkpoints.index import Finding, quote, refuse_ambiguous
from pydetox.checkpoints.layout import TOKENIZER_NAMES, TRANSFORMERS_CONFIG_NAME
from pydetox.checkpoints.provenance import METADATA_KEY, Provenance
from pydetox.checkpoints.sources import OpenWeights, open_weights
from pydetox.checkpoints.transformers_clip import read_companions, to_open_clip
from pydetox.checkpoints.weights import read_open
from pydetox.errors import ArchitectureError, CheckpointError


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint that was read and checked.

    Attributes:
        state_dict: Name to tensor, on the CPU, in the dtypes of the file; wrapper prefixes
            (``module.``) are removed.
        model_config: open_clip's ``model_cfg`` (``embed_dim``, ``vision_cfg``, ``text_cfg``, …).
            :func:`load_checkpoint` always sets it.
        preprocess_config: open_clip's ``preprocess_cfg`` (``mean``, ``std``, ``interpolation``,
            ``resize_mode``), if known.
        name: The name under which it was asked for.
        path: The weights file, or the index of its shards.
        sha256: SHA-256 of that file, in hexadecimal; of shards, see
            :meth:`pydetox.checkpoints.sources.OpenWeights.sha256`.
        format: ``"safetensors"`` or ``"torch"``.
        metadata: The text metadata of a safetensors file.
        companions: Files beside the weights that a repaired model needs as well, by name. Of a
            CLIPModel in transformers' layout: configuration, image processor and tokenizer;
            ``state_dict`` then has open_clip's names, and a repaired model is written in the layout
            that it came in. Otherwise: the tokenizer, where it is not CLIP's own.
        findings: What is odd about the file, without keeping it from being read.
        preprocess_source: Who tells ``preprocess_config``.
        warnings: One line for each part of the configuration that is a guess or was passed over.
        named: The architecture that the user named, where nothing else tells; else None.
    """

    state_dict: dict[str, torch.Tensor]
    model_config: Config | None
    preprocess_config: Config | None
    name: str
    path: Path
    sha256: str
    format: str
    metadata: dict[str, str] = field(default_factory=dict)
    companions: dict[str, bytes] = field(default_factory=dict, repr=False)
    findings: tuple[Finding, ...] = ()
    preprocess_source: str = "open_clip's default"
    warnings: tuple[str, ...] = ()
    named: str | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape."""
        return {name: tuple(tensor.shape) for name, tensor in self.state_dict.items()}

    @property
    def digest(self) -> str:
        """Hash of all that decides what the model computes: weights and configuration."""
        return content_digest(self.sha256, self.model_config, self.preprocess_config)

    @property
    def provenance(self) -> Provenance | None:
        """How pydetox made it, or ``None`` if pydetox did not.

        Raises:
            CheckpointError: The file says something about it, but nothing that pydetox would write.
        """
        text = self.metadata.get(METADATA_KEY)
        return None if text is None else Provenance.from_json(text)


def load_checkpoint(
    reference: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    preprocess: Mapping[str, Any] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool = False,
    allow_nonfinite: bool = False,
    weights_key: str | None = None,
) -> Checkpoint:
    """Read a checkpoint without executing anything in it.

    Args:
        reference: A weights file, a ``*.index.json`` with its shards, a folder in open_clip's or
            transformers' layout, ``local-dir:…``, ``hf-hub:org/repo[@revision]`` or
            ``ARCHITECTURE,TAG`` of open_clip.
        model: The architecture of weights that do not tell theirs: open_clip's name of it or the
            path of a JSON configuration. What a folder or one of open_clip's tags tells comes
            first; a configuration beside the weights that cannot be used is passed over, with one
            of `Checkpoint.warnings`. A name also tells how images are prepared: as for open_clip's
            pretrained weights of that architecture.
        preprocess: How images are prepared, whatever else tells it: any of ``mean``, ``std``,
            ``interpolation``, ``resize_mode`` and ``fill_color``, as in open_clip's
            ``preprocess_cfg``.
        cache_dir: Where hub downloads are kept; ``None`` for the hub's usual place.
        offline: Use only what is on this machine; no socket is opened.
        allow_nonfinite: Accept weights that are NaN or infinite; they become a finding.
        weights_key: Of a pickled checkpoint with several sets of weights: the key of the one that
            is meant, with slashes between nested ones, ``"."`` for the outermost dictionary.

    Raises:
        CheckpointError: It cannot be found, fetched or read.
        UnsafeCheckpointError: It is built to run code or to exhaust memory.
        ArchitectureError: Nothing tells the architecture, or weights are NaN or infinite.
        UsageError: ``reference`` or ``model`` has no meaning.
    """
    identity = identify_checkpoint(
        reference, model=model, preprocess=preprocess, cache_dir=cache_dir, offline=offline
    )
    return read_checkpoint(identity, allow_nonfinite=allow_nonfinite, weights_key=weights_key)


def read_checkpoint(
    identity: CheckpointIdentity, *, allow_nonfinite: bool = False, weights_key: str | None = None
) -> Checkpoint:
    """Read the checkpoint whose files were found before; see :func:`load_checkpoint`.

    Raises:
        CheckpointError: It cannot be read, or its shards are others than those that were found.
        UnsafeCheckpointError: It is built to run code or to exhaust memory.
        ArchitectureError: Nothing tells the architecture, or weights are NaN or infinite.
    """
    configured = identity.configured()
    model_config = configured.model_config
    try:
        with open_weights(identity.weights, weights_key) as weights:
            if weights.shards is not None:
                identity.check_shards(weights.shards.files)
            _refuse_adapters(weights)
            if model_config is None:
                _refuse_transformers_names(weights)
                raise ArchitectureError(
                    f"nothing tells its architecture: there is no {CONFIG_NAME} beside it; name "
                    "one with model= "
                    "(--model), such as ViT-B-32 or a JSON file"
                )
            state_dict, digest = read_open(weights)
            companions: dict[str, bytes] = {}
            if any(name.startswith("vision_model.") for name in state_dict):
                state_dict = _from_transformers(state_dict, model_config)
                if identity.config_file is not None:
                    companions = read_companions(identity.config_file.parent)
            elif model_config["text_cfg"].get("hf_tokenizer_name"):
                companions = read_companions(identity.weights.parent, TOKENIZER_NAMES)
        if not allow_nonfinite:
            check_finite(state_dict)
    except CheckpointError as error:
        raise type(error)(f"{identity.weights}: {error}") from error
    return Checkpoint(
        state_dict=state_dict,
        model_config=model_config,
        preprocess_config=configured.preprocess_config,
        preprocess_source=configured.preprocess_source,
        warnings=configured.warnings,
        named=configured.named,
        name=identity.reference,
        path=identity.weights,
        sha256=digest,
        format=weights.format,
        metadata=weights.metadata,
        companions=companions,
        findings=(*weights.findings, *(nonfinite_findings(state_dict) if allow_nonfinite else ())),
    )


def require_unambiguous(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint of which nobody knows that a user's loader takes these weights.

    Work on it would be on other weights than those that run, perhaps.

    Raises:
        CheckpointError: The file has a finding of `AMBIGUOUS_RULES`.
    """
    try:
        refuse_ambiguous(checkpoint.findings)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error


def _refuse_adapters(weights: OpenWeights) -> None:
    """Raise ArchitectureError for weights that change those of another model (LoRA of peft)."""
    adapters = [n for n in weights.tensors if ".lora_" in n or n.startswith("lora_")]
    if adapters:
        raise ArchitectureError(
            f"holds adapters ({len(adapters)} tensors such as {quote(adapters[0])}), which are no "
            "model of their own: merge them into the model that they were trained for and save "
            "that (peft: PeftModel.from_pretrained(base, folder).merge_and_unload())"
        )


def _refuse_transformers_names(weights: OpenWeights) -> None:
    theirs = [n for n in weights.tensors if n.startswith(("vision_model.", "text_model."))]
    if theirs:
        raise ArchitectureError(
            f"its {len(weights.tensors)} tensors are named as in a model of transformers "
            f"({quote(theirs[0])}), and there is no {TRANSFORMERS_CONFIG_NAME} beside it; put the "
            "repository's there, or name its architecture with model= (--model)"
        )


def _from_transformers(
    state_dict: dict[str, torch.Tensor], model_config: Config
) -> dict[str, torch.Tensor]:
    text, vision = model_config["text_cfg"], model_config["vision_cfg"]
    if (
        model_config.get("custom_text")
        or text.get("hf_model_name")
        or vision.get("timm_model_name")
    ):
        raise ArchitectureError(
            "its tensors are named as in a model of transformers; of the architectures of "
            "open_clip only a plain CLIP with two vision transformers is read from those names"
        )
    return to_open_clip(state_dict, model_config)


def locate_weights(
    reference: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool = False,
) -> Path:
    """Find (on the hub: fetch) the weights file that a checkpoint's name means.

    Args:
        reference: As for :func:`load_checkpoint`.
        cache_dir: Where hub downloads are kept; ``None`` for the hub's usual place.
        offline: Use only what is on this machine; no socket is opened.

    Raises:
        CheckpointError: It cannot be found or fetched.
        UsageError: ``reference`` has no meaning.
    """
    return identify_checkpoint(reference, cache_dir=cache_dir, offline=offline).weights
