import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from pydetox.detect.statistics import (
    Calibration,
    Detection,
    RepairHistory,
    Verdict,
    anomaly_index,
    detect,
)
from pydetox.errors import UsageError
from pydetox.inversion import Elimination


def references(count=4, classes=5, scatter=0.1, seed=0):
    rng = np.random.default_rng(seed)
    centres = np.log(np.linspace(0.02, 0.04, classes))
    rows = np.exp(centres + scatter * rng.standard_normal((count, classes)))
    names = tuple(f"m{i}" for i in range(count))
    return Calibration(tuple(map(tuple, rows.tolist())), "key", names)


def test_two_classes_are_judged_by_student_s_t():
    """With C = 2 there is one contrast per model, so that the chance has a closed form."""
    rng = np.random.default_rng(5)
    logs = np.log([0.05, 0.08]) + 0.2 * rng.standard_normal((4, 2))
    calibration = Calibration(tuple(map(tuple, np.exp(logs).tolist())), "k", tuple("abcd"))
    suspect = np.array([0.01, 0.05])
    contrast = logs[:, 0] - logs[:, 1]
    distance = contrast.mean() - math.log(0.01 / 0.05)
    single = stats.t.sf(distance / (contrast.std(ddof=1) * math.sqrt(1 + 1 / 4)), 3)
    found = detect(suspect.tolist(), calibration, has_classes=True)
    assert found.target == 0
    assert found.p_value == pytest.approx(1 - (1 - single) ** 2, rel=1e-9)
    assert found.score == pytest.approx(stats.norm.isf(single), rel=1e-9)


def test_one_size_is_judged_by_student_s_t():
    """A label-free search has nothing to judge a size beside."""
    sizes = np.array([0.1, 0.13, 0.12, 0.09])
    calibration = Calibration(tuple((v,) for v in sizes.tolist()), "k", tuple("abcd"))
    logs = np.log(sizes)
    t = (logs.mean() - math.log(0.06)) / (logs.std(ddof=1) * math.sqrt(1 + 1 / 4))
    found = detect([0.06], calibration, has_classes=False)
    assert found.p_value == pytest.approx(stats.t.sf(t, 3), rel=1e-9)


def test_the_threshold_is_the_size_at_which_the_verdict_changes():
    calibration = references()
    values = [math.exp(v) for v in calibration.mean]
    values[2] /= 5
    found = detect(values, calibration, has_classes=True)
    assert found.verdict is Verdict.BACKDOORED
    values[2] = found.threshold
    assert detect(values, calibration, has_classes=True).p_value == pytest.approx(0.01, rel=1e-6)
    values[2] = calibration.size_threshold(2, 0.03)
    assert detect(values, calibration, has_classes=True).p_value == pytest.approx(0.03, rel=1e-6)


def test_a_rescan_is_corrected_for_the_classes_that_it_judges():
    """Fault: p was corrected for all 1,000 classes although one was judged."""
    calibration = references(count=4, classes=1000)
    values = [math.exp(v) for v in calibration.mean]
    values[3] *= math.exp(-0.4)  # 3.5 of the references' deviations
    alone = detect(
        values,
        calibration,
        has_classes=True,
        history=RepairHistory(cleared=(*range(3), *range(4, 1000))),
    )
    assert alone.target == 3
    assert alone.p_value < 0.003
    assert alone.verdict is Verdict.BACKDOORED
    both = detect(
        values,
        calibration,
        has_classes=True,
        history=RepairHistory(cleared=(*range(2), *range(4, 1000))),
    )
    assert both.p_value == pytest.approx(1 - (1 - alone.p_value) ** 2, rel=1e-9)
    # Of all classes one so far away is no wonder.
    every = detect(values, calibration, has_classes=True)
    assert every.p_value == pytest.approx(1 - (1 - alone.p_value) ** 1000, rel=1e-9)
    assert every.verdict is Verdict.CLEAN


