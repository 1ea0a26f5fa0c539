"""The tokenizer of a model: CLIP's own, or one of the Hugging Face hub through open_clip's wrapper.

A tokenizer of the hub comes from the files beside the weights, or from the hub's cache on this
machine. Nothing is downloaded. transformers reads it, and pydetox needs transformers for this
alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import Tensor

from ..checkpoints.layout import TOKENIZER_NAMES
from ..checkpoints.tokenizer_files import check_tokenizer_json, guarded, is_failure, reason_of
from ..errors import ArchitectureError
from .hub_towers import vocabulary_of

Tokenizer = Callable[[list[str]], Tensor]


def tokenizer_of(text: Mapping[str, Any], companions: Mapping[str, bytes], name: str) -> Tokenizer:
    """Return the function from n texts to token ids, int64 [n, context_length].

    text: open_clip's ``text_cfg``. companions: The files beside the weights. name: The name of the
    model, for messages.

    Raises:
        ArchitectureError: The tokenizer is not on this machine, or its vocabulary is larger than
            the text tower's.
    """
    wanted = text.get("hf_tokenizer_name")
    length = int(text.get("context_length", 77))
    vocabulary = vocabulary_of(text)
    if wanted:
        return _of_the_hub(str(wanted), text, length, companions, name)
    if text.get("hf_model_name"):
        raise ArchitectureError(
            f"{name}: its configuration names no tokenizer for its text tower; expected "
            "hf_tokenizer_name in text_cfg"
        )
    if text.get("tokenizer_kwargs"):
        given: Tokenizer = _plain_with(length, tuple(sorted(text["tokenizer_kwargs"].items())))
        return given
    plain: Tokenizer = _plain(length)
    if _plain(length).vocab_size > int(vocabulary):
        raise ArchitectureError(
            f"{name}: a vocabulary of {vocabulary} tokens; CLIP's tokenizer has "
            f"{_plain(length).vocab_size} (a label-free scan needs no text tower)"
        )
    return plain


@lru_cache(maxsize=4)
def _plain(context_length: int) -> SimpleTokenizer:
    # Kept: each one reads CLIP's whole list of merges, a tenth of a second.
    return SimpleTokenizer(context_length=context_length)


@lru_cache(maxsize=4)
def _plain_with(context_length: int, options: tuple[tuple[str, Any], ...]) -> SimpleTokenizer:
    return SimpleTokenizer(context_length=context_length, **dict(options))


def _of_the_hub(
    wanted: str,
    text: Mapping[str, Any],
    length: int,
    companions: Mapping[str, bytes],
    name: str,
) -> Tokenizer:
    given = {
        "context_length": length,
        "tokenizer_mode": text.get("tokenizer_mode"),
        **text.get("tokenizer_kwargs", {}),
        # Last, so that no configuration changes them.
        "local_files_only": True,
        "trust_remote_code": False,
    }
    files = {key: companions[key] for key in TOKENIZER_NAMES if key in companions}
    if "tokenizer.json" in files:
        try:
            check_tokenizer_json(files["tokenizer.json"])
        except ArchitectureError as error:
            raise ArchitectureError(f"{name}: {error}") from error
    tokenizer: Tokenizer
    try:
        if not files:
            tokenizer = HFTokenizer(wanted, **given)
            return tokenizer
        # In a folder that holds these files alone: nothing else of a stranger's is looked at.
        with tempfile.TemporaryDirectory(prefix="pydetox-tokenizer-") as folder:
            for key, content in files.items():
                (Path(folder) / key).write_bytes(content)
            tokenizer = HFTokenizer(folder, **given)
            return tokenizer
    except ImportError as error:
        raise ArchitectureError(
            f"{name}: its text tower wants the tokenizer {wanted!r}, which transformers reads: "
            "pip install transformers (a label-free scan needs no text tower)"
        ) from error
    except BaseException as error:  # the libraries raise whatever a file led them into
        if not is_failure(error):
            raise
        where, reason = "beside its weights" if files else "in the hub's cache", reason_of(error)
        raise ArchitectureError(
            f"{name}: its tokenizer {wanted!r} cannot be read {where}: fetch it with "
            f"`hf download {wanted}`, or put its files beside the weights (a label-free scan needs "
            f"no text tower); {reason}"
        ) from error


def tokenize(
    tokenizer: Tokenizer, prompts: Sequence[str], text: Mapping[str, Any], name: str
) -> Tensor:
    """Return token ids int64 [n, context_length]; ArchitectureError for one out of the table."""
    tokens: Tensor = guarded(tokenizer, name)(list(prompts))
    vocabulary = vocabulary_of(text)
    if tokens.numel() and int(tokens.max()) >= vocabulary:
        raise ArchitectureError(
            f"{name}: its tokenizer gives token {int(tokens.max())}, and its text tower knows "
            f"{vocabulary}: it is another model's"
        )
    return tokens
