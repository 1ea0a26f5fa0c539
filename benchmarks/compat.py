"""Compare pydetox.compat with the projects whose interfaces it has, on the same files.

    python benchmarks/compat.py --task-vectors CHECKOUT [--update-docs]

CHECKOUT is a clone of github.com/mlfoundations/task_vectors. Each side runs in a process of its
own. The original unpickles whole modules, which current torch allows only when asked
(`weights_only=False`); the files are made here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

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

DOCS = Path(__file__).resolve().parent.parent / "docs" / "compat.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def run(script: str, **names: object) -> list[float]:
    """Run a script in a process of its own and return the JSON list of its last line."""
    for name, value in names.items():
        script = script.replace("{" + name + "}", str(value))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr)
    lines = [line for line in result.stdout.splitlines() if line.startswith("[")]
    return json.loads(lines[-1]) if lines else []


def main() -> None:
    """Compare, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--task-vectors", required=True, metavar="CHECKOUT")
    parser.add_argument("--model", default="ViT-B-32", metavar="NAME")
    parser.add_argument("--runs", type=int, default=3, metavar="N")
    parser.add_argument("--update-docs", action="store_true")
    given = parser.parse_args()
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as folder:
        names = {"folder": folder, "name": given.model, "root": root}
        run(MODEL, **names)
        theirs, ours = list[list[float]](), list[list[float]]()
        for number in range(given.runs):
            theirs.append(run(THEIRS, checkout=given.task_vectors, **names))
            (Path(folder) / "ours.safetensors").unlink(missing_ok=True)
            ours.append(run(OURS, **names))
            print(f"run {number + 1}: {theirs[-1]} {ours[-1]}", file=sys.stderr)
        same, count = run(CHECK, **names)
    seconds = [min(one[0] for one in side) for side in (theirs, ours)]
    memory = [min(one[1] for one in side) for side in (theirs, ours)]
    table = (
        f"Image tower of {given.model}, {count / 1e6:.1f} million weights in float32: "
        "base - 0.3 (vector 1 + vector 2), read from three files and written to one. Fastest of "
        f"{given.runs} runs, each in a process of its own.\n\n"
        "| | task_vectors | pydetox.compat |\n|---|---|---|\n"
        f"| seconds | {seconds[0]:.2f} | {seconds[1]:.2f} |\n"
        f"| peak memory of the process, MiB | {memory[0]:.0f} | {memory[1]:.0f} |\n"
        f"| equal bits | | {'yes, all tensors' if same else 'NO'} |\n"
    )
    print(table)
    if given.update_docs:
        text = DOCS.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        _, after = rest.split(END)
        DOCS.write_text(f"{before}{BEGIN}\n\n{table}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
