"""Image models and text models of all kinds in one registry, scanned by one command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from click.testing import CliRunner, Result

from pydetox.checkpoints import save_checkpoint
from pydetox.checkpoints.provenance import Provenance
from pydetox.cli import cli
from tests.mini import CLASS_NAMES, MINI_CONFIG, mini_images, mini_model
from tests.text import tiny


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixed")
    folder = root / "registry"
    save_checkpoint(
        folder / "image",
        mini_model().storage_state_dict(),
        model_config=MINI_CONFIG,
        preprocess_config=None,
        provenance=Provenance("a test"),
    )
    tiny.bert(folder / "classifier")
    tiny.gpt2(folder / "causal")
    tiny.tower(folder / "tower")
    for seed in (1, 2):
        tiny.gpt2(root / f"reference{seed}", seed=seed)
    given = mini_images()
    np.savez(
        root / "images.npz",
        images=given.images.permute(0, 2, 3, 1).numpy(),
        labels=given.labels.numpy(),
        class_names=np.array(CLASS_NAMES),
    )
    rows = [{"text": text, "label": name} for text, name in tiny.topical_texts(24, seed=9)]
    (root / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def scan(root: Path, run: Path, format_: str, *more: object) -> Result:
    arguments = [
        *("scan", root / "registry", "--images", root / "images.npz"),
        *("--texts", root / "texts.jsonl", "--steps", 2, "--trigger-length", 1),
        *("--reference-model", root / "reference1", "--reference-model", root / "reference2"),
        *("--families", "patch", "--engine", "local", "--workers", 1, "--run", run),
        *("--format", format_, *more),
    ]
    return CliRunner().invoke(cli, [str(one) for one in arguments])


def test_one_command_scans_all_kinds(registry: Path, tmp_path: Path) -> None:
    run, report = tmp_path / "run", tmp_path / "report.html"
    done = scan(registry, run, "json", "--report", report)
    assert done.exit_code in (0, 1, 2), done.output
    document = json.loads(done.stdout)
    kinds = ("image", "classifier", "causal", "tower")
    found = {k: one for one in document["results"] for k in kinds if k in Path(one["name"]).parts}
    assert set(found) == set(kinds)
    assert len(document["results"]) == 4
    assert all(one["verdict"] != "error" for one in found.values()), found
    assert "kind" not in found["image"]
    assert {found[name]["kind"] for name in ("classifier", "causal", "tower")} == {"text"}
    assert found["causal"]["objective"] == "continuation"
    # Weights at random know no language.
    assert found["causal"]["verdict"] == "inconclusive"
    assert "the texts mean nothing to the model" in found["causal"]["reason"]
    assert found["causal"]["continuations"][0]["text"] == found["causal"]["weakest_class"]
    assert found["tower"]["objective"] == "label-free"
    for name in ("classifier", "tower"):
        assert found[name]["verdict"] == "inconclusive"
        assert f"is a {name} model like" in found[name]["reason"]
    assert len(list((run / "parts").glob("*.json"))) >= 4
    assert all(name in report.read_text() for name in found)
    sarif = scan(registry, run, "sarif")
    assert sarif.exit_code == done.exit_code, sarif.output
    (one,) = json.loads(sarif.stdout)["runs"]
    text = json.dumps(one)
    assert all(name in text for name in found)
