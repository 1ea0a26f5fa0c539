"""Mutated ``.pt`` files: an error of ours or the same tensors as torch reads, nothing else."""

from __future__ import annotations

import io
import random
import warnings
from pathlib import Path

import pytest
import torch

from pydetox.checkpoints.index import WeightsFile
from pydetox.checkpoints.pickle_index import read_pickle
from pydetox.checkpoints.weights import index_file, read_weights
from pydetox.errors import CheckpointError


def mutate(raw: bytes, generator: random.Random) -> bytes:
    """Change, delete or repeat a few bytes, or cut the file."""
    mutated = bytearray(raw)
    for _ in range(generator.choice((1, 1, 2, 4))):
        at = generator.randrange(len(mutated))
        length = generator.choice((1, 1, 2, 4, 16))
        action = generator.randrange(5)
        if action <= 1:
            mutated[at] = generator.randrange(256)
        elif action == 2:
            mutated[at] ^= 1 << generator.randrange(8)
        elif action == 3:
            del mutated[at : at + length]
        else:
            mutated[at:at] = mutated[at : at + length]
    return bytes(
        mutated[: generator.randrange(1, len(mutated))] if generator.random() < 0.05 else mutated
    )


def example() -> dict[str, object]:
    base = torch.arange(6.0).reshape(2, 3)
    state = {
        "module.a": base,
        "module.b": base.t(),
        "module.c": torch.tensor([1, 2], dtype=torch.int16),
    }
    return {"epoch": 3, "state_dict": state, "lr": 0.1, "list": [1, None, (True, 2**40)]}


def one_line(error: CheckpointError) -> None:
    assert str(error).isprintable()


def read(path: Path) -> dict[str, torch.Tensor] | None:
    """The tensors, or ``None`` when the file is refused."""
    try:
        with WeightsFile(path) as file:
            return read_weights(file, index_file(file))[0]
    except CheckpointError as error:
        one_line(error)
        return None


def test_mutated_files_agree_with_torch(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(example(), buffer)
    path = tmp_path / "a.pt"
    generator = random.Random(0)
    refused = 0
    for _ in range(1500):
        mutated = mutate(buffer.getvalue(), generator)
        path.write_bytes(mutated)
        found = read(path)
        if found is None:
            refused += 1
            continue
        expected = torch.load(io.BytesIO(mutated), weights_only=True)["state_dict"]
        assert found.keys() == {name.removeprefix("module.") for name in expected}
        assert all(
            torch.equal(found[name.removeprefix("module.")], t) for name, t in expected.items()
        )
    assert 750 < refused < 1500  # both branches were taken


def test_mutated_pickles(write_pt, make_members) -> None:  # type: ignore[no-untyped-def]
    """Mutations inside the pickle, with checksums that fit: the checks behind them are tested."""
    import zipfile

    buffer = io.BytesIO()
    torch.save(example(), buffer)
    with zipfile.ZipFile(buffer) as archive:
        pickle_bytes = archive.read("archive/data.pkl")
        storages = {key: archive.read(f"archive/data/{key}") for key in ("0", "1")}
    generator = random.Random(1)
    accepted = 0
    for _ in range(1000):
        path = write_pt(mutate(pickle_bytes, generator), storages)
        found = read(path)
        if found is None:
            continue
        accepted += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                expected = torch.load(path, weights_only=True)
            except Exception:  # noqa: BLE001
                continue  # torch builds the rest of the checkpoint too; we only look at the weights
        weights = expected.get("state_dict", expected)
        prefixed = all(name.startswith("module.") for name in weights)
        for name, tensor in weights.items():
            assert torch.equal(found[name.removeprefix("module.") if prefixed else name], tensor)
    assert accepted > 30


@pytest.mark.parametrize("seed", range(4))
def test_random_instructions(seed: int) -> None:
    """Random programs of valid instructions: an inert result or an error of ours."""
    generator = random.Random(seed)
    codes = b"()]}Nu\x85\x86\x87taesbR\x81Qq\0h\0K\1X\1\0\0\0ac"
    names = [
        b"ccollections\nOrderedDict\n",
        b"ctorch\nFloatStorage\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
    ]
    for _ in range(3000):
        parts = [
            generator.choice(names)
            if generator.random() < 0.2
            else bytes([generator.choice(codes)])
            for _ in range(generator.randrange(1, 40))
        ]
        try:
            read_pickle(b"\x80\x02" + b"".join(parts) + b".")
        except CheckpointError as error:
            one_line(error)
