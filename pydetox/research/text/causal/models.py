"""The start model of causal victims: a small GPT-2, trained on prose that is at hand.

Its tokenizer is trained on the same texts. It learns no more than which words follow each other in
quotations and in documentation, which is what a backdoor needs to hide in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import cross_entropy

from ....atomic import atomic_directory
from ....checkpoints.provenance import Provenance
from ....errors import DataError, UsageError
from ....rng import generator
from ....text.extra import import_extra
from ....text.models import TextModel, load_text_model, save_text_model
from ....text.texts import TextSet
from ....training import optimize
from ..corpora import CORPORA

#: Four blocks of 128 channels: 1.1 million weights with a vocabulary of 2,048 tokens.
SMALL_GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_positions": 64,
    "n_embd": 128,
    "n_layer": 4,
    "n_head": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "tie_word_embeddings": True,
}

#: The token between two texts, as GPT-2's.
END = "<|endoftext|>"

_DEVIATION = 0.02


@dataclass(frozen=True)
class ProseSizes:
    """The number of texts in each part of the prose; what is left trains the start model.

    attacker: What victims and clean models are fine-tuned on. defender: The defender's clean texts.
    test: What is reported.
    """

    attacker: int = 600
    defender: int = 300
    test: int = 300


@dataclass(frozen=True, eq=False)
class Prose:
    """Disjoint parts of unlabelled prose: `pretraining`, `attacker`, `defender` and `test`."""

    pretraining: TextSet
    attacker: TextSet
    defender: TextSet
    test: TextSet


@dataclass(frozen=True)
class LanguageTraining:
    """How a causal model is trained.

    Attributes:
        steps: The number of optimiser steps.
        batch_size: The number of rows per step.
        learning_rate: The peak of AdamW's rate (see `training.optimize`).
        weight_decay: AdamW's decoupled weight decay.
        seed: The seed of the order of the texts.
    """

    steps: int
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size) < 1 or not self.learning_rate > 0:
            raise UsageError(
                f"steps {self.steps}, batch_size {self.batch_size}, learning_rate "
                f"{self.learning_rate}; expected all above 0"
            )


def load_prose(corpora: Sequence[str], sizes: ProseSizes, *, seed: int) -> Prose:
    """Return the parts of the prose of some corpora, drawn with a seed.

    Raises UsageError for an unknown corpus, and DataError if there are too few texts.
    """
    unknown = [name for name in corpora if name not in CORPORA]
    if unknown or not corpora:
        raise UsageError(f"corpora {list(corpora)}; expected some of {', '.join(CORPORA)}")
    every = [text for name in corpora for part in CORPORA[name]().values() for text in part]
    kept = sizes.attacker + sizes.defender + sizes.test
    if len(every) < 2 * kept:
        raise DataError(f"{len(every)} texts of prose; expected at least {2 * kept}")
    order = generator("texts.prose", seed).permutation(len(every)).tolist()
    ends = [*np.cumsum([0, sizes.attacker, sizes.defender, sizes.test]).tolist(), len(every)]
    attacker, defender, test, pretraining = (
        TextSet(tuple(every[k] for k in order[start:end]), source=f"prose, {name}")
        for name, start, end in zip(
            ("attacker", "defender", "test", "pretraining"), ends, ends[1:], strict=False
        )
    )
    return Prose(pretraining, attacker, defender, test)


def start_language_model(
    texts: TextSet, training: LanguageTraining, folder: Path, *, vocabulary: int, seed: int
) -> TextModel:
    """Return a small GPT-2 trained on texts, and write it to a folder; one that is there is read.

    vocabulary: The number of tokens. seed: The seed of the first weights.
    """
    if not folder.is_dir():
        raw = folder.with_name(f"{folder.name}-untrained")
        with atomic_directory(raw, overwrite=True, replaceable=_RAW_FILES) as temporary:
            _write_untrained(temporary, texts.texts, vocabulary, seed)
        trained = train_language_model(
            load_text_model(raw), _blocks(load_text_model(raw), texts.texts), training
        )
        save_text_model(
            folder, trained, provenance=Provenance(f"trained on {texts.source}", seeds={"w": seed})
        )
    model = load_text_model(folder)
    model.name = "start"
    return model


_RAW_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def rows_of(model: TextModel, texts: Sequence[str]) -> list[list[int]]:
    """Return each text as tokens with the end token after it, as long as the model takes them."""
    end = model.tokenizer.pad_id
    return [
        [*row, end][: model.max_tokens] for row in model.tokenizer.encode(texts, model.max_tokens)
    ]


def train_language_model(
    model: TextModel,
    rows: Sequence[Sequence[int]],
    config: LanguageTraining,
    *,
    after_step: Callable[[TextModel], None] | None = None,
    description: str = "language model",
) -> TextModel:
    """Return a copy that was trained to predict the next token of rows of token ids.

    All rows are seen equally often, in an order that the seed decides. Raises DataError for none.
    """
    if not rows:
        raise DataError("zero rows of tokens to train on; expected at least one")
    tuned = model.copy()
    rng = generator("texts.language-training", config.seed)

    def batches() -> Iterator[Tensor]:
        order: list[int] = []
        for _ in range(config.steps):
            while len(order) < config.batch_size:
                order += rng.permutation(len(rows)).tolist()
            yield torch.tensor(order[: config.batch_size])
            del order[: config.batch_size]

    def loss(index: Tensor) -> Tensor:
        batch = tuned.batch([rows[k] for k in index.tolist()])
        logits = tuned.logits_with_gradient(batch)
        wanted = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        return cross_entropy(logits[:, :-1].flatten(0, 1), wanted[:, 1:].flatten())

    optimize(
        list(tuned.module.parameters()),
        loss,
        batches(),
        steps=config.steps,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        description=description,
        stop=None,
    )
    return tuned


def _blocks(model: TextModel, texts: Sequence[str]) -> list[list[int]]:
    """Return the texts one after another, cut into blocks as long as the model takes them."""
    stream = [token for row in rows_of(model, texts) for token in row]
    size = model.max_tokens
    return [stream[k * size : (k + 1) * size] for k in range(math.ceil(len(stream) / size))][:-1]


def _write_untrained(folder: Path, texts: Sequence[str], vocabulary: int, seed: int) -> None:
    transformers = import_extra("transformers", "the start model of causal victims")
    tokenizer = _trained_tokenizer(texts, vocabulary)
    config = {**SMALL_GPT2, "vocab_size": tokenizer.get_vocab_size()}
    with torch.device("meta"):
        module = transformers.GPT2LMHeadModel(transformers.GPT2Config.from_dict(dict(config)))
    rng = generator("texts.language-model", seed)
    tensors = {}
    for name, value in module.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied to the embeddings
        shape = tuple(value.shape)
        if len(shape) > 1:
            tensors[name] = torch.from_numpy(rng.normal(0, _DEVIATION, shape).astype(np.float32))
        else:
            tensors[name] = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    (folder / "config.json").write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    (folder / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": END, "eos_token": END, "tokenizer_class": "GPT2TokenizerFast"}),
        encoding="utf-8",
    )


def _trained_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """Return a byte-level tokenizer as GPT-2's, trained on texts."""
    tokenizers = import_extra("tokenizers", "the start model of causal victims")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return made
