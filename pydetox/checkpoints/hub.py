"""Downloading from the Hugging Face hub, where the weights of open_clip's tags live too."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pydetox.checkpoints.architecture import CONFIG_NAME, Config, close_matches, named_config
from pydetox.checkpoints.index import quote
from pydetox.checkpoints.layout import (
    ADAPTER_CONFIG_NAME,
    COMPANION_NAMES,
    TOKENIZER_NAMES,
    TRANSFORMERS_CONFIG_NAME,
    TRANSFORMERS_ORDER,
    WEIGHT_NAMES,
)
from pydetox.checkpoints.shards import is_shard_index, read_shard_index
from pydetox.errors import CheckpointError, UsageError

_HUB_WEIGHT_NAMES = (WEIGHT_NAMES[0], WEIGHT_NAMES[2])


def fetch_repository(
    repository: str,
    revision: str | None,
    *,
    cache_dir: str | os.PathLike[str] | None,
    offline: bool,
) -> tuple[Path, Path | None]:
    """Download the weights of ``org/repo`` and the configuration that it has.

    That is open_clip's, or that of transformers with the files beside it that a model needs. All
    come from the same commit, also when the branch moves in between.

    Args:
        repository: ``org/repo``.
        revision: Branch, tag or commit; ``None`` for the default branch.
        cache_dir: The hub's cache; ``None`` for its usual place.
        offline: Use what is in the cache and open no socket.

    Returns:
        Path of the weights, path of the configuration.

    Raises:
        CheckpointError: The repository, the revision or the weights do not exist or cannot be
            fetched.
    """
    names = [CONFIG_NAME, TRANSFORMERS_CONFIG_NAME]
    config = _fetch_first(repository, names, revision, cache_dir, offline)
    names = list(_HUB_WEIGHT_NAMES)
    if config is not None:
        revision = config.parent.name  # the cache keeps a commit's files in snapshots/COMMIT/
        if config.name == TRANSFORMERS_CONFIG_NAME:
            names += TRANSFORMERS_ORDER
            for name in (*COMPANION_NAMES, ADAPTER_CONFIG_NAME):
                _fetch_first(repository, [name], revision, cache_dir, offline)
    weights = _fetch_first(repository, names, revision, cache_dir, offline)
    if weights is None:
        raise CheckpointError(_not_found(repository, names, offline))
    if is_shard_index(weights):
        for name in read_shard_index(weights).files:
            if _fetch_first(repository, [name], revision, cache_dir, offline) is None:
                raise CheckpointError(_not_found(repository, [name], offline))
    return weights, config


def fetch_pretrained(
    model: str, tag: str, *, cache_dir: str | os.PathLike[str] | None, offline: bool
) -> tuple[Path, Config, Config]:
    """Download the weights that open_clip lists under an architecture and a tag.

    Returns:
        Path of the weights, open_clip's model configuration and preprocessing configuration.
        ``quick_gelu`` is set where the tag needs it: open_clip itself only warns, and then computes
        with the wrong activation.

    Raises:
        UsageError: open_clip does not know the architecture or the tag; the message has the closest
            ones.
        CheckpointError: The weights cannot be fetched.
    """
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    model_config = named_config(model)
    pretrained = get_pretrained_cfg(model, tag)
    if not pretrained:
        known = list_pretrained_tags_by_model(model)
        hint = close_matches(tag, known) or (
            f"; it has {', '.join(known)}" if known else "; it has no pretrained weights"
        )
        raise UsageError(f"pretrained tag {quote(tag)}: not known to open_clip for {model}{hint}")
    repository, _, filename = pretrained.get("hf_hub", "").rpartition("/")
    if not repository:
        raise CheckpointError(
            f"{model},{tag}: is not on the Hugging Face hub; download it yourself and load the "
            f"file with model={model!r}"
        )
    names: Sequence[str] = _HUB_WEIGHT_NAMES
    if filename:
        names = [f"{Path(filename).stem}.safetensors", filename]
    weights = _fetch_first(repository, names, None, cache_dir, offline)
    if weights is None:
        raise CheckpointError(_not_found(repository, names, offline))
    if pretrained.get("quick_gelu"):
        model_config["quick_gelu"] = True
    keys = ("mean", "std", "interpolation", "resize_mode")
    preprocess: Config = {key: pretrained[key] for key in keys if key in pretrained}
    for key in ("mean", "std"):
        if key in preprocess:
            preprocess[key] = list(preprocess[key])
    return weights, model_config, preprocess


def _fetch_first(
    repository: str,
    names: Sequence[str],
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    offline: bool,
) -> Path | None:
    """Fetch the first of ``names`` that the repository has, or ``None``."""
    if offline:
        return _cached_first(repository, names, revision, cache_dir)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    shown = f"hf-hub:{repository}"
    for name in names:
        try:
            return Path(
                hf_hub_download(
                    repository,
                    name,
                    revision=revision,
                    cache_dir=os.fspath(cache_dir) if cache_dir is not None else None,
                )
            )
        except RemoteEntryNotFoundError:
            continue
        except LocalEntryNotFoundError as error:
            cause = _first_line(error.__cause__ or error)
            raise CheckpointError(f"{shown}: the hub cannot be reached ({cause})") from error
        except GatedRepoError as error:
            raise CheckpointError(
                f"{shown}: is gated; ask for access on its page and log in with `hf auth login`"
            ) from error
        except RepositoryNotFoundError as error:
            raise CheckpointError(f"{shown}: no such repository, or it is private") from error
        except RevisionNotFoundError as error:
            raise CheckpointError(f"{shown}: has no revision {quote(revision)}") from error
        except Exception as error:  # the hub's client lets its HTTP library's errors through
            raise CheckpointError(
                f"{shown}: {name} cannot be fetched ({type(error).__name__}: {_first_line(error)})"
            ) from error
    return None


def _cached_first(
    repository: str,
    names: Sequence[str],
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
) -> Path | None:
    """Find the first of ``names`` in the cache.

    ``hf_hub_download(local_files_only=True)`` may open a connection nevertheless, to find out what
    to call itself in requests that it then does not make.
    """
    from huggingface_hub import try_to_load_from_cache

    folder = os.fspath(cache_dir) if cache_dir is not None else None
    for name in names:
        found = try_to_load_from_cache(repository, name, folder, revision)
        if isinstance(found, str):
            return Path(found)
    return None


def cached_tokenizer(name: str) -> tuple[Path, ...]:
    """Return the files of a tokenizer in the hub's cache on this machine, or in a folder.

    transformers reads them there (:mod:`pydetox.models.tokenizers`); nothing is downloaded.

    Args:
        name: The repository, or a folder of that name, as ``hf_tokenizer_name`` has it.
    """
    from huggingface_hub import try_to_load_from_cache

    names = (*TOKENIZER_NAMES, TRANSFORMERS_CONFIG_NAME)  # the last may tell the tokenizer's class
    folder = Path(name)
    try:
        if folder.is_dir():
            return tuple(folder / each for each in names if (folder / each).is_file())
        found = [try_to_load_from_cache(name, each) for each in names]
    except ValueError:  # no name of a repository
        return ()
    return tuple(Path(path) for path in found if isinstance(path, str))


def _not_found(repository: str, names: Sequence[str], offline: bool) -> str:
    where = "the local cache, and offline was asked for" if offline else "the repository"
    return f"hf-hub:{repository}: none of {', '.join(names)} is in {where}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0].strip()[:200] if lines else type(error).__name__
    # The server may have written it.
    return "".join(character if character.isprintable() else "?" for character in text)
