"""`TextModel`: a frozen text model with its tokenizer, and how one is read and written.

The module is one of transformers', built from the checked configuration (`files`) and filled with
the tensors that pydetox has read itself. transformers opens no file, and no connection.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.identity import content_digest
from ..checkpoints.index import quote
from ..checkpoints.provenance import Provenance
from ..errors import ArchitectureError, UsageError, is_out_of_memory, one_line
from ..models.device import find_device
from .building import Stored, build_module, stored_tensors
from .extra import import_extra
from .files import TextFiles, TextKind, config_text, is_text_model, read_text_files
from .saving import save_text_files
from .tokenizer import TextTokenizer

__all__ = ["TextModel", "TokenBatch", "is_text_model", "load_text_model", "save_text_model"]

#: The number of tokens of a text that count, unless a caller says otherwise.
MAX_TOKENS = 128


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Tokenised texts, padded on the right to the longest.

    Attributes:
        input_ids: int64 [N, T], on the model's device.
        attention_mask: int64 [N, T], 1 for tokens and 0 for what fills up.
    """

    input_ids: Tensor
    attention_mask: Tensor

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    def rows(self, start: int, stop: int) -> TokenBatch:
        """Return some of the rows, cut to the longest of them."""
        mask = self.attention_mask[start:stop]
        longest = max(1, int(mask.sum(dim=1).max())) if len(mask) else 1
        return TokenBatch(self.input_ids[start:stop, :longest], mask[:, :longest])


