import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from pydetox.detect.statistics import Calibration, Verdict, anomaly_index, detect
from pydetox.errors import UsageError


def references(count=4, classes=5, scatter=0.1, seed=0):
    rng = np.random.default_rng(seed)
    centres = np.log(np.linspace(0.02, 0.04, classes))
    rows = np.exp(centres + scatter * rng.standard_normal((count, classes)))
    names = tuple(f"m{i}" for i in range(count))
    return Calibration(tuple(map(tuple, rows.tolist())), "key", names)


def test_statistics_agree_with_numpy_and_scipy():
    calibration = references()
    logs = np.log(np.array(calibration.p_l1))
    deviation = math.sqrt(logs.var(axis=0, ddof=1).mean())
    assert calibration.deviation == pytest.approx(deviation, rel=1e-12)
    assert calibration.degrees_of_freedom == 15
    suspect = [0.02, 0.01, 0.03, 0.03, 0.05]
    expected = (logs.mean(axis=0) - np.log(suspect)) / (deviation * math.sqrt(1 + 1 / 4))
    np.testing.assert_allclose(calibration.score(suspect), expected, rtol=1e-12)
    single = stats.t.sf(expected.max(), 15)
    assert calibration.p_value(expected.max()) == pytest.approx(1 - (1 - single) ** 5, rel=1e-9)


def test_thresholds_are_the_inverse_of_the_p_value():
    calibration = references()
    score = calibration.score_threshold(0.01)
    assert calibration.p_value(score) == pytest.approx(0.01, rel=1e-9)
    size = calibration.size_threshold(2, 0.01)
    values = [1.0] * 5
    values[2] = size
    assert calibration.score(values)[2] == pytest.approx(score, rel=1e-9)


def test_false_alarms_come_at_the_stated_rate():
    # Clean models drawn from the model that the test assumes: 5% +- 4 standard errors of them
    # must look suspicious.
    rng = np.random.default_rng(1)
    alarms, trials = 0, 1500
    for _ in range(trials):
        logs = -3.5 + 0.2 * rng.standard_normal((4, 6))
        rows = tuple(map(tuple, np.exp(logs[:3]).tolist()))
        found = detect(
            np.exp(logs[3]).tolist(), Calibration(rows, "k", ("a", "b", "c")), has_classes=True
        )
        alarms += found.verdict is not Verdict.CLEAN
    # The Sidak correction treats classes as independent; they share the estimated deviation, which
    # makes it slightly conservative or liberal, by less than the tolerance.
    assert alarms / trials == pytest.approx(0.05, abs=0.025)


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, Verdict.CLEAN), (0.2, Verdict.BACKDOORED)])
def test_a_small_trigger_is_found_in_its_class(factor, verdict):
    calibration = references()
    values = [math.exp(v) for v in calibration.mean]
    values[3] *= factor
    found = detect(values, calibration, has_classes=True)
    assert found.verdict is verdict
    if verdict is Verdict.BACKDOORED:
        assert found.target == 3
        assert found.smallest_p_l1 == values[3] < found.threshold
        assert found.p_value < 0.01
        assert "p =" in found.reason


def test_a_weak_class_of_every_reference_is_no_finding():
    # Class 0 is five times easier than the others in all of them: an anomaly index cries wolf.
    rows = tuple((0.006 * f, 0.03 * f, 0.031 / f, 0.029) for f in (0.95, 1.0, 1.05))
    found = detect(
        [0.006, 0.03, 0.031, 0.029], Calibration(rows, "k", ("a", "b", "c")), has_classes=True
    )
    assert found.verdict is Verdict.CLEAN
    assert anomaly_index([0.006, 0.03, 0.031, 0.029], 0) > 2


def test_between_the_two_limits_a_model_is_suspicious():
    calibration = references()
    values = [math.exp(v) for v in calibration.mean]
    values[1] = calibration.size_threshold(1, 0.03)
    assert detect(values, calibration, has_classes=True).verdict is Verdict.SUSPICIOUS


def test_without_calibration_nothing_is_decided():
    found = detect([0.001, 0.03, 0.04], None, has_classes=True)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert found.target == 0
    assert found.threshold is None
    assert "calibration" in found.reason


def test_nothing_found_at_all_is_inconclusive_and_a_missing_class_is_no_evidence():
    calibration = references()
    nothing = detect([math.inf] * 5, calibration, has_classes=True)
    assert nothing.verdict is Verdict.INCONCLUSIVE
    assert nothing.target is None
    values = [math.exp(v) for v in calibration.mean]
    values[0] = math.inf
    assert detect(values, calibration, has_classes=True).verdict is Verdict.CLEAN


