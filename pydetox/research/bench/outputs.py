"""The files of a run: JSON for each result, CSV, Markdown tables, one HTML page, the summary."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...atomic import refuse_foreign_folder, write_file
from ...reporting import to_json
from ...reporting.charts import Series, percent_chart
from ...reporting.heat_map import heat_map
from ...reporting.html import (
    Html,
    cards,
    details,
    image_strip,
    page,
    pairs,
    section,
    subsection,
    table,
    text,
)
from ...reporting.result import ASR_NOTE
from ...reporting.values import MISSING, duration, interval, number, percent
from ..defenses import DEFENSES, TUNING_EFFORT
from .plan import Plan
from .summary import KNOWN, UNKNOWN, asr_by_attack, mean, of, roc, won_shares, worse

_COLUMNS = (
    "attack", "seed", "targets", "rate", "defense", "ca", "ca_low", "ca_high", "asr", "asr_low",
    "asr_high", "relapse", "images", "labels", "seconds",
)  # fmt: skip


#: What `begin_outputs` and `write_outputs` write.
OUTPUT_NAMES = (
    "plan.json",
    "results",
    "results.csv",
    "results.md",
    "report.html",
    "run.json",
    "summary.json",
)


def begin_outputs(folder: Path, plan: Plan) -> None:
    """Write the plan.

    Raises OutputError if the folder cannot be written, or holds files of these names that are not
    of a benchmark.
    """
    mark = {"plan.json": r'\{\s*"data": [^\n]+\s*"attacker": \d'}
    refuse_foreign_folder(folder, OUTPUT_NAMES, mark)
    write_file(folder / "plan.json", to_json(plan) + "\n")


def write_outputs(folder: Path, result: Mapping[str, Any]) -> None:
    """Write all files to `folder`. summary.json comes last, so it shows that a run is complete."""
    (folder / "summary.json").unlink(missing_ok=True)
    for row in [*result["before"], *result["rows"]]:
        name = f"{row['suspect']}_{_file_name(row['defense'])}.json"
        write_file(folder / "results" / name, to_json(clip_benchmark_result(row, result)) + "\n")
    write_file(folder / "results.csv", csv_table(result))
    write_file(folder / "results.md", markdown(result))
    write_file(folder / "report.html", html_page(result))
    write_file(folder / "run.json", to_json(result) + "\n")
    write_file(folder / "summary.json", to_json(result["summary"]) + "\n")


def clip_benchmark_result(row: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """Return one result in the layout of CLIP_benchmark, whose tools merge many into a table.

    "model" is the suspect, and "pretrained" is the defence. "metrics" has acc1 and
    mean_per_class_recall as in CLIP_benchmark, and asr, that of the worse backdoor if there are
    two.
    """
    recalls = [v for v in row["per_class"] if v is not None]
    metrics: dict[str, Any] = {
        "acc1": row["ca"],
        "mean_per_class_recall": sum(recalls) / len(recalls),
    }
    if row["attack"] is not None:
        metrics["asr"] = worse(row)
    return {
        "dataset": result["plan"]["data"],
        "model": row["suspect"],
        "pretrained": row["defense"],
        "task": "zeroshot_classification",
        "metrics": metrics,
        "language": "en",
    }


def csv_table(result: Mapping[str, Any]) -> str:
    """Return one line per suspect and defence, with a header."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row in [*result["before"], *result["rows"]]:
        low, high = row["ca_ci"]
        attacked = row["attack"] is not None
        index = row["asr"].index(max(row["asr"])) if attacked else 0
        asr_low, asr_high = row["asr_ci"][index] if attacked else (None, None)
        given = {
            **{name: row.get(name) for name in _COLUMNS},
            "targets": " ".join(map(str, row["targets"])),
            "ca_low": low,
            "ca_high": high,
            "asr": row["asr"][index],
            "asr_low": asr_low,
            "asr_high": asr_high,
            "relapse": max(row["relapse"]) if row.get("relapse") else None,
        }
        writer.writerow(["" if given[name] is None else given[name] for name in _COLUMNS])
    return buffer.getvalue()


