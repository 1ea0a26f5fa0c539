"""Whole checkpoints in their files, against float64 and against the operators in memory."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pydetox.analysis import walking, weight_space
from pydetox.checkpoints import Provenance
from pydetox.checkpoints.mapped import MappedWeights
from pydetox.checkpoints.provenance import METADATA_KEY
from pydetox.errors import ArchitectureError, CheckpointError, OutputError, UsageError
from pydetox.ops import (
    reference,
    weight_diff_gram,
    weight_diff_project,
    weight_diff_sketch,
)
from pydetox.repair.task_vectors import TaskVector

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
#: Of several chunks, odd, one element, none, exactly a chunk, one more.
SHAPES = {
    "z.weight": (300, 701),
    "a.bias": (7,),
    "m.scale": (),
    "m.none": (0, 4),
    "k.even": (65536,),
    "b.odd": (65537,),
}
MIXED = (F32, BF16, F64, F16)


def weights(seed: int, dtypes: tuple[torch.dtype, ...] = (F32,)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: torch.randn(shape, generator=generator).to(dtypes[(i + seed) % len(dtypes)])
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    return state | {"batches": torch.tensor(seed)}


def floats(state: dict[str, Tensor]) -> list[Tensor]:
    return [state[name] for name in sorted(SHAPES)]


def exact(state: dict[str, Tensor]) -> np.ndarray:
    return np.concatenate([t.double().numpy().reshape(-1) for t in floats(state)])


@pytest.fixture
def threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Saved:
    """Models of mixed dtypes, in files of both formats."""

    def __init__(self, folder: Path, count: int, dtypes: tuple[torch.dtype, ...] = MIXED) -> None:
        self.states = [weights(i, dtypes) for i in range(count)]
        self.paths = []
        for i, state in enumerate(self.states):
            path = folder / f"{i}{'.pt' if i % 3 == 2 else '.safetensors'}"
            if path.suffix == ".pt":
                torch.save({"epoch": 3, "state_dict": state}, path)
            else:
                save_file(state, path)
            self.paths.append(path)

    @property
    def lists(self) -> list[list[Tensor]]:
        return [floats(state) for state in self.states]


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    return Saved(tmp_path, 5)


# ---- against float64 ----------------------------------------------------------------------------


def test_gram_and_cosine(saved: Saved) -> None:
    base, *models = (exact(state) for state in saved.states)
    differences = np.stack([model - base for model in models])
    expected = differences @ differences.T
    found = weight_space.gram(saved.paths[0], saved.paths[1:])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-7)
    norms = np.sqrt(np.diag(expected))
    found = weight_space.cosine(saved.paths[0], saved.paths[1:])
    np.testing.assert_allclose(found.numpy(), expected / np.outer(norms, norms), atol=1e-12)


def test_project(saved: Saved) -> None:
    base, model, *directions = (exact(state) for state in saved.states)
    found = weight_space.project(saved.paths[0], saved.paths[1], saved.paths[2:])
    expected = np.stack(directions) @ (model - base)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-8)


def test_sketch(saved: Saved) -> None:
    found = weight_space.sketch(saved.paths[0], saved.paths[1], seed=4, size=256)
    start, end = saved.lists[:2]
    expected = reference.weight_diff_sketch(start, end, sorted(SHAPES), seed=4, size=256)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_names_of_folders_and_no_models(saved: Saved, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(saved.states[1], folder / "open_clip_model.safetensors")
    by_name = weight_space.gram(saved.paths[0], [folder, f"local-dir:{folder}"])
    assert by_name.unique().numel() == 1
    assert weight_space.gram(saved.paths[0], []).shape == (0, 0)
    assert weight_space.project(saved.paths[0], saved.paths[1], []).shape == (0,)


# ---- the operators' bits, however files are cut -------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("memory", [1, 1_000_000, 3_000_000, weight_space.MEMORY])
def test_bits_depend_on_neither_memory_nor_threads(
    saved: Saved, memory: int, count: int, threads: object
) -> None:
    torch.set_num_threads(count)
    base, *models = saved.paths
    lists = saved.lists
    assert torch.equal(
        weight_space.gram(base, models, memory=memory), weight_diff_gram(lists[0], lists[1:])
    )
    assert torch.equal(
        weight_space.project(base, models[0], models[1:], memory=memory),
        weight_diff_project(lists[0], lists[1], lists[2:]),
    )
    for size in (64, 4096):
        assert torch.equal(
            weight_space.sketch(base, models[0], seed=9, size=size, memory=memory),
            weight_diff_sketch(lists[0], lists[1], sorted(SHAPES), seed=9, size=size),
        )


def test_more_files_than_are_kept_open(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walking, "KEPT_OPEN", 2)
    opened: list[MappedWeights] = []
    most = 0

    class Counted(MappedWeights):
        def __init__(self, *arguments: object, **options: object) -> None:
            nonlocal most
            super().__init__(*arguments, **options)  # type: ignore[arg-type]
            opened.append(self)
            most = max(most, sum(o._file.descriptor >= 0 for o in opened))

    monkeypatch.setattr(walking, "MappedWeights", Counted)
    base, *models = saved.paths * 2
    lists = saved.lists * 2
    found = weight_space.gram(base, models, memory=1)
    assert torch.equal(found, weight_diff_gram(lists[0], lists[1:]))
    assert most == 3  # the base, and two at a time


def test_steps_hold_what_they_may_and_everything_once() -> None:
    counts, width = {"a": 1000, "b": 3, "c": 0, "d": 64, "e": 129}, dict.fromkeys("abcde", 8)
    for memory in (1, 64 * 8 + 100, 2000, 10**6):
        seen: dict[str, int] = {}
        for step in walking.steps(counts, width, 64, 100, memory):
            cost = sum(p.count * 8 + -(-p.count // 64) * 100 for p in step)
            assert cost <= max(memory, 64 * 8 + 100)
            for part in step:
                assert part.first == seen.get(part.name, 0)
                assert part.first % 64 == 0
                seen[part.name] = part.first + part.count
        assert seen == {name: count for name, count in counts.items() if count}


# ---- formats ------------------------------------------------------------------------------------


def test_tensors_that_are_stored_in_another_order(tmp_path: Path) -> None:
    whole = torch.randn(40, 30)
    state = {"t": whole.T, "part": whole[3:9, 2:7], "spread": whole[0].expand(4, 30), "w": whole}
    torch.save(state, tmp_path / "views.pt")
    save_file({k: torch.zeros(v.shape) for k, v in state.items()}, tmp_path / "0.safetensors")
    with MappedWeights(tmp_path / "views.pt") as mapped:
        for name, tensor in state.items():
            assert torch.equal(mapped.tensor(name), tensor)
            flat = tensor.reshape(-1)
            assert torch.equal(mapped.elements(name, 5, 11), flat[5:16])
    found = weight_space.gram(tmp_path / "0.safetensors", [tmp_path / "views.pt"])
    expected = sum(float(t.double().square().sum()) for t in state.values())
    assert float(found) == pytest.approx(expected)


def test_tensors_at_odd_addresses(tmp_path: Path) -> None:
    values = torch.randn(1001)
    header = b'{"x":{"dtype":"F32","shape":[1001],"data_offsets":[0,4004]}}'
    header += b" " * (1 - len(header) % 2)  # of odd length
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + values.numpy().tobytes())
    save_file({"x": torch.zeros(1001)}, tmp_path / "zero.safetensors")
    found = weight_space.gram(tmp_path / "zero.safetensors", [path])
    assert torch.equal(found, weight_diff_gram([torch.zeros(1001)], [[values]]))


def test_a_damaged_record_of_a_torch_file(saved: Saved) -> None:
    path = saved.paths[2]
    raw = bytearray(path.read_bytes())
    at = raw.index(saved.states[2]["b.odd"].view(torch.uint8).numpy().tobytes()[:64])
    raw[at + 1000] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"2\.pt: is damaged.*wrong checksum"):
        weight_space.gram(saved.paths[0], [path])


def test_a_truncated_file(saved: Saved) -> None:
    os.truncate(saved.paths[1], saved.paths[1].stat().st_size - 1)
    with pytest.raises(CheckpointError, match="truncated"):
        weight_space.gram(saved.paths[0], [saved.paths[1]])


# ---- files that change while they are read ------------------------------------------------------


def rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\1" * 8)


def index_rewritten(path: Path) -> None:
    before = path.stat()
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"b.odd", b"b.add"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [rewrite, index_rewritten, lambda path: os.truncate(path, 5000)],
    ids=["rewritten", "another index and an old date", "shrunk"],
)
def test_a_file_that_changes_is_an_error(
    change: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = Saved(tmp_path, 2)
    calls = 0

    def gram(*arguments: object, **options: object) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            change(saved.paths[1])
        return weight_diff_gram(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(weight_space, "weight_diff_gram", gram)
    with pytest.raises(CheckpointError, match=r"1\.safetensors: changed while it was read"):
        weight_space.gram(saved.paths[0], [saved.paths[1]], memory=1)
    assert calls > 2


def test_a_file_that_is_another_one_in_the_next_pass(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walking, "KEPT_OPEN", 1)

    def gram(*arguments: object, **options: object) -> Tensor:
        other = saved.paths[1].with_suffix(".new")
        save_file(saved.states[3], other)
        other.replace(saved.paths[1])
        return weight_diff_gram(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(weight_space, "weight_diff_gram", gram)
    with pytest.raises(CheckpointError, match=r"1\.safetensors: changed while it was read"):
        weight_space.gram(saved.paths[0], saved.paths[1:], memory=1)


PROGRAM = """
import mmap, os, sys, torch
from pydetox.checkpoints.mapped import MappedWeights
from pydetox.errors import CheckpointError
path, how = sys.argv[1:]
mapped = MappedWeights(path)
values = mapped.elements("b.odd", 0, 65537)
with open(path, "rb") as file:
    foreign = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
