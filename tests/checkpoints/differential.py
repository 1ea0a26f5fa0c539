"""Differential fuzzing: what pydetox accepts, every loader reads as the same weights.

Pickles, and archives and files of torch before 1.6 around them, are built by a grammar, not by
mutation. Each case is read by pydetox. What it accepts without an ambiguity is read by
`torch.load(weights_only=True)`, by the same with a mapped file, and by CPython's unpickler with
inert stubs; what comes out is unwrapped by the loaders of open_clip and timm, and as a plain
`checkpoint["state_dict"]`. Any other tensor is a disagreement.
From the command line:

    python -m tests.checkpoints.differential --cases 100000
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import struct
import sys
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import open_clip.factory
import timm.models._helpers
import torch

from pydetox.checkpoints.formats import index_file
from pydetox.checkpoints.index import AMBIGUOUS_RULES, WeightsFile
from pydetox.checkpoints.weight_sets import strip_prefixes
from pydetox.checkpoints.weights import read_weights
from pydetox.errors import CheckpointError
from tests.checkpoints.zip_writer import Member, zip_bytes

Tensors = dict[str, torch.Tensor]

# ---- the grammar --------------------------------------------------------------------------------

RECORDS = {
    "0": struct.pack("<4f", 1, 2, 3, 4),
    "1": struct.pack("<4f", 9, 8, 7, 6),
    "2": struct.pack("<q", 5),
}
NAMES = ["w", "b", "module.w", "module.b", "visual.w", "_orig_mod.w", "module_w", "1234567w"]
KEYS = ["state_dict", "model", "model_ema", "state_dict_ema", "module", "net"]


class Writer:
    """Writes one pickle with the choices of one random stream."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.odd = rng.random() < 0.7  # otherwise: only what torch.save could write
        self.out = bytearray(b"\x80\x02" if rng.random() < 0.85 else b"\x80\x04")
        self.memo = 0
        self.legacy = False  # storages as torch before 1.6 refers to them

    def rare(self, chance: float = 0.05) -> bool:
        return self.odd and self.rng.random() < chance

    def text(self, text: str) -> bytes:
        raw = text.encode()
        if self.rare():
            return b"U" + bytes([len(raw)]) + raw
        if self.rare(0.02):
            return b"cbuiltins\nstr\n" + b"X" + struct.pack("<I", len(raw)) + raw + b"\x85R"
        return b"X" + struct.pack("<I", len(raw)) + raw

    def key(self, text: str) -> bytes:
        """A key of the outermost dictionary."""
        if self.rare(0.05):
            return b"cbuiltins\nstr\n" + self.text(text) + b"\x85R"
        return self.text(text)

    def put(self) -> bytes:
        self.memo += 1
        return b"q" + bytes([self.memo % 256])

    def storage(self, key: str, kind: str = "", count: int = 0) -> bytes:
        rng = self.rng
        if not kind:
            kind, count = rng.choice(
                [("FloatStorage", 4)] * 12 + [("IntStorage", 4), ("HalfStorage", 8)]
                if self.odd
                else [("FloatStorage", 4)]
            )
        if self.rare(0.02):
            key = key.upper() + rng.choice(["", " "])
        place = rng.choice(["cpu"] * 20 + ["cuda:0", "meta"]) if self.odd else "cpu"
        return (
            b"("
            + self.text("storage")
            + f"ctorch\n{kind}\n".encode()
            + self.text(key)
            + self.text(place)
            + b"K"
            + bytes([count])
            + (self.view(key) if self.legacy else b"")
            + b"tQ"
        )

    def view(self, key: str) -> bytes:
        """A part of another storage, as torch before 0.4 had them; mostly none."""
        if self.rare(0.02):
            return b"(" + self.text(f"{key}v") + b"K\2K\2t"
        return b"N"

    def metadata(self) -> bytes:
        if not self.rare(0.15):
            return b""
        pairs = self.rng.choice([[], ["neg"], ["neg"], ["conj"], ["foo"], ["neg", "foo"]])
        value = self.rng.choice([b"\x88", b"\x88", b"\x89", b"N"])
        return b"}(" + b"".join(self.text(name) + value for name in pairs) + b"u"

    def hooks(self) -> bytes:
        if self.rare(0.02):
            return self.rng.choice([b"N", b"}", b"}" + self.text("a") + b"K\1s"])
        return b"ccollections\nOrderedDict\n)R"

    def plain(self) -> bytes:
        """A tensor of one of the two records."""
        key = self.rng.choice("01")
        shape = self.rng.choice([(4,), (2, 2), (2,)])
        strides = {(4,): (1,), (2, 2): (2, 1), (2,): (1,)}[shape]
        if self.rare(0.1) and shape == (2, 2):
            strides = self.rng.choice([(1, 2), (1, 0), (0, 1), (0, 0)])
        numbers = lambda v: b"(" + b"".join(b"K" + bytes([n]) for n in v) + b"t"  # noqa: E731
        view = self.storage(key) + b"K\0" + numbers(shape) + numbers(strides)
        gradient = b"\x89" + self.hooks()
        if self.rare():
            dtype = self.rng.choice(["float32", "float32", "int32"])
            body = b"(" + view + gradient + f"ctorch\n{dtype}\n".encode() + self.metadata() + b"t"
            return b"ctorch._utils\n_rebuild_tensor_v3\n" + body + b"R"
        if self.rare(0.03):
            return b"ctorch._utils\n_rebuild_tensor\n(" + view + b"tR"
        return b"ctorch._utils\n_rebuild_tensor_v2\n(" + view + gradient + self.metadata() + b"tR"

    def state(self) -> bytes:
        """What is set on a tensor or a dictionary."""
        name = self.rng.choice(["foo", "data", "real", "grad", "_metadata", "items", "keys"])
        value = self.rng.choice([b"K\1", b"N", self.plain(), b"ccollections\nOrderedDict\n"])
        state = b"}" + self.text(name) + value + b"s"
        return self.rng.choice([state, state, b"N" + state + b"\x86"])

    def tensor(self) -> bytes:
        made = self.plain()
        if self.rare(0.1):
            made = b"ctorch._utils\n_rebuild_parameter\n(" + made + b"\x89" + self.hooks() + b"tR"
        if self.rare(0.05):
            head = b"ctorch._utils\n_rebuild_parameter_with_state\n("
            made = head + made + b"\x89" + self.hooks() + self.state() + b"tR"
        if self.rare(0.03):
            inner = self.plain()
            at = inner.index(b"(")
            made = (
                b"ctorch._tensor\n_rebuild_from_type_v2\n("
                + inner[:at]
                + b"ctorch\nTensor\n"
                + inner[at:-1]
                + self.state()
                + b"tR"
            )
        if self.rare(0.06):
            made += self.build()
        return made

    def build(self) -> bytes:
        other = b"(" + self.storage(self.rng.choice("01")) + b"K\0K\4\x85K\1\x85t"
        parameter = b"(" + self.plain() + b"\x89" + self.hooks() + b"t"
        parameter5 = b"(" + self.plain() + b"N" + self.hooks() + b"\x89t"
        return self.rng.choice([other, other, parameter, parameter5, self.state()]) + b"b"

    def mapping(self, items: bytes, allow: bool = True) -> bytes:
        """A dictionary of some kind with `items` (keys and values on the stack)."""
        kinds = [b"}", b"}", b"ccollections\nOrderedDict\n)R"]
        if allow and self.odd:
            kinds += [
                b"ccollections\nOrderedDict\n)\x81",
                b"ccollections\nCounter\n)R",
                b"ccollections\nCounter\n)\x81",
                b"ccollections\ndefaultdict\ncbuiltins\nlist\n\x85R",
                b"csomeproject\nWeights\n)\x81",
            ]
        made = self.rng.choice(kinds) + b"(" + items + b"u"
        if self.rare(0.05):
            made += self.state() + b"b"
        if self.rare(0.03):
            made = b"ccollections\nOrderedDict\n" + made + b"\x85R"
        return made

    def weights(self) -> bytes:
        rng = self.rng
        names = rng.choice([["w", "b"], ["module.w", "module.b"], ["w"]])
        if self.rare(0.08):
            names = rng.choices(NAMES, k=rng.randint(1, 3))
        parts = [self.text(name) + self.tensor() for name in names]
        if self.rng.random() < 0.1:
            other = self.rng.choice([*names, "epoch", "module_3", "x._extra_state", "modulesw"])
            parts.insert(self.rng.randint(0, len(parts)), self.text(other) + self.beside())
        if self.rng.random() < 0.05:
            count = b"ctorch._utils\n_rebuild_tensor_v2\n(" + self.storage("2", "LongStorage", 1)
            count += b"K\0))\x89" + self.hooks() + b"tR"
            place = self.rng.randint(0, len(parts)) if self.rare(0.3) else 0
            parts.insert(place, self.text("n_averaged") + count)
        return self.mapping(b"".join(parts))

    def beside(self) -> bytes:
        """A value beside the weights."""
        return self.rng.choice(
            [
                b"K\3",
                b"N",
                b"\x88",
                b"G" + struct.pack(">d", 0.5),
                b"]K\1a",
                self.text("x"),
                b"cargparse\nNamespace\n)\x81}" + self.text("lr") + b"K\1sb",
                b"cnumpy\ndtype\n" + self.text("f4") + b"\x89\x88\x87R",
                b"csomeproject\nOptions\n)\x81",
                b"ctorch.torch_version\nTorchVersion\n" + self.text("2.1") + b"\x85\x81",
                b"}" + self.text("exp_avg") + self.plain() + b"s",
                b"cuuid\nUUID\n)\x81",
                b"c__builtin__\nxrange\nK\0K\3K\1\x87R",
                b"chttp\nHTTPStatus\nK\xc8\x85R",
                b"cre\n_compile\n" + self.text("a+") + b"K\0\x86R",
            ]
        )

    def root(self) -> bytes:
        rng = self.rng
        if rng.random() < 0.3:
            return self.weights()
        entries = [(rng.choice([*KEYS[:1] * 6, *KEYS, ""]), self.weights())]
        while self.rare(0.3):
            entries.append((rng.choice([*KEYS, "", ".", "x/y"]), self.weights()))
            if self.rare(0.2):
                nested = self.text("y") + self.weights()
                entries.append((rng.choice(["x", "state_dict"]), self.mapping(nested)))
        while rng.random() < 0.4:
            entries.append((rng.choice(["epoch", "args", "x"]), self.beside()))
        if rng.random() < 0.1:
            entries.append((rng.choice(["best", "val.acc", "module_x"]), self.plain()))
        if self.rare(0.04):
            entries.append((rng.choice(NAMES), self.tensor()))
        rng.shuffle(entries)
        stored: list[bytes] = []
        parts = b""
        for key, value in entries:
            part = self.key(key) + value
            if self.rare(0.2) and len(stored) < 200:
                put = self.put()
                part += put
                stored.append(b"h" + put[1:])
            parts += part
        made = self.mapping(parts, allow=self.rare(0.2))
        if stored and self.rare(0.3):  # later, through the memo
            change = rng.choice(
                [self.text("w") + self.tensor() + b"s", self.build(), self.state() + b"b"]
            )
            made += rng.choice(stored) + change + b"0"
        return made

    def pickle(self) -> bytes:
        return bytes(self.out) + self.root() + b"."


