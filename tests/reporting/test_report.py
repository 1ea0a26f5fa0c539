"""HTML page and terminal text: complete, self-contained, escaped, written whole or not at all."""

from __future__ import annotations

import base64
import io
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pydetox.errors import DataError, OutputError, UsageError
from pydetox.reporting import detox_report, print_text, render_text, write_detox_report
from pydetox.reporting.images import png_data_uri

RNG = np.random.default_rng(0)
HOSTILE = "<script>alert('x')</script>\" onerror=\"alert(1)"
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Collects what a browser would see; fails on tags that do not match."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def result(name: str = "suspect") -> dict[str, Any]:
    names = ["zero", name, "two"]
    return {
        "title": f"Report on {name}",
        "subtitle": "seed 0",
        "summary": [
            {"label": "Verdict", "value": "backdoored", "tone": "bad"},
            {"label": name, "value": name, "tone": name},
        ],
        "scans": [
            {
                "name": name,
                "verdict": "backdoored",
                "p_l1": 0.0123,
                "threshold": 0.03,
                "anomaly_index": 5.2,
                "target": name,
                "class_names": names,
                "class_p_l1": [0.08, 0.0123, None],
                "reference_p_l1": [0.09, 0.07, math.nan],
            },
            {"name": "purified", "verdict": "clean", "p_l1": np.float32(0.07)},
        ],
        "triggers": [
            {"caption": name, "image": RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)},
            {"caption": "mask", "image": RNG.integers(0, 256, (8, 8), dtype=np.uint8)},
        ],
        "alpha_search": {
            "alpha": [0.0, 0.5, 1.0],
            "ca": [0.97, 0.96, 0.9],
            "asr": [1.0, 0.4, 0.0],
            "asr_kind": "recovered",
            "chosen": 0.5,
        },
        "evaluation": [
            {"name": "before", "ca": 0.97, "ca_ci": (0.95, 0.98), "asr": 1.0, "asr_ci": [0.9, 1]},
            {"name": name, "ca": 0.96, "asr": None, "asr_ci": None, "n_clean": 1540, "n_attack": 0},
        ],
        "provenance": {"source sha256": "ab" * 32, name: name},
        "seconds": {"scan": 12.34, name: math.nan},
    }


def test_page_says_everything() -> None:
    page = Page(detox_report(result()))
    for expected in (
        "Report on suspect",
        "seed 0",
        "backdoored",
        "0.0123",
        "5.20",
        "threshold 0.0300",
        "clean reference",
        "chosen: α = 0.500",
        "ASR: attack success rate, recovered trigger",
        "97.0%",
        "[95.0–98.0%]",
        "n = 1,540",
        "those of the target class are left out",
        "abababab",
        "12.3 s",
    ):
        assert expected in page.text, expected
    assert page.tags.count("h1") == 1
    assert page.tags.count("img") == 2


def test_drift_is_a_column_of_the_search_for_alpha() -> None:
    content = result()
    assert "Drift" not in Page(detox_report(content)).text
    content["alpha_search"]["drift"] = [0.0, 0.0125, 0.031]
    page = Page(detox_report(content)).text
    assert "Drift" in page
    assert "0.0125" in page
    terminal = render_text(content)
    assert "drift" in terminal
    assert "0.0125" in terminal
    assert "images made of the given ones" in " ".join(terminal.split())
    content["alpha_search"]["drift"] = [0.0]
    for shown in (detox_report, render_text):
        with pytest.raises(UsageError, match="1 drifts for 3"):
            shown(content)


def test_classes_that_were_dropped_are_shown_as_bounds() -> None:
    content = result()
    assert "≤" not in Page(detox_report(content)).text
    content["scans"][0] |= {"class_dropped": [60, None, None], "class_steps": [60, 150, 140]}
    page = Page(detox_report(content))
    assert "≤ 0.0800" in page.text
    assert "≤ 0.0123" not in page.text
    assert "given up on the way" in page.text
    assert "Steps" in page.text
    assert "140" in page.text


def test_page_is_self_contained() -> None:
    page = Page(detox_report(result()))
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "xlink:href", "action", "srcset"):
            assert value.startswith("data:image/png;base64,"), (tag, name, value[:40])
    source = detox_report(result())
    assert "url(" not in source
    assert "@import" not in source
    assert "http://" not in source
    assert "https://" not in source
    policy = [v for t, n, v in page.attributes if t == "meta" and n == "content"]
    assert any("default-src 'none'" in value for value in policy)
    assert "width=device-width, initial-scale=1" in policy
    assert "prefers-color-scheme: dark" in source