def test_a_shift_of_models_and_unequal_scatter_raise_no_false_alarms():
    """Fault: p-values assumed that clean models differ only class by class, all alike."""
    rng = np.random.default_rng(4)
    deviations, alarms, trials = 0.2 * np.geomspace(0.5, 2, 100), 0, 300
    for _ in range(trials):
        logs = -3.5 + deviations * rng.standard_normal((4, 100)) + 0.2 * rng.standard_normal((4, 1))
        rows = tuple(map(tuple, np.exp(logs[:3]).tolist()))
        found = detect(
            np.exp(logs[3]).tolist(), Calibration(rows, "k", tuple("abc")), has_classes=True
        )
        alarms += found.p_value < 0.01
    assert alarms <= 8  # 1%, and three standard deviations; it was 9%


def test_a_dropped_class_is_compared_with_the_references_at_that_step():
    logs = trajectories(classes=12)
    calibration = calibration_of(logs)
    early, late = np.exp(logs[:, -1])
    dropped = [None if c in calibration.controls or c == 0 else 60 for c in range(12)]
    values = np.where([step is not None for step in dropped], early, late)
    found = detect(values.tolist(), calibration, has_classes=True, dropped=dropped)
    assert found.dropped == tuple(dropped)
    assert calibration.at(150).p_l1 == calibration.p_l1
    late_margins = calibration.margins(late.tolist())
    shift = np.median([late_margins[c] for c in calibration.controls])
    gone = 2
    margin = calibration.at(60).margins(early.tolist())[gone]
    expected = calibration.at(60).scores([margin] * 12, [shift] * 12, calibration.controls)[gone]
    assert found.class_scores[gone] == pytest.approx(expected, rel=1e-12)
    # Class 0 is judged beside those that no scan drops.
    alone = calibration.score(late.tolist(), among=calibration.controls)[0]
    assert found.class_scores[0] == pytest.approx(alone, rel=1e-12)
    assert found.anomaly_index is None  # there is no median of bounds
    assert "6 of 12 classes" in found.reason
    with pytest.raises(UsageError, match="step 61"):
        detect(values.tolist(), calibration, has_classes=True, dropped=[None, 61, *dropped[2:]])


def test_a_dropped_class_is_never_the_suspect():
    logs = trajectories(classes=12)
    calibration = calibration_of(logs)
    values = np.exp(logs[1, -1])
    values[2] = 1e-4  # if it counted, it would be flagged
    dropped = [60 if c == 2 else None for c in range(12)]
    assert 2 not in calibration.controls
    found = detect(values.tolist(), calibration, has_classes=True, dropped=dropped)
    assert found.verdict is Verdict.CLEAN
    assert found.target != 2
    assert max(found.class_scores) == found.class_scores[2] > found.score
    bare = detect(values.tolist(), None, has_classes=True, dropped=dropped)
    assert bare.target != 2
    assert bare.anomaly_index is None


def test_dropping_raises_no_false_alarm_and_keeps_a_class_that_stands_out():
    alarms, alarms_without, hits, hits_without, gone = 0, 0, 0, 0, 0
    for seed in range(240):
        logs = trajectories(classes=12, seed=seed)
        logs[:, -1] += np.array([[0.2], [-0.3]])  # a shift that changes on the way
        if seed % 2:  # a backdoor shows early, if only in part
            logs[0, -1, 4] -= 1.2
            logs[1, -1, 4] -= 2.0
        calibration = calibration_of(logs)
        sizes = np.exp(logs[0, -1]).tolist()
        rule = Elimination(calibration.progress, 1.5, kept=1 + len(calibration.controls))
        out = rule.drop(60, sizes, [True] * 12)
        assert not any(out[c] for c in calibration.controls)
        gone += sum(out)
        values = np.where(out, *np.exp(logs[:, -1]))
        found = detect(
            values.tolist(),
            calibration,
            has_classes=True,
            dropped=[60 if dropped else None for dropped in out],
        )
        whole = detect(np.exp(logs[1, -1]).tolist(), calibration, has_classes=True)
        if seed % 2:
            hits += found.verdict is Verdict.BACKDOORED and found.target == 4
            hits_without += whole.verdict is Verdict.BACKDOORED and whole.target == 4
        else:
            alarms += found.verdict is not Verdict.CLEAN
            alarms_without += whole.verdict is not Verdict.CLEAN
    assert hits_without - 4 <= hits >= 110  # of 120
    assert gone > 5 * 240
    assert alarms <= 11  # 5% of 120, and two standard deviations
    assert alarms_without <= 11