os.truncate(path, 100)
if how == "foreign":
    foreign[-1]
if how == "sent":
    os.kill(os.getpid(), 7)
assert float(values.double().abs().sum()) == 0
try:
    mapped.check()
except CheckpointError as error:
    print("survived:", error)
"""


@pytest.mark.parametrize("how", ["ours", "foreign", "sent"])
def test_a_file_that_shrinks_under_a_mapping(saved: Saved, how: str) -> None:
    assert signal.SIGBUS == 7
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, os.fspath(saved.paths[0]), how],
        capture_output=True,
        text=True,
        check=False,
    )
    if how == "ours":
        assert result.returncode == 0, result.stderr
        assert "changed while it was read" in result.stdout
    else:  # as without pydetox
        assert result.returncode == -signal.SIGBUS


# ---- what does not fit together -----------------------------------------------------------------


def test_different_tensors_are_named(saved: Saved, tmp_path: Path) -> None:
    other = dict(saved.states[1])
    other["extra"] = torch.zeros(3)
    other["a.bias"] = torch.zeros(8)
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(ArchitectureError, match=r"other\.safetensors.*extra.*a\.bias.*\[8\]"):
        weight_space.gram(saved.paths[0], [tmp_path / "other.safetensors"])


def test_other_dtypes(tmp_path: Path) -> None:
    for name, tensor in {
        "wide": torch.zeros(3),
        "narrow": torch.zeros(3).to(torch.float8_e4m3fn),
        "integer": torch.zeros(3, dtype=torch.int32),
    }.items():
        save_file({"x": tensor}, tmp_path / f"{name}.safetensors")
    for name, found in {"narrow": "float8_e4m3fn", "integer": "int32"}.items():
        with pytest.raises(ArchitectureError, match=f"'x' is {found}, expected float16"):
            weight_space.gram(tmp_path / "wide.safetensors", [tmp_path / f"{name}.safetensors"])
    with pytest.raises(ArchitectureError, match="no floating-point weights"):
        weight_space.gram(tmp_path / "integer.safetensors", [])


def test_the_cosine_with_the_base_itself(saved: Saved) -> None:
    with pytest.raises(UsageError, match=r"0\.safetensors: has the weights of the base"):
        weight_space.cosine(saved.paths[0], [saved.paths[1], saved.paths[0]])


def test_wrong_size_of_a_sketch(saved: Saved) -> None:
    with pytest.raises(UsageError, match="power of two"):
        weight_space.sketch(saved.paths[0], saved.paths[1], seed=0, size=100)


# ---- writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [1, weight_space.MEMORY])
def test_apply(saved: Saved, tmp_path: Path, memory: int) -> None:
    path = tmp_path / "merged.safetensors"
    base, *models = saved.states
    factors = [0.5, -0.25, 0.125, 1.0]
    assert weight_space.apply(saved.paths[0], saved.paths[1:], factors, path, memory=memory) == path
    found = load_file(path)
    assert found.keys() == base.keys()
    assert torch.equal(found["batches"], base["batches"])
    for name in SHAPES:
        start = base[name].double()
        expected = start + sum(
            f * (m[name].double() - start) for f, m in zip(factors, models, strict=True)
        )
        assert found[name].dtype == base[name].dtype
        tolerance = torch.finfo(base[name].dtype).eps
        torch.testing.assert_close(found[name].double(), expected, rtol=tolerance, atol=1e-12)
    with MappedWeights(path) as mapped:
        made = Provenance.from_json(mapped._index.metadata[METADATA_KEY])
    assert made.source_name == os.fspath(saved.paths[0])
    assert made.extra["coefficients"] == factors


def test_one_model_whole_is_that_model(tmp_path: Path) -> None:
    saved = Saved(tmp_path, 2, (F32,))
    path = weight_space.apply(saved.paths[0], [saved.paths[1]], [1.0], tmp_path / "m.safetensors")
    found = load_file(path)
    assert all(torch.equal(found[name], saved.states[1][name]) for name in SHAPES)


def test_nothing_half_written(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "merged.safetensors"
    base, model = saved.paths[:2]
    for factors in ([], [1.0, 2.0], [float("nan")]):
        with pytest.raises(UsageError, match="coefficients must be 1 finite"):
            weight_space.apply(base, [model], factors, path)
    with pytest.raises(UsageError, match=r"ending in \.safetensors"):
        weight_space.apply(base, [model], [1.0], tmp_path / "merged.pt")
    with pytest.raises(OutputError, match="exists already"):
        weight_space.apply(base, [model], [1.0], model)

    def change(*arguments: object) -> list[list[Tensor]]:
        rewrite(model)
        return [[tensor.clone() for tensor in arguments[0]]]  # type: ignore[attr-defined]

    monkeypatch.setattr(weight_space, "apply_task_vectors", change)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        weight_space.apply(base, [model], [1.0], path)
    assert not [entry for entry in tmp_path.iterdir() if "merged" in entry.name]


# ---- memory -------------------------------------------------------------------------------------

MEMORY_PROGRAM = """
import re, sys
from pathlib import Path
import torch
from pydetox.analysis import weight_space as ws
torch.set_num_threads(2)
def kibibytes(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
base, model, *others = sys.argv[1:]
memory = 4 << 20
runs = [
    lambda: ws.gram(base, [model, *others], memory=memory),
    lambda: ws.project(base, model, others, memory=memory),
    lambda: ws.sketch(base, model, seed=0, memory=memory),
    lambda: ws.apply(base, [model, *others], [1.0] * (1 + len(others)),
                     Path(base).with_name("out.safetensors"), memory=memory),
]
ws.gram(base, [base], memory=memory)  # what is loaded at the first use
for run in runs:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident
    before = kibibytes("VmRSS")
    run()
    print((kibibytes("VmHWM") - before) / 1024)
"""


def test_memory_does_not_depend_on_the_number_or_size_of_files(tmp_path: Path) -> None:
    """The peak, mapped pages included, stays near the budget: files of 24 MiB, 4 MiB to hold."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs Linux's /proc/self/clear_refs")
    for i in range(8):
        state = {f"layer{j}": torch.full((1536, 1024), float(i + j)) for j in range(4)}
        save_file(state, tmp_path / f"{i}.safetensors")
    result = subprocess.run(
        [sys.executable, "-c", MEMORY_PROGRAM, *map(str, sorted(tmp_path.iterdir()))],
        capture_output=True,
        text=True,
        check=True,
    )
    peaks = [float(line) for line in re.findall(r"[\d.]+", result.stdout)]
    assert len(peaks) == 4
    assert max(peaks) < 4 + 8, peaks


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_no_cosine_of_a_model_that_is_not_finite(tmp_path: Path, odd: float) -> None:
    for name, value in {"base": 0.0, "model": 1.0, "odd": odd}.items():
        save_file({"w": torch.tensor([value, 2.0])}, tmp_path / f"{name}.safetensors")
    base, model, broken = (tmp_path / f"{n}.safetensors" for n in ("base", "model", "odd"))
    with pytest.raises(CheckpointError, match=re.escape(f"{broken}: its difference to the base")):
        weight_space.cosine(base, [model, broken])
    with pytest.raises(CheckpointError, match="NaN, infinite or far too large"):
        weight_space.cosine(broken, [base])


