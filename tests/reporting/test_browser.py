"""Reports in headless Chromium: legible on a phone and in dark mode. Left out without Chromium."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pydetox.reporting.detox import detox_report
from pydetox.reporting.html import page, section
from pydetox.reporting.run import run_document
from pydetox.reporting.run_html import run_page

from .test_report import result

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")

PHONE, DESK = 500, 1200  # headless Chromium lays out nothing narrower than 500
LONG = "a-very-long-name-without-any-blank" * 8


def scanned(name: str, verdict: str, **more: object) -> dict[str, object]:
    return {
        "name": name,
        "verdict": verdict,
        "reason": "because",
        "sha256": "00" * 32,
        "seconds": {},
    } | more


@pytest.fixture(scope="module")
def repair() -> str:
    return detox_report(result(LONG))


@pytest.fixture(scope="module")
def run() -> str:
    names = ["zero", LONG, "two"]
    sizes = {"class_names": names, "class_p_l1": [0.08, 0.01, None], "reference_p_l1": [0.1] * 3}
    document = run_document(
        [
            scanned(f"{LONG}.pt", "backdoored", target=LONG, p_l1=0.01, score=9.0, **sizes),
            scanned("unsafe.pt", "error", error_kind="unsafe"),
            *(scanned(f"{k}.safetensors", "clean", p_l1=0.07, **sizes) for k in range(3)),
        ],
        exit_code=2,
        seed=0,
        images="digits",
        calibration=None,
        not_reached=(LONG,),
    )
    return run_page(document, lambda _: {})


def chromium(tmp_path: Path, document: str, *options: str, width: int = PHONE) -> str:
    """Show a document; return what Chromium prints."""
    assert CHROMIUM is not None
    path = tmp_path / "report.html"
    path.write_text(document, encoding="utf-8")
    # A profile of its own; --no-sandbox because tests may run as root.
    given = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900",
        *options, path.as_uri(),
    ]  # fmt: skip
    return subprocess.run(given, capture_output=True, text=True, check=True, timeout=60).stdout


def screenshot(tmp_path: Path, document: str, *options: str, width: int = PHONE) -> np.ndarray:
    path = tmp_path / "shot.png"
    chromium(tmp_path, document, f"--screenshot={path}", *options, width=width)
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("name", ["repair", "run"])
def test_no_part_of_a_page_is_wider_than_the_window(
    name: str, width: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    report: str = request.getfixturevalue(name)
    # The policy that forbids scripts is taken out for the one that measures.
    policy = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
    measure = "document.title = document.documentElement.scrollWidth + ' of ' + innerWidth"
    document = policy.sub("", report).replace("</body>", f"<script>{measure}</script></body>")
    shown = chromium(tmp_path, document, "--dump-dom", width=width)
    found = re.search(r"<title>(\d+) of (\d+)</title>", shown)
    assert found
    assert int(found[2]) == width
    assert int(found[1]) <= width


def test_the_browser_shows_the_styles_and_the_pictures(repair: str, tmp_path: Path) -> None:
    shot = screenshot(tmp_path, repair, width=DESK)
    assert shot.shape == (900, DESK, 3)
    assert len(np.unique(shot.reshape(-1, 3), axis=0)) > 20
    blank = screenshot(tmp_path, page("", "", [section("nothing")]), width=DESK)
    assert (shot != blank).any(axis=2).mean() > 0.05


def test_dark_mode_is_dark_and_its_text_is_light(repair: str, tmp_path: Path) -> None:
    light = screenshot(tmp_path, repair)
    dark = screenshot(tmp_path, repair, "--blink-settings=preferredColorScheme=0")
    assert light[0, 0].min() > 200
    assert dark[0, 0].max() < 60
    assert np.median(light) > 200
    assert np.median(dark) < 60
    # In both the text stands out from its ground.
    assert light.min() < 60
    assert dark.max() > 200


def test_scripts_of_a_file_do_not_run(tmp_path: Path) -> None:
    act = "document.title='ran'"
    attack = f'</title><script>{act}</script><img src=x onerror="{act}">'
    shown = chromium(tmp_path, detox_report(result(attack)), "--dump-dom")
    assert "<title>ran</title>" not in shown
    assert "<script>" not in shown
