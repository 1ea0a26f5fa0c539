import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from pydetox.checkpoints import Provenance, load_checkpoint, save_checkpoint, save_weights
from pydetox.detect.calibration_file import write_calibration
from pydetox.detect.statistics import Calibration
from pydetox.errors import CheckpointError, DataError, UsageError
from pydetox.inversion.trigger_file import load_triggers
from pydetox.models import OpenClipModel
from pydetox.reporting import to_json, to_plain
from pydetox.scanning import Scanner
from pydetox.scanning.memory import Limits
from pydetox.scanning.runs import compare_runs, load_run
from pydetox.scanning.scanner import NO_INVERSION
from pydetox.scanning.store import read_artifacts, read_events

from .conftest import TINY, contents, save, save_model, scan


def started(run: Path, kind: str = "scan") -> list[str]:
    """Names of the targets whose scan has begun, in order, over all drivers of a run."""
    return [e["name"] for e in read_events(run) if e["event"] == "started" and e["kind"] == kind]


def shard(source: Path, folder: Path) -> Path:
    """Write a checkpoint of open_clip's layout as two shards with an index."""
    tensors = load_checkpoint(source).state_dict
    folder.mkdir()
    names = list(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2]}
    parts["model-00002-of-00002.safetensors"] = names[1::2]
    for part, kept in parts.items():
        save_weights(folder / part, {name: tensors[name] for name in kept})
    weight_map = {name: part for part, kept in parts.items() for name in kept}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shutil.copy(source / "open_clip_config.json", folder)
    return folder


def test_records_of_a_folder(registry, config):
    records = scan(config(), registry / "models")
    names = {Path(name).name for name in records}
    assert names == {"a", "b", "c", "d"}
    for record in records.values():
        assert record.verdict == "inconclusive"
        assert len(str(record.sha256)) == 64
        assert record.scan["class_names"] == ["cat", "dog", "cow"]
        assert 0 < record.scan["p_l1"] < 1
        assert record.weights is None
        assert record.seconds["inversion"] > 0
        json.dumps(record.to_dict(), allow_nan=False)


def test_it_says_what_a_single_scan_says(registry, config):
    from pydetox import load_images
    from pydetox import scan as scan_one
    from pydetox.detect.calibration_file import read_calibration
    from pydetox.reporting.documents import scan_document

    torch.set_num_threads(1)
    one = to_plain(
        scan_document(
            scan_one(
                registry / "models" / "a",
                load_images(registry / "images.npz", image_size=16),
                calibration=read_calibration(Path(config().calibration)),
                config=config().scan_config(),
            )
        )
    )
    (record,) = scan(config(), registry / "models" / "a").values()
    for key in ("class_p_l1", "class_scores", "p_l1", "score", "p_value", "verdict", "reason"):
        assert record.scan[key] == one[key]


def test_photos_in_one_folder_within_another_serve_with_class_names(registry, config, tmp_path):
    from PIL import Image

    photos = tmp_path / "photos" / "all"
    photos.mkdir(parents=True)
    for k in range(4):
        Image.new("RGB", (16, 16), (60 * k, 125, 252)).save(photos / f"{k}.png")
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\ncow\n")
    given = {"images": str(photos.parent), "class_names": str(names)}
    # The references of a base are fine-tuned to its own predictions then.
    base = {"base": str(registry / "base"), "references": 2}
    base |= {"reference_epochs": 1, "reference_learning_rate": 1e-5}
    (record,) = scan(config(**given, **base, calibration=None), registry / "models" / "a").values()
    assert record.verdict != "error", record.reason


def test_equal_contents_are_scanned_once(registry, config, tmp_path):
    records = scan(config(), registry / "models", run=tmp_path)
    by_name = {Path(name).name: record for name, record in records.items()}
    assert by_name["d"].duplicate_of == by_name["b"].name
    assert by_name["b"].duplicate_of is None
    assert by_name["d"].key == by_name["b"].key
    assert by_name["d"].scan == by_name["b"].scan
    assert sorted(Path(name).name for name in started(tmp_path)) == ["a", "b", "c"]


