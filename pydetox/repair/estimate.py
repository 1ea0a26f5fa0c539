"""An estimate of the time and memory of a repair, before it begins."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..detect.configuration import ScanConfig
from ..detect.copies import BATCH, STEPS
from ..detect.references import ReferencePlan
from ..detect.search import label_free_objective, objective_for
from ..evaluation import predict
from ..inversion import WaveConfig, invert
from ..models.frozen import freeze
from ..session import Session
from .configuration import UnlearnConfig

# What is timed: images of a forward pass, triggers and steps of a search.
_IMAGES, _TRIGGERS, _STEPS = 32, 4, 3
# Forward passes that a training step on an image costs: one forward, two for its gradients.
_TRAINING = 3


@dataclass(frozen=True)
class RepairEstimate:
    """The most that a repair should take. Searches that end early make it less.

    Attributes:
        references: The seconds to make and search clean references; 0 if a calibration is given.
        scan: The seconds of one scan.
        repair: The seconds of one repair: recovering triggers, the trigger vector and the search
            for alpha. A scan follows it.
        memory: The bytes of weights and activations at the deepest point, beside the images.
    """

    references: float
    scan: float
    repair: float
    memory: int


def estimate_repair(
    session: Session, plan: ReferencePlan, unlearning: UnlearnConfig, *, recovers: bool = True
) -> RepairEstimate:
    """Time a few steps and return what the whole repair should take at most.

    The arguments are those of `repair_session`. recovers: Whether triggers are searched for.
    """
    config, model, images = plan.config, session.model, session.images
    few = images.at_most(_IMAGES, config.seed).images
    head = session.head if session.has_head else session.prototypes
    forward = _seconds(lambda: predict(model, few, head)) / len(few)
    stamped = _stamped_seconds(session, config)
    classes = len(head) if config.objective == "targeted" else 1
    towers = 2 if config.contrast else 1
    step = config.inversion.batch_size * stamped * towers
    searches = classes * config.searches_per_class * len(config.families)
    scan = searches * config.inversion.steps * step
    references = 0.0
    if plan.makes_calibration:
        given = None if plan.references is None else len(plan.references)
        copies = config.references
        if config.reference_training is None:  # at two distances
            # The pilot of each distance takes about as long as one more copy.
            shown, copies, made = STEPS * BATCH, 2 * copies, 2 * (copies + 1)
        else:
            shown, made = config.reference_training.epochs * len(images), copies - 1
        training = 0.0 if given is not None else made * shown * _TRAINING * forward
        references = (given or copies) * scan + training
    recovered = len(config.families) * 3 + unlearning.warps if recovers else 0
    # A step of a vector shows clean and triggered images, and half as many surrogates, twice.
    views = (2 + (1 if unlearning.retention > 0 else 0)) * _TRAINING + 1
    vector = unlearning.steps * min(unlearning.batch_size, len(images)) * views * forward
    candidates = len(unlearning.coefficients)
    alpha = candidates * (len(images) + unlearning.attacked_images + 256) * forward
    waves = 0.0
    if recovers and unlearning.waves and (config.objective == "targeted" or config.contrast):
        waves = WaveConfig(count=unlearning.waves).shown * towers * forward
    one_pass = recovered * config.inversion.steps * step + waves + vector + alpha
    memory = _memory(session, plan, leads_to_base=unlearning.leads_to_base)
    return RepairEstimate(references, scan, unlearning.passes * one_pass, memory)


def _stamped_seconds(session: Session, config: ScanConfig) -> float:
    """Return the seconds of one stamped image in one step of a search."""
    count = _TRIGGERS
    if config.objective != "targeted":
        objective = label_free_objective(replace(session, base=None))
    else:
        targets = [k % len(session.class_names) for k in range(_TRIGGERS)]
        plain = replace(session, base=None)
        plain.__dict__["head"] = session.head
        objective = objective_for(plain, targets, config.seed)

    def seconds(steps: int) -> float:
        found = invert(
            session.model,
            session.images.images,
            objective,
            replace(config.inversion, steps=steps, seed=config.seed),
            restarts=count,
            labels=session.images.labels,
            description="timing a search",
        )
        return found.seconds

    both = [seconds(steps) for steps in (1, 1 + _STEPS)]
    batch = min(config.inversion.batch_size, len(session.images))
    return max(0.0, both[1] - both[0]) / (_STEPS * count * batch)


def _memory(session: Session, plan: ReferencePlan, *, leads_to_base: bool) -> int:
    """Return the bytes of weights and activations when a vector is trained."""
    model = session.model
    trained = sum(p.numel() for p in model.visual.parameters())
    toward = leads_to_base and plan.start is not None
    copies = 2 + (1 if plan.config.contrast or toward else 0)
    # A gradient and AdamW's two moments beside the weights that are trained; `TowardBase` also has
    # where they began, their way and their share of it.
    kept = 6 if toward else 3
    weights = 4 * (copies * model.num_parameters + kept * trained)
    activations = freeze(model.visual).bytes_per_image * 3 * 64
    return int(weights + activations)


def _seconds(work: Callable[[], object]) -> float:
    work()  # the first call also prepares libraries
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
