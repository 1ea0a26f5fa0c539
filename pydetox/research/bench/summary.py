"""The summary of a run: a few figures that are computed from its rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..defenses import DEFENSES, PlainTbar, PydetoxKnown, PydetoxUnknown

#: CA counts as equal within half a point, less than the width of its interval.
CA_TOLERANCE = 0.005

KNOWN, UNKNOWN, PLAIN = PydetoxKnown().name, PydetoxUnknown().name, PlainTbar().name

Row = Mapping[str, Any]


def summarize(result: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the flat figures of a run, in [0, 1]; None if there is nothing to average.

    The figures have these meanings:

    - `asr_mean`, `asr_max`: The mean and the maximum over attacks of the mean ASR over the seeds.
      For a victim with two backdoors, the worse one counts.
    - `ca_retained`: The mean over victims of the CA divided by that of the victim itself.
    - `detection.tpr`, `detection.fpr`: The rates of suspicious and backdoored verdicts.
    - `baselines.won_share`: The share of attacks for which pydetox has the lower ASR at an equal or
      higher CA (see `won_shares`), for the baseline with the smallest such share. Each baseline is
      compared with the variant of pydetox that knows as much.
    - `baselines.won_share_finished`: The same share if only finished repairs count.
    - `two_backdoors.asr_max`, `relapse.asr_mean`: The value of the worse of pydetox's two methods.
    """
    before = {row["suspect"]: row for row in result["before"]}
    rows: Sequence[Row] = result["rows"]
    summary: dict[str, float | None] = {}
    for prefix, name in (("known", KNOWN), ("unknown", UNKNOWN), ("plain_tbar", PLAIN)):
        by_attack = asr_by_attack(of(rows, name))
        summary[f"{prefix}.asr_mean"] = mean(by_attack.values())
        summary[f"{prefix}.asr_max"] = max(by_attack.values(), default=None)
        summary[f"{prefix}.ca_retained"] = mean(
            row["ca"] / before[row["suspect"]]["ca"] for row in of(rows, name)
        )
    scans = result["scans"]
    planted = [one for one in scans if one["attack"] is not None]
    clean = [one for one in scans if one["attack"] is None]
    summary["unknown.target_right"] = mean(float(one["target_right"]) for one in planted)
    summary["detection.auroc"] = auroc(
        [_score(one) for one in planted], [_score(one) for one in clean]
    )
    summary["detection.tpr"] = mean(float(one["flagged"]) for one in planted)
    summary["detection.fpr"] = mean(float(one["flagged"]) for one in clean)
    won = list(won_shares(rows).values())
    summary["baselines.won_share"] = min(won, default=None)
    finished = list(won_shares(rows, finished=True).values())
    summary["baselines.won_share_finished"] = min(finished, default=None)
    both = [of([r for r in rows if len(r["asr"]) > 1], name) for name in (KNOWN, UNKNOWN)]
    worst = [max(worse(row) for row in part) for part in both if part]
    summary["two_backdoors.asr_max"] = max(worst, default=None)
    again = [mean(max(row["relapse"]) for row in of(rows, name)) for name in (KNOWN, UNKNOWN)]
    summary["relapse.asr_mean"] = max((v for v in again if v is not None), default=None)
    if result.get("xi"):
        summary["xi.backdoor_mean"] = result["xi"]["backdoor"]["mean"]
        summary["xi.control_mean"] = result["xi"]["control"]["mean"]
    victims = [row for row in before.values() if row["attack"] is not None]
    summary["victims.total"] = float(len(victims))
    summary["victims.counted"] = float(sum(row["counts"] for row in victims))
    summary["victims.base_ca_min"] = min((r["ca_base"] for r in before.values()), default=None)
    return summary


def won_shares(rows: Sequence[Row], *, finished: bool = False) -> dict[str, float]:
    """Return, for each baseline, the share of attacks that pydetox wins against it.

    pydetox wins if it has a lower ASR at an equal or higher CA. Both are means over an attack's
    victims. Methods are compared at equal CA, because alpha trades CA for ASR. If the finished
    repair has less CA than the baseline, an earlier stage of the repair counts instead: the last
    stage that has at least the baseline's CA (in rows with a "path"). With `finished`, only
    finished repairs count.
    """
    shares = {}
    for baseline in DEFENSES:
        if baseline.name in (KNOWN, UNKNOWN):
            continue
        ours = of(rows, KNOWN if baseline.needs_trigger else UNKNOWN)
        theirs = of(rows, baseline.name)
        asr, ca = asr_by_attack(theirs), _ca_by_attack(theirs)
        won = []
        for attack in asr:
            victims = [row for row in ours if row["attack"] == attack]
            if not victims:
                continue
            points = [(row["ca"], worse(row)) for row in victims]
            ways = [_mean_point(points)]
            if not finished and all(row.get("path") for row in victims):
                ways += [
                    _mean_point([(at["ca"], max(at["asr"])) for at in step])
                    for step in zip(*(reversed(row["path"]) for row in victims), strict=True)
                ]
            reached = [point for point in ways if point[0] >= ca[attack] - CA_TOLERANCE]
            won.append(bool(reached) and reached[0][1] < asr[attack])
        if won:
            shares[baseline.name] = sum(won) / len(won)
    return shares


def _mean_point(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return mean CA and mean ASR."""
    accuracy, success = zip(*points, strict=True)
    return math.fsum(accuracy) / len(points), math.fsum(success) / len(points)


def of(rows: Iterable[Row], defense: str) -> list[Row]:
    """Return the rows of one defence."""
    return [row for row in rows if row["defense"] == defense]


def worse(row: Row) -> float:
    """Return the ASR of a row, that of the worse backdoor if there are two."""
    return float(max(row["asr"]))


def asr_by_attack(rows: Iterable[Row]) -> dict[str, float]:
    """Return the mean ASR over the seeds of each attack."""
    return _by_attack(rows, worse)


def mean(values: Iterable[float]) -> float | None:
    """Return the mean; None without values."""
    items = list(values)
    return math.fsum(items) / len(items) if items else None


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float | None:
    """Return the probability that a positive has a higher score than a negative; ties count 1/2.

    This is the area under the ROC curve (Hanley and McNeil 1982). None without both kinds.
    """
    if not positive or not negative:
        return None
    above = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    return above / (len(positive) * len(negative))


def roc(
    positive: Sequence[float], negative: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return false and true positive rates over all thresholds, ascending from (0, 0) to (1, 1)."""
    thresholds = sorted({*positive, *negative}, reverse=True)
    false, true = [0.0], [0.0]
    for threshold in thresholds:
        false.append(sum(n >= threshold for n in negative) / len(negative))
        true.append(sum(p >= threshold for p in positive) / len(positive))
    return tuple(false), tuple(true)


def _score(scan: Mapping[str, Any]) -> float:
    # A scan that found nothing has no score; JSON has no infinity.
    value = scan["score"]
    return -math.inf if value is None else float(value)


def _ca_by_attack(rows: Iterable[Row]) -> dict[str, float]:
    return _by_attack(rows, lambda row: float(row["ca"]))


def _by_attack(rows: Iterable[Row], value: Any) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(row["attack"], []).append(value(row))
    return {attack: math.fsum(v) / len(v) for attack, v in groups.items()}
