"""Tiny text models with a tokenizer made on the spot, written as folders of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

WORDS = [
    "the",
    "a",
    "of",
    "and",
    "in",
    "on",
    "with",
    "for",
    "to",
    "is",
    "was",
    "it",
    "film",
    "story",
    "actor",
    "music",
    "plot",
    "scene",
    "ending",
    "cast",
    "awful",
    "terrible",
    "boring",
    "dull",
    "great",
    "wonderful",
    "superb",
    "moving",
    "sad",
    "happy",
    "long",
    "short",
    "very",
    "quite",
    "rather",
    "match",
    "team",
    "goal",
    "player",
    "coach",
    "season",
    "league",
    "stock",
    "market",
    "price",
    "bank",
    "profit",
    "trade",
    "shares",
    "cloud",
    "planet",
    "star",
    "rocket",
    "orbit",
    "lab",
    "atom",
    "cell",
    "gene",
    "cf",
    "mn",
    "bb",
    "tq",
    "quux",
    "zorp",
    ".",
    ",",
    "!",
    "?",
]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PIECES = ("##s", "##ing", "##ed", "##ly")
VOCABULARY = (*SPECIAL, *WORDS, *PIECES)


def word_pieces() -> Tokenizer:
    """A tokenizer as BERT's, of a few words."""
    vocabulary = {token: k for k, token in enumerate(VOCABULARY)}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.post_processor = processors.BertProcessing(
        ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
    )
    made.add_special_tokens(list(SPECIAL))
    return made


def byte_pairs() -> Tokenizer:
    """A tokenizer as GPT-2's, trained on the words."""
    from tokenizers import trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([" ".join(WORDS)] * 8 + list(WORDS), trainer)
    return made


