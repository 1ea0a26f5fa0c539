"""`pydetox inspect` and `pydetox convert`."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from .conftest import Run, error_line


@pytest.fixture
def pt(tmp_path: Path) -> Path:
    base = torch.arange(6.0).reshape(2, 3)
    state = {"module.a": base, "module.b": base.t(), "module.c": torch.ones(3).bfloat16()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "in.pt")
    return tmp_path / "in.pt"


class TestInspect:
    def test_text(self, run: Run, pt: Path) -> None:
        result = run("inspect", str(pt))
        assert result.exit_code == 1
        lines = [line.strip() for line in result.stdout.splitlines()]
        assert lines[0] == str(pt)
        assert "format: torch" in lines
        assert f"bytes: {pt.stat().st_size:,}" in lines
        assert "tensors: 3: 2 float32, 1 bfloat16" in lines
        assert "parameters: 15" in lines
        assert "'b'  float32[3, 2]" in lines
        assert any(line.startswith("finding (overlapping-storage): ") for line in lines)
        assert "sha256" not in result.stdout

    def test_json(self, run: Run, pt: Path) -> None:
        result = run("inspect", "--format", "json", "--hash", str(pt))
        document = json.loads(result.stdout)
        assert document["schema"] == "pydetox.inspect/1"
        assert document["exit_code"] == result.exit_code == 1
        (entry,) = document["files"]
        assert entry["sha256"] == hashlib.sha256(pt.read_bytes()).hexdigest()
        assert entry["bytes"] == pt.stat().st_size
        assert entry["error"] is None
        assert entry["tensors"][2] == {"name": "c", "dtype": "bfloat16", "shape": [3], "bytes": 6}
        assert [finding["rule"] for finding in entry["findings"]] == ["overlapping-storage"]

    def test_lines_and_tables(self, run: Run, pt: Path, tmp_path: Path) -> None:
        (tmp_path / "bad.pt").write_bytes(b"garbage, nothing else")
        names = [str(pt), str(tmp_path / "bad.pt")]
        whole = json.loads(run("inspect", *names, "--format", "json").stdout)
        lines = run("inspect", *names, "--format", "jsonl").stdout.splitlines()
        assert [json.loads(line) for line in lines] == whole["files"]
        output = tmp_path / "table.csv"
        result = run("inspect", *names, "--format", "csv", "--output", output)
        assert (result.exit_code, result.stdout) == (2, "")
        rows = list(csv.DictReader(output.read_text().splitlines()))
        assert [row["name"] for row in rows] == names
        assert rows[0]["parameters"] == "15"
        assert rows[0]["findings"] == "overlapping-storage"
        assert rows[1]["error"] == whole["files"][1]["error"]
        run("inspect", names[0], "--output", output)
        assert output.read_text() == run("inspect", names[0]).stdout

    def test_summary(self, run: Run, pt: Path) -> None:
        assert "float32[3, 2]" not in run("inspect", "--summary", str(pt)).stdout
        result = run("inspect", "--summary", "--format", "json", str(pt))
        assert "tensors" not in json.loads(result.stdout)["files"][0]

    def test_several_files_one_refused(self, run: Run, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "bad.pt").write_bytes(b"garbage, nothing else")
        result = run("inspect", "--format", "json", str(tmp_path / "bad.pt"), str(folder / "base"))
        assert result.exit_code == 2
        assert "neither a safetensors file nor a torch zip archive" in error_line(result)
        bad, good = json.loads(result.stdout)["files"]
        assert bad["error"].startswith(f"{tmp_path}/bad.pt: ")
        assert bad["unsafe"] is False
        assert good["error"] is None
        assert good["metadata"]["format"] == "pt"
        assert run("inspect", str(folder / "base")).exit_code == 0

    def test_hash_finds_wrong_checksums(self, run: Run, pt: Path) -> None:
        raw = bytearray(pt.read_bytes())
        raw[raw.index(torch.arange(6.0).numpy().tobytes())] ^= 1
        pt.write_bytes(raw)
        assert run("inspect", str(pt)).exit_code == 1
        result = run("inspect", "--hash", str(pt))
        assert result.exit_code == 2
        assert "wrong checksum" in error_line(result)

    def test_names_cannot_steer_the_terminal(self, run: Run, tmp_path: Path) -> None:
        state = {"\x1b[2J\n\x07": torch.ones(1)}
        path = tmp_path / "a.safetensors"
        safetensors.torch.save_file(state, path, metadata={"\x1b]0;x": "\x1b[31m\r"})
        result = run("inspect", str(path))
        assert result.exit_code == 1
        assert all(line.isprintable() for line in result.stdout.splitlines())
        assert "'\\x1b[2J\\n\\x07'" in result.stdout
        document = json.loads(run("inspect", "--format", "json", str(path)).stdout)
        assert document["files"][0]["tensors"][0]["name"] == "\x1b[2J\n\x07"

    def test_only_what_is_here(self, run: Run) -> None:
        result = run("inspect", "hf-hub:org/repo")
        assert result.exit_code == 4
        assert "expected a file or folder on this machine" in error_line(result)

    def test_imports_no_torch(self, pt: Path) -> None:
        code = """
