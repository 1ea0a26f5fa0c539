"""Digests of what a configuration names: the files beside the targets that decide the results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from ..checkpoints import CheckpointIdentity, identify_checkpoint
from ..checkpoints.architecture import resolve_model
from ..checkpoints.identity import tokenizer_digests
from ..errors import DataError
from .config import ScannerConfig


def identify(config: ScannerConfig, reference: str, *, is_base: bool = False) -> CheckpointIdentity:
    """Find the files of a suspect, a reference model or the base.

    What the user says about preparing images is about the suspects and the references; a base that
    tells itself keeps its own.
    Raises what `identify_checkpoint` raises.
    """
    given = config.preprocess()
    if is_base:
        identity = identify_checkpoint(
            reference, model=config.base_model or config.model, offline=config.offline
        )
        if identity.tells_preprocessing() or not given:
            return identity
    return identify_checkpoint(
        reference,
        model=(config.base_model if is_base else None) or config.model,
        preprocess=given,
        offline=config.offline,
    )


def content_digests(config: ScannerConfig, warn: Callable[[str], None]) -> dict[str, str]:
    """Return digests of the files that a configuration names; raises when one cannot be read.

    warn: takes one line about each base or reference whose configuration is a guess.
    """

    def digest(reference: str, *, is_base: bool = False) -> str:
        identity = identify(config, reference, is_base=is_base)
        for warning in identity.configured().warnings:
            warn(warning)
        return identity.digest()

    found = {"images": config.image_source().digest(), "class_names": "", "templates": ""}
    for name in ("model", "base_model"):
        path = getattr(config, name)
        if path is not None and Path(path).is_file():
            found[name] = _file_digest(Path(path))
        if path is not None:  # it stands in for a suspect's own configuration, and its tokenizer
            tokenizer = tokenizer_digests(resolve_model(path)[0], {})
            if tokenizer:
                found[f"tokenizer_of_{name}"] = json.dumps(tokenizer, sort_keys=True)
    if config.base is not None:
        found["base"] = digest(config.base, is_base=True)
    if config.before is not None:
        found["before"] = digest(config.before)
    found["reference_models"] = ",".join(digest(name) for name in config.reference_models)
    if config.calibration is not None:
        found["calibration"] = _file_digest(Path(config.calibration))
    if config.known_vectors:
        found["known_vectors"] = ",".join(
            identify_checkpoint(Path(v)).sha256() for v in config.known_vectors
        )
    return found


def _file_digest(path: Path) -> str:
    hasher = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                hasher.update(block)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    return hasher.hexdigest()
