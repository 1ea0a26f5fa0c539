"""How thorough a scan or a repair is: three settings in place of many numbers.

The keys are the options of the command line, without torch to import.
`detect.configuration.ScanConfig` and `repair.configuration.UnlearnConfig` make their `quick()` and
`thorough()` of them. What is not named keeps its default. An option that is given explicitly wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Of a scan: fewer steps of fewer images and patches alone; or twice the steps and images, twice
#: the searches, and six references (docs/method.md, "False alarms and power").
SCAN_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "quick": {"steps": 80, "batch_size": 12, "families": ("patch",)},
    "thorough": {"steps": 300, "batch_size": 32, "restarts": 2, "references": 6},
}

#: Of a repair: one short pass without warps and waves; or three passes, with twice the steps,
#: warps and waves.
UNLEARN_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "quick": {"vector_steps": 80, "passes": 1, "warps": 0, "waves": 0},
    "thorough": {"vector_steps": 320, "passes": 3, "warps": 8, "waves": 4},
}