def case(seed: int, number: int) -> bytes:
    """The file of one number: the same for every run with that seed."""
    rng = random.Random(f"{seed}/{number}")
    writer = Writer(rng)
    container = random.Random(f"{seed}/{number}/container")
    if container.random() < 0.15:
        writer.legacy = True
        return legacy_bytes(writer.pickle(), container if writer.odd else None)
    pickled = writer.pickle()
    records = dict(RECORDS)
    if writer.rare(0.03):
        records = {"W": records["0"], "w": records["1"], **records}
    if writer.rare(0.03):
        pickled = pickled.replace(b"X\1\0\0\x000", b"X\1\0\0\x00w")
        records = {"w": RECORDS["0"], "1": RECORDS["1"]}
        records.update({"W": RECORDS["1"]} if rng.random() < 0.7 else {})
    members = [Member("archive/data.pkl", pickled)]
    if rng.random() < 0.8:
        members.append(Member("archive/byteorder", b"little"))
    members += [Member(f"archive/data/{key}", data) for key, data in records.items()]
    members.append(Member("archive/version", b"3\n"))
    if writer.rare(0.03):
        extra = rng.choice(
            [
                ("BYTEORDER", b"big"),
                ("byteOrder", b"big"),
                ("DATA.PKL", Writer(rng).pickle()),
                ("data.PKL", Writer(rng).pickle()),
                (".DATA/version", b"3\n"),
                ("README", b"hello"),
            ]
        )
        members.insert(rng.randrange(len(members)), Member(f"archive/{extra[0]}", extra[1]))
    if writer.rare(0.03):
        rng.shuffle(members)
    return zip_bytes(members)


