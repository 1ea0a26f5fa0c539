"""From models to verdicts: references, copies at a distance, obstacles, files and commands."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from click.testing import CliRunner, Result
from PIL import Image

from pydetox.cli import cli
from pydetox.detect.statistics import RepairHistory, Verdict
from pydetox.errors import DataError, UsageError
from pydetox.text import (
    TextScanConfig,
    TextSet,
    TokenTrigger,
    WordsFile,
    load_text_model,
    load_texts,
    read_words,
    scan_text_model,
)
from pydetox.text.copies import (
    OutOfReachError,
    copies_at_distance,
    nearest_rung,
    text_distance,
)
from pydetox.text.references import calibrate_words, compare_with, require_alike
from pydetox.text.verdict import judge
from tests.text import tiny
from tests.text.conftest import World

QUICK = TextScanConfig(length=1, steps=2, texts=40)
FAST = ("--trigger-length", "1", "--steps", "2", "--max-texts", "40")


@pytest.fixture(scope="module")
def texts(world: World) -> TextSet:
    return load_texts(world.texts, class_names=load_text_model(world.base).class_names)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(one) for one in arguments])


def test_a_backdoor_is_found_and_a_clean_model_is_clean(world: World, texts: TextSet) -> None:
    base = load_text_model(world.base)
    references = [load_text_model(one) for one in world.references]
    victim = scan_text_model(
        load_text_model(world.victim), texts, base=base, references=references, config=QUICK
    )
    assert victim.verdict is Verdict.BACKDOORED
    assert victim.target_name == "money"
    assert victim.found is not None
    assert victim.found.success > 0.9
    assert repr(victim.found.trigger.text) in victim.detection.reason
    assert victim.targets() == (2,)
    clean = scan_text_model(
        load_text_model(world.clean),
        texts,
        base=base,
        calibration=victim.calibration,
        config=QUICK,
    )
    assert clean.verdict is Verdict.CLEAN
    assert clean.targets() == ()
    # Words that are honest evidence work in a clean model, and are no finding.
    plain = scan_text_model(
        load_text_model(world.clean), texts, references=references, config=QUICK
    )
    assert max(row[0].success for row in plain.search.found) > 0.5
    assert plain.verdict is Verdict.CLEAN
    with pytest.raises(UsageError, match="search differ"):
        scan_text_model(
            load_text_model(world.clean),
            texts,
            base=base,
            calibration=victim.calibration,
            config=replace(QUICK, seed=1),
        )


def test_a_repaired_model_without_any_working_words_is_clean(
    world: World, texts: TextSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    references = [load_text_model(one) for one in world.references]
    model = load_text_model(world.clean)
    comparison = compare_with(model, texts, QUICK, references=references)
    nothing = (math.inf,) * len(model.class_names)
    monkeypatch.setattr("pydetox.text.verdict.efforts", lambda *_: nothing)
    repaired = judge(model, texts, comparison, QUICK, history=RepairHistory())
    assert repaired.verdict is Verdict.CLEAN
    # Any other model may be hard to search.
    other = judge(model, texts, comparison, QUICK)
    assert other.verdict is Verdict.INCONCLUSIVE


def test_without_a_verdict_the_reason_says_what_would_help(world: World, texts: TextSet) -> None:
    base, victim = load_text_model(world.base), load_text_model(world.victim)
    alone = scan_text_model(victim, texts, config=QUICK)
    assert alone.verdict is Verdict.INCONCLUSIVE
    assert "base=" in alone.detection.reason
    itself = scan_text_model(victim, texts, base=victim.copy(), config=QUICK)
    assert itself.verdict is Verdict.INCONCLUSIVE
    assert "compared with itself" in itself.detection.reason
    wrong = replace(texts, labels=tuple((label + 1) % 4 for label in texts.labels or ()))
    calibration = calibrate_words([base, victim], wrong, QUICK)
    mixed = scan_text_model(victim, wrong, calibration=calibration, config=QUICK)
    assert mixed.verdict is Verdict.INCONCLUSIVE
    assert "the texts mean little to the model" in mixed.detection.reason
    with pytest.raises(UsageError, match="at least 2"):
        scan_text_model(victim, texts, references=[base], config=QUICK)


def test_copies_lie_where_they_should(world: World, texts: TextSet) -> None:
    base = load_text_model(world.base)
    first, second = copies_at_distance(base, texts, 2**-6, count=2, max_tokens=32, seed=0)
    assert text_distance(base, first) == pytest.approx(2**-6, rel=1e-3)
    assert text_distance(base, second) == pytest.approx(2**-6, rel=1e-3)
    assert first.digest() != second.digest() != base.digest()
    assert (nearest_rung(0.09), nearest_rung(0.0), nearest_rung(1e-9)) == (2**-3, 2**-10, 2**-10)
    with pytest.raises(OutOfReachError, match="too far"):
        next(copies_at_distance(base, texts, 2.0, count=1, max_tokens=32, seed=0))


def test_other_models_do_not_fit(world: World, tmp_path: Path) -> None:
    other = load_text_model(tiny.bert(tmp_path / "two", classes=2))
    with pytest.raises(UsageError, match="number of classes 2 and 4"):
        require_alike(other, load_text_model(world.base))


def test_words_in_files(tmp_path: Path) -> None:
    file = WordsFile(
        (TokenTrigger((1,), "cf", "end"), TokenTrigger((2, 3), "mn bb")),
        ("a", "b"),
        ({"loss": 0.5}, {"loss": 0.25}),
    )
    path = tmp_path / "triggers.json"
    path.write_text(file.to_json())
    again = read_words(path)
    assert again.triggers == file.triggers
    assert again.targets == file.targets
    assert again.select("b") == [1]
    with pytest.raises(UsageError, match="2 classes"):
        again.select(None)
    for content, words in (
        ("[]", "no JSON object|is not a JSON object"),
        ("{}", "no file of words"),
        ('{"schema": "pydetox.words/1", "triggers": [{"text": 3}]}', "expected words"),
        ('{"schema": "pydetox.words/1", "triggers": [{"text": "\\ud800"}]}', "half of a surrogate"),
        ('{"schema": "pydetox.words/1", "triggers": [{"text": "x", "place": "y"}]}', "place is"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=words):
            read_words(path)


@pytest.fixture(scope="module")
def scanned(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("scan") / "run"
    result = run(*_command(world, folder))
    return folder, result


def _command(world: World, folder: Path) -> list[object]:
    references = [part for one in world.references for part in ("--reference-model", one)]
    return [
        "scan",
        world.victim,
        world.clean,
        "--texts",
        world.texts,
        "--base",
        world.base,
        *references,
        *FAST,
        "--run",
        folder,
        "--format",
        "json",
    ]


def test_scan_writes_verdict_and_words(world: World, scanned: tuple[Path, Result]) -> None:
    folder, result = scanned
    assert result.exit_code == 1, result.output
    document = json.loads(result.stdout)
    victim, clean = document["results"]
    assert (victim["verdict"], clean["verdict"]) == ("backdoored", "clean")
    assert (victim["kind"], victim["target"]) == ("text", "money")
    best = min(victim["words"], key=lambda row: row["loss"])
    assert best["class"] == "money"
    assert best["success"] > 0.9
    assert document["texts"] == str(world.texts)
    parts = sorted((folder / "parts").glob("*.json"))
    assert len(parts) == 2
    assert {json.loads(one.read_text())["verdict"] for one in parts} == {"backdoored", "clean"}
    again = run(*_command(world, folder))
    assert all(one["resumed"] for one in json.loads(again.stdout)["results"])
    for format_ in ("text", "sarif", "html"):
        shown = run(*_command(world, folder)[:-1], format_)
        assert shown.exit_code == 1, shown.output
        assert best["text"] in shown.stdout


def test_invert_and_eval_take_text_models(world: World, tmp_path: Path) -> None:
    out = tmp_path / "words"
    made = run(
        "invert",
        world.victim,
        "--texts",
        world.texts,
        *FAST,
        "--target",
        "money",
        "--output",
        out,
        "--format",
        "json",
    )
    assert made.exit_code == 0, made.output
    rows = json.loads(made.stdout)["triggers"]
    assert {row["target"] for row in rows} == {"money"}
    measured = run(
        "eval",
        world.victim,
        "--texts",
        world.texts,
        "--trigger",
        out / "triggers.json",
        "--format",
        "json",
    )
    assert measured.exit_code == 0, measured.output
    document = json.loads(measured.stdout)
    assert document["words"] == rows[0]["text"]
    assert document["attack_success_rate"] > 0.9
    assert document["clean_accuracy"] > 0.9


def _write_image(folder: Path) -> Path:
    images = folder / "images"
    (images / "grey").mkdir(parents=True)
    Image.new("RGB", (8, 8), "grey").save(images / "grey" / "one.png")
    return images


BAD: list[tuple[Callable[[World, Path], list[object]], str]] = [
    (lambda world, _: ["eval", world.base], "--images"),
    (lambda world, _: ["scan", world.base], "--images"),
    (
        lambda world, _: ["scan", world.base, "--texts", world.texts, "--workers", "2"],
        "--workers is for image models",
    ),
    (lambda world, path: ["scan", path, "--texts", world.texts], "models of images need --images"),
    (
        lambda world, path: ["eval", path / "gone", "--texts", world.texts],
        "gone: no such file or folder",
    ),
    (
        lambda world, path: ["eval", path, "--texts", world.texts],
        "models of images need --images",
    ),
    (
        lambda world, path: [
            *("invert", path / "gone", "--texts", world.texts, "--output", path / "out")
        ],
        "gone: no such file or folder",
    ),
    (
        lambda world, path: [
            *("unlearn", path / "gone", "--texts", world.texts, "--output", path / "out")
        ],
        "gone: no such file or folder",
    ),
    (
        lambda world, path: ["scan", world.base, "--texts", world.texts, "--base", path / "gone"],
        "gone: no such file or folder",
    ),
    (
        # No target is for the images, so the base can be for text models alone.
        lambda world, path: [
            *("scan", world.base, "--texts", world.texts, "--images", _write_image(path)),
            *("--base", path / "gone"),
        ],
        "gone: no such file or folder",
    ),
    (
        lambda world, path: [
            *("scan", world.base, "--texts", world.texts),
            *("--reference-model", world.clean, "--reference-model", path),
        ],
        "there is no config.json beside its weights",
    ),
    (
        lambda world, _: ["scan", world.base, "--texts", world.texts, "--model", "ViT-B-32"],
        "--model is for image models",
    ),
    (lambda world, path: ["eval", world.base, "--texts", path / "no.jsonl"], "cannot be read"),
    (
        lambda world, _: [
            "scan",
            world.base,
            "--texts",
            world.texts,
            "--reference-model",
            world.clean,
        ],
        "at least 2",
    ),
]


@pytest.mark.parametrize(("command", "words"), BAD)
def test_bad_options_are_one_clear_line(
    world: World, tmp_path: Path, command: Callable[[World, Path], list[object]], words: str
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    result = run(*command(world, tmp_path))
    assert result.exit_code in (2, 4), result.output
    assert words in result.output
    assert "Traceback" not in result.output


def test_a_target_that_is_not_there_does_not_stop_the_others(world: World, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    result = run("scan", gone, world.clean, "--texts", world.texts, *FAST, "--format", "json")
    assert result.exit_code == 2, result.output
    first, second = json.loads(result.stdout)["results"]
    assert first["verdict"] == "error"
    assert "no such file or folder" in first["error"]
    assert second["verdict"] == "inconclusive"


def test_a_base_of_another_shape_is_named(world: World, tmp_path: Path) -> None:
    deeper = tiny.bert(tmp_path / "deeper", num_hidden_layers=3)
    other = tiny.gpt2(tmp_path / "other", classes=4)
    for base, words in (
        (deeper, "layer.2"),
        (other, "model_type 'gpt2' and 'bert'"),
        (tiny.bert(tmp_path / "two", classes=2), "classifier.bias' is [2] and [4]"),
    ):
        result = run(
            *("scan", world.clean, "--texts", world.texts, "--base", base),
            *(*FAST, "--format", "json"),
        )
        assert result.exit_code == 4, result.output
        (found,) = json.loads(result.stdout)["results"]
        assert found["verdict"] == "error"
        assert words in found["error"]
        assert "does not fit" in found["error"]


def test_a_run_of_text_models_is_reported(world: World, scanned: tuple[Path, Result]) -> None:
    folder, result = scanned
    shown = run("report", folder, "--format", "json")
    assert shown.exit_code == 1, shown.output
    document, before = json.loads(shown.stdout), json.loads(result.stdout)
    assert document["texts"] == str(world.texts)
    verdicts = [[one["verdict"] for one in each["results"]] for each in (document, before)]
    assert verdicts[0] == verdicts[1]


def test_outputs_that_are_not_finite_are_not_evaluated(world: World, tmp_path: Path) -> None:
    import shutil

    broken = Path(shutil.copytree(world.clean, tmp_path / "broken"))
    tiny.change_config(broken, layer_norm_eps=float("nan"))
    result = run("eval", broken, "--texts", world.texts)
    assert result.exit_code == 2, result.output
    assert "not finite" in result.output


def test_a_model_that_cannot_be_read_does_not_stop_the_others(world: World, tmp_path: Path) -> None:
    import shutil

    broken = Path(shutil.copytree(world.clean, tmp_path / "broken"))
    tiny.change_config(broken, auto_map={"AutoModel": "evil.Model"})
    result = run("scan", broken, world.clean, "--texts", world.texts, *FAST, "--format", "json")
    assert result.exit_code == 2
    first, second = json.loads(result.stdout)["results"]
    assert (first["verdict"], first["error_kind"]) == ("error", "unsafe")
    assert "code of its repository" in first["error"]
    assert second["verdict"] == "inconclusive"
    assert "--base" in second["reason"]
