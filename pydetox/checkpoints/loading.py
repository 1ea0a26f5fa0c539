"""From a checkpoint's name to its checked weights: :func:`load_checkpoint`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pydetox.checkpoints.architecture import (
    CONFIG_NAME,
    Config,
    check_finite,
    nonfinite_findings,
    read_config,
    resolve_model,
)
from pydetox.checkpoints.hub import fetch_pretrained, fetch_repository
from pydetox.checkpoints.index import Finding, quote
from pydetox.checkpoints.naming import CheckpointReference, parse_reference
from pydetox.checkpoints.provenance import METADATA_KEY, Provenance
from pydetox.checkpoints.sources import OpenWeights, find_weights, open_weights
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
        findings: What is odd about the file, without keeping it from being read.
    """

    state_dict: dict[str, torch.Tensor]
    model_config: Config | None
    preprocess_config: Config | None
    name: str
    path: Path
    sha256: str
    format: str
    metadata: dict[str, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape."""
        return {name: tuple(tensor.shape) for name, tensor in self.state_dict.items()}

    @property
    def provenance(self) -> Provenance | None:
        """How pydetox made it, or ``None`` if pydetox did not.

        Raises:
            CheckpointError: The file says something about it, but nothing that pydetox would write.
        """
        text = self.metadata.get(METADATA_KEY)
        return None if text is None else Provenance.from_json(text)


@dataclass(frozen=True)
class _Files:
    """Where the weights are, and what came with them."""

    weights: Path
    model_config: Config | None = None
    preprocess_config: Config | None = None


def load_checkpoint(
    reference: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool = False,
    allow_nonfinite: bool = False,
    weights_key: str | None = None,
) -> Checkpoint:
    """Read a checkpoint without executing anything in it.

    Args:
        reference: A weights file, a ``*.safetensors.index.json`` with its shards, a folder in
            open_clip's layout, ``local-dir:…``, ``hf-hub:org/repo[@revision]`` or
            ``ARCHITECTURE,TAG`` of open_clip.
        model: The architecture: open_clip's name of it or the path of a JSON configuration. Then
            an ``open_clip_config.json`` beside the weights is not read at all.
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
    parsed = parse_reference(reference)
    given = resolve_model(model) if model is not None else None
    files = _find_files(parsed, cache_dir, offline, read_beside=given is None)
    model_config, preprocess_config = given or (files.model_config, files.preprocess_config)
    try:
        with open_weights(files.weights, weights_key) as weights:
            _refuse_transformers_names(weights)
            if model_config is None:
                raise ArchitectureError(
                    f"nothing tells its architecture: there is no {CONFIG_NAME} beside it; name "
                    "one with model= "
                    "(--model), such as ViT-B-32 or a JSON file"
                )
            state_dict, digest = read_open(weights)
        if not allow_nonfinite:
            check_finite(state_dict)
    except CheckpointError as error:
        raise type(error)(f"{files.weights}: {error}") from error
    return Checkpoint(
        state_dict=state_dict,
        model_config=model_config,
        preprocess_config=preprocess_config,
        name=parsed.text,
        path=files.weights,
        sha256=digest,
        format=weights.format,
        metadata=weights.metadata,
        findings=(*weights.findings, *(nonfinite_findings(state_dict) if allow_nonfinite else ())),
    )


def _refuse_transformers_names(weights: OpenWeights) -> None:
    theirs = [n for n in weights.tensors if n.startswith(("vision_model.", "text_model."))]
    if theirs:
        raise ArchitectureError(
            f"its {len(weights.tensors)} tensors are named as in the CLIPModel of transformers "
            f"({quote(theirs[0])}), expected the names of open_clip ('visual.…'); use the "
            "repository's weights for open_clip"
        )


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
    return _find_files(parse_reference(reference), cache_dir, offline, read_beside=False).weights


def _find_files(
    reference: CheckpointReference,
    cache_dir: str | os.PathLike[str] | None,
    offline: bool,
    read_beside: bool,
) -> _Files:
    if reference.model is not None and reference.tag is not None:
        return _Files(
            *fetch_pretrained(reference.model, reference.tag, cache_dir=cache_dir, offline=offline)
        )
    config: Path | None
    if reference.repository is not None:
        weights, config = fetch_repository(
            reference.repository, reference.revision, cache_dir=cache_dir, offline=offline
        )
    else:
        assert reference.path is not None  # the remaining kinds both have one
        weights = find_weights(reference.path, folder_expected=reference.kind == "local-dir")
        config = weights.parent / CONFIG_NAME
    if read_beside and config is not None and os.path.lexists(config):
        return _Files(weights, *read_config(config))
    return _Files(weights)
