"""Run all parts: correctness first, some of it in the background, then timing alone.

python -m benchmarks.gpu [--device cuda] [--tiny] [--limit 530] [--out runs/gpu] [--bundle FOLDER]

Writes to the folder of --out, after every part anew: summary.json (flat), gpu.md (tables),
figures.jsonl (every figure as it came) and logs.tar.gz. Exit code: 0 if everything that ran was
right, 1 if not, 2 if nothing could run. A figure that misses its bound is no failure.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import events, machine, native, page, plan
from .bundle import Manifest, source_digest
from .processes import ROOT, Clock, Outcome, Part, Running
from .summary import Summary, Value

WORK = ROOT / "build" / "gpu"
FRESH = WORK / "fresh"
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
#: All files that a run writes into its folder.
WRITTEN = ("summary.json", "gpu.md", "figures.jsonl", "logs.tar.gz", "profile.json", "ncu.csv")
#: Of ncu, for every kernel of pydetox: how long, and how busy memory and multiprocessors are.
NCU_METRICS = (
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)


class Check:
    """One run: its options, its clock, what it has found so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.gpu = options.device.partition(":")[0] == "cuda"
        self.clock = Clock(options.limit)
        self.out: Path = options.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.logs = WORK / "logs"
        shutil.rmtree(self.logs, ignore_errors=True)
        self.figures = self.out / "figures.jsonl"
        # What an earlier run has left would look like this one's.
        for name in WRITTEN:
            (self.out / name).unlink(missing_ok=True)
        self.summary = Summary(self.out / "summary.json")
        self.background: list[Running] = []
        self.outcomes: dict[str, Outcome] = {}
        self.until: float | None = None  # seconds passed until which parts may run

    # ---- parts -------------------------------------------------------------------------

    def run(self, part: Part) -> Outcome:
        """Run a part to its end, its limit or the deadline, whichever comes first."""
        running = self.start(part)
        return self.note(running.wait()) if isinstance(running, Running) else running

    def start(self, part: Part) -> Running | Outcome:
        """Start a part, or leave it out where the time that is left is too short."""
        left = self.clock.left - plan.RESERVE
        if self.until is not None:
            left = min(left, self.until - self.clock.passed)
        if left < part.expected:
            return self.leave_out(part.name, f"{left:.0f} s left, {part.expected:.0f} expected")
        return Running(part, self.logs, min(part.limit, left))

    def start_in_background(self, part: Part) -> None:
        """Start a part that `finish_background` waits for."""
        running = self.start(part)
        if isinstance(running, Running):
            self.background.append(running)

    def finish_background(self, deadline: float) -> None:
        """Wait for the parts in the background; stop them at the deadline (seconds passed)."""

        def late() -> str | None:
            over = self.clock.passed > deadline
            return f"not finished: stopped at second {deadline:.0f}" if over else None

        while self.background:
            self.note(self.background.pop(0).wait(late))

    def leave_out(self, name: str, reason: str) -> Outcome:
        """Note a part that does not run."""
        return self.note(Outcome(name, f"left out: {reason}"))

    def note(self, outcome: Outcome) -> Outcome:
        """Put an outcome into the summary, and the logs beside it."""
        self.outcomes[outcome.name] = outcome
        key = f"part.{outcome.name}"
        values: dict[str, Value] = {key: outcome.result, f"{key}.seconds": round(outcome.seconds)}
        if outcome.tail:
            values[f"{key}.error"] = outcome.tail
        self.save(values)
        self.say(f"{outcome.name}: {outcome.result}, {outcome.seconds:.0f} s")
        if outcome.tail:
            print(outcome.tail, file=sys.stderr)
        return outcome

    def save(self, values: dict[str, Value]) -> None:
        """Rewrite everything in the folder."""
        self.summary.update({**values, "seconds": round(self.clock.passed, 1)})
        with contextlib.suppress(KeyError):
            (self.out / "gpu.md").write_text(page.render(self.summary.values), encoding="utf-8")
        if self.logs.is_dir():
            with tarfile.open(self.out / "logs.tmp", "w:gz") as archive:
                archive.add(self.logs, arcname="logs")
            (self.out / "logs.tmp").replace(self.out / "logs.tar.gz")

    def say(self, text: str) -> None:
        """Print progress to stderr."""
        print(f"[{self.clock.passed:4.0f} s] {text}", file=sys.stderr, flush=True)

    # ---- what the parts are ------------------------------------------------------------

    def python(self, name: str, arguments: Sequence[str], limit: float, **kwargs: object) -> Part:
        """Return a part that runs this Python."""
        return Part(name, [sys.executable, *arguments], limit, **kwargs)  # type: ignore[arg-type]

    def prepare(self) -> bool:
        """Describe the machine and make pydetox importable; False where that fails."""
        manifest = Manifest.read(self.options.bundle) if self.options.bundle else None
        if self.options.bundle and manifest is None:
            self.say(f"{self.options.bundle}: no bundle.json in it; make it with make gpu-bundle")
            return False
        torch = machine.torch_facts(self.options.device)
        self.save(
            {
                **machine.facts(self.options.device, torch, manifest),
                "tiny": int(self.options.tiny),
                "limit_seconds": self.options.limit,
                "complete": "no",
            }
        )
        if not torch:
            self.say(f"{sys.executable} cannot import torch, or has no {self.options.device}")
            return False
        if self.gpu and "gpu" not in torch:
            self.say("torch sees no GPU; DEVICE=cpu TINY=1 tries everything on a CPU")
            return False
        if manifest is None:
            if native.needs_build():
                self.say(f"pydetox is not built for {sys.executable}: make setup, or --bundle")
                return False
            return True
        self.say(f"installed from the bundle: {native.install_missing(manifest) or 'nothing'}")
        architectures = str(torch.get("capability", manifest.architecture))
        cuda = "ON" if torch["cuda"] != "none" else "OFF"
        configure = [native.configure_command(cuda, architectures)]
        current = manifest.sources == source_digest()
        if architectures == manifest.architecture and current:
            native.take_libraries(manifest)
            commands = [*configure, [sys.executable, "-m", "benchmarks.gpu.native"]]
            if self.run(Part("native", native.together(commands), 120)).passed:
                # It would take time from the measuring where nothing is waited for before.
                if cuda == "ON" and not self.options.skip_correctness:
                    self.start_in_background(self.build())
                return True
            self.say("the bundle's libraries cannot be used: building all")
        elif current:
            self.say(f"the bundle is for {manifest.architecture}, this GPU is {architectures}")
        else:
            self.say("the bundle was built from other sources than these: building all")
        commands = [*configure, *native.build_commands(native.PACKAGE)]
        return self.run(Part("native-whole", native.together(commands), 400)).passed

    def build(self) -> Part:
        """Return the project's own build for this torch, in a copy of the tree."""
        shutil.rmtree(FRESH, ignore_errors=True)
        FRESH.mkdir(parents=True)
        for name in ("pydetox", "tests"):
            leave = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(ROOT / name, FRESH / name, ignore=leave)
        shutil.copyfile(ROOT / "pyproject.toml", FRESH / "pyproject.toml")
        commands = native.together(list(native.build_commands(FRESH / "pydetox")))
        # Which C++ runtime the compiler links decides whether exceptions arrive: the log shows it.
        commands[-1] += f"\nldd {shlex.quote(str(FRESH / 'pydetox' / '_C_cuda.so'))} || true"
        return Part("build", ["nice", "-n", "10", *commands], 240)

    def sanitizers(self) -> Iterator[Part]:
        """Every operator once under each checker of compute-sanitizer; on a CPU, once without."""
        module = ["-m", "benchmarks.gpu.operators_once", "--device", self.options.device, "--small"]
        if not self.gpu:
            yield self.python("operators-once", module, 120)
            return
        if shutil.which("compute-sanitizer") is None:
            self.leave_out("sanitizers", "there is no compute-sanitizer on PATH")
            return
        for tool in SANITIZERS:
            # memcheck looks at every kernel, races are sought in ours alone, which is slower.
            # initcheck has to see that torch's kernels write what ours read.
            ours_alone = tool in ("racecheck", "synccheck")
            only = ["--kernel-regex", "kns=pydetox"] if ours_alone else []
            checker = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *only]
            # No caching: what is beyond a tensor is beyond its allocation.
            uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            command = [*checker, sys.executable, *module]
            yield Part(f"sanitizer-{tool}", command, 180, environment=uncached)

    def correctness(self) -> None:
        """Prove what can be proved; stop what is in the background when it is time to time."""
        self.until = plan.CORRECTNESS_SHARE * self.options.limit
        for part in self.sanitizers():
            self.start_in_background(part)
        tiny = ["--tiny"] if self.options.tiny else []
        (WORK / "demo-cpu.json").unlink(missing_ok=True)
        suspects = ["-m", "benchmarks.gpu.demo", "--suspects", str(WORK), *tiny]
        self.start_in_background(self.python("demo-cpu", suspects, 240))
        self.run(self.python("doctor", ["-m", "pydetox", "doctor"], 60))
        selftest = ["-m", "pydetox", "doctor", "--selftest", "--format", "json"]
        self.run(self.python("selftest", selftest, 120))
        self.run(self.pytest("pytest-cuda", ROOT))
        self.finish_background(self.until)
        built = self.outcomes.get("build")
        if built is not None and built.passed:
            paths = [str(native.SITE), str(FRESH)]
            environment = {"PYTHONPATH": os.pathsep.join(paths)}
            self.run(self.pytest("pytest-fresh-build", FRESH, environment))

    def pytest(self, name: str, root: Path, environment: dict[str, str] | None = None) -> Part:
        """Return the tests that need a GPU: no other module, which may need packages of its own."""
        marked = [
            str(path.relative_to(root))
            for path in sorted((root / "tests").rglob("test_*.py"))
            if "pytest.mark.cuda" in path.read_text(encoding="utf-8")
        ]
        arguments = ["-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", *marked]
        return Part(name, [sys.executable, *arguments], 150, 10, environment or {}, root)

    def measure(self) -> None:
        """Run the stages, in as few processes as it takes: one that is lost is replaced."""
        self.until = None
        names = self.options.only or [stage.name for stage in plan.STAGES]
        stages = {stage.name: stage for stage in plan.STAGES if stage.name in names}
        if "demo" in stages and not (WORK / "demo-cpu.json").is_file():
            reason = "the part demo-cpu has made nothing to compare with"
            events.append(self.figures, event="left out", stage="demo", reason=reason)
            del stages["demo"]
        outcome, seconds = Outcome("measure", "passed"), self.clock.passed
        while stages:
            before = len(stages)
            deadline = self.clock.deadline - plan.RESERVE
            arguments = ["-m", "benchmarks.gpu.stages", "--device", self.options.device]
            arguments += ["--results", str(self.figures), "--work", str(WORK)]
            arguments += ["--deadline", str(deadline), *(["--tiny"] if self.options.tiny else [])]
            running = self.start(self.python("measure", [*arguments, *stages], self.options.limit))
            if isinstance(running, Outcome):
                for name in stages:
                    events.append(self.figures, event="left out", stage=name, reason="no time left")
                return self.take_figures()
            outcome = running.wait(_Watch(self, stages))
            self.end_stage(outcome)
            self.take_figures()
            for name in events.progress(events.read(self.figures)).finished:
                stages.pop(name, None)
            if outcome.passed or len(stages) == before:
                break
        passed = Outcome(outcome.name, outcome.result, self.clock.passed - seconds, outcome.tail)
        self.note(passed)
        return None

    def end_stage(self, outcome: Outcome) -> None:
        """Note the stage in which a process ended too early."""
        stage = events.progress(events.read(self.figures)).running
        if stage is not None:
            if outcome.unfinished:
                events.append(self.figures, event="left out", stage=stage, reason=outcome.result)
                return
            reason = outcome.result + (f": {outcome.tail[-300:]}" if outcome.tail else "")
            events.append(self.figures, event="end", stage=stage, seconds=0.0, error=reason)

    def take_figures(self) -> None:
        """Take over what was measured so far; the keys carry the device's type."""
        now = events.progress(events.read(self.figures))
        kind = str(self.summary.values["device_type"])
        self.save({**now.results, **{f"{kind}.{k}": v for k, v in now.figures.items()}})

    def counters(self) -> None:
        """Read the hardware counters of every kernel of pydetox."""
        if not self.gpu or self.options.tiny or self.options.no_counters:
            return
        if shutil.which("ncu") is None:
            self.leave_out("ncu", "there is no ncu on PATH")
            return
        command = ["ncu", "--clock-control", "none", "--kernel-name-base", "demangled"]
        command += ["--kernel-name", "regex:pydetox", "--csv", "--metrics", ",".join(NCU_METRICS)]
        module = ["-m", "benchmarks.gpu.operators_once", "--device", self.options.device]
        self.run(Part("ncu", [*command, sys.executable, *module], 90, expected=30))
        log = self.logs / "ncu.log"
        if log.is_file():
            shutil.copyfile(log, self.out / "ncu.csv")

    def finish(self) -> int:
        """Say how it went."""
        outcomes = self.outcomes.items()
        failed = [name for name, o in outcomes if not (o.passed or o.unfinished)]
        stages = events.progress(events.read(self.figures)).results
        failed += [key for key, value in stages.items() if value == "failed"]
        self.save({"complete": "yes", "failed": ", ".join(failed) or "nothing"})
        print((self.out / "gpu.md").read_text(encoding="utf-8"))
        self.say(f"written to {self.out}; failed: {', '.join(failed) or 'nothing'}")
        return 1 if failed else 0

    def stop(self) -> None:
        """End what is still at work."""
        for running in self.background:
            running.stop()