def test_few_classes_are_all_searched_to_the_end():
    calibration = calibration_of(trajectories(classes=5))
    assert calibration.controls == (0, 1, 2, 3, 4)
    assert calibration.progress(60, [0.1] * 5) == (math.inf,) * 5


def test_a_calibration_without_a_verdict_drops_nothing():
    nothing = ((math.inf,) * 8,) * 2
    rows = tuple(tuple(0.1 + 0.01 * r + 0.002 * c * r for c in range(8)) for r in range(2))
    calibration = Calibration(rows, "k", ("a", "b"), (60, 150), (nothing, rows))
    assert calibration.progress(60, [0.1] * 8) == (math.inf,) * 8


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


def test_something_must_be_left_to_judge():
    calibration = calibration_of(trajectories())
    with pytest.raises(UsageError, match="6 of 6 dropped"):
        detect([0.1] * 6, calibration, has_classes=True, dropped=[60] * 6)
    with pytest.raises(UsageError, match="0 of 5 dropped"):
        detect([0.1] * 6, calibration, has_classes=True, dropped=[None] * 5)


def test_a_history_must_fit():
    rows = ((0.1, 0.2), (0.1, 0.3))
    with pytest.raises(UsageError, match="2 recorded steps, a history of 1"):
        Calibration(rows, "k", ("a", "b"), (60, 150), (rows,))
    with pytest.raises(UsageError, match="every reference and class"):
        Calibration(rows, "k", ("a", "b"), (60,), (((0.1,), (0.1,)),))
    with pytest.raises(UsageError, match="step 60"):
        Calibration(rows, "k", ("a", "b")).at(60)


@pytest.mark.parametrize("values", [[], [-0.1, 1.0], [0.1, 0.1]])
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
    content = json.loads(json.dumps(calibration.to_dict()))
    assert Calibration.from_dict(content) == calibration
    # Earlier versions had another name for the recorded steps.
    content["looks"] = content.pop("recorded_steps")
    assert Calibration.from_dict(content) == calibration
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


def test_classes_that_were_clean_before_a_repair_are_not_judged():
    calibration = references(scatter=0.02)
    sizes = np.exp(calibration.mean)
    sizes[[1, 3]] /= [3, 2]
    found = detect(sizes.tolist(), calibration, has_classes=True)
    assert (found.target, found.suspects, found.cleared) == (1, (1, 3), ())
    again = detect(
        sizes.tolist(), calibration, has_classes=True, history=RepairHistory(cleared=(0, 1, 4))
    )
    assert (again.target, again.suspects, again.cleared) == (3, (3,), (0, 1, 4))
    assert again.verdict is Verdict.BACKDOORED
    # The others keep their numbers: nothing that was measured is hidden.
    assert again.class_scores == found.class_scores
    assert again.anomaly_index is not None
    assert "3 of 5 classes had been clean before the repair" in again.reason
    sizes[3] *= 2
    after = detect(
        sizes.tolist(), calibration, has_classes=True, history=RepairHistory(cleared=(0, 1, 4))
    )
    assert after.verdict is Verdict.CLEAN
    assert after.suspects == ()
    with pytest.raises(UsageError, match="5 cleared"):
        detect(
            sizes.tolist(),
            calibration,
            has_classes=True,
            history=RepairHistory(cleared=tuple(range(5))),
        )


