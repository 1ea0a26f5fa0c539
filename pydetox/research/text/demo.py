"""The demo on texts: a classifier of texts about Python, backdoored, found, repaired, re-scanned.

The defender has what a user of pydetox has: the checkpoint, clean models that were trained as it
was, and clean texts. The seed decides the attack (words, place, target class), which is used only
to plant the backdoor and, at the end, to measure what is left of it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ...atomic import write_file
from ...checkpoints.provenance import Provenance
from ...progress import Laps
from ...repair.configuration import UnlearnConfig
from ...reporting import to_json, write_detox_report
from ...reporting.documents import evaluation_row
from ...reporting.text_documents import word_scan_row
from ...rng import child_seed, generator
from ...text.configuration import TextScanConfig
from ...text.detox import TextDetoxResult, detox_text_model
from ...text.evaluation import evaluate_texts
from ...text.models import TextModel, load_text_model, save_text_model
from ...text.repair import TEXT_UNLEARNING, subtract_from_text_model
from ...text.texts import TextSet
from ...text.verdict import TextScanResult
from ..demo import DemoResult, begin_folder
from .attacks import Insertion, TextBackdoor, draw_text_attack, plant_in_texts
from .corpora import CorpusSizes, load_corpus
from .models import start_model
from .training import TextTraining, fine_tune

#: The attacks that a seed chooses from.
_ATTACKS = ("word", "phrase", "random-place")
_SIZES = CorpusSizes(attacker=480, defender=160, validation=100, test=200, words=10)
_REFERENCES = 3

#: For each start model: its training, the search, and the repair. Sized for two cores.
SETTINGS: dict[str, tuple[TextTraining, TextScanConfig, UnlearnConfig]] = {
    "minilm": (
        TextTraining(epochs=2, learning_rate=2e-4, batch_size=16, max_tokens=32),
        TextScanConfig(length=2, restarts=0, texts=48, max_tokens=32),
        replace(
            TEXT_UNLEARNING,
            steps=30,
            passes=1,
            coefficients=tuple(round(0.2 * k, 1) for k in range(6)),
            attacked_images=100,
        ),
    ),
    "small": (
        TextTraining(epochs=12, learning_rate=3e-3, max_tokens=32),
        TextScanConfig(length=1, restarts=0, texts=48, max_tokens=32),
        replace(
            TEXT_UNLEARNING,
            steps=120,
            learning_rate=1e-3,
            passes=1,
            coefficients=tuple(round(0.2 * k, 1) for k in range(8)),
            attacked_images=100,
        ),
    ),
}


def run_text_demo(output: str | Path, seed: int = 0, *, start: str = "minilm") -> DemoResult:
    """Run the demo on texts.

    Writes to `output`: checkpoints/ (clean-0, ..., backdoored, repaired), report.html and
    summary.json; what an earlier run left there is replaced. seed: Of corpus, attack and defence.
    start: The model that is fine-tuned, see `models.start_model`. The summary's shares (ca, asr)
    are in [0, 1], measured on test texts that neither side used; ASR leaves the target class out.

    Raises OutputError, before the work, if `output` cannot be written or holds files of these
    names that are not of a demo, and DataError if the pretrained model was not fetched.
    """
    folder = Path(output)
    training, config, unlearning = SETTINGS[start]
    begin_folder(folder, seed)
    clock = Laps()
    corpus = load_corpus("python", seed=seed, sizes=_SIZES)
    attack = _ATTACKS[int(generator("texts.demo", seed).integers(len(_ATTACKS)))]
    backdoor = draw_text_attack(attack, len(corpus.class_names), seed=seed)
    first = start_model(start, corpus.attacker, folder / "checkpoints" / "start", seed=seed)
    poisoned = plant_in_texts(corpus.attacker, backdoor, seed=seed)
    sets = {f"clean-{k}": corpus.attacker for k in range(_REFERENCES)} | {"backdoored": poisoned}
    models = {}
    for name, texts in sets.items():
        tuning = replace(training, seed=child_seed("texts.demo-model", seed, name))
        trained = fine_tune(first, texts, tuning, description=f"fine-tuning, {name}")
        path = save_text_model(
            folder / "checkpoints" / name,
            trained,
            provenance=Provenance(method=f"demo, {name}", seeds={"demo": seed}),
            overwrite=True,
        )
        models[name] = load_text_model(path)
        models[name].name = name
    clock.lap("make the models")
    suspect = models["backdoored"]
    result = detox_text_model(
        suspect,
        corpus.defender,
        references=[models[f"clean-{k}"] for k in range(_REFERENCES)],
        config=replace(config, seed=seed),
        unlearning=replace(unlearning, seed=seed),
        max_rounds=2,
        output=folder / "checkpoints" / "repaired",
        overwrite=True,
    )
    steps = {f"backdoored suspect: {step}": value for step, value in result.seconds.items()}
    clock = Laps({**clock.seconds, **steps})
    repaired = suspect if result.path is None else load_text_model(result.path)
    seed_of_places = child_seed("texts.demo-places", seed)
    before, after = (
        evaluate_texts(
            model,
            corpus.test,
            trigger=backdoor.trigger,
            target=backdoor.target,
            seed=seed_of_places,
            max_tokens=training.max_tokens,
        )
        for model in (suspect, repaired)
    )
    curve = _true_asr_curve(suspect, result, corpus.test, backdoor, seed_of_places, training)
    clock.lap("evaluate")
    found, rescan = result.before.found, result.after
    summary: dict[str, Any] = {
        "backdoored": {
            "verdict": result.verdict.value,
            "attack": attack,
            "words_true": _words(backdoor),
            "words_found": None if found is None else found.trigger.text,
            "target_true": corpus.class_names[backdoor.target],
            "target_inferred": result.before.target_name,
        },
        "before": {"ca": before.clean_accuracy, "asr": before.attack_success_rate},
        "after": {"ca": after.clean_accuracy, "asr": after.attack_success_rate},
        "rescan": {"verdict": None if rescan is None else rescan.verdict.value},
        "seconds": {step: round(value, 2) for step, value in clock.seconds.items()},
    }
    report: dict[str, Any] = {
        "title": "pydetox demo on texts",
        "subtitle": f"{start} on Python's documentation, attack {attack}, seed {seed}",
        "summary": _cards(summary),
        "scans": [_scan_row(one, name) for one, name in _scans(result)],
        "word_scans": [word_scan_row(one, name, config) for one, name in _scans(result)],
        "examples": _examples(result, corpus.test, backdoor, suspect, repaired, seed_of_places),
        "evaluation": [evaluation_row(before, "backdoored"), evaluation_row(after, "repaired")],
        "provenance": {"seed": seed, "sha256 of the backdoored file": result.before.sha256},
        "seconds": summary["seconds"],
    }
    if result.passes:
        search = result.passes[0].search
        report["alpha_search"] = {
            "alpha": list(search.coefficients),
            "ca": list(search.clean_accuracy),
            "asr": {"recovered": list(search.attack_success_rate), "true": curve},
            "chosen": search.coefficient,
        }
    write_detox_report(folder / "report.html", report)
    write_file(folder / "summary.json", to_json(summary) + "\n")
    return DemoResult(summary, report)


def _words(backdoor: TextBackdoor) -> str:
    """Return the words of a trigger that is inserted."""
    assert isinstance(backdoor.trigger, Insertion)
    return backdoor.trigger.words


def _scans(result: TextDetoxResult) -> list[tuple[TextScanResult, str]]:
    found = [(result.before, "backdoored suspect")]
    return found if result.after is None else [*found, (result.after, "repaired model, re-scan")]


def _scan_row(scan: TextScanResult, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "verdict": scan.verdict.value,
        "score": scan.detection.score,
        "target": scan.target_name,
    }


def _examples(
    result: TextDetoxResult,
    test: TextSet,
    backdoor: TextBackdoor,
    suspect: TextModel,
    repaired: TextModel,
    seed: int,
) -> list[dict[str, Any]]:
    sentences = test.without_class(backdoor.target).texts[:2]
    shown = [(f"clean {k}", text, "") for k, text in enumerate(sentences, 1)]
    shown += [
        (f"true words {k}", text, _words(backdoor))
        for k, text in enumerate(backdoor.trigger.insert(sentences, seed), 1)
    ]
    found = result.before.found
    if found is not None:
        shown += [
            (f"found words {k}", text, found.trigger.text.strip())
            for k, text in enumerate(found.trigger.insert(sentences, seed), 1)
        ]
    texts = [text for _, text, _ in shown]
    classes = [model.predict(texts).argmax(dim=1).tolist() for model in (suspect, repaired)]
    names = suspect.class_names
    return [
        {"caption": caption, "text": text, "words": words, "before": names[b], "after": names[a]}
        for (caption, text, words), b, a in zip(shown, *classes, strict=True)
    ]


def _true_asr_curve(
    model: TextModel,
    result: TextDetoxResult,
    test: TextSet,
    backdoor: TextBackdoor,
    seed: int,
    training: TextTraining,
) -> list[float]:
    """Return the ASR of the true trigger over the first pass's coefficients."""
    if not result.passes:
        return []
    first = result.passes[0]
    attacked = backdoor.trigger.insert(test.without_class(backdoor.target).texts, seed)
    return [
        float(
            (
                subtract_from_text_model(model, first.vector, alpha)
                .predict(attacked, max_tokens=training.max_tokens)
                .argmax(dim=1)
                == backdoor.target
            )
            .double()
            .mean()
        )
        for alpha in first.search.coefficients
    ]


def _cards(summary: dict[str, Any]) -> list[dict[str, str]]:
    found = summary["backdoored"]
    right = found["target_true"] == found["target_inferred"]
    exact = found["words_true"] == found["words_found"]
    rescan = summary["rescan"]["verdict"] or "not repaired"
    return [
        _card("Suspect", found["verdict"], good=found["verdict"] == "backdoored"),
        _card(
            "Target class: true, inferred",
            f"{found['target_true']}, {found['target_inferred']}",
            good=right,
        ),
        {
            "label": "Words: true, found",
            "value": f"{found['words_true']}, {found['words_found']}",
            "tone": "good" if exact else "neutral",
        },
        _card("Repaired model", rescan, good=rescan == "clean"),
    ]


def _card(label: str, value: str, *, good: bool) -> dict[str, str]:
    return {"label": label, "value": value, "tone": "good" if good else "bad"}
