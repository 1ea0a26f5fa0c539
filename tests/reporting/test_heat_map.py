import re

import pytest

from pydetox.errors import UsageError
from pydetox.reporting.heat_map import heat_map


def drawn(values, **changes):
    given = {"title": "t", "row_label": "a", "column_label": "<b>", "maximum": 2.0} | changes
    return heat_map([0.0, 1.0], [0.0, 0.5, 1.0], values, **given)


def test_every_cell_is_as_strong_as_its_value_and_tells_it():
    page = drawn([[0.0, 1.0, 2.0], [None, float("nan"), 5.0]], caption="A map.")
    wide = page.split('<div class="narrow">')[0]
    strengths = [float(v) for v in re.findall(r'fill-opacity="([\d.]+)"', wide)]
    assert strengths == [0.0, 0.5, 1.0, 1.0]
    assert "a 0.00, &lt;b&gt; 0.500: 1.00" in wide
    assert "<b>" not in page
    assert "A map. Full colour: 2.00." in page
    assert page.count("<svg") == 2
    # The first row is at the bottom.
    heights = [float(v) for v in re.findall(r'class="bar"[^>]* y="([\d.]+)"', wide)]
    assert heights[0] > heights[-1]


def test_sizes_must_fit():
    for wrong in ([[0.0] * 3], [[0.0] * 2] * 2):
        with pytest.raises(UsageError, match="2 rows and 3 columns"):
            drawn(wrong)
    with pytest.raises(UsageError):
        drawn([[0.0] * 3] * 2, maximum=0.0)