class _Watch:
    """Looks at the figures while they come, and ends a stage that is over its limit."""

    def __init__(self, check: Check, stages: dict[str, plan.Stage]) -> None:
        self._check, self._stages = check, stages
        self._seen, self._stage, self._since = 0, "", time.monotonic()

    def __call__(self) -> str | None:
        """Return why the process has to end, or None."""
        size = self._check.figures.stat().st_size if self._check.figures.is_file() else 0
        if size != self._seen:
            self._seen = size
            stage = events.progress(events.read(self._check.figures)).running or ""
            if stage != self._stage:
                self._stage, self._since = stage, time.monotonic()
                self._check.take_figures()
                if stage:
                    self._check.say(f"measuring {stage}: {self._stages[stage].about}")
        seconds = time.monotonic() - self._since
        # Without a stage: it is importing.
        limit = self._stages[self._stage].limit if self._stage else 90.0
        return f"stopped after {seconds:.0f} s" if seconds > limit else None


def main() -> int:
    """Run the check."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu")
    parser.add_argument("--tiny", action="store_true", help="small models and tensors")
    parser.add_argument("--limit", type=float, default=plan.LIMIT, help="seconds for everything")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu")
    parser.add_argument("--bundle", type=Path, help="folder that make gpu-bundle has made")
    parser.add_argument("--only", nargs="*", choices=[stage.name for stage in plan.STAGES])
    parser.add_argument("--skip-correctness", action="store_true", help="measure alone")
    parser.add_argument("--no-counters", action="store_true", help="leave ncu out")
    options = parser.parse_args()
    # Nothing is fetched, idle threads sleep, and a log shows what was printed before a kill.
    os.environ.update(HF_HUB_OFFLINE="1", OMP_WAIT_POLICY="passive", PYTHONUNBUFFERED="1")
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    check = Check(options)
    try:
        if not check.prepare():
            return 2
        if not options.skip_correctness:
            check.correctness()
        check.measure()
        check.counters()
        return check.finish()
    finally:
        check.stop()


if __name__ == "__main__":
    sys.exit(main())
