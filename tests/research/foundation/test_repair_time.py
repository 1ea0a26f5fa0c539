"""How long a repair takes beside the earlier procedure: the figures of measured rows."""

import pytest

from pydetox.repair.configuration import UnlearnConfig
from pydetox.research.foundation.repair_time import (
    BEFORE,
    _own_modules,
    summarize_repair_time,
)
from tests.mini import mini_images, mini_model


def row(seed, procedure, unlearn, rescan, *, passes=1, asr=0.0, kept=1.0):
    seconds = {"unlearn": unlearn, "rescan": rescan}
    return {
        "seed": seed,
        "procedure": procedure,
        "passes": passes,
        "seconds": seconds,
        "asr": asr,
        "ca_kept": kept,
    }


def test_ratios_are_of_one_model_and_their_median_counts():
    rows = [
        row(1, "before", 60.0, 10.0, asr=0.02, kept=0.98),
        row(1, "now", 20.0, 10.0, asr=0.01, kept=0.99),
        row(2, "before", 90.0, 10.0, asr=0.0, kept=1.0),
        row(2, "now", 90.0, 10.0, asr=0.01, kept=1.0),
        row(3, "before", 50.0, 10.0, asr=0.01, kept=0.99),
        row(3, "now", 10.0, 20.0, asr=0.01, kept=0.98),
        # This one was not found, and so took no time.
        row(4, "before", 0.0, 0.0, passes=0),
        row(4, "now", 0.0, 0.0, passes=0),
    ]
    found = summarize_repair_time(rows)
    assert found["unlearn.models"] == 3
    assert found["unlearn.vs_before"] == pytest.approx(1 / 3)
    assert found["unlearn.with_rescan_vs_before"] == pytest.approx(0.5)
    assert found["unlearn.before_seconds"] == 60.0
    assert found["unlearn.now_seconds"] == 20.0
    assert found["unlearn.before_asr"] == pytest.approx(0.01)
    assert found["unlearn.now_ca_kept"] == pytest.approx(0.99)
    assert summarize_repair_time(rows[6:]) == {"unlearn.models": 0}


def test_the_earlier_procedure_measures_all_and_runs_modules():
    assert len(BEFORE.coefficients) == 21
    assert BEFORE.advanced.alpha_stride == 1
    assert not BEFORE.advanced.reuse_scans
    assert (BEFORE.steps, BEFORE.passes) == (160, 2)
    model, images = mini_model(), mini_images(2).images
    ran = []
    model.visual.register_forward_hook(lambda *_: ran.append(True))
    with _own_modules(True):
        model.encode_pixels(model.pixels(images))
    assert ran
    model.encode_pixels(model.pixels(images))
    assert len(ran) == 1
    assert UnlearnConfig().advanced.reuse_scans