_STORAGE = re.compile(rb"Storage\n(?:cbuiltins\nstr\n)?(?:X\x01\0\0\0|U\x01)([012])")
_COUNTS = {b"FloatStorage": 4, b"IntStorage": 4, b"HalfStorage": 8}


def legacy_bytes(pickled: bytes, odd: random.Random | None) -> bytes:
    """A file of torch before 1.6 around a pickle. odd: of what torch would not write; or None."""

    def rare(chance: float = 0.03) -> bool:
        return odd is not None and odd.random() < chance

    magic = 0x1950A86A20F9469CFC6C + rare(0.01)
    version = 1001 + rare(0.01)
    machine = {"protocol_version": 1001, "little_endian": not rare(0.01), "type_sizes": {}}
    keys = sorted({match[1].decode() for match in _STORAGE.finditer(pickled)})
    if odd is not None and rare(0.3):
        keys.reverse()
    if odd is not None and rare():
        keys = odd.choice([keys * 2, keys[:1], [*keys, "3"], tuple(keys), keys + keys[:1]])
    head = b"".join(pickle.dumps(part, protocol=2) for part in (magic, version, machine))
    out = head + pickled + pickle.dumps(keys, protocol=2)
    kinds = re.findall(rb"ctorch\n((?!Long)\w+Storage)\n", pickled)
    count = _COUNTS.get(kinds[0] if kinds else b"", 4)
    for key in keys:
        own = 1 if key == "2" else count
        out += struct.pack("<q", own - rare(0.02)) + RECORDS.get(key, RECORDS["0"])
    return out + (b"\0" * 8 if rare(0.02) else b"")


