"""Defences that subtract a trigger vector: the paper's, and pydetox's two."""

from __future__ import annotations

from dataclasses import dataclass

from ...api import detox
from ...models import OpenClipModel
from ...repair.alpha import CoefficientSearch, search_coefficient
from ...repair.configuration import AdvancedUnlearnConfig, UnlearnConfig
from ...repair.retention import DriftProbe
from ...repair.subtraction import subtract
from ...repair.task_vectors import TaskVector
from ...repair.trigger_vector import trigger_vector
from ...rng import child_seed
from ...session import Session
from .base import DefenderData, Outcome, Stopwatch

# The paper trains on the images as they are.
_STILL = AdvancedUnlearnConfig(augment=False)


@dataclass(frozen=True)
class PlainTbar:
    """TBAR as published: strengthen the backdoor on triggered images, subtract the change.

    Source: Abdelraheem, Favero, Bovet, Frossard, arXiv 2510.14845. The forget set is a few hundred
    images; alpha is the smallest with ASR <= 1% at 97% of CA, else the least ASR at that CA.
    """

    name: str = "plain TBAR"
    needs_trigger: bool = True
    forget_set: int = 256
    grid: tuple[UnlearnConfig, ...] = tuple(
        UnlearnConfig("strengthen", steps, rate, safety_factor=1.0, advanced=_STILL)
        for steps in (20, 80)
        for rate in (1e-4, 3e-4)
    )

    def defend(self, model: OpenClipModel, data: DefenderData, config: UnlearnConfig) -> Outcome:
        """Return the repaired model; details: alpha and CA, ASR over alpha for each trigger.

        details["steps"]: the vectors with their alpha, in the order they were subtracted.
        """
        return _subtract_known(self.name, model, data, config, self.forget_set)


@dataclass(frozen=True)
class PydetoxKnown:
    """pydetox with the true trigger: the forget vector (see `pydetox.repair.trigger_vector`)."""

    name: str = "pydetox, known trigger"
    needs_trigger: bool = True
    # The trigger is the attacker's own, so no success of it needs to be accepted.
    grid: tuple[UnlearnConfig, ...] = (
        UnlearnConfig(max_attack_success=0.002),
        UnlearnConfig(max_attack_success=0.002, safety_factor=1.5),
        UnlearnConfig(max_attack_success=0.002, safety_factor=2.0),
        UnlearnConfig(max_attack_success=0.002, safety_factor=1.5, learning_rate=2e-4),
    )

    def defend(self, model: OpenClipModel, data: DefenderData, config: UnlearnConfig) -> Outcome:
        """Return the repaired model; details: alpha and CA, ASR over alpha for each trigger.

        details["steps"]: the vectors with their alpha, in the order they were subtracted.
        """
        return _subtract_known(self.name, model, data, config)


@dataclass(frozen=True)
class PydetoxUnknown:
    """pydetox without the trigger: scan, recover triggers, subtract, and scan again, up to 3 times.

    A model that the scan calls clean is not changed.
    """

    name: str = "pydetox, unknown trigger"
    needs_trigger: bool = False
    grid: tuple[UnlearnConfig, ...] = (
        UnlearnConfig(),
        UnlearnConfig(safety_factor=1.5),
        UnlearnConfig(min_accuracy_kept=0.98),
        UnlearnConfig(advanced=AdvancedUnlearnConfig(blend_amplifications=(1.0, 1.5))),
    )

    def defend(self, model: OpenClipModel, data: DefenderData, config: UnlearnConfig) -> Outcome:
        """Return the repaired model; details["detox"] is the whole DetoxResult.

        details["steps"]: as of the known trigger.
        """
        watch = Stopwatch(len(data.images), data.label_count)
        result = detox(
            model,
            data.images,
            base=data.base,
            calibration=data.calibration,
            templates=data.templates,
            config=data.scan,
            unlearning=config,
        )
        steps = [(one.vector, one.search.coefficient) for one in result.rounds]
        return Outcome(result.model, watch.stop(), {"detox": result, "steps": steps})


def _subtract_known(
    name: str,
    model: OpenClipModel,
    data: DefenderData,
    config: UnlearnConfig,
    forget_set: int | None = None,
) -> Outcome:
    """Subtract the vectors of the known triggers.

    The forget direction needs no target class. Therefore one vector serves all triggers, with the
    largest alpha that one of them needs. Vectors of other directions are made and subtracted one
    after the other, and the accuracy is always compared with that of the first model. forget_set:
    The largest number of images that make a vector.
    """
    triggers = data.known(name)
    watch = Stopwatch(len(data.images), data.label_count)
    head = data.head(model)
    session = Session.open(model, data.images, templates=data.templates)
    forget = session.forget_set(config.advanced.forget_share, config.seed)
    if forget_set is not None:
        forget = forget.at_most(forget_set, child_seed("defenses.forget", config.seed))
    # The paper sets no limit to it.
    forgets = config.vector == "forget"
    probe = DriftProbe(model, session.images.images, seed=config.seed) if forgets else None
    repaired = model.clone()
    searches, steps = list[CoefficientSearch](), list[tuple[TaskVector, float]]()
    for group in [triggers] if config.vector == "forget" else [(one,) for one in triggers]:
        stamps = [one.trigger for one in group]
        vector = trigger_vector(
            repaired,
            forget.images,
            stamps,
            head,
            [one.target for one in group],
            config,
            description=name,
        )
        before = searches[0].clean_accuracy[0] if searches else None
        found = [
            search_coefficient(
                repaired,
                vector,
                data.images,
                [one.trigger],
                head,
                one.target,
                config,
                accuracy_before=before,
                probe=probe,
            )
            for one in group
        ]
        steps.append((vector, max(one.coefficient for one in found)))
        repaired = subtract(repaired, *steps[-1])
        searches += found
    return Outcome(repaired, watch.stop(), {"searches": searches, "steps": steps})