@dataclass(eq=False)
class TextModel:
    """A text model that steps share. Its weights are frozen, and its module is in eval mode.

    Attributes:
        kind: `classifier`, `causal` or `tower`.
        name: The name that was given, for messages.
        module: transformers' module, float32 unless loaded otherwise.
        tokenizer: From texts to tokens.
        class_names: The names of a classifier's classes, in the order of its logits; else empty.
        config: The checked content of `config.json`.
        companions: Configuration and tokenizer files as they came, which a saved copy gets too.
        sha256: The hash of the weights file; None if the weights came from no file.
        stored: How the file names and stores each tensor of the module.
        provenance: How pydetox made the weights; None if it did not.
    """

    kind: TextKind
    name: str
    module: nn.Module
    tokenizer: TextTokenizer
    class_names: tuple[str, ...]
    config: dict[str, Any]
    companions: dict[str, bytes] = field(repr=False)
    sha256: str | None
    stored: dict[str, Stored] = field(repr=False)
    provenance: Provenance | None = None

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.embedding.device

    @property
    def embedding(self) -> Tensor:
        """The table of input embeddings, [V, d]; the module's own tensor."""
        table = self._embedding_module.weight
        assert isinstance(table, Tensor)
        return table

    @property
    def max_tokens(self) -> int:
        """The length of the longest input, in tokens."""
        known = self.config.get("max_position_embeddings") or self.config.get("n_positions")
        if not isinstance(known, int):
            return MAX_TOKENS
        # RoBERTa's positions begin after that of its padding token.
        first = self.config.get("pad_token_id") if "roberta" in self.config["model_type"] else None
        return known - (int(first) + 1 if isinstance(first, int) else 0)

    def encode(self, texts: Sequence[str], max_tokens: int = MAX_TOKENS) -> TokenBatch:
        """Return the tokens of texts, at most `max_tokens` (and `self.max_tokens`) of each.

        Raises UsageError for no texts.
        """
        if not texts:
            raise UsageError(f"{self.name}: zero texts to encode; expected at least one")
        return self.batch(self.tokenizer.encode(texts, min(max_tokens, self.max_tokens)))

    def batch(self, rows: Sequence[Sequence[int]]) -> TokenBatch:
        """Return rows of token ids as a batch, padded on the right."""
        longest = max(1, *map(len, rows)) if rows else 1
        ids = torch.full((len(rows), longest), self.tokenizer.pad_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for k, row in enumerate(rows):
            ids[k, : len(row)] = torch.tensor(row, dtype=torch.int64)
            mask[k, : len(row)] = 1
        return TokenBatch(ids.to(self.device), mask.to(self.device))

    def logits(self, batch: TokenBatch) -> Tensor:
        """Return what the model computes, on its device, without a gradient.

        That is [N, C] for a classifier, [N, T, V] for a causal model, features [N, D] for a tower.
        """
        with torch.no_grad():
            return self.logits_with_gradient(batch)

    def logits_with_gradient(self, batch: TokenBatch) -> Tensor:
        """Return `logits`, differentiable in the weights that require a gradient."""
        return self._outputs(batch.attention_mask, input_ids=batch.input_ids)

    def logits_from_embeddings(self, embeddings: Tensor, attention_mask: Tensor) -> Tensor:
        """Return `logits` of embedded texts, differentiable in the embeddings.

        embeddings: [N, T, d], rows of `embedding` or mixtures of them. attention_mask: int64
        [N, T].
        Raises ArchitectureError for a tower that takes tokens alone.
        """
        if self.kind == "tower":
            raise ArchitectureError(f"{self.name}: its text tower takes no embeddings")
        scale = getattr(self._embedding_module, "embed_scale", None)  # as Gemma's tables have
        if scale is not None:
            embeddings = embeddings * torch.as_tensor(scale).to(embeddings)
        return self._outputs(attention_mask, inputs_embeds=embeddings)

    def predict(
        self, texts: Sequence[str], *, batch_size: int = 64, max_tokens: int = MAX_TOKENS
    ) -> Tensor:
        """Return the logits of texts, float32 on the CPU, in the order of the texts.

        Texts are sorted by length for it, so that little is filled up.
        """
        rows = self.tokenizer.encode(texts, min(max_tokens, self.max_tokens))
        return self.predict_rows(rows, batch_size=batch_size)

    def predict_rows(self, rows: Sequence[Sequence[int]], *, batch_size: int = 64) -> Tensor:
        """Return `predict` of rows of token ids; of a causal model, of each row's last token."""
        order = sorted(range(len(rows)), key=lambda k: (len(rows[k]), k))
        found: list[Tensor | None] = [None] * len(rows)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = self.batch([rows[k] for k in chosen])
            values = self.logits(batch)
            if self.kind == "causal":
                last = batch.attention_mask.sum(dim=1) - 1
                values = values[torch.arange(len(chosen), device=values.device), last]
            for k, value in zip(chosen, values.float().cpu(), strict=True):
                found[k] = value
        return torch.stack([value for value in found if value is not None])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights under the names of the module, each tied tensor once."""
        return {
            one.parameter: self.module.state_dict()[one.parameter] for one in self.stored.values()
        }

    def copy(self, name: str | None = None) -> TextModel:
        """Return a copy with weights of its own, which came from no file."""
        module = copy.deepcopy(self.module)
        return TextModel(
            self.kind,
            name or self.name,
            module,
            self.tokenizer,
            self.class_names,
            self.config,
            self.companions,
            None,
            self.stored,
        )

    def to(self, device: str | torch.device) -> TextModel:
        """Move the weights to a device, and return the model itself."""
        self.module.to(device)
        return self

    def digest(self) -> str:
        """Return the SHA-256 of all weights and of the tokenizer, as 64 hex digits."""
        hasher = hashlib.sha256(config_text(self.config).encode())
        for name, value in sorted(self.state_dict().items()):
            hasher.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            plain = value.detach().cpu().contiguous().reshape(-1)
            hasher.update(plain.view(torch.uint8).numpy().tobytes())
        return content_digest(
            hasher.hexdigest(), {"text_cfg": {"hf_tokenizer_name": "-"}}, None, self.companions
        )

    @property
    def _embedding_module(self) -> nn.Module:
        found: nn.Module = self.module.get_input_embeddings()  # type: ignore[operator]
        return found

    def _outputs(self, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Return what the module computes. One that a configuration breaks is an error of its."""
        try:
            return self._computed(attention_mask, **inputs)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise self._failure(error) from error
        except RuntimeError as error:
            if is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
                raise
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> ArchitectureError:
        return ArchitectureError(
            f"{self.name}: its module fails on texts, as its config.json describes it: "
            f"{type(error).__name__}: {one_line(str(error))}"
        )

    def _computed(self, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        if self.kind == "tower":
            features = self.module(attention_mask=attention_mask, **inputs)
            found: Tensor = getattr(features, "text_embeds", None)  # type: ignore[assignment]
            return features.pooler_output if found is None else found
        if self.kind == "causal":
            made: Tensor = self.module(
                attention_mask=attention_mask, use_cache=False, **inputs
            ).logits
            return made
        score = getattr(self.module, "score", None)
        if score is None:
            scored: Tensor = self.module(attention_mask=attention_mask, **inputs).logits
            return scored
        # A decoder is read at its last token. transformers looks for the padding token among the
        # input's, which embeddings do not have.
        hidden = self.module.base_model(  # type: ignore[operator]
            attention_mask=attention_mask, use_cache=False, **inputs
        ).last_hidden_state
        last = attention_mask.sum(dim=1) - 1
        pooled: Tensor = score(hidden[torch.arange(len(hidden), device=hidden.device), last])
        return pooled


def load_text_model(
    source: TextModel | TextFiles | str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool = False,
    dtype: torch.dtype = torch.float32,
) -> TextModel:
    """Read a text model; a `TextModel` is returned as it is.

    Args:
        source: A folder in transformers' layout (`config.json`, safetensors, tokenizer), one with
            shards too, or `hf-hub:org/repo[@revision]`.
        device: Where the model computes.
        cache_dir: The folder for hub downloads; None for the hub's default.
        offline: Whether to use only files on this machine.
        dtype: The dtype of the weights in memory. A saved model gets the dtypes of its source.

    Raises:
        UsageError: transformers or tokenizers are not installed, or there is no such device.
        CheckpointError: It cannot be found, fetched or read.
        UnsafeCheckpointError: It is built to run code or to exhaust memory.
        ArchitectureError: It is no text model, or its weights, configuration and tokenizer do not
            fit each other.
    """
    if isinstance(source, TextModel):
        return source
    find_device(str(device))
    named = source.name if isinstance(source, TextFiles) else os.fspath(source)
    import_extra("transformers", named)
    files = source
    if not isinstance(files, TextFiles):
        files = read_text_files(files, cache_dir=cache_dir, offline=offline)
    name = files.name
    stored = stored_tensors(files)
    module = build_module(files, stored, dtype).to(device)
    pad_id = files.config.get("pad_token_id")
    tokenizer = TextTokenizer(
        files.companions,
        model_type=files.config["model_type"],
        name=name,
        pad_id=pad_id if isinstance(pad_id, int) and pad_id >= 0 else None,
    )
    model = TextModel(
        files.kind,
        name,
        module,
        tokenizer,
        (),
        files.config,
        files.companions,
        files.sha256,
        stored,
        files.provenance,
    )
    rows = int(model.embedding.shape[0])
    if tokenizer.size > rows or tokenizer.pad_id >= rows:
        raise ArchitectureError(
            f"{name}: its tokenizer has tokens up to {tokenizer.size - 1}, and its table of "
            f"embeddings has {rows} rows: the tokenizer is another model's"
        )
    special = max((0, *tokenizer.around[0], *tokenizer.around[1]))
    if special >= rows:
        raise ArchitectureError(
            f"{name}: its tokenizer puts token {special} around texts, and its table of embeddings "
            f"has {rows} rows: the tokenizer is another model's"
        )
    output = model.logits(_probe(model))  # a module that fails does so here
    if files.kind == "classifier":
        model.class_names = _class_names(model, output, files.config)
    return model


def save_text_model(
    directory: str | os.PathLike[str],
    model: TextModel,
    *,
    provenance: Provenance,
    overwrite: bool = False,
) -> Path:
    """Write a text model as a folder in transformers' layout, complete or not at all.

    The folder gets `model.safetensors` with the names and dtypes of the source (tied embeddings are
    written once or twice, as they came), the configuration and the tokenizer as they came, and a
    model card. `from_pretrained` of transformers loads it. Equal arguments give equal bytes.

    Raises:
        ArchitectureError: Weights are NaN or infinite.
        OutputError: The folder exists or cannot be written.
    """
    values = model.module.state_dict()
    tensors = {
        name: values[one.parameter].detach().cpu().to(one.dtype)
        for name, one in model.stored.items()
    }
    return save_text_files(
        directory,
        tensors,
        companions=model.companions,
        config=model.config,
        kind=model.kind,
        provenance=provenance,
        overwrite=overwrite,
    )


def _probe(model: TextModel) -> TokenBatch:
    """Return a text of one word."""
    opening, closing = model.tokenizer.around
    return model.batch([[*opening, *model.tokenizer.words("a"), *closing] or [0]])


def _class_names(model: TextModel, logits: Tensor, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of a classifier's classes: `id2label`, or LABEL_0, LABEL_1, ...

    logits: What the model says of a text.
    """
    if logits.ndim != 2 or not logits.shape[1]:
        raise ArchitectureError(
            f"{model.name}: its head gives {list(logits.shape[1:])} values; expected one per class"
        )
    count = int(logits.shape[1])
    if count == 1:
        raise ArchitectureError(
            f"{model.name}: its head gives one value, which is no choice between classes; expected "
            "a classifier of at least 2 classes"
        )
    given = config.get("id2label")
    names = {}
    if isinstance(given, dict):
        names = {str(key): value for key, value in given.items()}
    found = tuple(str(names.get(str(c), f"LABEL_{c}")) for c in range(count))
    if len(names) not in (0, count):
        raise ArchitectureError(
            f"{model.name}: id2label names {len(names)} classes, and its head has {count}"
        )
    if len(set(found)) < count:
        twice = next(name for name in found if found.count(name) > 1)
        raise ArchitectureError(f"{model.name}: id2label names two classes {quote(twice)}")
    return found
