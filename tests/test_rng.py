"""Named streams: each is listed, drawn from in one place, and shares its numbers with no other."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import pydetox
from pydetox.errors import UsageError
from pydetox.rng import STREAMS, child_seed, generator

ROOT = Path(pydetox.__file__).parent
DRAWING = {"generator", "child_seed", "generator_per_image"}


def sources() -> Iterator[tuple[Path, str]]:
    for path in sorted(ROOT.rglob("*.py")):
        if path != ROOT / "rng.py":
            yield path, path.read_text()


def drawn() -> Counter[str]:
    """The streams named in calls that draw, and how many calls name each."""
    found: Counter[str] = Counter()
    for _, source in sources():
        for node in ast.walk(ast.parse(source)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute)):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            texts = [a.value for a in given if isinstance(a, ast.Constant)]
            streams = [t for t in texts if isinstance(t, str) and re.fullmatch(r"\w+\.[\w-]+", t)]
            if name in DRAWING:
                found.update(streams)
    return found


def test_every_stream_is_drawn_from_in_one_place():
    found = drawn()
    assert set(found) == set(STREAMS)
    # Fine-tuning on class prompts and on captions are two ways to do the same.
    # Names that a defender knows, and the images that belong to them, are drawn with other keys.
    several = {"repair.rescan", "training.batches", "foundation.names"}
    assert {name: count for name, count in found.items() if count > 1 and name not in several} == {}


def test_no_generator_is_made_and_no_seed_computed_elsewhere():
    forbidden = r"PCG64|default_rng|RandomState|seed\w*\s*[+*^]\s*[\w(]|\+\s*(\w+\.)?seed\b"
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path, source in sources()
        for line in source.splitlines()
        if re.search(forbidden, line) and not re.search('PCG64, IEEE|"_pcg64"', line)
    ]
    assert found == []


def test_streams_seeds_and_places_do_not_share_their_numbers():
    seeds = (0, 1, 2**32, 2**63)
    places: tuple[tuple[int | str, ...], ...] = ((), (0,), (1,), ("0",), (0, 1))
    first = {
        int(generator(stream, seed, *place).integers(2**63))
        for stream in STREAMS
        for seed in seeds
        for place in places
    }
    assert len(first) == len(STREAMS) * len(seeds) * len(places)
    children = {child_seed(stream, seed) for stream in STREAMS for seed in seeds}
    assert len(children) == len(STREAMS) * len(seeds)
    assert all(0 <= one < 2**63 for one in children)


def test_a_stream_is_a_spawned_seed_sequence():
    """The definition, spelled out once more: what a stream gives must never change."""
    import hashlib

    digest = hashlib.blake2b(b'["images.sample", 3, "x"]', digest_size=16).digest()
    words = [int.from_bytes(digest[k : k + 4], "little") for k in range(0, 16, 4)]
    expected = np.random.Generator(
        np.random.PCG64(np.random.SeedSequence(entropy=7, spawn_key=tuple(words)))
    )
    found = generator("images.sample", 7, 3, "x")
    assert found.integers(1000, size=5).tolist() == expected.integers(1000, size=5).tolist()


def test_unknown_streams_and_negative_seeds_are_refused():
    with pytest.raises(KeyError, match="no random stream"):
        generator("images.sampel", 0)
    with pytest.raises(UsageError, match="seed is -1"):
        child_seed("images.sample", -1)