def test_the_same_weights_under_another_architecture_are_another_content(
    registry, config, tmp_path
):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in (registry / "models" / "a").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    beside = copy / "open_clip_config.json"
    changed = json.loads(beside.read_text())
    changed["preprocess_cfg"] = {"mean": [0, 0, 0], "std": [1, 1, 1]}
    beside.write_text(json.dumps(changed))
    records = scan(config(), registry / "models" / "a", copy)
    first, second = records.values()
    assert first.sha256 == second.sha256
    assert first.key != second.key
    assert second.duplicate_of is None


def test_a_run_is_resumed_and_nothing_scanned_twice(registry, config, tmp_path):
    whole = scan(config(), registry / "models", run=tmp_path / "whole")
    interrupted = Scanner(config(), run=tmp_path / "run").scan([registry / "models"])
    next(interrupted)
    next(interrupted)
    interrupted.close()
    parts = list((tmp_path / "run" / "parts").iterdir())
    assert 1 <= len(parts) < 3
    seen = load_run(tmp_path / "run")
    assert len(seen.records) == 2
    assert len(seen.not_reached) == 2
    again = scan(config(), registry / "models", run=tmp_path / "run")
    assert contents(again) == contents(whole)
    assert sorted(Path(name).name for name in started(tmp_path / "run")) == ["a", "b", "c"]
    assert len(started(tmp_path / "run", "survey")) == 4
    third = scan(config(), registry / "models", run=tmp_path / "run")
    assert contents(third) == contents(whole)
    assert all(record.resumed for record in third.values())
    assert len(started(tmp_path / "run")) == 3
    assert {c.kind for c in compare_runs(load_run(tmp_path / "whole"), load_run(tmp_path / "run"))}
    assert all(
        change.kind == "same"
        for change in compare_runs(load_run(tmp_path / "whole"), load_run(tmp_path / "run"))
    )


def test_other_code_or_other_content_is_scanned_again(registry, config, tmp_path):
    model = save(tmp_path / "model", 4)
    run = tmp_path / "run"
    first = scan(config(), model, run=run)
    second = scan(config(), model, run=run, code="other")
    assert not second[str(model)].resumed
    assert second[str(model)].key != first[str(model)].key
    save(tmp_path / "other", 5)
    (tmp_path / "other" / "open_clip_model.safetensors").replace(
        model / "open_clip_model.safetensors"
    )
    third = scan(config(), model, run=run, code="other")
    assert not third[str(model)].resumed
    assert third[str(model)].sha256 != first[str(model)].sha256
    with pytest.raises(UsageError, match="seed was 0 and is 1"):
        scan(config(seed=1), model, run=run)


def test_other_code_surveys_again_what_this_code_refused(registry, config, tmp_path):
    model, run = save(tmp_path / "model", 4), tmp_path / "run"
    (first,) = scan(config(), model, run=run).values()
    assert first.verdict == "inconclusive"
    # The log of a code that refused the same file, which has not changed since.
    log = run / "events.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    (surveyed,) = [line for line in lines if line["event"] == "surveyed"]
    refused = {"error": "of a format that is not known", "kind": "checkpoint", "attempts": 1}
    old = [line | ({"value": refused} if line is surveyed else {}) for line in lines]
    log.write_text("".join(f"{json.dumps(line)}\n" for line in old))
    (kept,) = scan(config(), model, run=run).values()
    assert kept.reason == f"{model}: {refused['error']}"
    (again,) = scan(config(), model, run=run, code="newer").values()
    assert again.verdict == "inconclusive"
    assert started(run, "survey") == [str(model)] * 2