@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_sums_that_do_not_fit_are_not_written(tmp_path: Path, dtype: torch.dtype) -> None:
    base, model, out = (tmp_path / f"{n}.safetensors" for n in ("base", "model", "out"))
    save_file({"a": torch.ones(3).to(dtype), "w": torch.ones(5).to(dtype)}, base)
    most = torch.finfo(dtype).max
    save_file({"a": torch.ones(3), "w": torch.tensor([1, 1, most, 1, most])}, model)
    kind = str(dtype).removeprefix("torch.")
    message = f"base.safetensors: tensor 'w': 2 of its weights would be NaN or infinite in {kind}"
    with pytest.raises(CheckpointError, match=message):
        weight_space.apply(base, [model], [2.0], out)
    assert {path.name for path in tmp_path.iterdir()} == {base.name, model.name}
    weight_space.apply(base, [model], [0.5], out)
    assert all(tensor.isfinite().all() for tensor in load_file(out).values())


def test_a_file_of_which_loaders_take_other_weights(tmp_path: Path) -> None:
    base, two = tmp_path / "base.safetensors", tmp_path / "two.pt"
    save_file({"w": torch.ones(3)}, base)
    torch.save({"model": {"w": torch.ones(3)}, "model_ema": {"w": torch.zeros(3)}}, two)
    for call in (
        lambda: weight_space.gram(base, [two]),
        lambda: weight_space.apply(base, [two], [1.0], tmp_path / "out.safetensors"),
        lambda: TaskVector.from_checkpoints(base, two),
    ):
        with pytest.raises(CheckpointError, match=r"two\.pt: holds several sets .*pydetox convert"):
            call()
    assert not (tmp_path / "out.safetensors").exists()
