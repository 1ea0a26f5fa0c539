"""How long a repair takes beside the procedure that it replaces, on the same models.

`before` is the earlier procedure as a configuration: two passes, whatever the first one reached;
triggers of its own in both, warps of any size among them; all 21 values of alpha; vectors of 160
steps, in open_clip's own modules. `now` is the default. Both repair the backdoored model of the
demo from the same scan configuration and references, in turns, so that a machine whose speed
changes does so for both. The attack is unknown to both.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from ...api import calibrate, detox
from ...data import DIGIT_NAMES, DIGIT_TEMPLATES, ImageSet, load_digits
from ...detect.configuration import ScanConfig
from ...evaluation import Evaluation, evaluate
from ...models import OpenClipModel, open_clip_model
from ...repair.configuration import AdvancedUnlearnConfig, UnlearnConfig
from ...session import as_model
from ..demo import Attack, demo_scan_config, draw_attack, make_suspects

#: The side of the demo's images.
_SIZE = 32

#: The repair as it was before it measured few alphas and ended where it had done enough.
BEFORE = UnlearnConfig(
    steps=160,
    batch_size=64,
    passes=2,
    warps=4,
    waves=0,
    advanced=AdvancedUnlearnConfig(largest_warp=math.inf, alpha_stride=1, reuse_scans=False),
)


@dataclass(frozen=True)
class RepairTimePlan:
    """Everything that decides a run.

    Attributes:
        seeds: One backdoored model of the demo per seed.
        before, now: The two configurations.
        scan: The scan of a seed.
        device: Where models are trained, searched and repaired: `cpu`, `cuda` or `cuda:1`.
    """

    seeds: tuple[int, ...] = (10, 11, 12)
    before: UnlearnConfig = BEFORE
    now: UnlearnConfig = field(default_factory=UnlearnConfig)
    scan: Callable[[int], ScanConfig] = demo_scan_config
    device: str = "cpu"


def run_repair_time(
    plan: RepairTimePlan, log: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Run a plan; return "rows", one for each seed and procedure, and "summary"."""
    rows = []
    for seed in plan.seeds:
        attacker, defender, test = load_digits(_SIZE).split((0.5, 0.2, 0.3), seed=seed)
        attack, config = draw_attack(seed), plan.scan(seed)
        with tempfile.TemporaryDirectory() as folder:
            paths = make_suspects(attacker, attack, Path(folder), seed, device=plan.device)
            base, victim = (
                as_model(paths[name]).to(plan.device) for name in ("base", "backdoored")
            )
            calibration = calibrate(base, defender, templates=DIGIT_TEMPLATES, config=config)
            for name, unlearning in (("before", plan.before), ("now", plan.now)):
                with _own_modules(name == "before"):
                    result = detox(
                        victim,
                        defender,
                        calibration=calibration,
                        templates=DIGIT_TEMPLATES,
                        config=config,
                        unlearning=unlearning,
                    )
                first, last = (_measured(one, test, attack) for one in (victim, result.model))
                rows.append(
                    {
                        "seed": seed,
                        "procedure": name,
                        "passes": len(result.rounds),
                        "seconds": {k: round(v, 2) for k, v in result.seconds.items()},
                        "rescan": None if result.after is None else result.after.verdict.value,
                        "asr_before": first.attack_success_rate,
                        "asr": last.attack_success_rate,
                        "ca_kept": last.clean_accuracy / first.clean_accuracy,
                    }
                )
                log(_told(rows[-1]))
    return {
        "rows": rows,
        "summary": summarize_repair_time(rows),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def summarize_repair_time(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return flat figures.

    unlearn.vs_before: The median over the seeds of the seconds of `unlearn` now, relative to those
    before. unlearn.with_rescan_vs_before: The same with the scans after it, because a scan can now
    take the place of a pass. For each procedure: the median seconds, and the mean ASR and CA kept
    on test images. unlearn.models: The number of models; those that a scan did not find are left
    out, and without any there are no other figures.
    """
    by_seed: dict[int, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        by_seed.setdefault(row["seed"], {})[row["procedure"]] = row
    pairs = [pair for pair in by_seed.values() if all(row["passes"] for row in pair.values())]
    if not pairs:
        return {"unlearn.models": 0}

    def seconds(row: Mapping[str, Any], *laps: str) -> float:
        return float(sum(row["seconds"].get(lap, 0.0) for lap in laps))

    def ratio(*laps: str) -> float:
        return statistics.median(
            seconds(pair["now"], *laps) / seconds(pair["before"], *laps) for pair in pairs
        )

    figures: dict[str, float] = {
        "unlearn.models": len(pairs),
        "unlearn.vs_before": ratio("unlearn"),
        "unlearn.with_rescan_vs_before": ratio("unlearn", "rescan"),
    }
    for name in ("before", "now"):
        own = [pair[name] for pair in pairs]
        figures |= {
            f"unlearn.{name}_seconds": statistics.median(seconds(row, "unlearn") for row in own),
            f"unlearn.{name}_asr": statistics.fmean(row["asr"] for row in own),
            f"unlearn.{name}_ca_kept": statistics.fmean(row["ca_kept"] for row in own),
        }
    return figures


def _measured(model: OpenClipModel, test: ImageSet, attack: Attack) -> Evaluation:
    head = model.zero_shot_head(DIGIT_NAMES, DIGIT_TEMPLATES)
    return evaluate(model, test, head, trigger=attack.trigger, target=attack.target)


def _told(row: Mapping[str, Any]) -> str:
    seconds = row["seconds"]
    return (
        f"seed {row['seed']}, {row['procedure']}: unlearn {seconds.get('unlearn', 0):.1f} s in "
        f"{row['passes']} passes, re-scan {seconds.get('rescan', 0):.1f} s ({row['rescan']}), ASR "
        f"{row['asr_before']:.1%} -> {row['asr']:.1%}, CA kept {row['ca_kept']:.1%}"
    )


@contextmanager
def _own_modules(wanted: bool) -> Iterator[None]:
    """Let fine-tunings run through open_clip's own modules, as they did before."""
    with patch.object(open_clip_model, "trainable", lambda _: None) if wanted else nullcontext():
        yield
