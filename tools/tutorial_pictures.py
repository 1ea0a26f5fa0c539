"""Make the pictures of docs/tutorial.md from the reports and triggers that its commands wrote.

    python tools/tutorial_pictures.py FOLDER

FOLDER is where the tutorial's commands were run. Charts are taken out of the HTML reports and
written to docs/assets as SVG files that need no style sheet; pictures of triggers are copied.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "docs" / "assets"

#: Report, its how-manieth wide chart, and the name of the picture.
CHARTS = (
    ("scan.html", 0, "scan.svg"),
    ("repair.html", 1, "rescan.svg"),
    ("repair.html", 2, "alpha.svg"),
)
TRIGGERS = ("mask", "pattern", "stamped")


def light_style() -> str:
    """Return the report's style sheet with the light colours in the place of its variables."""
    css = (ROOT / "pydetox/reporting/style.css").read_text(encoding="utf-8")
    colours = dict(re.findall(r"(--[\w-]+): (#[0-9a-f]+)", css.split("@media")[0]))
    parts = r"^(?:svg |\.(?:grid|axis|marked|line|mark|bar|reference|threshold)\b).*$"
    rules = re.findall(parts, css, re.MULTILINE)
    style = "\n".join(["svg { font-family: system-ui, sans-serif; }", *rules])
    return re.sub(r"var\((--[\w-]+)\)", lambda match: colours[match[1]], style)


def main() -> None:
    """Write all pictures."""
    folder = Path(sys.argv[1])
    style = light_style()
    for report, index, name in CHARTS:
        page = (folder / report).read_text(encoding="utf-8")
        drawn = re.findall(r'<div class="wide">(<svg.*?</svg>)</div>', page, re.DOTALL)[index]
        head, _, body = drawn.partition(">")
        picture = f'{head} xmlns="http://www.w3.org/2000/svg"><style>{style}</style>{body}\n'
        (ASSETS / name).write_text(picture, encoding="utf-8")
    for kind in TRIGGERS:
        (found,) = (folder / "runs/triggers").glob(f"*_seven_{kind}.png")
        shutil.copyfile(found, ASSETS / f"trigger-{kind}.png")
    print(f"{len(CHARTS) + len(TRIGGERS)} pictures in {ASSETS}")


if __name__ == "__main__":
    main()
