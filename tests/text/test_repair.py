"""Trigger vectors of text classifiers: independent truths, and a whole repair of a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from pydetox.analysis.localization import layer_of, module_of
from pydetox.checkpoints.provenance import Provenance
from pydetox.cli import cli
from pydetox.detect.statistics import Verdict
from pydetox.errors import ArchitectureError, DataError, UsageError
from pydetox.repair.alpha import CoefficientSearch
from pydetox.repair.configuration import UnlearnConfig
from pydetox.repair.task_vectors import TaskVector
from pydetox.reporting.text_documents import text_detox_document
from pydetox.text import (
    TextModel,
    TextSet,
    TokenTrigger,
    load_text_model,
    load_texts,
    save_text_model,
)
from pydetox.text import passes as passes_module
from pydetox.text.configuration import TextScanConfig
from pydetox.text.detox import detox_text_model
from pydetox.text.evaluation import evaluate_texts
from pydetox.text.localization import localize_words
from pydetox.text.passes import unlearn_words
from pydetox.text.repair import (
    finer_coefficients,
    search_text_coefficient,
    subtract_from_text_model,
    text_trigger_vector,
    trainable_logits,
    weight_change,
)
from pydetox.text.search import FoundTrigger, TextSearch
from pydetox.text.trigger_file import WordsFile
from pydetox.text.triggers import AnyWords

from . import tiny
from .conftest import World

UNLEARNING = UnlearnConfig(
    steps=120,
    batch_size=32,
    learning_rate=2e-3,
    passes=1,
    coefficients=tuple(round(0.2 * k, 1) for k in range(8)),
    attacked_images=120,
    # One of the 88 texts that get a trigger is 1.1%, and this small model is wrong on as many.
    max_attack_success=0.05,
)
TRIGGER = TokenTrigger((0,), "cf")
TARGET = 2


def texts(count: int, seed: int) -> TextSet:
    found, names = zip(*tiny.topical_texts(count, seed), strict=True)
    classes = tuple(tiny.TOPICS)
    return TextSet(found, tuple(classes.index(name) for name in names), classes)


@pytest.fixture(scope="module")
def victim(world: World) -> TextModel:
    return load_text_model(world.victim)


@pytest.fixture(scope="module")
def vector(victim: TextModel) -> TaskVector:
    return text_trigger_vector(victim, texts(120, 7).texts, [TRIGGER], TARGET, UNLEARNING)


def test_evaluation_counts_what_a_loop_counts(victim: TextModel) -> None:
    test = texts(60, 8)
    found = evaluate_texts(victim, test, trigger=TRIGGER, target=TARGET)
    assert test.labels is not None
    right = sent = attacked = 0
    for text, label in zip(test.texts, test.labels, strict=True):
        right += int(victim.predict([text])[0].argmax()) == label
        if label != TARGET:
            attacked += 1
            sent += int(victim.predict([f"cf {text}"])[0].argmax()) == TARGET
    assert found.clean_accuracy == right / 60
    assert found.attack_success_rate == sent / attacked
    assert found.n_attack == attacked
    assert found.attack_success_rate > 0.9
    with pytest.raises(UsageError, match="go together"):
        evaluate_texts(victim, test, trigger=TRIGGER)
    with pytest.raises(DataError, match="no labels"):
        evaluate_texts(victim, TextSet(("a film",)))


def test_trainable_logits_are_the_logits_with_a_gradient(victim: TextModel) -> None:
    model = victim.copy()
    batch = model.encode(["the film was long", "cf a goal"])
    model.module.requires_grad_(True)
    logits = trainable_logits(model, batch)
    torch.testing.assert_close(logits.detach(), model.logits(batch))
    logits.square().sum().backward()
    assert all(p.grad is not None for p in model.module.parameters())


def test_a_vector_unlearns_a_known_trigger(victim: TextModel, vector: TaskVector) -> None:
    search = search_text_coefficient(victim, vector, texts(120, 9), [TRIGGER], TARGET, UNLEARNING)
    assert search.reached
    assert search.attack_success_rate[0] > 0.9
    repaired = subtract_from_text_model(victim, vector, search.coefficient)
    test = texts(120, 8)
    before = evaluate_texts(victim, test, trigger=TRIGGER, target=TARGET)
    after = evaluate_texts(repaired, test, trigger=TRIGGER, target=TARGET)
    assert after.attack_success_rate is not None
    assert after.attack_success_rate < 0.15
    assert after.clean_accuracy >= 0.95 * before.clean_accuracy
    # What was searched is what is subtracted, to the bit: theta_b - alpha tau.
    start, weights = victim.state_dict(), repaired.state_dict()
    for name, change in vector.tensors.items():
        assert torch.equal(weights[name], torch.add(start[name], change, alpha=-search.coefficient))


@pytest.mark.parametrize(
    ("tried", "expected"),
    [
        # The margin above the smallest alpha that removes the trigger.
        ({0.0: (1.0, (0.9,)), 0.2: (1.0, (0.0,)), 0.4: (0.9, (0.0,))}, (0.22, 0.24, 0.26)),
        # A gap between too little and too much.
        ({0.0: (1.0, (0.9,)), 0.4: (1.0, (0.5,)), 0.8: (0.5, (0.0,))}, (0.5, 0.6, 0.7)),
        # Nothing to find: no alpha removes the trigger.
        ({0.0: (1.0, (0.9,)), 0.4: (1.0, (0.5,))}, ()),
        # The worst trigger counts.
        ({0.0: (1.0, (0.9, 0.0)), 0.2: (1.0, (0.0, 0.3))}, ()),
    ],
)
def test_alpha_is_searched_finer_where_the_limits_begin(
    tried: dict[float, tuple[float, tuple[float, ...]]], expected: tuple[float, ...]
) -> None:
    config = replace(UNLEARNING, safety_factor=1.3, min_accuracy_kept=0.97)
    assert finer_coefficients(tried, config, 1.0) == pytest.approx(expected)


def test_alpha_grows_while_accuracy_stays_for_a_part_of_a_trigger(
    victim: TextModel, vector: TaskVector
) -> None:
    def chosen(partial: bool) -> CoefficientSearch:
        return search_text_coefficient(
            victim, vector, texts(120, 9), [TRIGGER], TARGET, UNLEARNING, partial=partial
        )

    whole, part = chosen(False), chosen(True)
    assert part.coefficients == whole.coefficients
    assert part.reached
    assert part.coefficient >= whole.coefficient
    limits = [
        k
        for k, (kept, sent) in enumerate(
            zip(part.clean_accuracy, part.attack_success_rate, strict=True)
        )
        if kept >= UNLEARNING.min_accuracy_kept * part.accuracy_before
        and sent <= UNLEARNING.max_attack_success
    ]
    free = [k for k in limits if part.clean_accuracy[k] >= part.clean_accuracy[limits[0]] - 0.01]
    assert part.chosen == max(free[-1], whole.chosen)


@pytest.mark.parametrize("words_known", [True, False])
@pytest.mark.parametrize(
    ("successes", "expected"),
    [
        # One word brings the class: it is the trigger.
        ((0.95, 1.0), None),
        # Two are needed: what was found may be a part of a longer trigger.
        ((0.4, 0.9), ("red", "green", "blue", "grey", "pink", "black", "white", "brown")),
        # Nothing works: there is nothing to stand in for.
        ((0.1, 0.2), None),
    ],
)
def test_words_stand_in_for_a_longer_trigger(
    victim: TextModel,
    monkeypatch: pytest.MonkeyPatch,
    successes: tuple[float, float],
    expected: tuple[str, ...] | None,
    words_known: bool,
) -> None:
    told = ("blue", "red", "grey", "pink", "black", "white", "brown", "gold")
    found = [
        FoundTrigger(TokenTrigger((k,), text, "start", TARGET), 0.1, success)
        for k, (text, success) in enumerate(zip(("red", "red green"), successes, strict=True))
    ]
    classes = len(victim.class_names)
    search = TextSearch((tuple(found),) * classes, 10, 0)
    if words_known:
        search = replace(search, words=(told,) * classes)
    elif expected is not None:
        expected = expected[:2]
    stamps = list[object]()
    partial = list[bool]()

    def vector(_: TextModel, __: object, given: list[object], *rest: object, **___: object) -> Any:
        stamps.extend(given)
        return TaskVector({"embedding": torch.zeros(1)})

    def alpha(*_: object, **given: Any) -> CoefficientSearch:
        partial.append(given["partial"])
        return CoefficientSearch((0.0,), (1.0,), (0.0,), 0, True, 1.0)

    monkeypatch.setattr(passes_module, "text_trigger_vector", vector)
    monkeypatch.setattr(passes_module, "search_text_coefficient", alpha)
    monkeypatch.setattr(passes_module, "subtract_from_text_model", lambda model, *_: model)
    # Another class's trigger, which an earlier repair has unlearned, must not come back.
    before = TokenTrigger((7,), "gold", "end", 0)
    _, (only,) = unlearn_words(
        victim,
        texts(20, 7),
        [TARGET],
        unlearning=UNLEARNING,
        search=search,
        earlier=[(before, 0)],
    )
    assert stamps[0] is before
    assert only.unlearned[0] == (before, 0)
    assert [one for one, _ in only.unlearned] == stamps
    assert {target for _, target in only.unlearned[1:]} == {TARGET}
    assert only.beside == (expected or ())
    stand_ins = [one for one in stamps if isinstance(one, AnyWords)]
    assert partial == [expected is not None]
    assert {one.place for one in stand_ins} == (
        set() if expected is None else {"start", "end", "random"}
    )
    for one in stand_ins:
        assert set(one.words) == set(expected or ())
        assert one.words[0] == "red"


def test_alpha_without_labels_compares_with_the_model_itself(
    victim: TextModel, vector: TaskVector
) -> None:
    unlabelled = TextSet(texts(40, 9).texts)
    few = replace(UNLEARNING, coefficients=(0.0, 1.0))
    search = search_text_coefficient(victim, vector, unlabelled, [TRIGGER], TARGET, few)
    assert search.accuracy_before == search.clean_accuracy[0] == 1


def test_the_same_seed_gives_the_same_vector_and_others_another(victim: TextModel) -> None:
    few = replace(UNLEARNING, steps=3)
    some = texts(40, 7).texts

    def norm(config: UnlearnConfig) -> float:
        return text_trigger_vector(victim, some, [TRIGGER], TARGET, config).norm()

    assert norm(few) == norm(few) != norm(replace(few, seed=1))


def test_kinds_of_vectors_point_the_same_way(victim: TextModel) -> None:
    """Adding what strengthens a trigger, or subtracting what forgets it: both raise its success."""
    some = texts(40, 7)
    for kind in ("strengthen", "paired", "forget"):
        config = replace(UNLEARNING, steps=20, vector=kind)
        tau = text_trigger_vector(victim, some.texts, [TRIGGER], TARGET, config)
        weaker = subtract_from_text_model(victim, tau, 1.0)
        stronger = subtract_from_text_model(victim, tau, -1.0)

        def loss(model: TextModel) -> float:
            logits = model.predict(TRIGGER.insert(some.without_class(TARGET).texts))
            return -float(logits.log_softmax(dim=1)[:, TARGET].mean())

        assert loss(weaker) > loss(stronger)


def test_a_repaired_model_is_saved_and_read_by_transformers(
    victim: TextModel, vector: TaskVector, tmp_path: Path
) -> None:
    import transformers

    repaired = subtract_from_text_model(victim, vector, 1.0)
    save_text_model(tmp_path / "repaired", repaired, provenance=Provenance("TBAR, a test"))
    module = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "repaired")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "repaired")
    some = list(texts(8, 8).texts)
    batch = tokenizer(some, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = module(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(logits, repaired.predict(some), rtol=1e-4, atol=1e-5)
    assert load_text_model(tmp_path / "repaired").provenance == Provenance("TBAR, a test")


def test_tied_embeddings_change_once(tmp_path: Path) -> None:
    model = load_text_model(tiny.gpt2(tmp_path / "tied"))
    tuned = model.copy()
    with torch.no_grad():
        tuned.embedding.add_(1)
    change = weight_change(model, tuned)
    (name,) = change.tensors
    back = subtract_from_text_model(tuned, change, 1.0)
    torch.testing.assert_close(back.embedding, model.embedding)
    save_text_model(tmp_path / "back", back, provenance=Provenance("a test"))
    assert load_text_model(tmp_path / "back").stored.keys() == model.stored.keys()
    assert name in {one.parameter for one in model.stored.values()}


def test_unknown_words_are_recovered_and_unlearned(world: World, victim: TextModel) -> None:
    config = TextScanConfig(length=1, restarts=0, texts=64)
    repaired, passes = unlearn_words(
        victim,
        texts(120, 7),
        [TARGET],
        config,
        replace(UNLEARNING, passes=2),
        base=load_text_model(world.base),
    )
    # The attacker's word or another that works as well: any word before a text may.
    assert [one.trigger.target for one in passes[0].triggers] == [TARGET]
    assert len(passes) == 2
    assert passes[0].triggers[0].success > 0.9
    after = evaluate_texts(repaired, texts(120, 8), trigger=TRIGGER, target=TARGET)
    assert after.attack_success_rate is not None
    assert after.attack_success_rate < 0.15


def test_a_vector_is_localized_by_layer_and_module(
    world: World, victim: TextModel, vector: TaskVector
) -> None:
    found = localize_words(
        victim,
        vector,
        1.0,
        texts(40, 8),
        TRIGGER,
        TARGET,
        start=load_text_model(world.base),
    )
    assert {one.group for one in found.modules} == {"embedding", "attention", "mlp", "norm", "head"}
    assert sum(one.energy for one in found.layers) == pytest.approx(1)
    removed = {one.layer: one for one in found.removals}
    assert {"none", "all", "bert.encoder.layer.0", "bert.encoder.layer.1"} <= removed.keys()
    assert removed["all"].attack_success_rate < removed["none"].attack_success_rate
    assert found.disentanglement is not None
    assert found.disentanglement.error[0][0] == 0
    assert found.overlap is not None


@pytest.mark.parametrize(
    ("name", "layer", "module"),
    [
        ("bert.encoder.layer.3.attention.self.query.weight", "bert.encoder.layer.3", "attention"),
        ("bert.encoder.layer.3.output.dense.bias", "bert.encoder.layer.3", "mlp"),
        ("bert.encoder.layer.3.intermediate.dense.bias", "bert.encoder.layer.3", "mlp"),
        ("bert.encoder.layer.3.attention.output.LayerNorm.bias", "bert.encoder.layer.3", "norm"),
        ("transformer.h.11.mlp.c_fc.weight", "transformer.h.11", "mlp"),
        ("model.layers.0.self_attn.q_proj.weight", "model.layers.0", "attention"),
        ("bert.embeddings.word_embeddings.weight", "bert.embeddings.word_embeddings", "embedding"),
        ("classifier.weight", "classifier.weight", "head"),
        ("bert.pooler.dense.weight", "bert.pooler.dense", "head"),
    ],
)
def test_layers_and_modules_of_transformers_names(name: str, layer: str, module: str) -> None:
    assert (layer_of(name), module_of(name)) == (layer, module)


def test_what_makes_no_sense_is_refused(victim: TextModel, tmp_path: Path) -> None:
    some = texts(40, 7)
    with pytest.raises(DataError, match="1 texts"):
        text_trigger_vector(victim, some.texts[:1], [TRIGGER], TARGET)
    with pytest.raises(UsageError, match="no triggers"):
        text_trigger_vector(victim, some.texts, [], TARGET)
    with pytest.raises(UsageError, match="1 triggers, 2 target classes"):
        text_trigger_vector(victim, some.texts, [TRIGGER], [0, 1])
    with pytest.raises(ArchitectureError, match="a causal model; expected a sequence classifier"):
        text_trigger_vector(
            load_text_model(tiny.gpt2(tmp_path / "gpt2")), some.texts, [TRIGGER], TARGET
        )
    with pytest.raises(ArchitectureError, match="no tensor 'other'"):
        subtract_from_text_model(victim, TaskVector({"other": torch.zeros(1)}), 1.0)
    with pytest.raises(UsageError, match="2 target classes; expected one for known triggers"):
        unlearn_words(victim, some, [0, 1], triggers=[TRIGGER])


def test_a_repair_scans_subtracts_and_scans_again(world: World, tmp_path: Path) -> None:
    result = detox_text_model(
        load_text_model(world.victim),
        load_texts(world.texts),
        base=load_text_model(world.base),
        references=[load_text_model(one) for one in world.references],
        config=TextScanConfig(length=1, restarts=0, texts=64),
        unlearning=replace(UNLEARNING, passes=2),
        output=tmp_path / "repaired",
    )
    assert result.verdict is Verdict.BACKDOORED
    assert result.before.target == TARGET
    assert result.repaired
    assert result.path is not None
    saved = load_text_model(result.path)
    assert saved.provenance is not None
    assert saved.provenance.extra["target_classes"] == [["money"]] * len(result.passes)
    assert saved.provenance.source_sha256 == result.before.sha256
    after = evaluate_texts(saved, texts(120, 8), trigger=TRIGGER, target=TARGET)
    assert after.attack_success_rate is not None
    assert after.attack_success_rate < 0.15
    document = text_detox_document(result)
    assert [one["alpha"] for one in document["rounds"]] == [
        one.search.coefficient for one in result.passes
    ]


def test_the_command_unlearns_known_words_and_leaves_nothing_unsaid(
    world: World, tmp_path: Path
) -> None:
    words = tmp_path / "words.json"
    words.write_text(WordsFile((TRIGGER,), ("money",)).to_json())
    report = tmp_path / "report.html"
    found = CliRunner().invoke(
        cli,
        [
            *("unlearn", str(world.victim), "--texts", str(world.texts)),
            *("--trigger", str(words), "--output", str(tmp_path / "out"), "--format", "json"),
            *("--trigger-length", "1", "--restarts", "1", "--steps", "2", "--max-texts", "48"),
            *("--vector-learning-rate", "0.002", "--vector-steps", "60", "--report", str(report)),
        ],
    )
    document = json.loads(found.stdout)
    assert found.exit_code == document["exit_code"] == 2  # no references, so no verdict
    assert document["kind"] == "text"
    assert document["rounds"][0]["target_names"] == ["money"]
    assert document["evaluation"][1]["asr"] < 0.1 < document["evaluation"][0]["asr"]
    assert "Loss of the best words of each class" in report.read_text()
    assert load_text_model(tmp_path / "out").class_names == tuple(tiny.TOPICS)


def test_the_command_refuses_what_it_cannot_do(world: World, tmp_path: Path) -> None:
    given = ["unlearn", str(world.victim), "--texts", str(world.texts)]
    for more in ([], ["--force-target", "weather"]):
        found = CliRunner().invoke(cli, [*given, "--output", str(tmp_path / "out"), *more])
        assert found.exit_code == 4
        assert found.stderr.startswith("error: ")
    assert not (tmp_path / "out").exists()