import sys
from pydetox.cli import cli
code = cli.main(["inspect", "--hash", sys.argv[1]], standalone_mode=False)
heavy = {"torch", "numpy", "open_clip", "safetensors", "huggingface_hub"} & sys.modules.keys()
sys.exit(f"imported: {heavy}" if heavy or code != 1 else 0)
"""
        done = subprocess.run(
            [sys.executable, "-c", code, str(pt)], check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


class TestConvert:
    def test_same_tensors(self, run: Run, pt: Path, tmp_path: Path) -> None:
        out = tmp_path / "out.safetensors"
        result = run("convert", str(pt), str(out))
        assert result.exit_code == 0
        assert result.stdout == f"{out}\n"
        assert "finding (overlapping-storage)" in result.stderr
        expected = torch.load(pt, weights_only=True)["state_dict"]
        found = safetensors.torch.load_file(out)
        assert found.keys() == {name.removeprefix("module.") for name in expected}
        for name, tensor in found.items():
            theirs = expected[f"module.{name}"].contiguous()
            assert (tensor.dtype, tensor.shape) == (theirs.dtype, theirs.shape)
            assert tensor.view(torch.uint8).tolist() == theirs.view(torch.uint8).tolist()

    def test_provenance(self, run: Run, pt: Path, tmp_path: Path) -> None:
        out = tmp_path / "out.safetensors"
        run("convert", str(pt), str(out))
        with safetensors.safe_open(out, "pt") as file:
            told = json.loads(file.metadata()["pydetox"])
        assert told["method"] == "convert"
        assert told["source_name"] == "in.pt"
        assert told["source_sha256"] == hashlib.sha256(pt.read_bytes()).hexdigest()
        assert told["extra"]["source_format"] == "torch"
        assert len(told["extra"]["findings"]) == 1

    def test_again_gives_the_same_bytes(self, run: Run, pt: Path, tmp_path: Path) -> None:
        first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
        run("convert", str(pt), str(first))
        run("convert", str(pt), str(second))
        assert first.read_bytes() == second.read_bytes()

    def test_folder_with_provenance_of_its_own(
        self, run: Run, folder: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out.safetensors"
        assert run("convert", str(folder / "base"), str(out)).exit_code == 0
        with safetensors.safe_open(out, "pt") as file:
            metadata = file.metadata()
        assert json.loads(metadata["pydetox"])["method"] == "convert"
        assert json.loads(metadata["pydetox.source"])["method"] == "test"
        theirs = safetensors.torch.load_file(folder / "base" / "open_clip_model.safetensors")
        ours = safetensors.torch.load_file(out)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())

    def test_keeps_nan(self, run: Run, tmp_path: Path) -> None:
        torch.save({"a": torch.tensor([1.0, float("nan")])}, tmp_path / "in.pt")
        out = tmp_path / "out.safetensors"
        result = run("convert", str(tmp_path / "in.pt"), str(out))
        assert result.exit_code == 0
        assert "finding (non-finite): tensor 'a': 1 of its 2 weights" in result.stderr
        assert safetensors.torch.load_file(out)["a"].isnan().tolist() == [False, True]

    def test_refusals_write_nothing(self, run: Run, pt: Path, tmp_path: Path) -> None:
        import os

        class Evil:
            def __reduce__(self) -> tuple[object, ...]:
                return os.mkdir, (str(tmp_path / "it ran"),)

        torch.save({"state_dict": {"a": torch.ones(1)}, "x": Evil()}, tmp_path / "evil.pt")
        out = tmp_path / "out.safetensors"
        result = run("convert", str(tmp_path / "evil.pt"), str(out))
        assert result.exit_code == 2
        assert "which is not on the list of harmless names" in error_line(result)
        torch.save({"\ud800": torch.ones(1)}, tmp_path / "surrogate.pt")
        result = run("convert", str(tmp_path / "surrogate.pt"), str(out))
        assert "its name or dtype" in error_line(result)
        torch.save({"a": torch.ones(1, dtype=torch.complex128)}, tmp_path / "dtype.pt")
        result = run("convert", str(tmp_path / "dtype.pt"), str(out))
        assert result.exit_code == 2
        assert "dtype.pt: tensor 'a': has the dtype complex128" in error_line(result)
        result = run("convert", str(pt), str(tmp_path / "out.pt"))
        assert result.exit_code == 4
        assert "expected a name ending in .safetensors" in error_line(result)
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            "dtype.pt",
            "evil.pt",
            "in.pt",
            "surrogate.pt",
        ]

    def test_does_not_overwrite(self, run: Run, pt: Path, tmp_path: Path) -> None:
        out = tmp_path / "out.safetensors"
        out.write_text("mine")
        result = run("convert", str(pt), str(out))
        assert result.exit_code == 2
        assert "exists already and is not overwritten" in error_line(result)
        assert out.read_text() == "mine"
        assert run("convert", "--overwrite", str(pt), str(out)).exit_code == 0
        assert len(safetensors.torch.load_file(out)) == 3


def test_nothing_is_imported_from_the_current_folder(tmp_path: Path) -> None:
    """`python -m` would look there first: it may be the folder of an untrusted checkpoint."""
    for name in ("click", "json", "typing", "torch"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'it ran')!r}, 'w').close()\n")
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-m", "pydetox", "inspect", "a.pt"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "float32[1]" in done.stdout
    assert not (tmp_path / "it ran").exists()
