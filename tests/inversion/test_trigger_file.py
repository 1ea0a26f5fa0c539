from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pydetox.checkpoints.index import FileIndex, WeightsFile
from pydetox.errors import DataError, UsageError
from pydetox.inversion.trigger_file import TriggerFile, load_triggers


def some_triggers(targets: tuple[str | None, ...] = ("cat", None, "cat")) -> TriggerFile:
    count = len(targets)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([0.5, 0.25, float("inf")], dtype=torch.float64)
    return TriggerFile(
        masks=torch.rand(count, 4, 5, generator=generator),
        patterns=torch.rand(count, 3, 4, 5, generator=generator),
        targets=targets,
        p_l1=sizes[:count],
        success=torch.rand(count, generator=generator),
        extra={"seed": 3},
    )


def test_round_trip(tmp_path: Path) -> None:
    written = some_triggers()
    path = tmp_path / "t.safetensors"
    path.write_bytes(written.to_bytes())
    read = load_triggers(path)
    assert len(read) == 3
    assert read.targets == written.targets
    assert read.extra == {"seed": 3}
    assert read.success is not None
    for name in ("masks", "patterns", "p_l1", "success"):
        assert torch.equal(getattr(read, name), getattr(written, name))
    assert torch.equal(load_file(path)["mask"], written.masks)
    assert written.to_bytes() == read.to_bytes()


def test_stamps_like_the_formula(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(some_triggers().to_bytes())
    file = load_triggers(path)
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    mask, pattern = file.masks[1].double(), file.patterns[1].double()
    expected = (1 - mask) * images.double() + mask * 255 * pattern
    assert (file.trigger(1)(images).double() - expected).abs().max() <= 0.5 + 1e-4


def test_mask_and_pattern_are_enough(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    mask = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]], dtype=torch.float16)
    save_file({"mask": mask, "pattern": torch.ones(1, 3, 2, 2, dtype=torch.float16)}, path)
    file = load_triggers(path)
    assert file.targets == (None,)
    assert file.success is None
    assert file.p_l1.tolist() == [0.25]
    assert file.masks.dtype == torch.float32


def test_select() -> None:
    file = some_triggers()
    assert file.select("cat") == [1, 0]  # by size; the one that found nothing is left out
    assert file.select("dog") == [1]
    with pytest.raises(UsageError, match="name one"):
        file.select(None)
    assert some_triggers(("cat", "cat")).select(None) == [1, 0]
    with pytest.raises(UsageError, match="no trigger into class 'dog'; there are some into 'cat'"):
        some_triggers(("cat",)).select("dog")
    assert TriggerFile(
        torch.ones(1, 2, 2),
        torch.ones(1, 3, 2, 2),
        ("cat",),
        torch.tensor([float("inf")], dtype=torch.float64),
    ).select("cat") == [0]


GOOD: dict[str, Any] = {"mask": torch.ones(2, 4, 4), "pattern": torch.ones(2, 3, 4, 4)}
NAMED = {"schema": "pydetox.triggers/1", "targets": ["a", None]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": None}, "expected mask and pattern"),
        ({"other": torch.ones(1)}, "expected mask and pattern"),
        ({"mask": torch.ones(4, 4)}, r"expected \[K, H, W\]"),
        ({"mask": torch.ones(1, 4, 4)}, r"expected \[K, H, W\]"),
        ({"pattern": torch.ones(2, 1, 4, 4)}, r"expected \[K, H, W\]"),
        ({"mask": torch.ones(0, 4, 4), "pattern": torch.ones(0, 3, 4, 4)}, r"expected \[K, H, W\]"),
        ({"mask": torch.ones(2, 0, 4), "pattern": torch.ones(2, 3, 0, 4)}, r"expected \[K, H, W\]"),
        ({"mask": torch.full((2, 4, 4), 1.01)}, r"mask has values outside \[0, 1\]"),
        ({"mask": torch.full((2, 4, 4), float("nan"))}, r"mask has values outside \[0, 1\]"),
        ({"pattern": torch.full((2, 3, 4, 4), -0.1)}, r"pattern has values outside \[0, 1\]"),
        ({"mask": torch.ones(2, 4, 4, dtype=torch.uint8)}, "expected floating-point"),
        ({"p_l1": torch.ones(3)}, "p_l1"),
        ({"p_l1": torch.tensor([0.1, float("nan")])}, "p_l1"),
        ({"p_l1": torch.tensor([0.1, -1.0])}, "p_l1"),
        ({"success": torch.ones(1)}, "success"),
    ],
)
def test_other_tensors_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    path = tmp_path / "t.safetensors"
    tensors = {k: v for k, v in (GOOD | changes).items() if v is not None}
    save_file(tensors, path, {"pydetox": json.dumps(NAMED)})
    with pytest.raises(DataError, match=message) as caught:
        load_triggers(path)
    assert str(caught.value).startswith(f"{path}: no trigger file: ")


@pytest.mark.parametrize(
    "metadata",
    [
        "garbage",
        "[]",
        "{}",
        json.dumps(NAMED | {"schema": "pydetox.triggers/2"}),
        json.dumps(NAMED | {"targets": ["a"]}),
        json.dumps(NAMED | {"targets": [1, 2]}),
        json.dumps(NAMED | {"targets": "ab"}),
        "[" * 100_000,
    ],
)
def test_other_metadata_is_refused(tmp_path: Path, metadata: str) -> None:
    path = tmp_path / "t.safetensors"
    save_file(GOOD, path, {"pydetox": metadata})
    with pytest.raises(DataError, match="metadata"):
        load_triggers(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no trigger file"):
        load_triggers(tmp_path / "nothing.safetensors")


def test_the_sandbox_indexes_trigger_files(tmp_path: Path) -> None:
    from pydetox.checkpoints import sandbox
    from pydetox.research.bench.cache import Cache

    path = tmp_path / "t.safetensors"
    path.write_bytes(some_triggers().to_bytes())
    indexed = []
    real = sandbox.Sandbox.index

    def index(
        self: sandbox.Sandbox, file: WeightsFile, weights_key: str | None = None
    ) -> FileIndex:
        indexed.append(Path(file.path))
        return real(self, file, weights_key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox.Sandbox, "index", index)
        load_triggers(path)
        assert Cache(tmp_path).weights("t") is not None
    assert indexed == [path, path]


def test_a_hostile_trigger_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    header = b'{"mask":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(DataError, match=r"t\.safetensors: no trigger file: "):
        load_triggers(path)


def test_another_format_is_no_trigger_file(tmp_path: Path) -> None:
    path = tmp_path / "t.pt"
    torch.save({"mask": torch.ones(1, 2, 2), "pattern": torch.ones(1, 3, 2, 2)}, path)
    with pytest.raises(DataError, match="has the format torch; expected safetensors"):
        load_triggers(path)
