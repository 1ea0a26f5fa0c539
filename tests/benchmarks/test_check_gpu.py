"""benchmarks/gpu: what it says of which device, and that it goes on after whatever fails."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import bundle, counters, events, machine, page, plan, recorder, stages
from benchmarks.gpu.__main__ import WRITTEN, Check
from benchmarks.gpu.processes import Clock, Outcome, Part, Running
from benchmarks.gpu.summary import SCHEMA, Summary, SummaryError, figures, read_summary

# Made up for these tests.
HEAD = {"schema": SCHEMA, "tiny": 0, "torch": "2.11.0", "date": "2026-01-02 03:04 UTC"}
GPU = {**HEAD, "device_type": "cuda", "device": "Some GPU", "complete": "yes"}
CPU = {**HEAD, "device_type": "cpu", "device": "CPU: some processor", "complete": "yes"}


def write(path: Path, values: dict[str, object]) -> Path:
    path.write_text(json.dumps(values))
    return path


# ---- the page -------------------------------------------------------------------------


def test_the_page_shows_the_results_in_its_folder() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.renewed(text) == text, "run: python -m benchmarks.gpu.page"


def test_a_page_without_results_says_so(tmp_path: Path) -> None:
    assert page.NOT_MEASURED in page.renewed(f"a\n{page.BEGIN}\nold\n{page.END}\nb\n", tmp_path)
    with pytest.raises(SummaryError, match="results"):
        page.renewed("no marks", tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (CPU, "takes none of a CPU"),
        ({**CPU, "device_type": "cuda"}, "takes none of a CPU"),
        ({**GPU, "tiny": 1}, "TINY"),
        ({**GPU, "cpu.stamp_f32.forward_us": 1.0}, "figures of a CPU"),
        ({**GPU, "schema": "other"}, "schema"),
        ({**GPU, "nested": {}}, "expected a number or a string"),
    ],
)
def test_the_page_takes_nothing_but_a_gpu_in_full_size(
    tmp_path: Path, values: dict[str, object], message: str
) -> None:
    write(tmp_path / "result.json", values)
    with pytest.raises(SummaryError, match=message):
        page.section(tmp_path)


def test_tables_carry_the_device_and_only_a_gpu_has_bounds(tmp_path: Path) -> None:
    name = "stamp_f32.forward_of_copy"
    on_gpu = page.render({**GPU, f"cuda.{name}": 0.5, "cuda.demo.verdicts_equal": 1})
    assert "### Some GPU" in on_gpu
    assert "| figure on Some GPU |" in on_gpu
    assert f"| {name} | 0.5 | >= 0.8 | missed |" in on_gpu
    assert "| demo.verdicts_equal | 1 | >= 1.0 | holds |" in on_gpu
    assert "not measured: " in on_gpu
    assert "scan_b32.seconds" in on_gpu
    on_cpu = page.render({**CPU, f"cpu.{name}": 0.5})
    assert "say nothing about any GPU" in on_cpu
    assert "| figure on CPU: some processor |" in on_cpu
    assert f"| {name} | 0.5 | | |" in on_cpu
    assert "missed" not in on_cpu
    write(tmp_path / "result.json", GPU)
    assert "### Some GPU" in page.section(tmp_path)


def ncu_output(*calls: tuple[str, str]) -> str:
    """Return what ncu writes for kernels and their times in nanoseconds."""
    head = ["ID", "Kernel Name", "Block Size", "Grid Size", "Metric Name", "Metric Unit"]
    lines = ["==PROF== Connected", ",".join(f'"{name}"' for name in [*head, "Metric Value"])]
    metrics = [
        ("dram__throughput.avg.pct_of_peak_sustained_elapsed", "%", "46.56"),
        ("sm__throughput.avg.pct_of_peak_sustained_elapsed", "%", "40.1"),
        ("sm__warps_active.avg.pct_of_peak_sustained_active", "%", "25"),
        ("launch__registers_per_thread", "register/thread", "75"),
    ]
    for number, (kernel, time_ns) in enumerate(calls):
        for metric in [*metrics, ("gpu__time_duration.sum", "ns", time_ns)]:
            cells = [str(number), kernel, "(128, 1, 1)", "(2, 3, 4)", *metric]
            lines.append(",".join(f'"{cell}"' for cell in cells))
    return "\n".join(lines)


def test_counters_of_the_second_round_become_a_table(tmp_path: Path) -> None:
    stamp, total = "void stamp<float, (int)4>(Params)", "void sum(P)"
    calls = [(stamp, "9,000"), (total, "9,000"), (stamp, "40,768"), (total, "5")]
    (tmp_path / "ncu.csv").write_text(ncu_output(*calls))
    found = counters.read_ncu(tmp_path / "ncu.csv")
    assert [(one.kernel, one.microseconds) for one in found] == [
        ("stamp<float, (int)4>", 40.8),
        ("sum", 0.0),
    ]
    assert (found[0].blocks, found[0].threads, found[0].registers) == (24, 128, 75)
    assert counters.from_csv(counters.to_csv(found)) == found
    assert list(counters.table(found))[2].endswith("| 24 × 128 | 40.8 | 47% | 40% | 25% | 75 |")
    (tmp_path / "ncu.csv").write_text(ncu_output(*calls[:1]))
    assert len(counters.read_ncu(tmp_path / "ncu.csv")) == 1
    (tmp_path / "ncu.csv").write_text("==ERROR== no device")
    with pytest.raises(ValueError, match="no kernel"):
        counters.read_ncu(tmp_path / "ncu.csv")


def test_figures_are_those_of_the_summarys_own_device() -> None:
    assert figures({**CPU, "cpu.a": 1, "cuda.b": 2}) == {"a": 1}


# ---- what is kept ---------------------------------------------------------------------


def test_a_summary_is_whole_after_every_update(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    summary = Summary(path)
    for number in range(3):
        summary.update({f"part.{number}": "passed"})
        assert read_summary(path)[f"part.{number}"] == "passed"
    assert list(tmp_path.iterdir()) == [path]


def test_a_summary_holds_no_path_of_the_machine(tmp_path: Path) -> None:
    summary = Summary(tmp_path / "summary.json")
    error = f'File "{page.ROOT}/pydetox/a.py", File "/opt/x/lib/site-packages/torch/b.py", line 3'
    summary.update({"cuda.a.error": error, "tiny": 0})
    expected = 'File "pydetox/a.py", File "site-packages/torch/b.py", line 3'
    assert read_summary(tmp_path / "summary.json")["cuda.a.error"] == expected


def test_events_survive_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "figures.jsonl"
    events.append(path, event="start", stage="a")
    events.append(path, event="figure", name="x", value=1.5)
    events.append(path, event="end", stage="a", seconds=2.0, error="no memory")
    events.append(path, event="left out", stage="b", reason="3 s left")
    events.append(path, event="start", stage="c")
    with path.open("a") as file:
        file.write('{"event": "figure", "na')
    before = events.read(path)
    events.append(path, event="figure", name="y", value=2.0)  # by the process that goes on
    assert events.read(path) == [*before, {"event": "figure", "name": "y", "value": 2.0}]
    now = events.progress(events.read(path))
    assert (now.figures, now.finished, now.running) == ({"x": 1.5, "y": 2.0}, ["a", "b"], "c")
    assert now.results["stage.a"] == "failed"
    assert now.results["stage.a.error"] == "no memory"
    assert now.results["stage.b"] == "left out: 3 s left"


def test_every_planned_stage_can_run() -> None:
    assert [stage.name for stage in plan.STAGES] == list(stages.RUN)


# ---- processes ------------------------------------------------------------------------


def test_a_part_ends_at_its_limit_with_all_it_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    script = f"sleep 60 & echo $! > {pid}; echo begun; wait"
    outcome = Running(Part("slow", ["sh", "-c", script], 0.7), tmp_path, 0.7).wait()
    assert outcome.result == "stopped after 1 s"
    assert not outcome.unfinished
    assert outcome.tail == "begun"
    child = int(pid.read_text())
    for _ in range(50):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the part's child is still there")


def test_what_the_time_for_everything_stops_has_not_failed(tmp_path: Path) -> None:
    outcome = Running(Part("slow", ["sleep", "60"], 60), tmp_path, 0.3).wait()
    assert outcome.result == "not finished: stopped after 0 s, no time left"
    assert outcome.unfinished


def test_outcomes_in_words(tmp_path: Path) -> None:
    def outcome(*command: str) -> Outcome:
        return Running(Part("it", command, 60), tmp_path, 60.0).wait()

    assert outcome("true").passed
    assert outcome("sh", "-c", "echo why; exit 7").result == "failed (exit code 7)"
    assert "could not be started" in outcome("no such program").result


def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *stage_names: str) -> Check:
    from argparse import Namespace

    monkeypatch.setattr("benchmarks.gpu.__main__.WORK", tmp_path / "work")
    options = Namespace(device="cpu", limit=60.0, out=tmp_path / "out", tiny=True)
    options.only = list(stage_names)
    found = Check(options)
    found.save({**{k: v for k, v in CPU.items() if k != "complete"}, "tiny": 1})
    return found


def test_a_lost_process_is_replaced_for_the_stages_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [stage.name for stage in plan.STAGES[:4]]
    run = check(tmp_path, monkeypatch, *names)
    # Like `stages`: measures the first stage, dies in the second one of all.
    program = """