def test_label_free_scans_have_one_size_and_no_target():
    calibration = Calibration(((0.1,), (0.11,), (0.12,)), "k", ("a", "b", "c"))
    found = detect([0.01], calibration, has_classes=False)
    assert found.verdict is Verdict.BACKDOORED
    assert found.target is None


def test_anomaly_index_by_hand_and_where_it_is_not_defined():
    # Median 5, absolute deviations 4 3 0 3 4, their median 3.
    assert anomaly_index([1, 2, 5, 8, 9], 0) == pytest.approx(4 / (1.4826 * 3))
    assert anomaly_index([5, 5, 5, 1], 3) is None  # MAD 0
    assert anomaly_index([1, 2], 0) is None
    assert anomaly_index([math.inf, 2, 3, 4], 0) is None


def trajectories(references=3, classes=6, seed=0):
    """Log sizes [2, references + 1, classes] at two looks, of references and one more clean model.

    What a model has at the first look is a part of what it has in the end.
    """
    rng = np.random.default_rng(seed)
    early = 0.2 * rng.standard_normal((references + 1, classes)) - 2.5
    late = early - 1 + 0.1 * rng.standard_normal((references + 1, classes))
    return np.stack([early, late])


def calibration_of(logs):
    """The calibration of all models but the last, looked at after 60 and 150 steps."""
    rows = tuple(tuple(map(tuple, np.exp(look[:-1]).tolist())) for look in logs)
    names = tuple(f"m{i}" for i in range(logs.shape[1] - 1))
    return Calibration(rows[-1], "k", names, (60, 150), rows)


def test_a_dropped_class_is_compared_with_the_references_at_that_step():
    logs = trajectories()
    calibration = calibration_of(logs)
    early, late = np.exp(logs[:, -1])
    values = late.copy()
    values[[1, 4]] = early[[1, 4]]
    dropped = [None, 60, None, None, 60, None]
    found = detect(values.tolist(), calibration, has_classes=True, dropped=dropped)
    assert found.dropped == tuple(dropped)
    assert calibration.at(150).p_l1 == calibration.p_l1
    for c, step in enumerate(dropped):
        look, size = (0, early[c]) if step else (1, late[c])
        others = logs[look, :-1]
        deviation = math.sqrt(others.var(axis=0, ddof=1).mean())
        expected = (others[:, c].mean() - math.log(size)) / (deviation * math.sqrt(1 + 1 / 3))
        assert found.class_scores[c] == pytest.approx(expected, rel=1e-12)
    assert found.anomaly_index is None  # there is no median of bounds
    assert "2 of 6 classes" in found.reason
    with pytest.raises(UsageError, match="step 61"):
        detect(values.tolist(), calibration, has_classes=True, dropped=[61, *dropped[1:]])


def test_a_dropped_class_is_never_the_suspect():
    logs = trajectories()
    calibration = calibration_of(logs)
    values = np.exp(logs[1, -1])
    values[2] = 1e-6  # if it counted, it would be flagged
    dropped = [None, None, 60, None, None, None]
    found = detect(values.tolist(), calibration, has_classes=True, dropped=dropped)
    assert found.verdict is Verdict.CLEAN
    assert found.target != 2
    assert max(found.class_scores) == found.class_scores[2] > found.score
    bare = detect(values.tolist(), None, has_classes=True, dropped=dropped)
    assert bare.target != 2
    assert bare.anomaly_index is None


def test_dropping_raises_no_false_alarm_and_keeps_a_class_that_stands_out():
    alarms, alarms_without, hits = 0, 0, 0
    for seed in range(400):
        logs = trajectories(seed=seed)
        if seed % 2:  # a backdoor shows early, if only in part
            logs[0, -1, 3] -= 1.2
            logs[1, -1, 3] -= 2.0
        calibration = calibration_of(logs)
        scores = calibration.at(60).score(np.exp(logs[0, -1]).tolist())
        best = int(np.argmax(scores))
        dropped = [60 if t < 1.5 and c != best else None for c, t in enumerate(scores)]
        values = np.where([step is not None for step in dropped], *np.exp(logs[:, -1]))
        found = detect(values.tolist(), calibration, has_classes=True, dropped=dropped)
        whole = detect(np.exp(logs[1, -1]).tolist(), calibration, has_classes=True)
        if found.verdict is not Verdict.CLEAN:
            assert whole.verdict is not Verdict.CLEAN
        if seed % 2:
            hits += found.verdict is Verdict.BACKDOORED and found.target == 3
        else:
            alarms += found.verdict is not Verdict.CLEAN
            alarms_without += whole.verdict is not Verdict.CLEAN
    assert hits >= 195
    assert alarms <= alarms_without <= 25