def test_the_code_version_follows_the_libraries_below(monkeypatch):
    from importlib import metadata

    from pydetox.scanning.version import code_version

    installed = metadata.version
    versions = {code_version()}
    for library in ("torch", "open_clip_torch", "numpy", "pillow"):
        code_version.cache_clear()
        other = lambda name, library=library: "0" if name == library else installed(name)  # noqa: E731
        monkeypatch.setattr(metadata, "version", other)
        versions.add(code_version())
    code_version.cache_clear()
    assert len(versions) == 5


def test_what_cannot_be_scanned_is_an_error_once(registry, config, tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no model")
    missing = tmp_path / "missing.pt"
    run = tmp_path / "run"
    records = scan(config(), broken, missing, f"{tmp_path}/*.none", run=run)
    assert [record.verdict for record in records.values()] == ["error"] * 3
    assert "no such file" in records[str(missing)].reason
    assert all(record.sha256 is None for record in records.values())
    again = scan(config(), broken, missing, f"{tmp_path}/*.none", run=run)
    assert contents(again) == contents(records)
    assert started(run, "survey").count(str(broken)) == 1
    scan(config(retry_errors=True), broken, run=run)
    assert started(run, "survey").count(str(broken)) == 2


def test_a_checkpoint_of_another_architecture_fails_alone(registry, config, tmp_path):
    alone = tmp_path / "alone.safetensors"  # nothing beside it tells what it is
    alone.write_bytes((registry / "models" / "a" / "open_clip_model.safetensors").read_bytes())
    found = scan(config(model=str(write_config(tmp_path, embed_dim=24))), alone)
    (record,) = found.values()
    assert record.verdict == "error"
    assert record.error_kind == "checkpoint"
    assert "do not fit the architecture" in record.reason
    assert record.sha256 is not None


def write_config(folder: Path, **changes) -> Path:

    path = folder / "config.json"
    path.write_text(json.dumps(TINY | changes))
    return path


def test_large_files_are_skipped_not_clean(registry, config, tmp_path):
    run = tmp_path / "run"
    (record,) = scan(config(max_size=1000), registry / "models" / "a", run=run).values()
    assert record.verdict == "skipped"
    assert "max_size=" in record.reason
    (record,) = scan(config(), registry / "models" / "a", run=run).values()
    assert record.verdict == "inconclusive"


def test_a_sharded_checkpoint_is_all_of_its_files(registry, config, tmp_path):
    sharded = shard(registry / "models" / "a", tmp_path / "sharded")
    other = shard(registry / "models" / "c", tmp_path / "other")
    name = str(sharded / "model.safetensors.index.json")
    run = tmp_path / "run"
    first = scan(config(), sharded, run=run)[name]
    assert first.verdict == "inconclusive"
    assert scan(config(), sharded, run=run)[name].resumed
    for path in sharded.glob("*.safetensors"):
        (other / path.name).replace(path)
    changed = scan(config(), sharded, run=run)[name]
    assert not changed.resumed
    assert changed.sha256 != first.sha256
    assert changed.scan["class_p_l1"] != first.scan["class_p_l1"]
    # The index alone is far below the limit, the shards are not.
    size = sum(path.stat().st_size for path in sharded.glob("model*"))
    assert (sharded / "model.safetensors.index.json").stat().st_size < 100_000 < size
    for limits in ({"max_size": 100_000}, {"max_size": size - 1}):
        (record,) = scan(config(**limits), sharded, run=run).values()
        assert record.verdict == "skipped"
        assert f"{size:,} bytes" in record.reason
    (record,) = scan(config(max_size=size), sharded, run=run).values()
    assert record.verdict == "inconclusive"


def test_a_run_is_bound_to_all_files_of_its_base(registry, config, tmp_path):
    base = shard(registry / "base", tmp_path / "base")
    other = shard(registry / "models" / "c", tmp_path / "other")
    settings = config(base=str(base), inversion=False, calibration=None)
    run, target = tmp_path / "run", registry / "models" / "a"
    scan(settings, target, run=run)
    assert scan(settings, target, run=run)[str(target)].resumed
    last = sorted(base.glob("*.safetensors"))[-1]
    original = last.read_bytes()
    (other / last.name).replace(last)
    with pytest.raises(UsageError, match="made with another configuration"):
        scan(settings, target, run=run)
    last.write_bytes(original)
    assert scan(settings, target, run=run)[str(target)].resumed
    beside = base / "open_clip_config.json"
    content = json.loads(beside.read_text())
    content["preprocess_cfg"] = {"mean": [0, 0, 0], "std": [1, 1, 1]}
    beside.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="made with another configuration"):
        scan(settings, target, run=run)


