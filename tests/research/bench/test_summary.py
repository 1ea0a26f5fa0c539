"""The figures of a run against hand-made rows, and AUROC against another library."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from pydetox.reporting.values import MISSING
from pydetox.research.bench.outputs import (
    clip_benchmark_result,
    csv_table,
    markdown,
    overview,
    verdicts,
    victims,
)
from pydetox.research.bench.summary import (
    KNOWN,
    PLAIN,
    UNKNOWN,
    auroc,
    mean,
    roc,
    summarize,
    won_shares,
)


def row(attack, seed, defense, ca, *asr, **more):
    return {
        "suspect": f"{attack or 'clean-0'}-seed{seed}",
        "attack": attack,
        "seed": seed,
        "defense": defense,
        "rate": 0.01,
        "targets": [3] * len(asr),
        "ca": ca,
        "ca_ci": [ca - 0.01, ca + 0.01],
        "n_clean": 100,
        "per_class": [ca, None, ca],
        "asr": list(asr) or [None],
        "asr_ci": [[a - 0.01, a + 0.01] for a in asr] or [None],
        "n_attack": [90] * max(1, len(asr)),
        "images": 50,
        "labels": 40,
        "seconds": 2.0,
        **more,
    }


def scanned(attack, score, *, right=None, flagged=True):
    return {
        "suspect": "x",
        "attack": attack,
        "score": score,
        "p_value": None if score is None else 10.0**-score,
        "flagged": flagged,
        "target_right": right,
        "seconds": 1.0,
    }


@pytest.fixture
def result():
    before = [
        row("a", 0, "no defence", 0.8, 1.0, counts=True, ca_base=0.86),
        row("a", 1, "no defence", 0.9, 1.0, counts=True, ca_base=0.85),
        row("b", 0, "no defence", 0.8, 0.9, 1.0, counts=True, ca_base=0.86),
        row("c", 0, "no defence", 0.8, 0.1, counts=False, ca_base=0.86),
        row(None, 0, "no defence", 0.85, counts=False, ca_base=0.86),
    ]
    rows = [
        row("a", 0, KNOWN, 0.8, 0.0, relapse=[0.1]),
        row("a", 1, KNOWN, 0.81, 0.02, relapse=[0.1]),
        row("b", 0, KNOWN, 0.76, 0.03, 0.05, relapse=[0.0, 0.4]),
        row("a", 0, UNKNOWN, 0.8, 0.1, relapse=[0.0]),
        row("a", 1, UNKNOWN, 0.9, 0.1, relapse=[0.0]),
        row("b", 0, UNKNOWN, 0.8, 0.3, 0.2, relapse=[0.0, 0.0]),
        row("a", 0, PLAIN, 0.7, 0.4),
        row("a", 1, PLAIN, 0.7, 0.2),
        row("b", 0, PLAIN, 0.9, 0.1, 0.0),
        row("a", 0, "fine-tuning", 0.86, 0.5),
        row("a", 1, "fine-tuning", 0.85, 0.5),
        row("b", 0, "fine-tuning", 0.8, 0.5, 0.5),
    ]
    scans = [
        scanned("a", 9.0, right=True),
        scanned("a", 4.0, right=True),
        scanned("b", 1.0, right=False, flagged=False),
        scanned(None, 2.0, flagged=False),
        scanned(None, None),
    ]
    xi = {"backdoor": {"mean": 0.1}, "control": {"mean": 0.3}}
    plan = {"data": "digits", "seeds": [0, 1], "tuning_seed": 100, "tuning_attacks": ["a"]}
    content = {"before": before, "rows": rows, "scans": scans, "xi": xi, "plan": plan}
    content["seconds"] = {"bases": 90.0}
    return {**content, "summary": summarize(content)}


def test_the_figures_are_means_over_attacks(result):
    found = result["summary"]
    assert found["known.asr_mean"] == pytest.approx((0.01 + 0.05) / 2)
    assert found["known.asr_max"] == pytest.approx(0.05)
    assert found["known.ca_retained"] == pytest.approx((1 + 0.9 + 0.95) / 3)
    assert found["unknown.asr_mean"] == pytest.approx((0.1 + 0.3) / 2)
    assert found["unknown.asr_max"] == pytest.approx(0.3)
    assert found["plain_tbar.asr_mean"] == pytest.approx((0.3 + 0.1) / 2)
    assert found["unknown.target_right"] == pytest.approx(2 / 3)
    assert found["detection.auroc"] == pytest.approx(5 / 6)
    assert found["detection.tpr"] == pytest.approx(2 / 3)
    assert found["detection.fpr"] == pytest.approx(1 / 2)
    assert found["two_backdoors.asr_max"] == pytest.approx(0.3)
    assert found["relapse.asr_mean"] == pytest.approx((0.1 + 0.1 + 0.4) / 3)
    assert found["xi.backdoor_mean"] == 0.1
    assert (found["victims.total"], found["victims.counted"]) == (4, 3)
    assert found["victims.base_ca_min"] == 0.85


def test_a_baseline_is_compared_with_the_method_that_knows_as_much(result):
    # Plain TBAR: the known method has the lower ASR on both attacks, but on b less accuracy.
    # Fine-tuning: the unknown method has the lower ASR on both, the accuracy on a is 0.85 : 0.855.
    assert won_shares(result["rows"]) == {PLAIN: 0.5, "fine-tuning": 1.0}
    assert result["summary"]["baselines.won_share"] == 0.5


def test_methods_compare_at_equal_accuracy_where_the_way_is_known(result):
    rows = [row for row in result["rows"] if row["defense"] in (UNKNOWN, "fine-tuning")]
    for one in rows:
        if one["defense"] == UNKNOWN and one["attack"] == "a":
            one["ca"] = 0.7  # less than fine-tuning's 0.855
            one["path"] = [
                {"ca": 0.88, "asr": [0.9]},
                {"ca": 0.86, "asr": [0.4]},  # the furthest with as much accuracy
                {"ca": 0.80, "asr": [0.2]},
            ]
    assert won_shares(rows) == {"fine-tuning": 1.0}
    assert won_shares(rows, finished=True) == {"fine-tuning": 0.5}
    for one in rows:
        if one["defense"] == UNKNOWN and one["attack"] == "a":
            one["path"][1]["asr"] = [0.6]  # above fine-tuning's 0.5; that of nearer points is too
    assert won_shares(rows) == {"fine-tuning": 0.5}
    for one in rows:
        if one["defense"] == UNKNOWN and one["attack"] == "a":
            one["path"] = []  # a model that was left as it is
    assert won_shares(rows) == {"fine-tuning": 0.5}


def test_an_empty_run_has_no_figures():
    found = summarize({"before": [], "rows": [], "scans": [], "xi": None})
    assert found["known.asr_mean"] is None
    assert found["detection.auroc"] is None
    assert found["baselines.won_share"] is None
    assert found["victims.total"] == 0


def test_auroc_and_curve_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    positive = list(rng.integers(2, 9, 30).astype(float))  # with ties
    negative = list(rng.integers(0, 6, 40).astype(float))
    labels, scores = [1] * 30 + [0] * 40, positive + negative
    assert auroc(positive, negative) == pytest.approx(roc_auc_score(labels, scores))
    false, true = roc(positive, negative)
    expected = roc_curve(labels, scores, drop_intermediate=False)
    assert np.allclose(false, expected[0])
    assert np.allclose(true, expected[1])
    assert auroc([], negative) is None
    assert mean([]) is None


def test_tables_hold_what_was_measured(result):
    header, lines = overview(result)
    assert header[:3] == ["Defence", "a", "b"]
    by_name = {line[0]: line for line in lines}
    assert by_name["no defence"][1:3] == ["100.0%", "100.0%"]  # c did not take
    assert by_name[KNOWN][1:6] == ["1.0%", "5.0%", "3.0%", "95.0%", "50"]
    page = markdown(result)
    assert "| known.asr_mean | 0.0300 |" in page
    assert "seed 100" in page
    assert f"| fine-tuning | {UNKNOWN} | 100.0% |" in page
    headers, lines = verdicts(result["scans"])
    assert headers[:4] == ["Models", "Number", "Flagged", "Right target"]
    assert [line[0] for line in lines] == ["a", "b", "clean"]
    assert [line[:4] for line in lines if line[0] == "clean"] == [["clean", "2", "1", MISSING]]
    (before_c,) = [line for line in victims(result)[1] if line[0] == "c"]
    assert before_c[2].endswith("(no)")
    made = {"date": "2026-01-02", "command": "pydetox bench"}
    assert markdown({**result, "made": made}).startswith("`pydetox bench`, 2026-01-02.\n\n")
    rows = csv_table(result).splitlines()
    assert len(rows) == 1 + 5 + 12
    assert rows[0].startswith("attack,seed,targets,rate,defense,ca,")
    assert rows[5].startswith(",0,,0.01,no defence,0.85,")
    # Two backdoors: the worse one with its own interval.
    (both,) = [line for line in rows if line.startswith("b,0,3 3") and UNKNOWN in line]
    assert ",0.3,0.29,0.31," in both.replace("0.28999999999999998", "0.29")


def test_a_result_has_the_layout_of_clip_benchmark(result):
    found = clip_benchmark_result(result["rows"][2], result)
    assert set(found) == {"dataset", "model", "pretrained", "task", "metrics", "language"}
    assert found["metrics"] == {"acc1": 0.76, "mean_per_class_recall": 0.76, "asr": 0.05}
    clean = clip_benchmark_result(result["before"][4], result)
    assert "asr" not in clean["metrics"]