def test_something_must_be_left_to_judge():
    calibration = calibration_of(trajectories())
    with pytest.raises(UsageError, match="6 of 6 dropped"):
        detect([0.1] * 6, calibration, has_classes=True, dropped=[60] * 6)
    with pytest.raises(UsageError, match="0 of 5 dropped"):
        detect([0.1] * 6, calibration, has_classes=True, dropped=[None] * 5)


def test_a_history_must_fit():
    rows = ((0.1, 0.2), (0.1, 0.3))
    with pytest.raises(UsageError, match="2 looks, a history of 1"):
        Calibration(rows, "k", ("a", "b"), (60, 150), (rows,))
    with pytest.raises(UsageError, match="every reference and class"):
        Calibration(rows, "k", ("a", "b"), (60,), (((0.1,), (0.1,)),))
    with pytest.raises(UsageError, match="step 60"):
        Calibration(rows, "k", ("a", "b")).at(60)


@pytest.mark.parametrize("values", [[], [math.nan, 1.0], [0.0, 1.0], [0.1, 0.1]])
def test_bad_sizes_are_refused(values):
    with pytest.raises(UsageError):
        detect(values, references(), has_classes=True)


@pytest.mark.parametrize("rows", [((0.1,),), ((0.1,), (0.1, 0.2)), ((), ())])
def test_too_few_or_unequal_references_are_refused(rows):
    with pytest.raises(UsageError, match="at least 2"):
        Calibration(rows, "k", ("a", "b"))


def test_calibration_survives_json():
    rows = ((0.1, math.inf), (0.2, 0.3))
    calibration = Calibration(rows, "key", ("a", "b"), (60, 150), (((math.inf, 1),) * 2, rows))
    assert Calibration.from_dict(json.loads(json.dumps(calibration.to_dict()))) == calibration
    with pytest.raises(UsageError, match="no calibration"):
        Calibration.from_dict({"p_l1": "x"})


def test_searching_for_more_families_raises_the_bar():
    calibration = references()
    values = [math.exp(v) for v in calibration.mean]
    values[1] *= 0.7
    one = detect(values, calibration, has_classes=True)
    two = detect(values, calibration, has_classes=True, families=2)
    assert two.score == one.score
    assert two.p_value == pytest.approx(1 - (1 - one.p_value) ** 2, rel=1e-9)
    assert two.threshold < one.threshold
    at_bar = list(values)
    at_bar[1] = two.threshold
    found = detect(at_bar, calibration, has_classes=True, families=2)
    assert found.p_value == pytest.approx(0.01, rel=1e-6)


def test_a_calibration_holds_the_families_and_survives_a_file():
    first = references()
    blend = Calibration(first.p_l1, "blend's", first.models, family="blend")
    both = replace(first, others=(blend,))
    assert both.of("blend") is blend
    assert both.of("patch") is both
    assert Calibration.from_dict(json.loads(json.dumps(both.to_dict()))) == both
    with pytest.raises(UsageError, match="'blend'"):
        first.of("blend")


def relative(count=4, classes=6, seed=0, scatter=0.1):
    rng = np.random.default_rng(seed)
    logs = np.log(np.linspace(0.02, 0.04, classes)) + scatter * rng.standard_normal(
        (count, classes)
    )
    logs += rng.standard_normal((count, 1))  # how far each was trained away from its base
    rows = tuple(map(tuple, np.exp(logs).tolist()))
    return Calibration(rows, "key", tuple("abcdefgh"[:count]), relative=True), logs


