"""Text models: read as transformers reads them, refused where they would run code, written back."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import torch
import transformers
from safetensors.torch import load_file, save_file

from pydetox.checkpoints.provenance import Provenance
from pydetox.errors import ArchitectureError, UnsafeCheckpointError, UsageError
from pydetox.text import is_text_model, load_text_model, save_text_model
from pydetox.text.tokenizer import TextTokenizer
from tests.text import tiny

TEXTS = ["The film was awful, and the plot boring.", "Great!", "stock market profit " * 40]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "bert": tiny.bert(root / "bert"),
        "gpt2": tiny.gpt2(root / "gpt2"),
        "gpt2-classifier": tiny.gpt2(root / "gpt2-classifier", classes=3),
    }


@pytest.fixture
def bert(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(folders["bert"], tmp_path / "bert"))


def test_a_classifier_computes_what_transformers_computes(folders: dict[str, Path]) -> None:
    model = load_text_model(folders["bert"])
    assert (model.kind, model.class_names) == ("classifier", ("film", "sport", "money", "science"))
    reference = transformers.AutoModelForSequenceClassification.from_pretrained(folders["bert"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["bert"])
    theirs = tokenizer(TEXTS, padding=True, truncation=True, max_length=64, return_tensors="pt")
    ours = model.encode(TEXTS)
    assert torch.equal(ours.input_ids, theirs["input_ids"])
    assert torch.equal(ours.attention_mask, theirs["attention_mask"])
    expected = reference(**theirs).logits
    torch.testing.assert_close(model.logits(ours), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.predict(TEXTS), expected, rtol=0, atol=1e-5)
    assert not any(p.requires_grad for p in model.module.parameters())


def test_a_decoder_with_a_score_is_read_at_its_last_token(folders: dict[str, Path]) -> None:
    model = load_text_model(folders["gpt2-classifier"])
    reference = transformers.GPT2ForSequenceClassification.from_pretrained(
        folders["gpt2-classifier"]
    )
    for text in TEXTS:  # alone, because without a padding token transformers refuses a batch
        ids = model.encode([text]).input_ids
        expected = reference(input_ids=ids).logits[0]
        torch.testing.assert_close(
            model.predict(TEXTS)[TEXTS.index(text)], expected, rtol=0, atol=1e-5
        )


def test_a_causal_model_and_its_tied_embeddings(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load_text_model(folders["gpt2"])
    reference = transformers.AutoModelForCausalLM.from_pretrained(folders["gpt2"])
    batch = model.encode(TEXTS[:1])
    torch.testing.assert_close(
        model.logits(batch), reference(input_ids=batch.input_ids).logits, rtol=0, atol=1e-4
    )
    assert model.module.lm_head.weight is model.embedding  # type: ignore[union-attr]
    saved = save_text_model(tmp_path / "saved", model, provenance=Provenance("test"))
    before = load_file(folders["gpt2"] / "model.safetensors")
    after = load_file(saved / "model.safetensors")
    assert sorted(after) == sorted(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("which", ["bert", "gpt2", "gpt2-classifier"])
def test_embeddings_give_what_tokens_give_and_have_a_gradient(
    folders: dict[str, Path], which: str
) -> None:
    model = load_text_model(folders[which])
    batch = model.encode(TEXTS)
    embedded = model.embedding[batch.input_ids].clone().requires_grad_()
    logits = model.logits_from_embeddings(embedded, batch.attention_mask)
    real = batch.attention_mask.bool() if model.kind == "causal" else slice(None)
    torch.testing.assert_close(logits[real], model.logits(batch)[real], rtol=0, atol=1e-5)
    logits[real].square().sum().backward()
    assert embedded.grad is not None
    assert (embedded.grad.abs().sum(dim=2)[batch.attention_mask.bool()] > 0).all()
    assert model.embedding.grad is None


def test_what_is_saved_is_read_by_transformers(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load_text_model(folders["bert"]).copy()
    with torch.no_grad():
        model.module.classifier.bias.add_(1)  # type: ignore[union-attr]
    record = Provenance("test", source_name="bert", scaling_coefficient=0.5)
    one = save_text_model(tmp_path / "one", model, provenance=record)
    two = save_text_model(tmp_path / "two", model, provenance=record)
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    reference = transformers.AutoModelForSequenceClassification.from_pretrained(one)
    tokenizer = transformers.AutoTokenizer.from_pretrained(one)
    theirs = reference(**tokenizer(TEXTS[0], return_tensors="pt")).logits[0]
    torch.testing.assert_close(model.predict(TEXTS[:1])[0], theirs, rtol=0, atol=1e-5)
    assert load_text_model(one).provenance == record
    assert "AutoModelForSequenceClassification" in (one / "README.md").read_text()


def test_half_precision_stays_what_it_was(bert: Path, tmp_path: Path) -> None:
    weights = {k: v.half() for k, v in load_file(bert / "model.safetensors").items()}
    save_file(weights, bert / "model.safetensors", metadata={"format": "pt"})
    model = load_text_model(bert)
    assert model.embedding.dtype == torch.float32
    saved = save_text_model(tmp_path / "saved", model, provenance=Provenance("test"))
    again = load_file(saved / "model.safetensors")
    assert all(
        again[k].dtype == torch.float16 and torch.equal(again[k], weights[k]) for k in weights
    )


def test_shards_and_old_names_are_read(bert: Path) -> None:
    expected = load_text_model(bert).predict(TEXTS)
    weights = load_file(bert / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for name, value in weights.items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(64)[None]
    (bert / "model.safetensors").unlink()
    names = sorted(old)
    files = {
        "model-00001-of-00002.safetensors": names[:9],
        "model-00002-of-00002.safetensors": names[9:],
    }
    for file, some in files.items():
        save_file({name: old[name] for name in some}, bert / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(v.nbytes for v in old.values())},
        "weight_map": {name: file for file, some in files.items() for name in some},
    }
    (bert / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.testing.assert_close(load_text_model(bert).predict(TEXTS), expected)


def test_each_line_of_vocab_txt_is_a_token_and_nothing_else_ends_a_line() -> None:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "\u2028", "\x85", "\x1c", "a", "b"]
    for end in ("\n", "\r\n"):
        files = {"vocab.txt": "".join(f"{one}{end}" for one in tokens).encode()}
        tokenizer = TextTokenizer(files, model_type="bert", name="it")
        assert tokenizer.size == len(tokens)
        assert tokenizer.encode(["a b"], 8) == [[2, 7, 8, 3]]


def test_vocab_txt_stands_in_for_tokenizer_json(bert: Path) -> None:
    rows = load_text_model(bert).tokenizer.encode(TEXTS, 64)
    (bert / "tokenizer.json").unlink()
    (bert / "vocab.txt").write_text("\n".join(tiny.VOCABULARY) + "\n")
    assert load_text_model(bert).tokenizer.encode(TEXTS, 64) == rows


def test_the_callers_random_numbers_stay(folders: dict[str, Path]) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    load_text_model(folders["bert"])
    assert torch.equal(torch.rand(2), expected)


CODE: list[tuple[dict[str, Any], str]] = [
    ({"auto_map": {"AutoModel": "modeling.Evil"}}, "code of its repository"),
    ({"custom_pipelines": {"x": {"impl": "evil.Pipeline"}}}, "code of its repository"),
    ({"_attn_implementation": "evil/kernels"}, "kernels of a hub"),
    ({"text_config": {"attn_implementation": "evil/kernels"}}, "kernels of a hub"),
    ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
    ({"vocab_size": 10**9}, "vocab_size is 1000000000"),
]


@pytest.mark.parametrize(("changes", "words"), CODE)
def test_a_configuration_that_asks_for_code_is_refused(
    bert: Path, changes: dict[str, Any], words: str
) -> None:
    tiny.change_config(bert, **changes)
    with pytest.raises(UnsafeCheckpointError, match=words):
        load_text_model(bert)


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["BertModel"]}, "is no text model"),
    ({"architectures": ["RobertaForSequenceClassification"]}, "transformers builds BertFor"),
    ({"model_type": "nothing"}, "none that transformers"),
    ({"model_type": None}, "no model_type"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
    ({"is_encoder_decoder": True}, "encoder with a decoder"),
    ({"num_hidden_layers": 3}, "lacks 16 tensors"),
    ({"num_hidden_layers": 1}, "has no place for 16 tensors"),
    ({"hidden_size": 36}, "describes"),
    ({"id2label": {"0": "x", "1": "x", "2": "y", "3": "z"}}, "names two classes 'x'"),
    ({"hidden_act": "nonsense"}, "builds no model"),
    ({"return_dict": False}, "fails on texts.*AttributeError"),
    ({"chunk_size_feed_forward": 7}, "fails on texts.*multiple of the chunk size"),
    ({"problem_type": "regression"}, "problem_type is 'regression'"),
    ({"problem_type": "multi_label_classification"}, "gives? each text one class"),
]


@pytest.mark.parametrize(("changes", "words"), BROKEN)
def test_a_configuration_that_does_not_fit_is_refused(
    bert: Path, changes: dict[str, Any], words: str
) -> None:
    tiny.change_config(bert, **changes)
    with pytest.raises(ArchitectureError, match=words):
        load_text_model(bert)


def test_a_tokenizer_of_another_model_is_refused(bert: Path, tmp_path: Path) -> None:
    larger = tiny.gpt2(tmp_path / "gpt2")
    shutil.copy(larger / "tokenizer.json", bert / "tokenizer.json")
    with pytest.raises(ArchitectureError, match="tokenizer is another model's"):
        load_text_model(bert)


def test_a_missing_or_damaged_tokenizer_is_named(bert: Path) -> None:
    (bert / "tokenizer.json").write_text("{}")
    with pytest.raises(ArchitectureError, match="its tokenizer cannot be read"):
        load_text_model(bert)
    (bert / "tokenizer.json").unlink()
    with pytest.raises(ArchitectureError, match="no tokenizer beside its weights"):
        load_text_model(bert)


def test_weights_that_are_no_numbers_are_refused(bert: Path) -> None:
    weights = load_file(bert / "model.safetensors")
    weights["classifier.bias"][0] = float("nan")
    save_file(weights, bert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArchitectureError, match=r"classifier\.bias"):
        load_text_model(bert)


def test_weights_of_whole_numbers_are_refused(bert: Path) -> None:
    weights = load_file(bert / "model.safetensors")
    weights["classifier.weight"] = weights["classifier.weight"].to(torch.int8)
    save_file(weights, bert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArchitectureError, match=r"classifier\.weight' is int8; .*quantised"):
        load_text_model(bert)


def test_a_tensor_of_another_name_is_named(bert: Path) -> None:
    weights = load_file(bert / "model.safetensors")
    weights["head.weight"] = weights.pop("classifier.weight")
    save_file(weights, bert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArchitectureError, match=r"lacks 1 tensors .*it has 'head\.weight'"):
        load_text_model(bert)


def test_stacked_experts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 2})
    monkeypatch.setitem(tiny.FAMILIES, "mixtral", family)
    with pytest.raises(ArchitectureError, match=r"experts\.0\.w1\.weight.* as they are"):
        load_text_model(tiny.causal(tmp_path / "mixtral", "mixtral"))


def test_a_head_of_one_value_is_no_classifier(tmp_path: Path) -> None:
    with pytest.raises(ArchitectureError, match="one value, which is no choice"):
        load_text_model(tiny.bert(tmp_path / "one", classes=1))


def test_special_tokens_beyond_the_embeddings_are_refused(bert: Path) -> None:
    path = bert / "tokenizer.json"
    content = json.loads(path.read_text())
    text = json.dumps(content["post_processor"])
    known = tiny.VOCABULARY.index("[SEP]")
    assert f"{known}" in text
    changed = json.loads(re.sub(rf"\b{known}\b", "99999", text))
    path.write_text(json.dumps({**content, "post_processor": changed}))
    with pytest.raises(ArchitectureError, match="puts token 99999 around texts"):
        load_text_model(bert)


def test_a_module_that_fails_later_is_an_error_of_the_model(folders: dict[str, Path]) -> None:
    model = load_text_model(folders["bert"])
    with pytest.raises(ArchitectureError, match=r"fails on texts.*IndexError"):
        model.predict_rows([[10**6]])


def test_how_a_model_generates_is_saved_as_it_came(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["gpt2"], tmp_path / "gpt2"))
    kept = {
        "generation_config.json": '{"eos_token_id": [0, 5], "temperature": 0.3}',
        "chat_template.jinja": "{{ messages[0].content }}",
    }
    for name, content in kept.items():
        (folder / name).write_text(content)
    saved = save_text_model(
        tmp_path / "saved", load_text_model(folder), provenance=Provenance("test")
    )
    assert {name: (saved / name).read_text() for name in kept} == kept
    # Such a folder is one of a text model, and may be replaced.
    save_text_model(
        saved, load_text_model(folders["gpt2"]), provenance=Provenance("test"), overwrite=True
    )
    assert not (saved / "chat_template.jinja").exists()


def test_an_adapter_is_refused(bert: Path) -> None:
    (bert / "adapter_config.json").write_text("{}")
    with pytest.raises(ArchitectureError, match="adapter_config"):
        load_text_model(bert)


def test_text_models_are_told_from_others(folders: dict[str, Path], tmp_path: Path) -> None:
    assert is_text_model(folders["gpt2"])
    assert not is_text_model(tmp_path)
    assert not is_text_model(tmp_path / "nothing")


def test_a_missing_extra_is_named(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"pydetox\[text\]"):
        load_text_model(folders["bert"])


def test_inputs_are_checked(folders: dict[str, Path]) -> None:
    model = load_text_model(folders["bert"])
    with pytest.raises(UsageError, match="zero texts"):
        model.encode([])
    with pytest.raises(UsageError, match="at least 3"):
        model.encode(["a"], max_tokens=2)
    assert model.encode(["a " * 500], max_tokens=10).input_ids.shape == (1, 10)
    assert model.encode(["a " * 500], max_tokens=1000).input_ids.shape == (1, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"unk_token": "[NONE]"}}, "its tokenizer fails: .*Missing"),
        (
            {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}}},
            "its tokenizer fails: .*retry-limit",
        ),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "cannot be read"),
        ({"normalizer": {"type": "Prepend", "prepend": "a" * 100}}, "inserts 100 characters"),
    ],
)
def test_a_hostile_tokenizer_ends_in_one_line(bert: Path, changes: dict, message: str) -> None:
    path = bert / "tokenizer.json"
    content = json.loads(path.read_text())
    split = {"behavior": "Isolated", "invert": False}
    for key, value in changes.items():
        more = split if value.get("type") == "Split" else {}
        kept = content[key] if key == "model" else {}
        content[key] = {**kept, **value, **more}
    path.write_text(json.dumps(content))
    with pytest.raises(ArchitectureError, match=message):
        load_text_model(bert).tokenizer.encode([f"{'a' * 40} unheard b"], 16)
