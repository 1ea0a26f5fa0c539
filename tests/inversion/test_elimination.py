import math

import pytest

from pydetox.errors import UsageError
from pydetox.inversion import Elimination, relative_to_smallest

ALL = (True,) * 4


def by_table(scores):
    """A score that does not look at the sizes."""
    return lambda step, sizes: scores[step]


def test_score_relative_to_the_smallest_by_hand():
    scores = relative_to_smallest(10, [0.02, 0.04, math.inf, 0.02 * math.e])
    assert scores == pytest.approx((0.0, -math.log(2), -math.inf, -1.0))
    assert relative_to_smallest(10, [math.inf, math.inf]) == (0.0, 0.0)


def test_classes_below_the_floor_go_once_the_first_steps_are_over():
    rule = Elimination(by_table({5: [9, 0, 0, 0], 60: [3.0, 1.0, 0.99, -7.0]}), floor=1.0, first=60)
    assert rule.drop(5, [0.1] * 4, ALL) == (False, False, False, False)
    assert rule.drop(60, [0.1] * 4, ALL) == (False, False, True, True)


def test_the_best_class_stays_whatever_it_scores():
    rule = Elimination(by_table({1: [-3.0, -1.0, -2.0, -4.0]}), floor=0.0, first=1)
    assert rule.drop(1, [0.1] * 4, ALL) == (True, False, True, True)
    two = Elimination(rule.score, floor=0.0, first=1, kept=2)
    assert two.drop(1, [0.1] * 4, ALL) == (True, False, False, True)
    # Class 1 is out of the contest: the best of the others stays.
    assert rule.drop(1, [0.1] * 4, (True, False, True, True)) == (True, False, False, True)


def test_a_class_has_the_size_of_its_smallest_restart_and_goes_with_all_of_them():
    seen = []

    def score(step, sizes):
        seen.append(list(sizes))
        return relative_to_smallest(step, sizes)

    rule = Elimination(score, floor=-0.5, restarts=2, first=1)
    assert rule.drop(1, [0.5, 0.02, 0.04, math.inf], ALL) == (False, False, True, True)
    assert seen == [[0.02, 0.04]]


@pytest.mark.parametrize("wrong", [{"restarts": 0}, {"kept": 0}, {"floor": math.nan}])
def test_rules_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UsageError, match="expected"):
        Elimination(relative_to_smallest, **{"floor": 0.0, **wrong})


def test_triggers_that_are_no_multiple_of_the_restarts_are_refused():
    rule = Elimination(relative_to_smallest, floor=0.0, restarts=3, first=1)
    with pytest.raises(UsageError, match="multiple of 3"):
        rule.drop(1, [0.1] * 4, ALL)
