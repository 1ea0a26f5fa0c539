"""The files of a checkpoint, and the signature that shows whether they have changed.

A name (:mod:`naming`) leads to one :class:`CheckpointIdentity`. All code that reads a checkpoint,
limits its size, hashes it or remembers it asks the identity for its files. All of it therefore
means the same files: the weights, all shards, the configuration that gives the architecture, and a
tokenizer beside the weights or in the hub's cache.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydetox.checkpoints.index import WeightsFile, quote
from pydetox.checkpoints.layout import (
    CONFIG_NAME,
    PROCESSOR_NAMES,
    TOKENIZER_NAMES,
    TRANSFORMERS_CONFIG_NAME,
    find_weights,
)
from pydetox.checkpoints.naming import hint_for_missing, parse_reference
from pydetox.checkpoints.noted import told_architecture
from pydetox.checkpoints.shards import is_shard_index, read_shard_index, shard_path
from pydetox.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from pydetox.checkpoints.preprocessing import Configuration

#: open_clip's ``model_cfg`` and ``preprocess_cfg``.
ConfigPair = tuple["dict[str, Any] | None", "dict[str, Any] | None"]

_CHUNK = 1 << 20


@dataclass(frozen=True)
class CheckpointIdentity:
    """The files of one checkpoint.

    Finding them reads the index of shards, and what a training noted about the architecture
    (:mod:`noted`), and no weights.

    Attributes:
        reference: The name that was given.
        weights: The weights file, or the index of its shards.
        shards: The shards, in bytewise order of their names; empty for a single file.
        config_file: The ``open_clip_config.json`` or transformers' ``config.json`` that gives the
            architecture. It need not exist. ``None`` if the architecture comes from elsewhere.
        processor_file: The file beside a ``config.json`` that describes how images are prepared;
            ``None`` if there is none.
        listed: The model and preprocessing configuration in open_clip's list of pretrained models;
            ``None`` if files give it.
        model: The architecture that the user named, for a checkpoint that does not name it.
        preprocess: The user's values for preparing images, which override all other sources.
    """

    reference: str
    weights: Path
    shards: tuple[Path, ...] = ()
    config_file: Path | None = None
    processor_file: Path | None = None
    listed: ConfigPair | None = None
    model: str | None = None
    preprocess: Mapping[str, Any] | None = None

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The weights file, or the index followed by all shards."""
        return (self.weights, *self.shards)

    @property
    def nbytes(self) -> int:
        """The size of all weight files together, in bytes.

        Raises:
            CheckpointError: One of them is missing.
        """
        total = 0
        for path in self.weight_files:
            try:
                total += path.stat().st_size
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise CheckpointError(f"{path}: cannot be opened: {reason}") from error
        return total

    def signature(self) -> tuple[int, ...]:
        """The size, times, inode and device of every file; -1 for each missing file.

        Only the system can set the time at which an inode changed. On one machine, files with equal
        signatures are therefore the same files with the same content.
        """
        beside = (self.config_file, self.processor_file)
        tokenizer = [self.weights.with_name(name) for name in TOKENIZER_NAMES]
        files = (
            *self.weight_files,
            *(path for path in beside if path is not None),
            *([path for path in tokenizer if os.path.lexists(path)] or self._cached_tokenizer()),
        )
        found: list[int] = []
        for path in files:
            try:
                status = path.stat()
            except (OSError, ValueError):
                found.append(-1)
                continue
            times = status.st_mtime_ns, status.st_ctime_ns
            found += [status.st_size, *times, status.st_ino, status.st_dev]
        return tuple(found)

    def _cached_tokenizer(self) -> tuple[Path, ...]:
        """The files of the tokenizer in the hub's cache that the model uses, if it uses one."""
        try:
            model_config, _ = self.configuration()
        except (CheckpointError, UsageError):
            return ()  # reading it raises this error
        return _cached_tokenizer(model_config)

    def configured(self) -> Configuration:
        """Return what the model is and how its images are prepared, with the source of both.

        What a checkpoint says about itself comes first: the entry in open_clip's list, then the
        file beside the weights. The name that the user gave counts only if neither says anything.

        Raises:
            ArchitectureError: The configuration file is none, and no name stands in for it.
            UnsafeCheckpointError: It asks for remote code or absurd sizes, and no name stands in.
            UsageError: The name has no meaning.
        """
        from pydetox.checkpoints.preprocessing import configure  # with torch

        return configure(
            self.reference,
            listed=self.listed,
            config_file=self.config_file,
            processor_file=self.processor_file,
            model=self.model,
            preprocess=self.preprocess,
        )

    def tells_preprocessing(self) -> bool:
        """Return whether the checkpoint itself tells how images are prepared.

        Raises what `configured` raises.
        """
        return self.configured().preprocess_is_own

    def configuration(self) -> ConfigPair:
        """Return the model and preprocessing configurations; ``None`` for an unknown one.

        Raises what `configured` raises.
        """
        found = self.configured()
        return found.model_config, found.preprocess_config

    def sha256(self) -> str:
        """Return the SHA-256 of the weights as hex digits; for shards see `OpenWeights.sha256`.

        Raises:
            CheckpointError: A file is missing or no regular file, or the index has changed.
            UnsafeCheckpointError: A shard leads out of its folder.
        """
        try:
            if not self.shards:
                return _hash_file(self.weights)
            index = read_shard_index(self.weights)
            self.check_shards(index.files)
            return index.sha256(
                {p.name: _hash_file(shard_path(p.parent, p.name)) for p in self.shards}
            )
        except CheckpointError as error:
            raise type(error)(f"{self.weights}: {error}") from error

    def digest(self) -> str:
        """Return a hash of everything that the model's results depend on.

        These are the weights, the configuration, and the tokenizer if it is not CLIP's own. The
        hash equals the :attr:`Checkpoint.digest` of the checkpoint that is read from these files.

        Raises:
            CheckpointError: As :meth:`sha256` and :meth:`configuration`; or a file of the tokenizer
                cannot be read.
        """
        from pydetox.checkpoints.transformers_files import read_companions  # with torch

        model_config, preprocess_config = self.configuration()
        tokenizer: dict[str, bytes] = {}
        if needs_tokenizer(model_config):
            tokenizer = read_companions(self.weights.parent, TOKENIZER_NAMES)
        return content_digest(self.sha256(), model_config, preprocess_config, tokenizer)

    def check_shards(self, names: dict[str, list[str]]) -> None:
        """Raise CheckpointError unless an index that was read later names the same shards."""
        if list(names) != [path.name for path in self.shards]:
            raise CheckpointError("changed while it was read")


