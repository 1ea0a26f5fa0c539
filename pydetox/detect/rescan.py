"""Re-scans: the proof of a repair, judged together with the scan before it.

The references show how sizes of clean models scatter. They have been through no repair, which moves
the weights further, and not as a fine-tuning does. A clean class of a repaired model can therefore
stand out more often than its p-value in the re-scan says. But a repair plants no backdoor. A class
that leads to one has led to it before. So it counts only if it stands out in both scans, and its
p-value is the larger one of the two (an intersection-union test: Berger 1982, doi
10.1080/00401706.1982.10487790). The share of false alarms is at most that of the first scan,
whatever a repair does to sizes.

A first scan may have dropped a class before its search ended, so that its p-value is unknown. If
such a class stands out in the re-scan, and only then, it is searched to the end in the model before
the repair. A backdoor that the first scan gave up too early is thus still found.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from ..rng import child_seed
from ..session import Session
from .configuration import ScanConfig
from .references import Comparison
from .result import FamilyScan, ScanResult
from .scan import decisive, scan_session
from .search import search_classes, sizes_per_class
from .statistics import FINDINGS, RepairHistory, detect, p_values_of_suspects


class Rescans:
    """The re-scans of one model, after each of its repairs."""

    def __init__(
        self,
        session: Session,
        comparison: Comparison,
        before: ScanResult,
        *,
        known: int | None = None,
    ) -> None:
        """Begin with the scan before any repair.

        session: Of the model before any repair. comparison, before: Of its scan, and the result.
        known: A class that is repaired whatever this scan says, and judged as if there were none.
        """
        self._session, self._comparison, self._before = session, comparison, before
        every = [one.detection for one in families(before)]
        self._complete = before.objective == "targeted" and all(one.class_scores for one in every)
        self._cleared = {c for c in before.cleared() if c != known}
        self._p_before = p_values_of_suspects(every) if self._complete else {}
        if known is not None:
            self._p_before.pop(known, None)
        self._known = known

    def scan(
        self, repaired: Session, config: ScanConfig, *, unlearned: Sequence[int] = ()
    ) -> ScanResult:
        """Scan a repaired model.

        config: That of the scan before, with another seed. unlearned: The classes that repairs have
        unlearned so far, beside which no other is judged.
        """
        start = time.perf_counter()
        found = scan_session(
            repaired,
            replace(self._comparison, config=config),
            history=self._history(unlearned),
            description=f"re-scan of {self._session.model.name}",
        )
        while unknown := self._unknown(found):
            self._search_before(unknown)
            found = rejudged(found, config, self._history(unlearned))
        return replace(found, seconds=time.perf_counter() - start)

    @property
    def cleared(self) -> tuple[int, ...]:
        """The classes that were clean before the repair, as far as this was asked yet."""
        return tuple(sorted(self._cleared))

    def _history(self, unlearned: Sequence[int]) -> RepairHistory:
        return RepairHistory(self.cleared, dict(self._p_before), tuple(unlearned))

    def _unknown(self, found: ScanResult) -> list[int]:
        """Return the classes that stand out now, and of which the first scan says nothing."""
        if not self._complete:
            return []
        suspects = {c for one in families(found) for c in one.detection.suspects}
        return sorted(suspects - self._cleared - self._p_before.keys() - {self._known})

    def _search_before(self, classes: Sequence[int]) -> None:
        """Search classes that were dropped, in the model before the repair, to the end."""
        config, chances = self._comparison.config, dict.fromkeys(classes, 1.0)
        for one in families(self._before):
            sizes, dropped = list(one.detection.p_l1), list(one.detection.dropped)
            missing = [c for c in classes if dropped[c] is not None]
            if missing:
                search = search_classes(
                    self._session,
                    config,
                    one.family,
                    classes=missing,
                    description=f"{self._session.model.name} before its repair ({one.family})",
                )
                found = sizes_per_class(search.p_l1, config)
                for c, size in zip(missing, found, strict=True):
                    sizes[c], dropped[c] = size, None
            again = detect(
                sizes,
                one.calibration,
                has_classes=True,
                p_backdoored=config.p_backdoored,
                p_suspicious=config.p_suspicious,
                dropped=dropped,
                families=len(config.families),
            )
            for c in classes:
                chances[c] = min(chances[c], again.p_values[c] if again.p_values else 1.0)
        self._cleared |= {c for c, p in chances.items() if p >= config.p_suspicious}
        self._p_before |= {c: p for c, p in chances.items() if p < config.p_suspicious}


def scan_after_repair(session: Session, comparison: Comparison, before: Session) -> ScanResult:
    """Scan a repaired model as the re-scan of its repair does: beside the model before the repair.

    That model is scanned first, with the same references. If this scan is no finding, the model has
    nothing that a repair removes. Then it clears no class, and a warning says so. A label-free
    search judges one trigger, which the model before the repair has anyway, and scans only the
    repaired model. Raises what `scan_session` raises.

    session: Of the repaired model. before: Of the model before, with the same images, prompts and
    base.
    """
    config = comparison.config
    if comparison.calibration is None or config.objective != "targeted":
        return scan_session(session, comparison, history=RepairHistory())
    name = before.model.name
    first = replace(comparison, config=replace(config, positive_control=False))
    earlier = scan_session(before, first, description=f"scan of {name}, before the repair")
    if earlier.verdict not in FINDINGS:
        found = scan_session(session, comparison)
        doubt = (
            f"{name} is {earlier.verdict.value} in this scan and clears no class: expected is the "
            "model before the repair (before=)"
        )
        return replace(found, warnings=(*found.warnings, doubt))
    seeded = replace(config, seed=child_seed("repair.repaired", config.seed))
    # Which classes were repaired is not known; those that a repair would go after are likely ones.
    return Rescans(before, comparison, earlier).scan(session, seeded, unlearned=earlier.targets())


def families(result: ScanResult) -> list[FamilyScan]:
    """Return the results of all families, the decisive one first."""
    first = FamilyScan(result.family, result.detection, result.inversion, result.calibration)
    return [first, *result.others]


def rejudged(result: ScanResult, config: ScanConfig, history: RepairHistory) -> ScanResult:
    """Return the re-scan of all classes with the same sizes, and other knowledge of the first scan.

    result: Without a screening, which judges all classes, so that nothing becomes known later.
    Raises what `detect` raises.
    """
    judged = [
        replace(
            one,
            detection=detect(
                one.detection.p_l1,
                one.calibration,
                has_classes=True,
                p_backdoored=config.p_backdoored,
                p_suspicious=config.p_suspicious,
                dropped=one.detection.dropped,
                families=len(config.families),
                history=history,
            ),
        )
        for one in sorted(families(result), key=lambda one: config.families.index(one.family))
    ]
    chosen = decisive(judged)
    return replace(
        result,
        detection=chosen.detection,
        target=chosen.detection.target,
        inversion=chosen.inversion,
        calibration=chosen.calibration,
        family=chosen.family,
        others=tuple(one for one in judged if one is not chosen),
    )
