"""Provenance and the model card: what comes from outside must stay text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from pydetox.checkpoints import Provenance
from pydetox.checkpoints.card import code_span, model_card
from pydetox.errors import UsageError

HOSTILE = [
    "[click](https://evil.example)",
    "![x](https://evil.example/x.png)",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "https://evil.example www.evil.example",
    "`closed` and [open](x)",
    "``` ` ``",
    "`",
    "a | b | c",
    "a\n\n# Heading\n\n---\n",
    "\x1b[31mred\x1b[0m \u202e reversed \0",
    "  spaces  ",
    "",
    "\\",
    "&lt;b&gt;",
    "\u2028line",
]


def tokens(text: str) -> list[Token]:
    found: list[Token] = []
    for token in MarkdownIt("commonmark", {"linkify": False}).enable("table").parse(text):
        found += [token, *(token.children or [])]
    return found


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("in_table", [False, True])
def test_code_spans_hold_anything(text: str, in_table: bool) -> None:
    span = code_span(text, in_table=in_table)
    assert span.isprintable()
    before, after = (f"| {span} | x |\n|---|---|", "") if in_table else (f"- {span}", "")
    kinds = {token.type for token in tokens(before + after)}
    assert "code_inline" in kinds
    assert not kinds & {"link_open", "image", "html_inline", "html_block", "heading_open", "hr"}
    cells = [token for token in tokens(before) if token.type == "th_open"]
    assert len(cells) == (2 if in_table else 0)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text("`| a\\\n<[", max_size=12))
def test_code_spans_show_the_text(text: str) -> None:
    (span,) = (token for token in tokens(f"x {code_span(text)} y") if token.type == "code_inline")
    assert span.content.strip() == text.replace("\n", "\\n").strip()


def hostile_provenance() -> Provenance:
    return Provenance(
        method=HOSTILE[0],
        source_name=HOSTILE[2],
        source_sha256=HOSTILE[9],
        seeds={text: i for i, text in enumerate(HOSTILE)},
        before=dict.fromkeys(HOSTILE, 0.5),
        after={"another": 0.25},
        extra={text: {"nested": text} for text in HOSTILE},
    )


def test_card_has_no_structure_from_outside() -> None:
    card = model_card(HOSTILE[9], hostile_provenance(), {"embed_dim": 1, "x": HOSTILE[2]})
    # The front matter is for the hub; Markdown itself sees what follows it.
    body = card.split("---\n", 2)[2]
    found = tokens(body)
    kinds = [token.type for token in found]
    assert not set(kinds) & {"link_open", "image", "html_inline", "html_block", "hr"}
    assert kinds.count("heading_open") == 5
    assert kinds.count("tr_open") == 1 + len(HOSTILE) + 1
    assert kinds.count("td_open") == 3 * (len(HOSTILE) + 1)


def test_card_tells_the_recipe() -> None:
    provenance = Provenance(
        "TBAR",
        source_name="runs/suspect",
        source_sha256="ab" * 32,
        scaling_coefficient=0.3,
        seeds={"inversion": 7},
        before={"ASR": 0.99},
        after={"ASR": 0.0, "CA": 0.9},
    )
    card = model_card("clean", provenance, {"embed_dim": 16})
    for line in (
        "# Model card for `clean`",
        "- Method: `TBAR`",
        f"- SHA-256 of the source's weights: `{'ab' * 32}`",
        "- Scaling coefficient α: `0.3`",
        "- Seed of `inversion`: `7`",
        f"- pydetox version: `{provenance.pydetox_version}`",
        "| `ASR` | `0.99` | `0.0` |",
        "| `CA` |  | `0.9` |",
    ):
        assert line in card.splitlines()
    assert "Before" not in model_card("x", Provenance("y"), {})


@pytest.mark.parametrize("provenance", [Provenance("x"), hostile_provenance()])
def test_json_round_trip(provenance: Provenance) -> None:
    text = provenance.to_json()
    assert "\n" not in text
    assert Provenance.from_json(text) == provenance


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1, 2}])
def test_what_json_cannot_hold(value: Any) -> None:
    with pytest.raises(UsageError, match="provenance cannot be written as JSON"):
        Provenance("x", extra={"value": value}).to_json()
