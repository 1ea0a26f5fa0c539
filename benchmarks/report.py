"""The last `make bench` as tables: printed, and with --update-docs into docs/performance.md.

python benchmarks/report.py [--device cuda] [--update-docs]

The figures of a GPU carry its name, and do not go into docs/performance.md, which is about CPUs;
docs/gpu.md is made of what `make check-gpu` measures.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

# The script's own folder is on the path, the project's is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.recording import BOUNDS, folder, holds

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- figures -->", "<!-- /figures -->"


def tables(kind: str = "cpu") -> str:
    """Return the figures of a type of device."""
    figures: dict[str, float] = json.loads((folder(kind) / "summary.json").read_text())
    machine = json.loads((folder(kind) / "machine.json").read_text())
    if kind != "cpu":
        device = machine["device"]
        lines = [f"{device}, torch {machine['torch']}.", ""]
        lines += [f"| figure on {device} | measured |", "|---|---|"]
        return "\n".join([*lines, *(f"| {n} | {v:.3g} |" for n, v in sorted(figures.items()))])
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
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    kind = options.device.partition(":")[0]
    if not (folder(kind) / "summary.json").is_file():
        sys.exit(f"report: there is no {folder(kind)}/summary.json; run `make bench` first")
    if options.update_docs and kind != "cpu":
        sys.exit("report: docs/performance.md is about CPUs; for docs/gpu.md see `make check-gpu`")
    text = tables(kind)
    print(text)
    if options.update_docs:
        head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
