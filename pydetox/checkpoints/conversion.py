"""From a file that nobody should unpickle to one that cannot hold code."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from pydetox.atomic import rehearse_directory, rehearse_file
from pydetox.checkpoints.adapter_writing import (
    ADAPTER_FILES,
    DEFAULT_RANK,
    Adapter,
    make_adapter,
    save_adapter,
)
from pydetox.checkpoints.adapters import adapter_scale, merge_adapter
from pydetox.checkpoints.architecture import nonfinite_findings
from pydetox.checkpoints.index import Finding, quote, refuse_ambiguous
from pydetox.checkpoints.naming import parse_reference
from pydetox.checkpoints.provenance import METADATA_KEY, Provenance
from pydetox.checkpoints.safetensors_index import DTYPE_CODES
from pydetox.checkpoints.sources import OpenWeights, find_weights, open_weights
from pydetox.checkpoints.weights import read_open
from pydetox.checkpoints.writing import save_weights
from pydetox.errors import ArchitectureError, CheckpointError, OutputError, UsageError


def convert_checkpoint(
    reference: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    weights_key: str | None = None,
    base: str | os.PathLike[str] | None = None,
) -> tuple[Finding, ...]:
    """Write the weights of an untrusted checkpoint as one ``.safetensors`` file.

    Names (without the wrapper prefixes ``module.`` and ``_orig_mod.``), dtypes, shapes and bytes of
    the tensors stay the same. A tensor that shares its storage with another one becomes a separate
    tensor, because the format has no sharing. Other content, such as the epoch and the optimizer,
    is left out. The metadata names the source.

    Args:
        reference: A weights file, a ``*.safetensors.index.json``, or a folder.
        output: The file to write. It appears complete or not at all.
        overwrite: Whether to replace an existing file.
        weights_key: As in :func:`pydetox.checkpoints.load_checkpoint`.
        base: The file or folder of the model that a LoRA adapter of peft was trained for, if
            ``reference`` is the folder of such an adapter. The merged weights are written, under
            the names and in the dtypes of the base.

    Returns:
        The findings about the source, including NaN and infinite weights.

    Raises:
        CheckpointError: The source is missing or damaged, or a tensor has a dtype that the format
            does not know.
        UnsafeCheckpointError: It is built to do harm.
        UsageError: ``reference`` is not on this machine, or ``output`` is no ``.safetensors`` name.
        OutputError: The file exists, is one of those that are read, or cannot be written.
    """
    parsed = parse_reference(reference)
    if parsed.path is None:
        raise UsageError(f"{parsed.text}: expected a file or folder on this machine")
    if Path(output).suffix.lower() != ".safetensors":
        raise UsageError(f"{os.fspath(output)}: expected a name ending in .safetensors")
    rehearse_file(output, overwrite=overwrite)
    path = find_weights(parsed.path, folder_expected=parsed.kind == "local-dir")
    extra: dict[str, object] = {}
    try:
        with open_weights(path, weights_key) as weights:
            _refuse_input(output, weights)
            state_dict, digest = read_open(weights)
            if base is not None:
                state_dict, extra = _merged(state_dict, path.parent, base, output)
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from error
    unfit = [n for n, entry in weights.tensors.items() if entry.dtype not in DTYPE_CODES]
    if unfit:
        raise CheckpointError(
            f"{path}: tensor {quote(unfit[0])}: has the dtype {weights.tensors[unfit[0]].dtype}, "
            "which a safetensors file cannot hold"
        )
    findings = (*weights.findings, *nonfinite_findings(state_dict))
    provenance = Provenance(
        method="convert" if base is None else "merge of a LoRA adapter",
        source_name=path.name,
        source_sha256=digest,
        extra={"source_format": weights.format, "findings": [f.message for f in findings], **extra},
    )
    kept = {key: text for key, text in weights.metadata.items() if key != METADATA_KEY}
    earlier = weights.metadata.get(METADATA_KEY)
    if earlier is not None:
        kept[f"{METADATA_KEY}.source"] = earlier
    metadata = {"format": "pt", **kept, METADATA_KEY: provenance.to_json()}
    save_weights(output, state_dict, metadata=metadata, overwrite=overwrite)
    return findings


def convert_to_adapter(
    reference: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str],
    rank: int = DEFAULT_RANK,
    overwrite: bool = False,
    weights_key: str | None = None,
) -> tuple[tuple[Finding, ...], Adapter]:
    """Write the change from a base to a checkpoint as a LoRA adapter of peft.

    Args:
        reference: The file or folder of the changed model, with transformers' names.
        output: The folder to write.
        base: The file or folder of the model before the change.
        rank: As in `make_adapter`.
        overwrite: Whether to replace a folder that holds nothing but an adapter.
        weights_key: Of ``reference``, as in :func:`pydetox.checkpoints.load_checkpoint`.

    Returns:
        The findings about the changed model, and the adapter.

    Raises:
        ArchitectureError: As in `make_adapter`, or the names are not those of transformers.
        PydetoxError: All that `convert_checkpoint` raises.
    """
    rehearse_directory(output, overwrite=overwrite, replaceable=ADAPTER_FILES)
    paths, states, digests, findings = [], [], [], list[Finding]()
    for given, key in ((base, None), (reference, weights_key)):
        parsed = parse_reference(given)
        if parsed.path is None:
            raise UsageError(f"{parsed.text}: expected a file or folder on this machine")
        path = find_weights(parsed.path, folder_expected=parsed.kind == "local-dir")
        try:
            with open_weights(path, key) as weights:
                refuse_ambiguous(weights.findings)
                state_dict, digest = read_open(weights)
                if not any(name.startswith("vision_model.") for name in state_dict):
                    raise ArchitectureError(
                        "its tensors are not named as in a model of transformers, onto which peft "
                        "would load an adapter"
                    )
        except CheckpointError as error:
            raise type(error)(f"{path}: {error}") from error
        paths.append(path)
        states.append(state_dict)
        digests.append(digest)
        findings = list(weights.findings)
    adapter = make_adapter(states[0], states[1], rank=rank)
    provenance = Provenance(
        method="convert to a LoRA adapter",
        source_name=paths[1].name,
        source_sha256=digests[1],
        extra={"base_name": paths[0].name, "base_sha256": digests[0], "error": adapter.error},
    )
    save_adapter(output, adapter, base=os.fspath(base), provenance=provenance, overwrite=overwrite)
    return tuple(findings), adapter


def _refuse_input(output: str | os.PathLike[str], weights: OpenWeights) -> None:
    """Raise OutputError if a file to write is one of the open ones, perhaps one of several."""
    if os.path.realpath(output) in (os.path.realpath(file.path) for file, _ in weights.files):
        raise OutputError(
            f"{os.fspath(output)}: is read here, so it is not replaced; name another file"
        )


def _merged(
    adapter: dict[str, torch.Tensor],
    folder: Path,
    base: str | os.PathLike[str],
    output: str | os.PathLike[str],
) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Return an adapter merged into its base, and what the provenance says about the base."""
    scale = adapter_scale(folder)
    named = parse_reference(base)
    if named.path is None:
        raise UsageError(f"{named.text}: expected a file or folder on this machine as base=")
    path = find_weights(named.path, folder_expected=named.kind == "local-dir")
    with open_weights(path) as weights:
        _refuse_input(output, weights)
        refuse_ambiguous(weights.findings)
        state_dict, digest = read_open(weights)
    merged = merge_adapter(adapter, state_dict, scale)
    return merged, {"base_name": path.name, "base_sha256": digest, "adapter_scale": scale}