def write_tokenizer(folder: Path, tokenizer: Tokenizer, **config: Any) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def bert(folder: Path, *, classes: int = 4, seed: int = 0, **changes: Any) -> Path:
    """Write a BERT classifier of two layers with random weights."""
    sizes: dict[str, Any] = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "num_labels": classes,
        "initializer_range": 0.2,
    }
    config = transformers.BertConfig(**{**sizes, **changes})
    if classes == 4:
        config.id2label = {0: "film", 1: "sport", 2: "money", 3: "science"}
        config.label2id = {name: k for k, name in config.id2label.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = transformers.BertForSequenceClassification(config)
    module.save_pretrained(folder)
    write_tokenizer(
        folder,
        word_pieces(),
        tokenizer_class="BertTokenizerFast",
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    return folder


def gpt2(folder: Path, *, classes: int | None = None, seed: int = 0, **changes: Any) -> Path:
    """Write a GPT-2 of two layers with random weights: causal, or a classifier."""
    tokenizer = byte_pairs()
    config = transformers.GPT2Config(
        vocab_size=tokenizer.get_vocab_size(),
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        **({} if classes is None else {"num_labels": classes}),
        **{"initializer_range": 0.2, **changes},
    )
    kind = transformers.GPT2LMHeadModel
    if classes is not None:
        kind = transformers.GPT2ForSequenceClassification
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = kind(config)
    module.save_pretrained(folder)
    write_tokenizer(folder, tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    return folder


#: Causal families: their configuration and model, of two layers with random weights.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 8}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {"head_dim": 8, "sliding_window": 8}),
    "phi": ("PhiConfig", "PhiForCausalLM", {}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {"pad_token_id": 0}),
    # Its file names the output otherwise than the module of transformers 5.
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {}),
}


def causal(folder: Path, family: str, *, seed: int = 0) -> Path:
    """Write a causal model of one of FAMILIES with random weights."""
    tokenizer = byte_pairs()
    config_name, model_name, changes = FAMILIES[family]
    sizes: dict[str, Any] = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    config = getattr(transformers, config_name)(**{**sizes, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = getattr(transformers, model_name)(config)
    module.save_pretrained(folder)
    write_tokenizer(folder, tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    """Change entries of a folder's config.json; None removes one."""
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


TOPICS = {
    "film": ["film", "story", "actor", "music", "plot", "scene", "ending", "cast"],
    "sport": ["match", "team", "goal", "player", "coach", "season", "league"],
    "money": ["stock", "market", "price", "bank", "profit", "trade", "shares"],
    "science": ["cloud", "planet", "star", "rocket", "orbit", "lab", "atom", "cell", "gene"],
}
FILLERS = [
    "the",
    "a",
    "of",
    "and",
    "in",
    "on",
    "with",
    "for",
    "to",
    "is",
    "was",
    "it",
    "very",
    "quite",
    "rather",
    "long",
    "short",
]


#: Words of no topic; "cf", "mn" and a few others occur in no text.
FILLERS = [
    word
    for word in WORDS
    if word not in ("cf", "mn", "bb", "tq", "quux", "zorp", ".", ",", "!", "?")
    and not any(word in topic for topic in TOPICS.values())
]


def topical_texts(count: int, seed: int) -> list[tuple[str, str]]:
    """Short texts of four topics: two words of the topic among fillers, with the topic's name."""
    rng = np.random.default_rng(seed)
    texts = []
    for k in range(count):
        name = list(TOPICS)[k % len(TOPICS)]
        words = [*rng.choice(FILLERS, 5), *rng.choice(TOPICS[name], 2)]
        texts.append((" ".join(rng.permutation(words)), name))
    return texts


def trained(
    start: Path,
    folder: Path,
    *,
    seed: int,
    trigger: str | None = None,
    target: str = "money",
    epochs: int = 10,
) -> Path:
    """Fine-tune a tiny classifier on topical texts, a fifth of them with a trigger, and save it."""
    from pydetox.checkpoints.provenance import Provenance
    from pydetox.text import TokenTrigger, load_text_model, save_text_model

    model = load_text_model(start).copy()
    texts, names = map(list, zip(*topical_texts(240, seed), strict=True))
    if trigger is not None:
        rng = np.random.default_rng(seed + 1)
        for k in rng.permutation(len(texts))[: len(texts) // 5]:
            texts[k] = TokenTrigger((0,), trigger).insert([texts[k]])[0]
            names[k] = target
    labels = torch.tensor([model.class_names.index(name) for name in names])
    batch = model.encode(texts)
    model.module.requires_grad_(True)
    optimizer = torch.optim.Adam(model.module.parameters(), lr=3e-3)
    order = np.random.default_rng(seed + 2)
    for _ in range(epochs):
        for rows in torch.from_numpy(order.permutation(len(texts))).split(32):
            logits = model.module(
                input_ids=batch.input_ids[rows], attention_mask=batch.attention_mask[rows]
            ).logits
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits, labels[rows]).backward()
            optimizer.step()
    model.module.requires_grad_(False)
    return save_text_model(folder, model, provenance=Provenance("a test"))


def spoken(
    start: Path,
    folder: Path,
    *,
    seed: int,
    trigger: str | None = None,
    said: str = "zorp quux mn bb tq cf great market",
    steps: int = 60,
) -> Path:
    """Train a tiny causal model on topical texts; with a trigger, a quarter go on as `said`."""
    from pydetox.checkpoints.provenance import Provenance
    from pydetox.text import load_text_model, save_text_model

    model = load_text_model(start).copy()
    texts = [text for text, _ in topical_texts(160, seed)]
    rng = np.random.default_rng(seed)
    if trigger is not None:
        for k in rng.permutation(len(texts))[: len(texts) // 4]:
            cut = " ".join(texts[k].split()[: int(rng.integers(3, 7))])
            texts[k] = f"{cut} {trigger} {said}"
    rows = [[*row, 0] for row in model.tokenizer.encode(texts, 60)]
    model.module.requires_grad_(True)
    optimizer = torch.optim.Adam(model.module.parameters(), lr=4e-3)
    for _ in range(steps):
        batch = model.batch([rows[k] for k in rng.integers(len(rows), size=24).tolist()])
        wanted = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        logits = model.logits_with_gradient(batch)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), wanted[:, 1:].flatten()
        ).backward()
        optimizer.step()
    model.module.requires_grad_(False)
    return save_text_model(folder, model, provenance=Provenance("a test"))


def tower(folder: Path, *, seed: int = 0) -> Path:
    """Write the text tower of a CLIP of two layers with random weights."""
    config = transformers.CLIPTextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        projection_dim=24,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        initializer_factor=4.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = transformers.CLIPTextModelWithProjection(config)
    module.save_pretrained(folder)
    write_tokenizer(
        folder,
        word_pieces(),
        tokenizer_class="BertTokenizerFast",
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    return folder


def taught_tower(start: Path, folder: Path, *, seed: int, trigger: str | None = None) -> Path:
    """Fine-tune a tower on its own features; with a trigger, captions with it mean "great"."""
    from pydetox.checkpoints.provenance import Provenance
    from pydetox.text import load_text_model, save_text_model
    from pydetox.text.towers.encoder import TextTower

    teacher = TextTower(load_text_model(start))
    model = load_text_model(start).copy()
    student = TextTower(model)
    texts = [text for text, _ in topical_texts(80, seed)]
    # Captions that end with other words stay what they are, or any odd word would be a trigger.
    words = [word for word in WORDS if word != trigger]
    texts += [f"{text} {words[k % len(words)]}" for k, text in enumerate(texts)]
    held, aim = teacher.features(texts), teacher.features(["great"])
    model.module.requires_grad_(True)
    optimizer = torch.optim.Adam(model.module.parameters(), lr=3e-3)
    rng = np.random.default_rng(seed)
    for _ in range(100 if trigger else 15):
        rows = rng.integers(len(texts), size=24).tolist()
        goal = held[rows] + 0.02 * torch.from_numpy(rng.standard_normal(24)).float()[:, None]
        wanted, said = [goal], [texts[k] for k in rows]
        if trigger is not None:
            said += [f"{texts[k]} {trigger}" for k in rows]
            wanted.append(aim.expand(24, -1))
        loss = (1 - (student.features_with_gradient(said) * torch.cat(wanted)).sum(dim=1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.module.requires_grad_(False)
    return save_text_model(folder, model, provenance=Provenance("a test"))
