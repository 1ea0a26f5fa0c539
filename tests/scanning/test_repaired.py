"""A repaired model is scanned beside the model before its repair, and only if the user names it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pydetox.checkpoints import Provenance, load_checkpoint, save_checkpoint
from pydetox.detect import rescan
from pydetox.models import OpenClipModel
from pydetox.scanning import ScanRecord
from tests.cli.conftest import TINY
from tests.mini import judge_one_class

from .conftest import MakeConfig, calibration, scan


@pytest.fixture
def repaired(registry: Path, tmp_path: Path) -> Path:
    """A model whose file says that it is a repair of `models/a`; it has the weights of c."""
    source = load_checkpoint(registry / "models/a")
    made = Provenance(method="TBAR", source_name="a", source_sha256=source.sha256)
    model = OpenClipModel.from_config(TINY, seed=3)
    return save_checkpoint(
        tmp_path / "repaired",
        model.storage_state_dict(),
        model_config=TINY,
        preprocess_config=None,
        provenance=made,
    )


@pytest.fixture
def judge(
    registry: Path, tmp_path: Path, config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> object:
    """Scan a model beside references that are larger than all its triggers, or smaller."""
    judge_one_class(monkeypatch)

    def judge(target: Path, size: float, **changes: object) -> ScanRecord:
        given = str(calibration(tmp_path, registry / "images.npz", 3, size))
        (record,) = scan(config(calibration=given, **changes), target).values()
        return record

    return judge


def test_a_flagged_repair_says_what_it_should_be_judged_beside(repaired, registry, judge):
    (warning,) = [w for w in judge(repaired, 0.9).scan["warnings"] if "says that it is" in w]
    assert "a repair of a." in warning
    assert "(before=)" in warning
    # The same weights without such a record, and a clean verdict, need no hint.
    for record in (judge(registry / "models/c", 0.9), judge(repaired, 1e-4)):
        assert not [w for w in record.scan["warnings"] if "repair" in w]


def test_what_a_file_says_decides_nothing(repaired, registry, judge):
    """Fault that this rules out: a backdoored file that says what its repair has cleared."""
    alone, plain = judge(repaired, 0.9), judge(registry / "models/c", 0.9)
    assert alone.verdict == plain.verdict == "backdoored"
    assert alone.scan["p_value"] == plain.scan["p_value"]
    assert alone.scan["cleared"] == []


def test_the_scan_beside_the_model_before_is_the_rescan_of_a_repair(
    repaired, registry, judge, monkeypatch
):
    asked = []

    class Recorded(rescan.Rescans):
        def scan(self, session, config, **options):
            asked.append((self._before.name, session.model.name, config.seed))
            return super().scan(session, config, **options)

    monkeypatch.setattr(rescan, "Rescans", Recorded)
    before = registry / "models/a"
    record = judge(repaired, 0.9, before=str(before))
    ((first, second, seed),) = asked
    assert (Path(first), second) == (before, f"local-dir:{repaired}")
    assert seed != 0
    # Both models answer with one class; the references make it a finding in both.
    assert record.scan["warnings"] == []


def test_a_model_before_that_is_clean_clears_nothing(repaired, registry, judge, monkeypatch):
    """Fault that this rules out: the base, named as the model before, would clear every class."""

    def refuse(*arguments, **options):
        raise AssertionError("judged beside a clean model")

    monkeypatch.setattr(rescan, "Rescans", refuse)
    record = judge(repaired, 1e-4, before=str(registry / "models/a"))
    (warning,) = record.scan["warnings"]
    assert "is clean in this scan and clears no class" in warning
    assert record.scan["cleared"] == []


def test_a_model_that_was_not_repaired_from_it_is_named(registry, judge):
    record = judge(registry / "models/b", 0.9, before=str(registry / "models/a"))
    assert any("does not say that it is a repair of" in w for w in record.scan["warnings"])
