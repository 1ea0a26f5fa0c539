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
    needs_tokenizer,
)
from pydetox.checkpoints.index import Finding, quote, refuse_ambiguous
from pydetox.checkpoints.layout import (
    ADAPTER_CONFIG_NAME,
    TOKENIZER_NAMES,
    TRANSFORMERS_CONFIG_NAME,
    TRANSFORMERS_ORDER,
    is_divided_name,
)
from pydetox.checkpoints.provenance import METADATA_KEY, Provenance
from pydetox.checkpoints.sources import OpenWeights, open_weights
from pydetox.checkpoints.transformers_files import read_companions, read_object
from pydetox.checkpoints.transformers_layouts import from_transformers
from pydetox.checkpoints.weights import read_open
from pydetox.errors import ArchitectureError, CheckpointError


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint that was read and checked.

    Attributes:
        state_dict: The tensors by name, on the CPU, in the dtypes of the file. Wrapper prefixes
            (``module.``) are removed.
        model_config: open_clip's ``model_cfg`` (``embed_dim``, ``vision_cfg``, ``text_cfg``, …).
            :func:`load_checkpoint` always sets it.
        preprocess_config: open_clip's ``preprocess_cfg`` (``mean``, ``std``, ``interpolation``,
            ``resize_mode``), if known.
        name: The name that was given.
        path: The weights file, or the index of its shards.
        sha256: The SHA-256 of that file as hex digits. For shards, see
            :meth:`pydetox.checkpoints.sources.OpenWeights.sha256`.
        format: ``"safetensors"`` or ``"torch"``.
        metadata: The text metadata of a safetensors file.
        companions: The files beside the weights that a repaired model needs as well, by name. For a
            folder in transformers' layout, these are configuration, image processor and tokenizer.
            ``state_dict`` then has open_clip's or timm's names (`transformers_layouts`), and a
            repaired model is written in transformers' layout. For other models, it is the tokenizer
            if it is not CLIP's own.
        findings: Odd things about the file that do not prevent reading it.
        preprocess_source: The source of ``preprocess_config``.
        warnings: One line for each part of the configuration that is a guess or was passed over.
        named: The architecture that the user named, if the checkpoint does not name it; else None.
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
        """A hash of everything that the model's results depend on.

        These are the weights, the configuration and a tokenizer that is not CLIP's own.
        """
        return content_digest(
            self.sha256, self.model_config, self.preprocess_config, self.companions
        )

    @property
    def provenance(self) -> Provenance | None:
        """The record of how pydetox made it; ``None`` if pydetox did not make it.

        Raises:
            CheckpointError: The file has such a record, but pydetox cannot have written it.
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
        model: The architecture, as open_clip's name or the path of a JSON configuration, for
            weights that do not name it. The configuration of a folder or of one of open_clip's tags
            takes precedence. A configuration beside the weights that cannot be used is passed over,
            with one of `Checkpoint.warnings`. A name also decides how images are prepared: as for
            the pretrained weights that open_clip, timm or torchvision have under that name.
        preprocess: How images are prepared; this overrides all other sources. Any of ``mean``,
            ``std``, ``interpolation``, ``resize_mode`` and ``fill_color``, as in open_clip's
            ``preprocess_cfg``, and ``resize_size`` (see `Resizing`). A ``resize_mode`` alone means
            that nothing is cut off beyond a square.
        cache_dir: The folder for hub downloads; ``None`` for the hub's default.
        offline: Whether to use only files on this machine, without opening a socket.
        allow_nonfinite: Whether to accept weights that are NaN or infinite; they become a finding.
        weights_key: The key of the weights in a pickled checkpoint with several sets of them. It
            has slashes between nested keys, and ``"."`` means the outermost dictionary.

    Raises:
        CheckpointError: It cannot be found, fetched or read.
        UnsafeCheckpointError: It is built to run code or to exhaust memory.
        ArchitectureError: The architecture is unknown, or weights are NaN or infinite.
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
            _refuse_parts(identity.weights)
            _refuse_other_weights(identity)
            if model_config is None:
                _refuse_transformers_names(weights)
                raise ArchitectureError(
                    f"nothing tells its architecture: there is no {CONFIG_NAME} beside it; name "
                    "one with model=, such as ViT-B-32 or a JSON file"
                )
            state_dict, digest = read_open(weights)
            companions: dict[str, bytes] = {}
            beside = identity.config_file
            theirs = beside is not None and beside.name == TRANSFORMERS_CONFIG_NAME
            theirs = theirs and "layout" in model_config
            if theirs or any(name.startswith("vision_model.") for name in state_dict):
                state_dict = _from_transformers(state_dict, model_config)
                if identity.config_file is not None:
                    companions = read_companions(identity.config_file.parent)
            elif needs_tokenizer(model_config):
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
    """Refuse a checkpoint from which another loader may take other weights.

    A scan or a repair of it might concern other weights than those that run.

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
            "that, by converting the folder with base=, or with peft (merge_and_unload())"
        )


def _refuse_parts(path: Path) -> None:
    """Raise CheckpointError for a part of the weights of a training with DeepSpeed's ZeRO-3."""
    if is_divided_name(path.name):
        raise CheckpointError(
            "is a part of weights that DeepSpeed has divided (ZeRO stage 3); DeepSpeed's "
            f"zero_to_fp32.py joins them: in {path.parent.parent}, run "
            "`python zero_to_fp32.py . joined`, and give the folder joined"
        )


def _refuse_other_weights(identity: CheckpointIdentity) -> None:
    """Raise ArchitectureError for a folder from which transformers loads other weights."""
    config_file = identity.weights.with_name(TRANSFORMERS_CONFIG_NAME)
    theirs = identity.config_file == config_file or identity.weights.name in TRANSFORMERS_ORDER
    if not theirs or not os.path.lexists(config_file):
        return
    if os.path.lexists(config_file.with_name(ADAPTER_CONFIG_NAME)):
        raise ArchitectureError(
            f"there is an {ADAPTER_CONFIG_NAME} beside it, for which transformers loads another "
            "model and changes it; merge the adapter and save the result, or remove that file"
        )
    try:
        named = read_object(config_file).get("transformers_weights")
    except ArchitectureError:
        return  # no configuration, which is said elsewhere
    if named not in (None, identity.weights.name):
        raise ArchitectureError(
            f"{config_file.name} beside it has transformers_weights = {quote(named)}, which is "
            "what transformers loads from that folder"
        )


def _refuse_transformers_names(weights: OpenWeights) -> None:
    theirs = [n for n in weights.tensors if n.startswith(("vision_model.", "text_model."))]
    if theirs:
        raise ArchitectureError(
            f"its {len(weights.tensors)} tensors are named as in a model of transformers "
            f"({quote(theirs[0])}), and there is no {TRANSFORMERS_CONFIG_NAME} beside it; put the "
            "repository's there, or name its architecture with model="
        )


def _from_transformers(
    state_dict: dict[str, torch.Tensor], model_config: Config
) -> dict[str, torch.Tensor]:
    text, vision = model_config["text_cfg"], model_config["vision_cfg"]
    if "layout" not in model_config and (
        model_config.get("custom_text")
        or text.get("hf_model_name")
        or vision.get("timm_model_name")
    ):
        raise ArchitectureError(
            "its tensors are named as in a model of transformers; of the architectures of "
            "open_clip only a plain CLIP with two vision transformers is read from those names"
        )
    return from_transformers(state_dict, model_config)


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