def identify_checkpoint(
    reference: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    preprocess: Mapping[str, Any] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool = False,
) -> CheckpointIdentity:
    """Find (on the hub: fetch) the files that a checkpoint's name means.

    Args:
        reference: As for :func:`load_checkpoint`.
        model: The architecture, as for :func:`load_checkpoint`.
        preprocess: How images are prepared, as for :func:`load_checkpoint`.
        cache_dir: Where hub downloads are kept; ``None`` for the hub's usual place.
        offline: Use only what is on this machine; no socket is opened.

    Raises:
        CheckpointError: It cannot be found or fetched, or its index of shards is damaged.
        UnsafeCheckpointError: Its index of shards leads elsewhere.
        UsageError: ``reference`` or ``model`` has no meaning.
    """
    parsed = parse_reference(reference)
    listed: ConfigPair | None = None
    if model is not None:
        from pydetox.checkpoints.architecture import resolve_model  # with torch

        resolve_model(model)  # a name without a meaning is an error, whether it is needed or not
    config_file: Path | None = None
    if parsed.path is not None:
        try:
            weights = find_weights(parsed.path, folder_expected=parsed.kind == "local-dir")
        except CheckpointError as error:
            if parsed.kind != "path" or os.path.lexists(parsed.path):
                raise
            raise CheckpointError(f"{error}{hint_for_missing(parsed.text)}") from None
        config_file = _configuration_beside(weights)
        if model is None and not os.path.lexists(config_file):
            model = told_architecture(weights)
    else:
        from pydetox.checkpoints.hub import fetch_pretrained, fetch_repository  # with torch

        if parsed.model is not None and parsed.tag is not None:
            weights, model_config, preprocess_config = fetch_pretrained(
                parsed.model, parsed.tag, cache_dir=cache_dir, offline=offline
            )
            listed = model_config, preprocess_config
        else:
            assert parsed.repository is not None
            weights, config_file = fetch_repository(
                parsed.repository, parsed.revision, cache_dir=cache_dir, offline=offline
            )
    shards: tuple[Path, ...] = ()
    if is_shard_index(weights):
        try:
            shards = tuple(weights.parent / name for name in read_shard_index(weights).files)
        except CheckpointError as error:
            raise type(error)(f"{weights}: {error}") from error
    return CheckpointIdentity(
        reference=parsed.text,
        weights=weights,
        shards=shards,
        config_file=config_file,
        processor_file=_processor_of(config_file),
        listed=listed,
        model=None if model is None else os.fspath(model),
        preprocess=preprocess,
    )