def test_relative_statistics_agree_with_numpy():
    calibration, logs = relative()
    residuals = logs - logs.mean(axis=0)
    residuals -= residuals.mean(axis=1, keepdims=True)
    deviation = math.sqrt((residuals**2).sum() / 15)
    assert calibration.degrees_of_freedom == 15
    assert calibration.deviation == pytest.approx(deviation, rel=1e-12)
    suspect = np.array([0.2, 0.1, 0.04, 0.3, 0.3, 0.3])
    margins = logs.mean(axis=0) - np.log(suspect)
    scale = deviation * math.sqrt((1 + 1 / 4) * (1 + math.pi / 10))
    expected = [(m - np.median(np.delete(margins, c))) / scale for c, m in enumerate(margins)]
    np.testing.assert_allclose(calibration.score(suspect.tolist()), expected, rtol=1e-12)
    found = detect(suspect.tolist(), calibration, has_classes=True)
    assert found.target == int(np.argmax(expected))
    assert found.class_scores == pytest.approx(expected)
    assert Calibration.from_dict(json.loads(json.dumps(calibration.to_dict()))) == calibration
    # The threshold is the size at which that class of that model would be called backdoored.
    at = np.exp(logs.mean(axis=0)).tolist()
    at[3] /= 5
    found = detect(at, calibration, has_classes=True)
    assert found.target == 3
    at[3] = found.threshold
    assert detect(at, calibration, has_classes=True).p_value == pytest.approx(0.01, rel=1e-6)


def test_a_shift_of_all_classes_changes_nothing_relative_to_each_other():
    calibration, _ = relative()
    sizes = np.array([0.02, 0.01, 0.03, 0.03, 0.02, 0.05])
    one, two = (detect((f * sizes).tolist(), calibration, has_classes=True) for f in (1, 3))
    assert one.class_scores == pytest.approx(two.class_scores)
    assert one.p_value == pytest.approx(two.p_value)


def test_a_second_backdoor_or_a_failed_search_does_not_move_the_first():
    calibration, logs = relative(scatter=0.02)
    clean = np.exp(logs.mean(axis=0))
    first, both, failed = clean.copy(), clean.copy(), clean.copy()
    for sizes in (first, both, failed):
        sizes[2] /= 3
    both[4] /= 4
    failed[0] = math.inf
    scores = [
        detect(sizes.tolist(), calibration, has_classes=True).class_scores[2]
        for sizes in (first, both, failed)
    ]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-6)


def test_relative_false_alarms_come_at_about_the_stated_rate():
    rng = np.random.default_rng(2)
    alarms, trials = 0, 1500
    for _ in range(trials):
        logs = -3.5 + 0.2 * rng.standard_normal((5, 8)) + rng.standard_normal((5, 1))
        rows = tuple(map(tuple, np.exp(logs[:4]).clip(max=1).tolist()))
        calibration = Calibration(rows, "k", tuple("abcd"), relative=True)
        found = detect(np.exp(logs[4]).clip(max=1).tolist(), calibration, has_classes=True)
        alarms += found.verdict is not Verdict.CLEAN
    # pi / 2 is the limit for many classes; with few of them it errs on the safe side.
    assert 0.02 < alarms / trials < 0.075


def test_one_class_cannot_be_relative():
    with pytest.raises(UsageError, match="at least 2"):
        Calibration(((0.1,), (0.2,)), "k", ("a", "b"), relative=True)


def test_classes_that_were_clean_before_a_repair_are_not_judged():
    calibration = references(scatter=0.02)
    sizes = np.exp(calibration.mean)
    sizes[[1, 3]] /= [3, 2]
    found = detect(sizes.tolist(), calibration, has_classes=True)
    assert (found.target, found.suspects, found.cleared) == (1, (1, 3), ())
    again = detect(sizes.tolist(), calibration, has_classes=True, cleared=[0, 1, 4])
    assert (again.target, again.suspects, again.cleared) == (3, (3,), (0, 1, 4))
    assert again.verdict is Verdict.BACKDOORED
    # The others keep their numbers: nothing that was measured is hidden.
    assert again.class_scores == found.class_scores
    assert again.anomaly_index is not None
    assert "3 of 5 classes had been clean before the repair" in again.reason
    sizes[3] *= 2
    after = detect(sizes.tolist(), calibration, has_classes=True, cleared=[0, 1, 4])
    assert after.verdict is Verdict.CLEAN
    assert after.suspects == ()
    with pytest.raises(UsageError, match="5 cleared"):
        detect(sizes.tolist(), calibration, has_classes=True, cleared=range(5))


def test_a_finding_has_its_target_among_the_suspects():
    calibration = references(scatter=0.1)
    rng = np.random.default_rng(3)
    for _ in range(200):
        sizes = np.exp(np.array(calibration.mean) + 0.3 * rng.standard_normal(5))
        found = detect(sizes.tolist(), calibration, has_classes=True, families=2)
        assert (found.target in found.suspects) == (found.verdict is not Verdict.CLEAN)