def overview(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines: per defence, ASR by attack, its mean, CA kept, and what it used."""
    before = {row["suspect"]: row for row in result["before"]}
    attacks = list(dict.fromkeys(row["attack"] for row in result["rows"]))
    header = ["Defence", *attacks, "ASR, mean", "CA kept", "images", "labels", "seconds"]
    counted = {row["suspect"] for row in result["rows"]}
    undefended = [row for row in result["before"] if row["suspect"] in counted]
    parts = [("no defence", undefended)]
    parts += [(one.name, of(result["rows"], one.name)) for one in DEFENSES]
    lines = []
    for name, rows in parts:
        if not rows:
            continue
        asr = asr_by_attack(rows)
        kept = mean(row["ca"] / before[row["suspect"]]["ca"] for row in rows)
        used = [f"{max(row.get(key) or 0 for row in rows):,}" for key in ("images", "labels")]
        seconds = mean(row["seconds"] for row in rows if row.get("seconds") is not None)
        lines.append(
            [
                name,
                *(percent(asr.get(attack)) for attack in attacks),
                percent(mean(asr.values())),
                percent(kept),
                *used,
                number(seconds) if seconds is not None else MISSING,
            ]
        )
    return header, lines


def verdicts(scans: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines: per attack, and for clean models, what the scans said."""
    lines = []
    for attack in sorted({one["attack"] for one in scans}, key=lambda name: (not name, name)):
        part = [one for one in scans if one["attack"] == attack]
        right = [one["target_right"] for one in part if one["target_right"] is not None]
        p_values = sorted(one["p_value"] for one in part if one["p_value"] is not None)
        shown = [format(p, ".2g") for p in (p_values[:1] + p_values[-1:])]
        lines.append(
            [
                attack or "clean",
                str(len(part)),
                str(sum(one["flagged"] for one in part)),
                str(sum(right)) if right else MISSING,
                " to ".join(dict.fromkeys(shown)) or MISSING,
                number(mean(one["seconds"] for one in part)),
            ]
        )
    return ["Models", "Number", "Flagged", "Right target", "p-values", "Seconds"], lines


def victims(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines: per attack, ASR of its victims before any defence, seed by seed."""
    rows = [row for row in result["before"] if row["attack"] is not None]
    seeds = sorted({row["seed"] for row in rows})
    lines = []
    for attack in dict.fromkeys(row["attack"] for row in rows):
        cells = {row["seed"]: row for row in rows if row["attack"] == attack}
        shown = [
            ", ".join(map(percent, cells[seed]["asr"])) + ("" if cells[seed]["counts"] else " (no)")
            if seed in cells
            else MISSING
            for seed in seeds
        ]
        lines.append([attack, percent(next(iter(cells.values()))["rate"]), *shown])
    return ["Attack", "poisoned", *(f"seed {seed}" for seed in seeds)], lines


def against(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines: per baseline, what pydetox has over it (see `won_shares`)."""
    lines = []
    for name, share in won_shares(result["rows"]).items():
        known = next(one for one in DEFENSES if one.name == name).needs_trigger
        lines.append([name, KNOWN if known else UNKNOWN, percent(share)])
    return ["Baseline", "compared with", "attacks won"], lines


def markdown(result: Mapping[str, Any]) -> str:
    """Return the tables of a run as Markdown."""
    header, lines = overview(result)
    plan = result["plan"]
    seeds = ", ".join(map(str, plan["seeds"]))
    effort = "every method with its first setting"
    if plan["tuning_attacks"]:
        effort = (
            f"{TUNING_EFFORT} settings tried per method, on models of seed {plan['tuning_seed']}"
        )
    made = result.get("made")
    parts = [
        *([f"`{made['command']}`, {made['date']}.", ""] if made else []),
        f"ASR under the true triggers, as the mean over the seeds {seeds}. For a model with two "
        "backdoors, the worse one counts. Images of the target class are left out. CA kept is the "
        f"share of the victim's own CA. Tuning: {effort}.",
        "",
        _markdown_table(header, lines),
        "",
        "Verdicts on clean models and on the victims that count. The calibration saw none of them.",
        "",
        _markdown_table(*verdicts(result["scans"])),
        "",
        "Share of attacks for which pydetox has the lower ASR at an equal or higher CA (within "
        "half a point).",
        "",
        _markdown_table(*against(result)),
        "",
        "ASR of the victims before any defence. (no): the backdoor did not work, and the victim is "
        "left out everywhere else.",
        "",
        _markdown_table(*victims(result)),
        "",
        _markdown_table(["figure", "value"], _figures(result)),
        "",
        _markdown_table(
            ["stage", "minutes"],
            [(name, number(value / 60)) for name, value in result["seconds"].items()],
        ),
        "",
    ]
    return "\n".join(parts)


def html_page(result: Mapping[str, Any]) -> str:
    """Return the page: tables, alpha curves, maps of xi, triggers, ROC curve, settings."""
    summary = result["summary"]
    return page(
        "pydetox bench",
        f"{result['plan']['data']}, seeds {', '.join(map(str, result['plan']['seeds']))}",
        [
            cards(
                [
                    {"label": "Known trigger: ASR", "value": percent(summary["known.asr_mean"])},
                    {"label": "CA kept", "value": percent(summary["known.ca_retained"])},
                    {
                        "label": "Unknown trigger: ASR",
                        "value": percent(summary["unknown.asr_mean"]),
                    },
                    {"label": "CA kept", "value": percent(summary["unknown.ca_retained"])},
                    {"label": "Detection: AUROC", "value": number(summary["detection.auroc"])},
                ]
            ),
            _overview(result),
            _victims(result),
            _detection(result),
            _curves(result),
            _xi(result.get("xi")),
            _triggers(result["rows"]),
            _won(result["rows"]),
            _settings(result["settings"]),
            section("Figures", pairs(dict(_figures(result)))),
            section("Plan", pairs({k: str(v) for k, v in result["plan"].items()})),
        ],
    )


def _overview(result: Mapping[str, Any]) -> Html:
    header, lines = overview(result)
    shown = table(header, [[text(cell) for cell in line] for line in lines])
    rows = [
        [
            text(row["suspect"]),
            text(row["defense"]),
            text(f"{percent(row['ca'])} [{interval(row['ca_ci'])}]"),
            *_asr_cells(row),
            text(percent(max(row["relapse"])) if row.get("relapse") else MISSING),
            text(duration(row.get("seconds"))),
        ]
        for row in result["rows"]
    ]
    headers = ["Victim", "Defence", "CA", "ASR", "after benign fine-tuning", "time"]
    every = details("Every victim", table(headers, rows, numeric=2))
    return section("Attack success rate by defence and attack", shown, every, note=ASR_NOTE)


def _asr_cells(row: Mapping[str, Any]) -> list[Html]:
    shares = [
        f"{percent(asr)} [{interval(bounds)}]"
        for asr, bounds in zip(row["asr"], row["asr_ci"], strict=True)
        if asr is not None
    ]
    return [text(", ".join(shares) or MISSING)]


def _victims(result: Mapping[str, Any]) -> Html:
    names = result["plan"]["data"]
    rows = [
        [
            text(row["suspect"]),
            text(percent(row["rate"])),
            text(percent(row["ca"])),
            *_asr_cells(row),
            text("yes" if row["counts"] else "no: the backdoor did not take"),
        ]
        for row in result["before"]
        if row["attack"] is not None
    ]
    shown = table(["Victim", "Poisoned", "CA", "ASR", "counted"], rows)
    return section("Victims before any defence", shown, note=f"Test images of {names}.")


def _detection(result: Mapping[str, Any]) -> Html:
    planted = [one for one in result["scans"] if one["attack"] is not None]
    clean = [one for one in result["scans"] if one["attack"] is None]
    scores = [
        [-1e9 if one["score"] is None else one["score"] for one in part]
        for part in (planted, clean)
    ]
    chart = Html("")
    if planted and clean:
        false, true = roc(*scores)
        chart = percent_chart(
            false,
            [Series("all attacks", true, "TPR")],
            title="ROC curve",
            x_label="false positive rate",
            y_label="true positive rate",
        )
    headers, lines = verdicts(result["scans"])
    return section("Detection", chart, table(headers, [list(map(text, line)) for line in lines]))


def _curves(result: Mapping[str, Any]) -> Html:
    """Return CA and ASR over alpha, the first round of each attack's first victim."""
    parts = []
    for name in (KNOWN, UNKNOWN):
        seen = set()
        for row in of(result["rows"], name):
            searches = row["details"]["searches"]
            if row["attack"] in seen or not searches:
                continue
            seen.add(row["attack"])
            first = searches[0]
            chart = percent_chart(
                first["alpha"],
                [
                    Series("CA: clean accuracy", first["ca"], "CA"),
                    Series("ASR: of the triggers that the defence has", first["asr"], "ASR"),
                ],
                title=f"{name}, {row['suspect']}",
                x_label="scaling coefficient α",
                y_label="share of the defender's images (%)",
                marked=first["chosen"],
                marked_label=f"α = {number(first['chosen'])}",
            )
            parts.append(subsection(text(f"{name}: {row['suspect']}"), chart))
    return section("CA and ASR over α", *parts) if parts else Html("")


def _xi(maps: Mapping[str, Any] | None) -> Html:
    if maps is None:
        return Html("")
    parts = []
    for kind, heading in (("backdoor", "Backdoor and clean task"), ("control", "Two clean tasks")):
        found = maps[kind]
        chart = heat_map(
            found["first"],
            found["second"],
            found["error"],
            title=heading,
            row_label="α of the first vector",
            column_label="α of the second vector",
            maximum=2.0,
            caption=f"Mean over [0, 1]²: {number(found['mean'])}.",
        )
        parts.append(subsection(text(heading), chart))
    return section("Disentanglement error ξ", *parts)


def _triggers(rows: Iterable[Mapping[str, Any]]) -> Html:
    shown, seen = list[tuple[str, str]](), set()
    for row in of(rows, UNKNOWN):
        if row["attack"] in seen:
            continue
        seen.add(row["attack"])
        shown += [(one["uri"], one["caption"]) for one in row["details"]["pictures"]]
    return section("True and recovered triggers", image_strip(shown)) if shown else Html("")


def _won(rows: Sequence[Mapping[str, Any]]) -> Html:
    shares = {name: percent(share) for name, share in won_shares(rows).items()}
    note = "Share of attacks with a lower ASR at an equal or higher CA (within half a point)."
    return section("Against each baseline", pairs(shares), note=note) if shares else Html("")


def _settings(settings: Mapping[str, Any]) -> Html:
    shown = {name: one.get("config", "the first of its grid") for name, one in settings.items()}
    return section("Settings", pairs(shown), note=f"The best of {TUNING_EFFORT}, if tuned.")


def _figures(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, number(value)) for name, value in result["summary"].items()]


def _markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [header, ["---"] + ["---:"] * (len(header) - 1), *lines]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows)


def _file_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