import os, sys
from pathlib import Path
from benchmarks.gpu import events
path, *names = Path(sys.argv[1]), *sys.argv[2:]
for name in names:
    events.append(path, event="start", stage=name)
    if name == "operators":
        os.abort()
    events.append(path, event="figure", name=name + ".us", value=1.0)
    events.append(path, event="end", stage=name, seconds=0.1)
"""
    monkeypatch.setattr(
        run,
        "python",
        lambda name, arguments, limit: Part(
            name, [sys.executable, "-c", program, str(run.figures), *arguments[9:]], limit
        ),
    )
    run.measure()
    values = read_summary(tmp_path / "out" / "summary.json")
    assert [values[f"stage.{name}"] for name in names] == ["measured", "failed", *["measured"] * 2]
    assert "exit code -6" in str(values["stage.operators.error"])
    assert values["cpu.steps.us"] == 1.0
    assert not any(key.startswith("cuda.") for key in values)
    assert run.finish() == 1


def test_what_does_not_fit_is_left_out_and_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = check(tmp_path, monkeypatch, "steps")
    run.clock = Clock(5.0)
    run.measure()
    assert not run.run(Part("late", ["true"], 60)).passed
    values = read_summary(tmp_path / "out" / "summary.json")
    assert values["stage.steps"] == "left out: no time left"
    assert str(values["part.late"]).startswith("left out: 1 s left") or "0 s left" in str(
        values["part.late"]
    )
    assert run.finish() == 0


def test_what_is_stopped_for_the_timing_has_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = check(tmp_path, monkeypatch)
    run.start_in_background(Part("slow", ["sleep", "60"], 60))
    run.finish_background(0.3)
    values = read_summary(tmp_path / "out" / "summary.json")
    assert values["part.slow"] == "not finished: stopped at second 0"
    assert run.finish() == 0
    run.run(Part("wrong", ["false"], 60))
    assert run.finish() == 1


def test_a_part_in_the_foreground_ends_when_the_timing_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = check(tmp_path, monkeypatch)
    run.until = 6.0
    assert run.run(Part("tests", ["sleep", "60"], 60)).unfinished
    assert run.clock.passed < 12
    assert run.finish() == 0
    assert run.run(Part("later", ["true"], 60)).result.startswith("left out")
    run.until = None
    assert run.run(Part("timing", ["true"], 60)).passed


def test_a_stage_that_the_end_of_all_time_stops_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = check(tmp_path, monkeypatch)
    events.append(run.figures, event="start", stage="steps")
    run.end_stage(Outcome("measure", "not finished: stopped after 9 s, no time left"))
    run.take_figures()
    assert run.finish() == 0
    values = read_summary(tmp_path / "out" / "summary.json")
    assert str(values["stage.steps"]).startswith("left out: not finished")


def test_a_run_begins_without_what_an_earlier_one_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in WRITTEN:
        (out / name).write_text("of yesterday")
    check(tmp_path, monkeypatch)
    assert {path.name for path in out.iterdir()} <= {"summary.json", "gpu.md"}
    assert all(path.read_text() != "of yesterday" for path in out.iterdir())


def test_the_gpu_that_is_described_is_the_one_that_is_measured() -> None:
    assert machine.torch_facts("cpu")["torch"] == torch.__version__
    if not torch.cuda.is_available():
        assert "gpu" not in machine.torch_facts("cuda")
        return
    last = torch.cuda.device_count() - 1
    name = torch.cuda.get_device_properties(last).name
    assert machine.torch_facts(f"cuda:{last}")["gpu"] == name
    assert machine.torch_facts(f"cuda:{last + 1}") == {}


# ---- the measuring process ------------------------------------------------------------


def session(tmp_path: Path) -> recorder.Session:
    return recorder.Session(torch.device("cpu"), True, tmp_path / "figures.jsonl", tmp_path)


def test_running_out_of_memory_is_noted_and_the_rest_goes_on(tmp_path: Path) -> None:
    run = session(tmp_path)
    with recorder.stage(run, "steps"):
        with run.attempt("large"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        run.record("small.us", 2.0)
    now = events.progress(events.read(run.results))
    assert "OutOfMemoryError" in str(now.figures["large.error"])
    assert now.figures["small.us"] == 2.0
    assert now.results["stage.steps"] == "measured"
    assert session(tmp_path).figures["small.us"] == 2.0  # the next process knows it


def test_a_lost_device_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "_lost", [])
    run = session(tmp_path)
    with pytest.raises(recorder.DeviceLostError), recorder.stage(run, "steps"), run.attempt("x"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    assert "illegal memory access" in str(
        events.progress(events.read(run.results)).results["stage.steps.error"]
    )


# ---- the bundle -----------------------------------------------------------------------


def test_a_bundle_without_its_manifest_is_none(tmp_path: Path) -> None:
    assert bundle.Manifest.read(tmp_path) is None
    wheels = (bundle.Wheel("a-1-py3-none-any.whl", "a"),)
    manifest = bundle.Manifest(tmp_path, "9.0", "abc", bundle.source_digest(), "2.11.0", wheels)
    manifest.write()
    assert bundle.Manifest.read(tmp_path) == manifest


def test_the_libraries_take_nothing_unstable_from_torch() -> None:
    from pydetox.ops._library import PACKAGE_DIR

    for name in bundle.LIBRARIES:
        if (PACKAGE_DIR / name).is_file():
            assert bundle.unstable_symbols(PACKAGE_DIR / name) == []
    assert bundle.unstable_symbols(Path(torch.__file__).parent / "lib" / "libtorch_python.so")
