"""The last `make bench` as tables: printed, and with --update-docs into docs/performance.md.

python benchmarks/report.py [--update-docs]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

# The script's own folder is on the path, the project's is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.recording import BOUNDS, FOLDER, holds

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- figures -->", "<!-- /figures -->"


def tables() -> str:
    figures: dict[str, float] = json.loads((FOLDER / "summary.json").read_text())
    machine = json.loads((FOLDER / "machine.json").read_text())
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, CPU capability "
        f"{machine['cpu_capability']}, torch {machine['torch']}, Python {machine['python']}.",
        "",
        "| figure | measured | bound | |",
        "|---|---|---|---|",
    ]
    for name in sorted({*figures, *BOUNDS}):
        bound = " ".join(map(str, BOUNDS[name])) if name in BOUNDS else ""
        if name not in figures:
            lines.append(f"| {name} | not measured | {bound} | |")
            continue
        kept = holds(name, figures[name])
        word = "" if kept is None else "holds" if kept else "missed"
        lines.append(f"| {name} | {figures[name]:.3g} | {bound} | {word} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="The last run of the benchmarks as tables.")
    parser.add_argument("--update-docs", action="store_true")
    if not (FOLDER / "summary.json").is_file():
        sys.exit(f"report: there is no {FOLDER}/summary.json; run `make bench` first")
    text = tables()
    print(text)
    if parser.parse_args().update_docs:
        head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
