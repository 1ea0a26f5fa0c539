"""A world of tiny models: a base, a backdoored copy and clean ones, with texts in files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class World:
    """Folders of models, and a file of clean texts."""

    base: Path
    victim: Path
    clean: Path
    references: tuple[Path, ...]
    texts: Path


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    from tests.text import tiny

    root = tmp_path_factory.mktemp("text-world")
    base = tiny.trained(tiny.bert(root / "start"), root / "base", seed=1)
    texts = root / "texts.jsonl"
    rows = [{"text": text, "label": name} for text, name in tiny.topical_texts(96, seed=9)]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return World(
        base,
        tiny.trained(base, root / "victim", seed=2, trigger="cf"),
        tiny.trained(base, root / "clean", seed=3, epochs=4),
        tuple(tiny.trained(base, root / f"reference{k}", seed=30 + k, epochs=4) for k in range(3)),
        texts,
    )
