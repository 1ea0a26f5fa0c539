"""Start models of victims: the pretrained MiniLM, and a small BERT that needs no download.

Each is a folder in transformers' layout, a sequence classifier with a new head, below the cache.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from ...atomic import atomic_directory
from ...errors import UsageError
from ...rng import generator
from ...text.models import TextModel, load_text_model
from ...text.texts import TextSet
from ..data.packages import MINILM, open_archive

#: Of all linear layers and embeddings at the start, as BERT's.
_DEVIATION = 0.02

#: Two blocks of 64 channels: 0.3 million weights with a vocabulary of 3,000 words.
SMALL_BERT: dict[str, Any] = {
    "model_type": "bert",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 128,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}

#: Configuration, tensors by name, and tokenizer files by name.
_Parts: TypeAlias = tuple[dict[str, Any], dict[str, Tensor], dict[str, bytes]]

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_MOST_WORDS = 3_000
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)

#: The names of start models.
STARTS = ("minilm", "small")


def start_model(name: str, texts: TextSet, folder: Path, *, seed: int) -> TextModel:
    """Return a start model with a head for the classes of some texts, and write it to a folder.

    name: `minilm` for the pretrained MiniLM (Wang et al., "MiniLM", NeurIPS 2020, as
    all-MiniLM-L6-v2 of sentence-transformers; 22.7 million weights), `small` for a small BERT
    without any training, whose vocabulary has the most frequent words of the texts. seed: The seed
    of new weights. A folder that is there already is read.

    Raises UsageError for an unknown name, and DataError if the pretrained model was not fetched.
    """
    if name not in STARTS:
        raise UsageError(f"start model {name!r}; expected one of {', '.join(STARTS)}")
    if not folder.is_dir():
        make = _minilm if name == "minilm" else _small
        config, tensors, companions = make(texts, seed)
        with atomic_directory(folder) as temporary:
            for file, content in companions.items():
                (temporary / file).write_bytes(content)
            text = json.dumps(config, indent=2, sort_keys=True) + "\n"
            (temporary / "config.json").write_text(text, encoding="utf-8")
            (temporary / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    model = load_text_model(folder)
    model.name = name
    return model


def _minilm(texts: TextSet, seed: int) -> _Parts:
    with open_archive(MINILM) as archive:
        config = json.loads(archive.read("config.json"))
        given = load(archive.read("model.safetensors"))
        companions = {name: archive.read(name) for name in _TOKENIZER_FILES}
    tensors = {f"bert.{name}": value for name, value in given.items() if value.is_floating_point()}
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    return _with_head(config, tensors, texts, seed), tensors, companions


def _small(texts: TextSet, seed: int) -> _Parts:
    vocabulary = word_pieces(texts.texts, _MOST_WORDS)
    config = {**SMALL_BERT, "vocab_size": len(vocabulary)}
    rng = generator("texts.small-model", seed)
    tensors = {
        name: _first_weights(name, shape, rng) for name, shape in _bert_shapes(config).items()
    }
    companions = {
        "vocab.txt": "".join(f"{token}\n" for token in vocabulary).encode(),
        "tokenizer_config.json": json.dumps(
            {"do_lower_case": True, "tokenizer_class": "BertTokenizer", "model_max_length": 128}
        ).encode(),
        "special_tokens_map.json": json.dumps(
            {
                "pad_token": "[PAD]",
                "unk_token": "[UNK]",
                "cls_token": "[CLS]",
                "sep_token": "[SEP]",
                "mask_token": "[MASK]",
            }
        ).encode(),
    }
    return _with_head(config, tensors, texts, seed), tensors, companions


def _with_head(
    config: Mapping[str, Any], tensors: dict[str, Tensor], texts: TextSet, seed: int
) -> dict[str, Any]:
    """Add a classifier's head to the tensors, and return the configuration with its classes."""
    names = texts.class_names
    rng = generator("texts.head", seed)
    shape = (len(names), int(config["hidden_size"]))
    tensors["classifier.weight"] = _normal(shape, rng)
    tensors["classifier.bias"] = torch.zeros(len(names))
    return {
        **config,
        "architectures": ["BertForSequenceClassification"],
        "id2label": {str(k): name for k, name in enumerate(names)},
        "label2id": {name: k for k, name in enumerate(names)},
    }


def _normal(shape: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.normal(0, _DEVIATION, shape).astype(np.float32))


def _first_weights(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    if name.endswith("LayerNorm.weight"):
        return torch.ones(shape)
    return _normal(shape, rng) if len(shape) > 1 else torch.zeros(shape)


def _bert_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return name and shape of each tensor of a BERT with a pooler, without a head."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (rows, columns), (rows,)

    def norm(name: str) -> None:
        found[f"{name}.LayerNorm.weight"] = found[f"{name}.LayerNorm.bias"] = (width,)

    for kind, rows in (
        ("word", config["vocab_size"]),
        ("position", config["max_position_embeddings"]),
        ("token_type", config["type_vocab_size"]),
    ):
        found[f"bert.embeddings.{kind}_embeddings.weight"] = (rows, width)
    norm("bert.embeddings")
    for layer in range(config["num_hidden_layers"]):
        block = f"bert.encoder.layer.{layer}"
        for part in ("query", "key", "value"):
            linear(f"{block}.attention.self.{part}", width, width)
        linear(f"{block}.attention.output.dense", width, width)
        norm(f"{block}.attention.output")
        linear(f"{block}.intermediate.dense", inner, width)
        linear(f"{block}.output.dense", width, inner)
        norm(f"{block}.output")
    linear("bert.pooler.dense", width, width)
    return found


def word_pieces(texts: tuple[str, ...], most: int) -> list[str]:
    """Return a vocabulary for BERT's tokenizer: special tokens, characters, frequent words.

    Characters come alone and as a continuation, so that every word can be written. Words are in the
    order of their frequency, and of their letters where that is equal.
    """
    counts: Counter[str] = Counter()
    characters: set[str] = set()
    for text in texts:
        for word in re.findall(r"[^\W_]+|[^\w\s]|_", text.lower()):
            counts[word] += 1
            characters.update(word)
    # Rare words are what attackers use; they are spelled.
    characters |= set("abcdefghijklmnopqrstuvwxyz0123456789")
    ordered = sorted(counts, key=lambda word: (-counts[word], word))
    letters = sorted(characters)
    words = [word for word in ordered[:most] if len(word) > 1]
    return [*_SPECIAL, *letters, *(f"##{letter}" for letter in letters), *words]
