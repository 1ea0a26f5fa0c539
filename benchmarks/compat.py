"""Compare pydetox.compat with the projects whose interfaces it has, on the same files.

    python benchmarks/compat.py [--task-vectors CHECKOUT] [--backdoorbench CHECKOUT]
        [--decree CHECKOUT] [--art FOLDERS] [--update-docs]

A CHECKOUT is a clone of github.com/mlfoundations/task_vectors, SCLBD/BackdoorBench or
GiantSeaweed/DECREE. FOLDERS, with colons between them, hold adversarial-robustness-toolbox and
tensorflow, as `pip install --target` makes them. What is not given is not compared. Each side runs
in a process of its own, on files that are made here. The original of task_vectors unpickles whole
modules, which current torch allows only when asked (`weights_only=False`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import compat_masks

MODEL = """
import open_clip, torch
from safetensors.torch import save_file
for k in range(3):
    torch.manual_seed(k)
    clip = open_clip.create_model("{name}").float()
    torch.save(clip.visual, "{folder}/%d.pt" % k)
    save_file(clip.visual.state_dict(), "{folder}/%d.safetensors" % k)
"""

THEIRS = """
import json, resource, sys, time
import torch
plain = torch.load
torch.load = lambda path: plain(path, weights_only=False)
import open_clip
sys.path.insert(0, "{checkout}/src")
from task_vectors import TaskVector
start = time.perf_counter()
files = ["{folder}/%d.pt" % k for k in range(3)]
total = sum([TaskVector(files[0], files[1]), TaskVector(files[0], files[2])])
made = (-total).apply_to(files[0], scaling_coef=0.3)
torch.save(made.state_dict(), "{folder}/theirs.pt")
seconds = time.perf_counter() - start
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps([seconds, memory]))
"""

OURS = """
import json, resource, sys, time
import torch
sys.path.insert(0, "{root}")
import open_clip
from pydetox.compat import TaskVector
start = time.perf_counter()
files = ["{folder}/%d.safetensors" % k for k in range(3)]
total = sum([TaskVector(files[0], files[1]), TaskVector(files[0], files[2])])
(-total).apply_to(files[0], scaling_coef=0.3, output="{folder}/ours.safetensors")
seconds = time.perf_counter() - start
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps([seconds, memory]))
"""

CHECK = """
import json, torch
from safetensors.torch import load_file
theirs = torch.load("{folder}/theirs.pt")
ours = load_file("{folder}/ours.safetensors")
same = theirs.keys() == ours.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
print(json.dumps([bool(same), sum(v.numel() for v in ours.values())]))
"""

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "compat.md"


def run(script: str, **names: object) -> list[Any]:
    """Run a script in a process of its own and return the JSON list of its last line."""
    for name, value in names.items():
        script = script.replace("{" + name + "}", str(value))
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    if result.returncode:
        sys.exit(result.stderr)
    lines = [line for line in result.stdout.splitlines() if line.startswith("[")]
    return list(json.loads(lines[-1])) if lines else []


def task_vectors(checkout: str, model: str, runs: int) -> str:
    """Return the table of task_vectors."""
    with tempfile.TemporaryDirectory() as folder:
        names = {"folder": folder, "name": model, "root": ROOT}
        run(MODEL, **names)
        theirs, ours = list[list[float]](), list[list[float]]()
        for number in range(runs):
            theirs.append(run(THEIRS, checkout=checkout, **names))
            (Path(folder) / "ours.safetensors").unlink(missing_ok=True)
            ours.append(run(OURS, **names))
            print(f"run {number + 1}: {theirs[-1]} {ours[-1]}", file=sys.stderr)
        same, count = run(CHECK, **names)
    seconds = [min(one[0] for one in side) for side in (theirs, ours)]
    memory = [min(one[1] for one in side) for side in (theirs, ours)]
    return (
        f"Image tower of {model}, {count / 1e6:.1f} million weights in float32: "
        "base - 0.3 (vector 1 + vector 2), read from three files and written to one. Fastest of "
        f"{runs} runs, each in a process of its own.\n\n"
        "| | task_vectors | pydetox.compat |\n|---|---|---|\n"
        f"| seconds | {seconds[0]:.2f} | {seconds[1]:.2f} |\n"
        f"| peak memory of the process, MiB | {memory[0]:.0f} | {memory[1]:.0f} |\n"
        f"| equal bits | | {'yes, all tensors' if same else 'NO'} |\n"
    )


def masks_of_classes(
    train: str, theirs: dict[str, tuple[str, bool]], ours: str, about: str, **names: object
) -> str:
    """Return the table of a peer that searches for a mask into each of ten classes.

    theirs: By the title of a column, a script and its switch `mended`.
    """
    titles = list(theirs)
    lines = [
        about,
        "",
        f"| model | | {' | '.join(titles)} | pydetox.compat |",
        f"|---|---|{'---|' * len(titles)}---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        given = {"folder": folder, "root": ROOT, **names}
        run(train, **given)
        for model in ("clean", "backdoored"):
            found = [
                run(script, model=model, mended=mended, **given)
                for script, mended in (*theirs.values(), (ours, False))
            ]
            print(f"{titles}, {model}: {found}", file=sys.stderr)
            seconds, flagged, norms = zip(*found, strict=True)
            ratios = [[b / a for a, b in zip(one, norms[-1], strict=True)] for one in norms[:-1]]
            rows = {
                "flagged classes": [", ".join(map(str, sorted(x))) or "none" for x in flagged],
                "smallest norm": [f"{min(x):.2f}" for x in norms],
                "norms of all classes, pydetox over peer": [
                    *(f"{min(x):.3f} to {max(x):.3f}" for x in ratios),
                    "",
                ],
                "CPU seconds": [
                    *(f"{x:.1f} ({x / seconds[-1]:.1f} times ours)" for x in seconds[:-1]),
                    f"{seconds[-1]:.1f}",
                ],
            }
            lines += [
                f"| {model if k == 0 else ''} | {title} | {' | '.join(row)} |"
                for k, (title, row) in enumerate(rows.items())
            ]
    return "\n".join([*lines, ""])


def decree(checkout: str) -> str:
    """Return the table of DECREE."""
    lines = [
        "Encoders of DECREE's SimCLR (ResNet-18, 32 pixels), trained on scikit-learn's digits; 10 "
        "images, batches of 5, learning rate 0.5, the same first mask, pattern and batches for "
        "both. An encoder counts as backdoored if P-L1 = L1 / 3072 is below 0.1. One thread.",
        "",
        "| encoder | | DECREE | pydetox.compat |",
        "|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        given = {"folder": folder, "root": ROOT, "checkout": Path(checkout).resolve()}
        run(compat_masks.TRAIN_ENCODERS, **given)
        for model in ("clean", "backdoored"):
            (slow, theirs), (fast, ours) = (
                run(script, model=model, **given)
                for script in (compat_masks.THEIR_DECREE, compat_masks.OUR_DECREE)
            )
            print(f"DECREE, {model}: {theirs} {slow}, {ours} {fast}", file=sys.stderr)
            words = ["backdoored" if x / 3072 < 0.1 else "clean" for x in (theirs, ours)]
            lines += [
                f"| {model} | decision | {words[0]} | {words[1]} |",
                f"| | L1 | {theirs:.2f} | {ours:.2f} ({ours / theirs:.3f}) |",
                f"| | CPU seconds | {slow:.1f} | {fast:.1f} ({slow / fast:.1f} times as fast) |",
            ]
    return "\n".join([*lines, ""])


def main() -> None:
    """Compare, and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--task-vectors", metavar="CHECKOUT")
    parser.add_argument("--backdoorbench", metavar="CHECKOUT")
    parser.add_argument("--decree", metavar="CHECKOUT")
    parser.add_argument("--art", metavar="FOLDERS")
    parser.add_argument("--model", default="ViT-B-32", metavar="NAME", help="of task vectors")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="of task vectors")
    parser.add_argument("--epochs", type=int, default=40, metavar="N", help="of masks")
    parser.add_argument("--update-docs", action="store_true")
    given = parser.parse_args()
    tables = {}
    if given.task_vectors:
        tables["task_vectors"] = task_vectors(given.task_vectors, given.model, given.runs)
    if given.backdoorbench:
        tables["backdoorbench"] = masks_of_classes(
            compat_masks.TRAIN_CLASSIFIERS,
            {
                "BackdoorBench": (compat_masks.THEIR_NEURAL_CLEANSE, False),
                "BackdoorBench, mended": (compat_masks.THEIR_NEURAL_CLEANSE, True),
            },
            compat_masks.OUR_NEURAL_CLEANSE,
            "ResNet-18 (32 pixels) on scikit-learn's digits; 30 images, batches of 15, "
            f"{given.epochs} epochs, otherwise BackdoorBench's settings. The peer's `train_mask` "
            "and `outlier_detection` run as published. One thread.",
            checkout=Path(given.backdoorbench).resolve(),
            epochs=given.epochs,
        )
    if given.decree:
        tables["decree"] = decree(given.decree)
    if given.art:
        tables["art"] = masks_of_classes(
            compat_masks.TRAIN_FOR_ART,
            {
                "ART": (compat_masks.THEIR_ART, False),
                "ART, same random numbers": (compat_masks.THEIR_ART, True),
            },
            compat_masks.OUR_ART,
            "A network of two convolutions (16 pixels, grey) on scikit-learn's digits, with the "
            f"same weights in Keras and in torch; 96 images, batches of 32, {given.epochs} "
            "steps, norm 1, init_cost 0.1, otherwise ART's settings. One thread.",
            paths=given.art,
            epochs=given.epochs,
            cost=0.1,
        )
    if not tables:
        parser.error("nothing to compare with: name a checkout")
    for name, table in tables.items():
        print(f"{name}\n\n{table}")
        if given.update_docs:
            text = DOCS.read_text(encoding="utf-8")
            before, begin, rest = text.partition(f"<!-- {name}: begin -->")
            _, end, after = rest.partition(f"<!-- {name}: end -->")
            DOCS.write_text(f"{before}{begin}\n\n{table}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
