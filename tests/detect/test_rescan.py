"""The judgement of re-scans, on sizes that are made up: no model is searched."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pydetox.detect import rescan
from pydetox.detect.configuration import ScanConfig
from pydetox.detect.references import Comparison
from pydetox.detect.rescan import Rescans
from pydetox.detect.result import FamilyScan, ScanResult
from pydetox.detect.scan import decisive
from pydetox.detect.statistics import Calibration, RepairHistory, Verdict, detect

CLASSES = 10
CONFIG = ScanConfig()
FAMILIES = CONFIG.families
STEP = 60  # after which classes of the first scan are dropped


def calibration(rng, scatter=0.1, count=4):
    """References of two families, with sizes twice as large at STEP."""

    def of(family, others=()):
        centres = np.log(rng.uniform(0.02, 0.04, CLASSES))
        rows = np.exp(centres + scatter * rng.standard_normal((count, CLASSES)))
        then = tuple(map(tuple, (2 * rows).tolist()))
        names = tuple(f"m{i}" for i in range(count))
        rows = tuple(map(tuple, rows.tolist()))
        return Calibration(rows, "key", names, (STEP,), (then,), family, others)

    first, *others = FAMILIES
    return of(first, tuple(of(family) for family in others))


def scanned(compared, sizes, *, dropped=None, history=None):
    """The scan of a model with those P-L1, one list per family."""
    found = []
    for family in FAMILIES:
        detection = detect(
            sizes[family],
            compared.of(family),
            has_classes=True,
            dropped=None if dropped is None else dropped[family],
            families=len(FAMILIES),
            history=history,
        )
        found.append(FamilyScan(family, detection, SimpleNamespace(), compared.of(family)))
    chosen = decisive(found)
    return ScanResult(
        name="model",
        sha256=None,
        objective="targeted",
        class_names=tuple(map(str, range(CLASSES))),
        detection=chosen.detection,
        target=chosen.detection.target,
        inversion=chosen.inversion,
        calibration=chosen.calibration,
        seconds=0.0,
        family=chosen.family,
        others=tuple(one for one in found if one is not chosen),
    )


class Story:
    """A model before and after a repair: what its searches would find, and what was asked."""

    def __init__(self, monkeypatch, compared, before, after, dropped=()):
        """before, after: Sizes by family. dropped: Classes that the first scan drops."""
        self.searched = []
        steps = {f: [STEP if c in dropped else None for c in range(CLASSES)] for f in FAMILIES}
        # What is dropped was large then: 2.2 times what the references ended with.
        shown = {f: list(before[f]) for f in FAMILIES}
        for family in FAMILIES:
            for c in dropped:
                shown[family][c] = 2.2 * math.exp(compared.of(family).mean[c])
        self.first = scanned(compared, shown, dropped=steps)

        def scan_session(session, comparison, *, history, description):
            return scanned(compared, after, history=history)

        def search_classes(session, config, family, *, classes, description):
            self.searched.append((family, tuple(classes)))
            return SimpleNamespace(p_l1=torch.tensor([before[family][c] for c in classes]).double())

        monkeypatch.setattr(rescan, "scan_session", scan_session)
        monkeypatch.setattr(rescan, "search_classes", search_classes)
        self._comparison = Comparison(CONFIG, compared, None)

    def rescan(self, known=None, unlearned=()):
        session = SimpleNamespace(model=SimpleNamespace(name="model"))
        rescans = Rescans(session, self._comparison, self.first, known=known)
        return rescans.scan(session, CONFIG, unlearned=unlearned)


def usual(compared):
    """The mean sizes of the references."""
    return {family: [math.exp(m) for m in compared.of(family).mean] for family in FAMILIES}


def smaller(sizes, by):
    """The same sizes, those of some classes divided by a factor, in every family."""
    return {f: [v / by.get(c, 1) for c, v in enumerate(row)] for f, row in sizes.items()}


@pytest.fixture
def compared():
    return calibration(np.random.default_rng(0))


def test_a_p_value_is_the_larger_one_of_both_scans(compared):
    sizes = smaller(usual(compared), {3: 5})["patch"]
    options = {"has_classes": True, "families": 2}

    def before(p_values):
        return RepairHistory((0, 1), p_values)

    alone = detect(sizes, compared, history=before({}), **options)
    assert alone.verdict is Verdict.BACKDOORED
    assert alone.p_values[3] == alone.p_value
    assert alone.p_values[:2] == (1.0, 1.0)
    same = detect(sizes, compared, history=before({3: 1e-9}), **options)
    assert (same.p_value, same.threshold) == (alone.p_value, alone.threshold)
    doubtful = detect(sizes, compared, history=before({3: 0.03}), **options)
    assert (doubtful.verdict, doubtful.p_value) == (Verdict.SUSPICIOUS, 0.03)
    assert (doubtful.suspects, doubtful.backdoored) == ((3,), ())
    # No size of this class would be `backdoored`.
    assert doubtful.threshold is None
    assert doubtful.class_scores == alone.class_scores
    # A smaller score with a smaller p-value decides.
    two = smaller(usual(compared), {3: 5, 4: 3})["patch"]
    assert detect(two, compared, history=before({}), **options).target == 3
    assert detect(two, compared, history=before({3: 0.03, 4: 0.001}), **options).target == 4


def test_no_class_is_judged_beside_those_that_were_unlearned(monkeypatch, compared):
    """Fault: words of two classes were unlearned, and a third one looked backdoored beside them."""
    every, gone = usual(compared), (1, 2, 4, 6)
    history = RepairHistory(unlearned=gone)
    factors = {c: 0.05 if c in gone else 1 + 0.02 * c for c in range(CLASSES)}
    repaired = smaller(every, factors)
    sizes, options = repaired["patch"], {"has_classes": True, "families": 2}
    plain = detect(sizes, compared, **options)
    beside_others = detect(sizes, compared, history=history, **options)
    rest = [c for c in range(CLASSES) if c not in gone]
    expected = compared.of("patch").score(sizes, among=rest)
    assert beside_others.class_scores == pytest.approx(expected)
    assert beside_others.score < plain.score
    assert beside_others.verdict is Verdict.CLEAN
    # They are judged themselves, too: a trigger that is back is found.
    back = smaller(every, {1: 6})["patch"]
    assert detect(back, compared, history=history, **options).backdoored == (1,)
    # With less than three others there is too little to judge beside.
    many = RepairHistory(unlearned=tuple(range(CLASSES - 2)))
    assert detect(sizes, compared, history=many, **options) == plain
    # The re-scan of a repair says which classes they are, after a further search as well.
    before = smaller(every, {1: 6, 3: 6})
    story = Story(monkeypatch, compared, before, smaller(repaired, {3: 6}), dropped=[3])
    found = story.rescan(unlearned=[1])
    assert found.target == 3
    assert story.searched
    sizes = smaller(repaired, {3: 6})[found.family]
    rest = [c for c in range(CLASSES) if c != 1]
    expected = compared.of(found.family).score(sizes, among=rest)
    assert found.detection.class_scores == pytest.approx(expected)


def test_a_clean_class_that_stands_out_after_the_repair_alone_is_no_finding(monkeypatch, compared):
    """Fault: dropped classes were judged by the re-scan alone, beside unrepaired references."""
    before = smaller(usual(compared), {1: 6})
    after = smaller(usual(compared), {4: 3, 6: 3})
    # 4 was searched to the end before the repair, and 6 was not.
    story = Story(monkeypatch, compared, before, after, dropped=(6, 8))
    assert story.first.targets() == (1,)
    assert 4 in story.first.cleared()
    assert 6 not in story.first.cleared()
    found = story.rescan()
    assert found.verdict is Verdict.CLEAN
    assert set(found.detection.cleared) == {*story.first.cleared(), 6}
    # Only the class that stood out was searched again, once for each family.
    assert sorted(story.searched) == sorted((family, (6,)) for family in FAMILIES)


def test_nothing_is_searched_again_unless_something_stands_out(monkeypatch, compared):
    before = smaller(usual(compared), {1: 6})
    story = Story(monkeypatch, compared, before, usual(compared), dropped=(6, 8))
    assert story.rescan().verdict is Verdict.CLEAN
    assert story.searched == []


@pytest.mark.parametrize("dropped", [(), (6, 8)], ids=["flagged before", "dropped before"])
def test_a_second_backdoor_is_found_after_the_first_one_is_gone(monkeypatch, compared, dropped):
    before = smaller(usual(compared), {1: 6, 6: 4})
    after = smaller(usual(compared), {1: 0.5, 6: 4})
    story = Story(monkeypatch, compared, before, after, dropped)
    assert (6 in story.first.targets()) == (not dropped)
    found = story.rescan(known=1)
    assert (found.verdict, found.target) == (Verdict.BACKDOORED, 6)
    assert found.detection.suspects == (6,)
    assert bool(story.searched) == bool(dropped)


def test_a_class_that_is_known_to_be_backdoored_needs_no_first_scan(monkeypatch, compared):
    after = smaller(usual(compared), {2: 5})
    story = Story(monkeypatch, compared, usual(compared), after)
    assert story.first.verdict is Verdict.CLEAN
    found = story.rescan(known=2)
    assert (found.verdict, found.target) == (Verdict.BACKDOORED, 2)


def test_without_a_verdict_before_the_rescan_stands_alone(monkeypatch, compared):
    after = smaller(usual(compared), {2: 5})
    story = Story(monkeypatch, compared, usual(compared), after)
    nothing = replace(story.first.detection, class_scores=(), verdict=Verdict.INCONCLUSIVE)
    story.first = replace(story.first, detection=nothing)
    assert story.first.cleared() == ()
    assert story.rescan().target == 2
    assert story.searched == []


def test_false_alarms_are_no_more_than_nominal_although_a_repair_moves_sizes(monkeypatch):
    """Clean classes scatter as the references do before the repair, and 1.6 times as much after it.

    What a class has of its own stays in part. Re-scans alone flag far more than the nominal share.
    """
    rng, alarms, alone = np.random.default_rng(1), [], []
    few = [calibration(rng) for _ in range(30)]
    for compared in few * 4:
        before, after = {}, {}
        for family in FAMILIES:
            own, new = rng.standard_normal((2, CLASSES))
            centre = np.array(compared.of(family).mean)
            before[family] = np.exp(centre + 0.1 * own).tolist()
            moved = 0.16 * (0.7 * own + math.sqrt(1 - 0.7**2) * new)
            after[family] = np.exp(centre + moved).tolist()
            before[family][0] /= 6
            after[family][0] *= 2
        story = Story(monkeypatch, compared, before, after, dropped=(2, 4, 6, 8))
        found = story.rescan()
        alarms.append([found.verdict is not Verdict.CLEAN, found.verdict is Verdict.BACKDOORED])
        single = scanned(compared, after, history=RepairHistory(tuple(story.first.cleared())))
        alone.append([single.verdict is not Verdict.CLEAN, single.verdict is Verdict.BACKDOORED])
    suspicious, backdoored = np.mean(alarms, axis=0)
    # Two standard errors of 120 draws above 5% and 1%.
    assert suspicious <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / len(alarms))
    assert backdoored <= 0.01 + 2 * math.sqrt(0.01 * 0.99 / len(alarms))
    assert np.mean(alone, axis=0)[0] > 0.15