# ---- the readers --------------------------------------------------------------------------------


def ours(raw: bytes) -> tuple[Tensors | None, str]:
    """What pydetox reads, or None and why not."""
    descriptor = os.memfd_create("a.pt")
    os.write(descriptor, raw)
    try:
        with WeightsFile("a.pt", descriptor) as file:
            index = index_file(file)
            if any(finding.rule in AMBIGUOUS_RULES for finding in index.findings):
                return None, "ambiguous"
            return read_weights(file, index)[0], "accepted"
    except CheckpointError as error:
        return None, str(error)


class Stub:
    """Stands for whatever an unknown package holds; takes everything and does nothing."""

    def __init__(self, *arguments: object, **keywords: object) -> None:
        pass

    def __new__(cls, *arguments: object, **keywords: object) -> Stub:
        return super().__new__(cls)

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, value: object) -> None:
        """Do nothing."""


class StubWeights(dict):  # type: ignore[type-arg]
    """A dictionary of an unknown package."""


class StubUnpickler(pickle.Unpickler):
    """CPython's unpickler, except that unknown packages are stubs."""

    def find_class(self, module: str, name: str) -> Any:
        """Look a name up as CPython does."""
        if module.partition(".")[0] == "someproject":
            return StubWeights if name == "Weights" else Stub
        return super().find_class(module, name)


_FULL = types.ModuleType("pickle_with_stubs")
_FULL.Unpickler = StubUnpickler  # type: ignore[attr-defined]
_FULL.load = lambda file, **_: StubUnpickler(file).load()  # type: ignore[attr-defined]


def theirs(raw: bytes, path: Path) -> Iterator[tuple[str, object]]:
    """Yield each loader's name and what it makes of the file; nothing where it refuses."""
    path.write_bytes(raw)
    loads: list[tuple[str, Callable[[], object]]] = [
        ("weights_only", lambda: torch.load(path, weights_only=True, map_location="cpu")),
        ("mapped", lambda: torch.load(path, weights_only=True, mmap=True)),
        (
            "pickle",
            lambda: torch.load(path, weights_only=False, pickle_module=_FULL, map_location="cpu"),
        ),
    ]
    for name, load in loads:
        try:
            loaded = load()
        except Exception:  # noqa: BLE001 - a loader that refuses reads no other weights
            continue
        yield from _unwrapped(name, loaded, path)


def _unwrapped(name: str, loaded: object, path: Path) -> Iterator[tuple[str, object]]:
    def known(*_: object, **__: object) -> object:
        return loaded

    with mock.patch.object(torch, "load", known):
        unwraps: list[tuple[str, Callable[[], object]]] = [
            ("open_clip", lambda: open_clip.factory.load_state_dict("a.pt")),
            ("timm", lambda: timm.models._helpers.load_state_dict(str(path), use_ema=True)),
        ]
        for loader, unwrap in unwraps:
            try:
                yield f"{loader} of {name}", unwrap()
            except Exception:  # noqa: BLE001
                continue
    if isinstance(loaded, dict) and "state_dict" in loaded:
        yield f"state_dict of {name}", loaded["state_dict"]