def _configuration_beside(weights: Path) -> Path:
    """Return what tells the architecture of weights in a folder: open_clip's file, if it is there.

    Without either the result is open_clip's, which then does not exist.
    """
    ours, theirs = weights.with_name(CONFIG_NAME), weights.with_name(TRANSFORMERS_CONFIG_NAME)
    return theirs if os.path.lexists(theirs) and not os.path.lexists(ours) else ours


def _processor_of(config_file: Path | None) -> Path | None:
    """Return what tells how images are prepared, beside a configuration of transformers."""
    if config_file is None or config_file.name != TRANSFORMERS_CONFIG_NAME:
        return None
    found = (config_file.with_name(name) for name in PROCESSOR_NAMES)
    return next((path for path in found if os.path.lexists(path)), None)


def needs_tokenizer(model_config: Mapping[str, Any] | None) -> bool:
    """Return whether a model's texts need a tokenizer of the hub instead of CLIP's own."""
    return bool(((model_config or {}).get("text_cfg") or {}).get("hf_tokenizer_name"))


def _cached_tokenizer(model_config: Mapping[str, Any] | None) -> tuple[Path, ...]:
    if not needs_tokenizer(model_config):
        return ()
    from pydetox.checkpoints.hub import cached_tokenizer

    return cached_tokenizer(str((model_config or {})["text_cfg"]["hf_tokenizer_name"]))


def tokenizer_digests(
    model_config: Mapping[str, Any] | None, companions: Mapping[str, bytes]
) -> dict[str, str]:
    """Return the SHA-256 of each file of a tokenizer that counts; empty for CLIP's own.

    These are the files beside the weights, or else those in the hub's cache.
    companions: The files beside the weights.
    """
    names = TOKENIZER_NAMES if needs_tokenizer(model_config) else ()
    beside = {n: hashlib.sha256(companions[n]).hexdigest() for n in names if n in companions}
    if beside:
        return beside
    return {path.name: _hash_file(path) for path in _cached_tokenizer(model_config)}


def content_digest(
    sha256: str,
    model_config: dict[str, Any] | None,
    preprocess_config: dict[str, Any] | None,
    companions: Mapping[str, bytes],
) -> str:
    """Return a hash of a checkpoint's content.

    sha256: The hash of its weights. companions: The files beside them; those of a tokenizer count.
    Without them, a tokenizer in the hub's cache counts.
    """
    tokenizer = tokenizer_digests(model_config, companions)
    content = [sha256, model_config, preprocess_config, *([tokenizer] if tokenizer else [])]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _hash_file(path: Path) -> str:
    hasher = hashlib.sha256()
    try:
        with WeightsFile(path) as file:
            position = 0
            while block := os.pread(file.descriptor, _CHUNK, position):
                hasher.update(block)
                position += len(block)
    except CheckpointError as error:
        raise type(error)(f"{quote(path.name)}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{quote(path.name)}: cannot be read: {error.strerror}") from error
    return hasher.hexdigest()
