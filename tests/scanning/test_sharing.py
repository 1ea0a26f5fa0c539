"""What a suspect costs beside its search: readings, hashes, and workers that share a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pydetox.errors import DeviceMemoryError
from pydetox.models.open_clip_model import OpenClipModel
from pydetox.scanning import worker
from pydetox.scanning.engines import local
from pydetox.scanning.memory import share_of_gpu
from pydetox.scanning.worker import Worker
from tests.scanning.conftest import MakeConfig, save, scan


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the checkpoints that workers of this process read, in order."""
    read, names = worker.read_checkpoint, list[str]()

    def counted(identity, **options):
        names.append(identity.reference)
        return read(identity, **options)

    monkeypatch.setattr(worker, "read_checkpoint", counted)
    return names


def test_a_single_suspect_is_read_and_hashed_once(
    config: MakeConfig, registry: Path, readings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = []
    digest = OpenClipModel._text_digest
    monkeypatch.setattr(
        OpenClipModel, "_text_digest", lambda model: hashed.append(model.device) or digest(model)
    )
    (record,) = scan(config(), registry / "models" / "a").values()
    assert record.verdict == "inconclusive"
    assert len(readings) == 1
    assert hashed == [torch.device("cpu")]


def test_of_several_suspects_the_last_one_surveyed_alone_is_kept(
    config: MakeConfig, registry: Path, readings: list[str]
) -> None:
    names = [registry / "models" / name for name in "abc"]
    scan(config(), *names)
    assert 5 <= len(readings) <= 6
    assert {readings.count(f"local-dir:{name}") for name in names} <= {1, 2}


def test_a_file_that_changed_after_its_survey_is_read_again(
    config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path / "a", 1)
    survey = Worker._survey

    def then_changed(self, task):
        result = survey(self, task)
        save_over(folder)
        return result

    def save_over(folder: Path) -> None:
        other = save(tmp_path / "other", 2)
        for path in other.iterdir():
            path.replace(folder / path.name)

    monkeypatch.setattr(Worker, "_survey", then_changed)
    (record,) = scan(config(), folder).values()
    assert record.verdict == "error"
    assert "changed while it was scanned" in str(record.reason)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        DeviceMemoryError(
            "b: out of memory on cuda:0 even with one at a time (...); expected more"
        ),
    ],
    ids=["torch's", "ours"],
)
def test_a_suspect_that_does_not_fit_is_an_error_and_the_scan_goes_on(
    config: MakeConfig, registry: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    search = worker.scan_session

    def too_large(session, *args, **options):
        if session.model.name.endswith("b"):
            raise error
        return search(session, *args, **options)

    monkeypatch.setattr(worker, "scan_session", too_large)
    found = scan(config(), *(registry / "models" / name for name in "abc"))
    verdicts = {Path(name).name: record.verdict for name, record in found.items()}
    assert verdicts == {"a": "inconclusive", "b": "error", "c": "inconclusive"}
    (failed,) = (record for name, record in found.items() if name.endswith("b"))
    assert "out of memory" in str(failed.reason)
    assert "\n" not in str(failed.reason)


def test_workers_that_share_a_gpu_get_equal_parts_of_its_memory(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert share_of_gpu(1, 1) == share_of_gpu(4, 4) == share_of_gpu(1, 2) == 1.0
    assert share_of_gpu(3, 1) == pytest.approx(0.3)
    assert share_of_gpu(3, 2) == pytest.approx(0.45)
    setups = []

    class Process:
        def __init__(self, number, setup):
            setups.append(setup)
            self.number, self.process = number, type("P", (), {"pid": 1})

    monkeypatch.setattr(local, "_Process", Process)
    engine = local.LocalEngine(
        config(), workers=3, threads=1, devices=["cuda:0"], notify=lambda *_, **__: None
    )
    engine._hire(3)
    assert [(one["device"], one["share"]) for one in setups] == [("cuda:0", 0.3)] * 3
    shares = []
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: shares.append(share)
    )
    Worker(config(), "cuda:0", share=0.3)
    Worker(config(), "cuda:0")
    Worker(config(), "cpu", share=0.3)
    assert shares == [0.3]