def test_a_finding_has_its_target_among_the_suspects():
    calibration = references(scatter=0.1)
    rng = np.random.default_rng(3)
    for _ in range(200):
        sizes = np.exp(np.array(calibration.mean) + 0.3 * rng.standard_normal(5))
        found = detect(sizes.tolist(), calibration, has_classes=True, families=2)
        assert (found.target in found.suspects) == (found.verdict is not Verdict.CLEAN)


def beside(*more, count=3, classes=4):
    """References of that many classes, and sizes of a clean suspect, some of them replaced."""
    calibration = references(count=count, classes=classes)
    values = [math.exp(v) for v in calibration.mean]
    values[: len(more)] = more
    return values, calibration


class TestInconclusive:
    """What bears no verdict is named, with what would help."""

    @pytest.mark.parametrize(
        ("sizes", "reason", "remedy"),
        [
            ([math.nan, 0.03, 0.03, 0.04], "not finite", "float32"),
            ([math.inf] * 4, "no search found a working trigger", "more steps"),
            ([1e-9, math.inf, math.inf, math.inf], "an empty trigger works for class 0", "weights"),
            ([0.0, 0.03, 0.03, 0.04], "an empty trigger works for class 0", "images of all"),
            ([0.018] * 4, "same size", "more steps"),
            ([1e-3, math.inf, math.inf, math.inf], "found for 1 of the 4 classes", "more steps"),
        ],
    )
    def test_sizes_of_the_suspect(self, sizes, reason, remedy):
        found = detect(sizes, beside()[1], has_classes=True)
        assert found.verdict is Verdict.INCONCLUSIVE
        assert reason in found.reason
        assert remedy in found.reason
        assert (found.p_value, found.score, found.threshold) == (None, None, None)
        assert (found.class_scores, found.suspects, found.backdoored) == ((), (), ())
        assert not any(math.isnan(value) for value in found.p_l1)

    @pytest.mark.parametrize(
        ("rows", "reason"),
        [
            (((math.inf,) * 4,) * 3, "no search in the references found"),
            (((1e-9, 0.1, 0.1, 0.2),) * 3, "'a' obeys an empty trigger"),
            (((0.03, 0.1, 0.1, 0.2),) * 3, "'a' and 'b' have the same sizes"),
            (((0.1, 0.1, 0.1, 0.2), (0.2, 0.1, 0.1, 0.1), (0.1, 0.1, 0.1, 0.2)), "'a' and 'c'"),
            (((0.1, math.inf, 0.2, 0.2), (math.inf, 0.1, math.inf, 0.1), (0.1,) * 4), "for 1 of 4"),
        ],
    )
    def test_references(self, rows, reason):
        found = detect(
            [0.03, 0.01, 0.05, 0.02], Calibration(rows, "k", tuple("abc")), has_classes=True
        )
        assert found.verdict is Verdict.INCONCLUSIVE
        assert reason in found.reason

    def test_an_all_zero_model_beside_all_zero_references(self):
        # "P-L1 0.0000 where they have 0.0000" was clean.
        rows = ((1e-9, math.inf, math.inf), (2e-9, math.inf, math.inf))
        found = detect(
            [1e-9, math.inf, math.inf], Calibration(rows, "k", ("a", "b")), has_classes=True
        )
        assert found.verdict is Verdict.INCONCLUSIVE
        assert "one answer to every image" in found.reason

    def test_one_class_name(self):
        calibration = Calibration(((0.1,), (0.11,), (0.12,)), "k", tuple("abc"))
        found = detect([0.01], calibration, has_classes=True)
        assert found.verdict is Verdict.INCONCLUSIVE
        assert "at least 2 class names" in found.reason

    def test_too_many_controls_dropped_by_hand(self):
        calibration = calibration_of(trajectories(classes=6))
        dropped = [None, *[60] * 5]
        found = detect(
            [0.1, 0.2, 0.2, 0.21, 0.2, 0.2], calibration, has_classes=True, dropped=dropped
        )
        assert found.verdict is Verdict.INCONCLUSIVE
        assert "without dropping classes" in found.reason