def weights_of(found: Tensors, other: object) -> dict[Any, torch.Tensor]:
    """The tensors of another loader that a model could take.

    A model of the names that were found takes those, with or without the prefix of a wrapper. A
    model of another kind takes what is named like a parameter of a module, `conv1.weight`, and is
    more than one number. Everything else, such as the best accuracy, no model takes.
    """
    if not isinstance(other, dict):
        return {}
    return {
        key: value
        for key, value in other.items()
        if isinstance(value, torch.Tensor)
        and (
            not isinstance(key, str)
            or re.sub(r"^(module\.|_orig_mod\.)+", "", key) in found
            or ("." in key and value.numel() > 1)
        )
    }


def difference(found: Tensors, other: object) -> str | None:
    """How another loader's weights differ; None where they are equal or where it has none."""
    tensors = weights_of(found, other)
    if not tensors:
        return None
    if not all(isinstance(key, str) for key in tensors):
        return "other names"
    names = strip_prefixes(list(tensors))
    renamed = dict(zip(names, tensors.values(), strict=True))
    if renamed.keys() != found.keys():  # their order is no part of the weights
        return f"names {list(renamed)} instead of {list(found)}"
    for name, tensor in renamed.items():
        mine = found[name]
        if (mine.dtype, mine.shape) != (tensor.dtype, tensor.shape):
            return f"{name}: {tensor.dtype}{list(tensor.shape)}"
        if tensor.device.type != "cpu":
            return f"{name}: is on {tensor.device}"
        left, right = (
            t.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
            for t in (mine, tensor)
        )
        if not torch.equal(left, right):
            return f"{name}: other values"
    return None


def compare(raw: bytes, path: Path) -> tuple[str, str | None]:
    """What pydetox says of a file, and how the first loader that differs does."""
    found, reason = ours(raw)
    if found is None:
        return reason, None
    for reader, other in theirs(raw, path):
        odd = difference(found, other)
        if odd is not None:
            return reason, f"{reader}: {odd}"
    return reason, None


# ---- the run ------------------------------------------------------------------------------------


def lock_up(largest_file: int = 1 << 20) -> None:
    """Let a child neither start anything, nor connect, nor fill the disk."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event.startswith(("subprocess.", "socket.connect", "os.system", "os.exec", "os.fork")):
            raise RuntimeError(f"forbidden here: {event}")

    sys.addaudithook(hook)


def run_range(
    seed: int, first: int, last: int, *, stop_at_first: bool = False
) -> tuple[Counter[str], list[tuple[int, str]]]:
    """Compare the cases first..last-1: how often each answer was given, and the disagreements."""
    answers: Counter[str] = Counter()
    odd: list[tuple[int, str]] = []
    path = Path(f"/dev/shm/pydetox-differential-{os.getpid()}.pt")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for number in range(first, last):
                answer, how = compare(case(seed, number), path)
                answers[answer if answer in ("accepted", "ambiguous") else "refused"] += 1
                if how is not None:
                    odd.append((number, how))
                    if stop_at_first:
                        break
    finally:
        path.unlink(missing_ok=True)
    return answers, odd


def main() -> int:
    """Run from the command line: 0 without, 1 with a disagreement."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    start = time.monotonic()
    step = 1000
    ranges = [(given.seed, n, min(n + step, given.cases)) for n in range(0, given.cases, step)]
    answers: Counter[str] = Counter()
    odd: list[tuple[int, str]] = []
    context = multiprocessing.get_context("spawn")
    with context.Pool(given.jobs, initializer=lock_up) as pool:
        for done, (found, disagreements) in enumerate(pool.imap(_run, ranges), 1):
            answers += found
            odd += disagreements
            sys.stderr.write(f"\r{done * step:,} cases, {len(odd)} disagreements")
    sys.stderr.write("\n")
    report = {
        "cases": given.cases,
        "seed": given.seed,
        **dict(answers),
        "disagreements": len(odd),
        "first": odd[:10],
        "seconds": round(time.monotonic() - start, 1),
    }
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
    return 1 if odd else 0


def _run(arguments: tuple[int, int, int]) -> tuple[Counter[str], list[tuple[int, str]]]:
    return run_range(*arguments)


if __name__ == "__main__":
    sys.exit(main())