def test_text_from_files_is_escaped_everywhere() -> None:
    plain, hostile = Page(detox_report(result())), Page(detox_report(result(HOSTILE)))
    assert hostile.tags == plain.tags
    assert [(t, n) for t, n, _ in hostile.attributes] == [(t, n) for t, n, _ in plain.attributes]
    assert HOSTILE in hostile.text


def test_control_characters_and_surrogates_do_not_reach_the_file(tmp_path: Path) -> None:
    path = write_detox_report(tmp_path / "r.html", result("a\x00\x1b]0;x\x07\udcff\u202e"))
    written = path.read_text(encoding="utf-8")
    assert not set(written) & set("\x00\x1b\x07\u202e")


def test_every_part_is_optional() -> None:
    empty = Page(detox_report({}))
    assert "pydetox report" in empty.text
    assert "section" not in empty.tags
    whole = result()
    for part in whole:
        Page(detox_report({part: whole[part]}))
        Page(detox_report({key: value for key, value in whole.items() if key != part}))
        Page(detox_report({part: None}))
    Page(detox_report({"scans": [{}], "evaluation": [{}], "summary": [{}]}))
    assert "α" not in Page(detox_report({"alpha_search": {"alpha": [], "ca": []}})).text


def test_flag_only_on_the_class_the_verdict_names() -> None:
    flagged = result()
    assert detox_report(flagged).count('class="bar flagged"') == 3  # wide, narrow, legend
    flagged["scans"][0]["verdict"] = "clean"
    assert 'class="bar flagged"' not in detox_report(flagged)


def test_named_asr_series() -> None:
    search = result()["alpha_search"] | {"asr": {"recovered": [1, 0, 0], "true": [1, 1, 0]}}
    page = Page(detox_report({"alpha_search": search}))
    assert "ASR: attack success rate, recovered trigger" in page.text
    assert "ASR true 0.0%" in page.text
    assert "ASR true" in render_text({"alpha_search": search})


def test_images_are_exact_enlargements() -> None:
    image = RNG.integers(0, 256, (24, 40, 3), dtype=np.uint8)
    uri = png_data_uri(image)
    decoded = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))
    assert np.array_equal(np.asarray(decoded), np.kron(image, np.ones((6, 6, 1), np.uint8)))
    grey = Image.open(io.BytesIO(base64.b64decode(png_data_uri(image[..., 0]).split(",")[1])))
    assert grey.mode == "L"
    large = np.zeros((200, 300, 3), np.uint8)
    assert np.asarray(
        Image.open(io.BytesIO(base64.b64decode(png_data_uri(large).split(",")[1])))
    ).shape == (200, 300, 3)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 3)),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
    ],
)
def test_other_images_are_refused(image: Any) -> None:
    with pytest.raises(DataError, match=r"report image is .* expected uint8 \[H, W, 3\]"):
        detox_report({"triggers": [{"caption": "x", "image": image}]})


def test_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    assert write_detox_report(path, result()) == path
    before = path.read_bytes()
    broken = result()
    broken["alpha_search"]["ca"] = [0.5]
    with pytest.raises(UsageError, match="3 positions, but 1 values of CA"):
        write_detox_report(path, broken)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    with pytest.raises(OutputError, match=r"report\.html"):
        write_detox_report(path / "below.html", result())


def test_same_result_same_bytes() -> None:
    fixed = result()
    assert detox_report(fixed) == detox_report(fixed)


def test_terminal_text() -> None:
    text = render_text(result())
    for expected in (
        "Report on suspect",
        "backdoored",
        "0.0123",
        "97.0% [95.0–98.0%]",
        "0.500 (chosen)",
        "40.0%",
        "12.3 s",
        "those of the target class are left out",
    ):
        assert expected in text, expected
    assert "\x1b" not in text
    assert max(len(line) for line in text.splitlines()) <= 120
    assert render_text({}) == ""


def test_terminal_text_is_not_markup_and_cannot_act() -> None:
    text = render_text(result("[red]x[/red]\x1b[2J\x07"))
    assert "[red]x[/red]\ufffd[2J\ufffd" in text
    assert "\x1b" not in text


def test_print_text_is_coloured_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    print_text(result())
    assert "\x1b[" in stream.getvalue()
    assert "backdoored" in stream.getvalue()


def test_print_text_goes_to_stdout_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    print_text(result())
    out, err = capsys.readouterr()
    assert out == render_text(result())
    assert err == ""