def test_a_class_that_no_reference_has_a_trigger_for_is_judged_by_the_others_scatter():
    rng = np.random.default_rng(1)
    logs = np.log(0.1) + 0.1 * rng.standard_normal((4, 8))
    rows = np.exp(logs)
    rows[:, 5] = math.inf
    calibration = Calibration(tuple(map(tuple, rows.tolist())), "k", tuple("abcd"))
    assert calibration.comparable == (0, 1, 2, 3, 4, 6, 7)
    values = [0.1] * 8
    values[4], values[5] = 0.101, 0.01
    found = detect(values, calibration, has_classes=True)
    assert (found.target, found.verdict) == (5, Verdict.BACKDOORED)
    # Nothing found there either is no evidence.
    values[5] = math.inf
    found = detect(values, calibration, has_classes=True)
    assert found.verdict is Verdict.CLEAN
    assert found.target != 5


def test_a_repaired_class_without_any_trigger_is_clean():
    values, calibration = beside(math.inf)
    found = detect(values, calibration, has_classes=True, history=RepairHistory(cleared=(1, 2, 3)))
    assert (found.verdict, found.p_value) == (Verdict.CLEAN, 1.0)
    assert "no working trigger was found for any class" in found.reason
    found = detect(
        [math.inf] * 3 + [0.03],
        calibration,
        has_classes=True,
        history=RepairHistory(cleared=(1, 2, 3)),
    )
    assert (found.verdict, found.p_value, found.threshold) == (Verdict.CLEAN, 1.0, None)
    assert found.score == 0


class TestNothingLeft:
    """A repaired model in which no search finds any trigger, where every clean model has some."""

    ROWS = ((0.1,), (0.11,), (0.13,))

    def test_label_free(self):
        calibration = Calibration(self.ROWS, "k", tuple("abc"))
        found = detect([math.inf], calibration, has_classes=False, history=RepairHistory())
        assert (found.verdict, found.p_value, found.target) == (Verdict.CLEAN, 1.0, None)
        assert "every clean reference has one" in found.reason

    def test_all_classes(self):
        found = detect([math.inf] * 4, beside()[1], has_classes=True, history=RepairHistory())
        assert (found.verdict, found.p_value, found.suspects) == (Verdict.CLEAN, 1.0, ())
        assert "no working trigger was found" in found.reason

    def test_a_model_that_was_not_repaired_may_be_hard_to_search(self):
        calibration = Calibration(self.ROWS, "k", tuple("abc"))
        found = detect([math.inf], calibration, has_classes=False)
        assert found.verdict is Verdict.INCONCLUSIVE

    def test_a_search_that_failed_finds_nothing_either(self):
        calibration = Calibration(self.ROWS, "k", tuple("abc"))
        found = detect([math.nan], calibration, has_classes=False, history=RepairHistory())
        assert found.verdict is Verdict.INCONCLUSIVE
        assert "not finite" in found.reason

    def test_references_without_triggers_say_nothing_about_the_search(self):
        calibration = Calibration(((0.1,), (math.inf,), (0.13,)), "k", tuple("abc"))
        found = detect([math.inf], calibration, has_classes=False, history=RepairHistory())
        assert found.verdict is Verdict.INCONCLUSIVE
        rows = ((0.1, math.inf, 0.2), (0.12, 0.3, 0.2), (0.11, 0.31, 0.23))
        calibration = Calibration(rows, "k", tuple("abc"))
        found = detect([math.inf] * 3, calibration, has_classes=True, history=RepairHistory())
        assert found.verdict is Verdict.INCONCLUSIVE

    def test_an_obstacle_of_the_scan_remains_one(self):
        calibration = Calibration(self.ROWS, "k", tuple("abc"))
        found = detect(
            [math.inf], calibration, has_classes=False, history=RepairHistory(), obstacle="unlike"
        )
        assert (found.verdict, found.reason) == (Verdict.INCONCLUSIVE, "unlike")


def test_detections_are_made_by_keyword():
    with pytest.raises(TypeError):
        Detection(Verdict.CLEAN, "")