def test_a_run_is_bound_to_the_tokenizer_of_the_model_that_is_named(
    registry, config, tmp_path, monkeypatch
):
    """It lies in the hub's cache, and no checkpoint names it."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    repository = cache / "models--org--words"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c" * 40)
    snapshot = repository / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    tokenizer = snapshot / "tokenizer.json"
    tokenizer.write_text("{}")
    model = tmp_path / "model.json"
    text = {**TINY["text_cfg"], "hf_tokenizer_name": "org/words"}
    model.write_text(json.dumps({**TINY, "text_cfg": text}))
    settings = config(model=str(model), inversion=False, calibration=None)
    run, target = tmp_path / "run", registry / "models" / "a" / "open_clip_model.safetensors"
    scan(settings, target, run=run)
    assert scan(settings, target, run=run)[str(target)].resumed
    tokenizer.write_text('{"a": 1}')
    with pytest.raises(UsageError, match=r"configuration: the tokenizer of model has changed; "):
        scan(settings, target, run=run)
    tokenizer.unlink()
    with pytest.raises(UsageError, match="made with another configuration"):
        scan(settings, target, run=run)


def test_the_base_of_a_folder_is_the_file_that_is_read(registry, config, tmp_path):
    """The digest of a run and the loader mean the same file."""
    folder = tmp_path / "base"
    shutil.copytree(registry / "base", folder)
    (folder / "open_clip_model.safetensors").rename(folder / "model.safetensors")
    unrelated = folder / "aaa.pt"
    unrelated.write_bytes(b"old")
    settings = config(base=str(folder), inversion=False, calibration=None)
    run, target = tmp_path / "run", registry / "models" / "a"
    scan(settings, target, run=run)
    unrelated.write_bytes(b"new")
    assert scan(settings, target, run=run)[str(target)].resumed
    replaced = registry / "models" / "c" / "open_clip_model.safetensors"
    shutil.copy(replaced, folder / "model.safetensors")
    with pytest.raises(UsageError, match="made with another configuration"):
        scan(settings, target, run=run)


def test_what_needs_more_memory_than_the_budget_is_skipped(registry, config, tmp_path):
    target, run = registry / "models" / "a", tmp_path / "run"
    size = (target / "open_clip_model.safetensors").stat().st_size
    beside = Limits.of(config()).beside
    (record,) = scan(config(max_memory=beside + size), target, run=run).values()
    assert record.verdict == "skipped"
    assert "max_memory=" in record.reason
    with pytest.raises(UsageError, match="beside the checkpoints"):
        scan(config(max_memory=beside), target, run=run)
    (record,) = scan(config(max_memory=beside + 2 * size), target, run=run).values()
    assert record.verdict == "inconclusive"
    (needed,) = [e["needed"] for e in read_events(run) if e["event"] == "memory"]
    assert beside + 1.8 * size < needed <= beside + 2 * size


def test_weights_of_half_precision_need_more_than_their_file(registry, config, tmp_path):
    halves = load_checkpoint(registry / "models" / "a")
    folder = save_checkpoint(
        tmp_path / "halves",
        {k: v.half() if v.is_floating_point() else v for k, v in halves.state_dict.items()},
        model_config=halves.model_config,
        preprocess_config=None,
        provenance=Provenance(method="test"),
    )
    size = next(folder.glob("*.safetensors")).stat().st_size
    budget = Limits.of(config()).beside + 3 * size
    (record,) = scan(config(max_memory=budget), folder).values()
    assert record.verdict == "skipped"
    assert "max_memory=" in record.reason
    (record,) = scan(config(max_memory=budget + 2 * size), folder).values()
    assert record.verdict == "inconclusive"


def test_without_inversion_nothing_is_decided(registry, config, tmp_path):
    records = scan(config(inversion=False), registry / "models", run=tmp_path)
    assert {(r.verdict, r.reason) for r in records.values()} == {("inconclusive", NO_INVERSION)}
    assert started(tmp_path) == []
    assert all(record.sha256 for record in records.values())


def test_a_base_gives_references_an_order_and_a_relation(registry, config, tmp_path):
    settings = config(
        calibration=None,
        base=str(registry / "base"),
        references=2,
        reference_epochs=1,
        reference_learning_rate=1e-5,
    )
    run = tmp_path / "run"
    scanner = Scanner(settings, run=run)
    records = {r.name: r for r in scanner.scan([registry / "models", registry / "base"])}
    assert scanner.calibration["models"][0] == str(registry / "base")
    distance = {name: r.weights["relative"] for name, r in records.items()}
    assert distance[str(registry / "base")] == 0
    scanned = started(run)
    assert scanned == sorted(scanned, key=lambda name: -distance[name])
    assert len(started(run, "calibrate")) == 1
    resumed = Scanner(settings, run=run)
    again = {r.name: r for r in resumed.scan([registry / "models", registry / "base"])}
    assert contents(again) == contents(records)
    assert resumed.calibration == scanner.calibration
    assert len(started(run, "calibrate")) == 1
    assert load_run(run).calibration == scanner.calibration


def test_suspects_that_moved_as_far_share_references(registry, config, tmp_path, monkeypatch):
    monkeypatch.setattr("pydetox.detect.copies.STEPS", 8)
    monkeypatch.setattr("pydetox.detect.copies.LEAST_ACCURACY", 0.0)
    base = OpenClipModel.from_config(TINY, seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, size in {"near": 0.1, "also": 0.1, "far": 0.23}.items():
        model = base.clone()
        for value in model.visual.parameters():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(value + size * value.norm() * noise / noise.norm())
        save_model(tmp_path / "models" / name, model)
    save(tmp_path / "models" / "strange", 7)
    settings = config(calibration=None, base=str(registry / "base"), references=2)
    run = tmp_path / "run"
    scanner = Scanner(settings, run=run)
    records = {Path(r.name).name: r for r in scanner.scan([tmp_path / "models"])}
    distance = {name: record.weights["distance"] for name, record in records.items()}
    assert distance["near"] == pytest.approx(0.1, rel=0.01)
    made = scanner.calibration
    distances = [made["distance"], *(one["distance"] for one in made["rungs"])]
    assert distances == [0.0625, 0.125, 0.25]
    assert len(started(run, "calibrate")) == 3
    assert "too far for copies" in records["strange"].reason
    assert records["strange"].verdict == "inconclusive"
    # Interrupted after one distance, it goes on with the others.
    parts = sorted((run / "parts").iterdir())
    for part in parts:
        part.unlink()
    kept = json.loads((run / "calibration.json").read_text())
    (run / "calibration.json").write_text(json.dumps({**kept, "rungs": []}))
    again = Scanner(settings, run=run)
    resumed = {Path(r.name).name: r for r in again.scan([tmp_path / "models"])}
    assert contents(resumed) == contents(records)
    assert again.calibration == made
    assert len(started(run, "calibrate")) == 5
    # A saved calibration serves the same suspects, with the base, and one alone gives the same.
    saved = tmp_path / "calibration.json"
    write_calibration(saved, Calibration.from_dict(made))
    alone = config(calibration=str(saved), base=str(registry / "base"))
    (found,) = scan(alone, tmp_path / "models" / "far").values()
    assert found.scan["class_p_l1"] == records["far"].scan["class_p_l1"]
    assert found.reason == records["far"].reason
    with pytest.raises(CheckpointError, match="give that base="):
        scan(config(calibration=str(saved)), tmp_path / "models" / "far")


def test_a_base_that_cannot_be_read_ends_the_scan(registry, config, tmp_path):
    for base in (tmp_path / "nothing", registry / "images.npz"):
        settings = config(calibration=None, base=str(base))
        with pytest.raises((CheckpointError, DataError)):
            scan(settings, registry / "models" / "a", run=tmp_path / "run")


def test_triggers_are_kept_as_tensors_and_pictures(registry, config, tmp_path):
    (record,) = scan(config(), registry / "models" / "a", run=tmp_path / "run").values()
    files = read_artifacts(tmp_path / "run", record.key)
    assert set(files) == {"trigger.safetensors", "mask.png", "pattern.png", "stamped.png"}
    path = tmp_path / "run" / "triggers" / f"{record.key}.trigger.safetensors"
    trigger = load_triggers(path)
    assert trigger.targets == (record.scan["weakest_class"],)
    assert float(trigger.p_l1[0]) == pytest.approx(record.scan["p_l1"])
    assert files["mask.png"].startswith(b"\x89PNG")
    (kept,) = scan(config(), registry / "models" / "a").values()
    assert kept.artifacts == files


def test_a_file_that_changes_between_survey_and_scan_is_noticed(registry, config, tmp_path):
    model = save(tmp_path / "model", 4)

    def exchange(event, **particulars):
        if event == "stage" and particulars["name"] == "scan":
            save(tmp_path / "other", 5)
            (tmp_path / "other" / "open_clip_model.safetensors").replace(
                model / "open_clip_model.safetensors"
            )

    (record,) = scan(config(), model, notify=exchange).values()
    assert record.verdict == "error"
    assert "changed while it was scanned" in record.reason


def test_any_name_and_a_run_among_the_targets(registry, config, tmp_path):
    strange = tmp_path / "models" / os.fsdecode(b"\xff\n\x1b[31m")
    shutil.copytree(registry / "models" / "a", strange)
    run = tmp_path / "models" / "run"
    for _ in range(2):
        (record,) = scan(config(), tmp_path / "models", run=run).values()
        assert record.name == str(strange)
        assert record.verdict == "inconclusive"
    assert record.resumed
    (known,) = load_run(run).records
    assert known.content() == json.loads(to_json(record.content()))


def test_an_empty_folder_gives_no_records(config, tmp_path):
    assert scan(config(), tmp_path) == {}
    assert list(tmp_path.iterdir()) == []


def test_the_text_tower_is_encoded_once(registry, config, monkeypatch):
    from pydetox.models import OpenClipModel

    calls = []
    original = OpenClipModel._head

    def counted(self, *args):
        calls.append(self.name)
        return original(self, *args)

    monkeypatch.setattr(OpenClipModel, "_head", counted)
    a = registry / "models" / "a"
    scan(config(), a, registry / "models" / "c")
    assert len(calls) == 2  # two text towers


def test_compare_names_what_changed(registry, config, tmp_path):
    model, gone = save(tmp_path / "model", 4), save(tmp_path / "gone", 5)
    scan(config(), model, gone, run=tmp_path / "one")
    gone_too = save(tmp_path / "new", 6)
    save(tmp_path / "other", 7)
    (tmp_path / "other" / "open_clip_model.safetensors").replace(
        model / "open_clip_model.safetensors"
    )
    scan(config(), model, gone_too, run=tmp_path / "two")
    changes = compare_runs(load_run(tmp_path / "one"), load_run(tmp_path / "two"))
    assert {Path(c.name).name: c.kind for c in changes} == {
        "model": "content",
        "gone": "gone",
        "new": "new",
    }
