"""The work of a benchmark, one cached step at a time; each step runs in any process alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...analysis.localization import disentanglement_error
from ...api import calibrate, scan
from ...data import (
    ImageSet,
)
from ...detect.result import ScanResult
from ...detect.statistics import FINDINGS, Calibration
from ...errors import UsageError
from ...evaluation import Evaluation, evaluate
from ...inversion import InversionResult
from ...models import OpenClipModel
from ...repair.result import DetoxResult
from ...repair.subtraction import subtract
from ...repair.task_vectors import TaskVector
from ...reporting.images import png_data_uri
from ...reporting.pictures import example_image
from ...rng import child_seed
from ...training import TrainConfig, train_on_prompts
from ..defenses import (
    DEFENSES,
    DefenderData,
    Defense,
    KnownTrigger,
    Outcome,
    PydetoxKnown,
    PydetoxUnknown,
)
from .cache import (
    EVALUATION_CODE,
    SCAN_CODE,
    XI_CODE,
    code_digest,
    data_digest,
    defense_code,
    key_of,
)
from .models import Models, Suspect

#: The attack that the maps of xi are drawn for.
_XI_ATTACK = "badnets"

#: Equal parts of the way from a victim to its repair, between which it is measured.
_PATH_PARTS = 8


def defense_named(name: str) -> Defense[Any]:
    """Return the defence of that name; UsageError for another one."""
    for one in DEFENSES:
        if one.name == name:
            return one
    raise UsageError(f"defence {name!r}; expected one of {', '.join(d.name for d in DEFENSES)}")


class Lab(Models):
    """Takes the steps of one seed of one plan, each at most once: judges, repairs, measures."""

    def calibration(self) -> Calibration:
        """Return the calibration from the reference models, made on the defender's images."""
        config = replace(self.plan.scan, seed=self.seed)
        key = key_of(
            "calibration",
            {"base": self._base_key, "scan": config, "code": code_digest(SCAN_CODE)}
            | {"data": data_digest(self.splits.defender)}
            | {"references": [self.key(one) for one in self.references]},
        )
        document = self.cache.document(key)
        if document is None:
            made = calibrate(
                self.base,
                self.splits.defender,
                references=[self.model(one) for one in self.references],
                templates=self.templates,
                config=config,
            )
            document = self.cache.keep_document(key, made.to_dict())
        return Calibration.from_dict(document)

    def defender_data(self, suspect: Suspect, defense: Defense[Any]) -> DefenderData:
        """Return what a defence is given: the true triggers only where it needs them."""
        known = tuple(KnownTrigger(one.trigger, one.target) for one in self.backdoors(suspect))
        return DefenderData(
            self.splits.defender,
            self.templates,
            triggers=known if defense.needs_trigger else (),
            base=None if defense.needs_trigger else self.base,
            calibration=None if defense.needs_trigger else self.calibration(),
            scan=replace(self.plan.scan, seed=self.seed),
        )

    def measure(self, model: OpenClipModel, suspect: Suspect, images: ImageSet) -> list[Evaluation]:
        """Return CA and ASR, one evaluation per backdoor (one without ASR for a clean model)."""
        head = model.zero_shot_head(self.names, self.templates)
        planted = self.backdoors(suspect)
        if not planted:
            return [evaluate(model, images, head)]
        return [
            evaluate(model, images, head, trigger=one.trigger, target=one.target) for one in planted
        ]

    # --- the steps: each returns a JSON document, from the cache if nothing it depends on changed

    def train(self, suspect: Suspect) -> dict[str, Any]:
        """Make a suspect and measure it before any defence."""
        key = self._result_key("before", suspect, EVALUATION_CODE, {})
        found = self.cache.document(key)
        if found is None:
            model = self.model(suspect)
            validation = self.measure(model, suspect, self.splits.validation)
            planted = [one.attack_success_rate for one in validation]
            row = self._row(suspect, "no defence", model, self.splits.test)
            base = evaluate(self.base, self.splits.test, self.head).clean_accuracy
            least = min((p for p in planted if p is not None), default=0.0)
            counts = suspect.attack is not None and least >= self.plan.least_planted
            row |= {"planted": planted, "counts": counts, "ca_base": base}
            row["ca_validation"] = validation[0].clean_accuracy
            found = self.cache.keep_document(key, row)
        return dict(found)

    def scan(self, suspect: Suspect) -> dict[str, Any]:
        """Judge a suspect."""
        config = replace(self.plan.scan, seed=child_seed("bench.scan", self.seed))
        content = {"scan": config, "references": [self.key(one) for one in self.references]}
        key = self._result_key("scan", suspect, SCAN_CODE, content)
        found = self.cache.document(key)
        if found is None:
            calibration = self.calibration()
            result = scan(
                self.model(suspect),
                self.splits.defender,
                calibration=calibration,
                base=self.base,
                templates=self.templates,
                config=config,
            )
            found = self.cache.keep_document(key, self._judged(suspect, result))
        return dict(found)

    def defend(
        self, suspect: Suspect, name: str, setting: int, *, part: str = "test", relapse: bool
    ) -> dict[str, Any]:
        """Repair a suspect with a defence and measure what is left.

        setting: index in the defence's grid. part: "test", or "validation" in tuning. relapse: also
        measure it after one more epoch of the suspect's own kind of fine-tuning, on clean images.
        """
        defense = defense_named(name)
        config = defense.grid[setting]
        content = {"defense": name, "config": config, "part": part, "relapse": relapse}
        if isinstance(defense, PydetoxUnknown):
            content["scan"] = self.plan.scan
            content["references"] = [self.key(one) for one in self.references]
        key = self._result_key("defense", suspect, defense_code(defense), content)
        found = self.cache.document(key)
        if found is not None:
            return dict(found)
        model = self.model(suspect)
        outcome = defense.defend(model, self.defender_data(suspect, defense), config)
        images = self.splits.test if part == "test" else self.splits.validation
        row = self._row(suspect, name, outcome.model, images)
        row |= {
            "setting": setting,
            "images": outcome.cost.images,
            "labels": outcome.cost.labels,
            "seconds": outcome.cost.seconds,
            "details": self._details(suspect, outcome),
        }
        if relapse:
            again = self._one_more_epoch(outcome.model)
            after = self.measure(again, suspect, images)
            row["relapse"] = [one.attack_success_rate for one in after]
        if isinstance(defense, PydetoxKnown | PydetoxUnknown) and part == "test":
            row["path"] = self._path(suspect, model, outcome.details["steps"], images)
        return dict(self.cache.keep_document(key, row))

    def xi(self) -> dict[str, Any]:
        """Return two maps of xi: backdoor against clean task, and two clean tasks as a control.

        The tasks of the control are the first and the second half of the classes. For the backdoor,
        tau_2 is what a poisoned fine-tuning has over a clean one with the same images and seed.
        """
        points = [
            round(-2 + 4 * k / (self.plan.xi_points - 1), 6) for k in range(self.plan.xi_points)
        ]
        victim = Suspect(self.seed, _XI_ATTACK)
        key = self._result_key("xi", victim, XI_CODE, {"points": points})
        found = self.cache.document(key)
        if found is not None:
            return dict(found)
        start = self.base.clip.state_dict()
        test = self.splits.test
        assert test.labels is not None
        clean = self._change_from(start, self.model(Suspect(self.seed, None, 0)))
        whole = self._change_from(start, self.model(victim))
        (backdoor,) = self.backdoors(victim)
        few = test.at_most(1000, child_seed("bench.xi", self.seed))
        assert few.labels is not None
        others = few.images[few.labels != backdoor.target]
        halves = []
        for part in (0, 1):
            assert self._poisonable.labels is not None
            chosen = torch.nonzero(self._poisonable.labels * 2 // len(self.names) == part)
            images = self._poisonable.subset(chosen.flatten())
            seed = child_seed("bench.control", self.seed, part)
            training = replace(self.plan.fine_tuning, seed=seed)
            tuned = train_on_prompts(self.base, images, self.templates, training)
            halves.append(self._change_from(start, tuned))
        tests = [test.images[test.labels * 2 // len(self.names) == part] for part in (0, 1)]
        given = {"first_coefficients": points, "second_coefficients": points}
        document = {
            "backdoor": disentanglement_error(
                self.base,
                clean,
                whole - clean,
                few.images,
                backdoor.trigger(others),
                self.head,
                **given,
            ),
            "control": disentanglement_error(
                self.base, halves[0], halves[1], tests[0], tests[1], self.head, **given
            ),
        }
        return dict(self.cache.keep_document(key, document))

    # --- parts of the steps

    def _result_key(
        self, kind: str, suspect: Suspect, code: tuple[str, ...], content: dict[str, Any]
    ) -> str:
        return key_of(
            kind,
            {
                "model": self.key(suspect),
                "code": code_digest(code),
                "data": self._defender_digests,
                "least": self.plan.least_planted,
                **content,
            },
        )

    @cached_property
    def _defender_digests(self) -> list[str]:
        parts = (self.splits.defender, self.splits.validation, self.splits.test)
        return [data_digest(part) for part in parts]

    def _change_from(self, start: dict[str, Tensor], model: OpenClipModel) -> TaskVector:
        return TaskVector.between(start, model.clip.state_dict())

    def _one_more_epoch(self, model: OpenClipModel) -> OpenClipModel:
        seed = child_seed("bench.relapse", self.seed)
        training: TrainConfig = replace(self.plan.fine_tuning, epochs=1, seed=seed)
        return train_on_prompts(
            model, self._poisonable, self.templates, training, description="benign fine-tuning"
        )

    def _row(
        self, suspect: Suspect, defense: str, model: OpenClipModel, images: ImageSet
    ) -> dict[str, Any]:
        measured = self.measure(model, suspect, images)
        return {
            "suspect": suspect.name,
            "attack": suspect.attack,
            "seed": suspect.seed,
            "defense": defense,
            "rate": None if suspect.attack is None else self.plan.rate(suspect.attack),
            "targets": [one.target for one in measured if one.target is not None],
            "ca": measured[0].clean_accuracy,
            "ca_ci": measured[0].clean_accuracy_ci,
            "n_clean": measured[0].n_clean,
            "per_class": measured[0].per_class_accuracy,
            "asr": [one.attack_success_rate for one in measured],
            "asr_ci": [one.attack_success_rate_ci for one in measured],
            "n_attack": [one.n_attack for one in measured],
        }

    def _path(
        self,
        suspect: Suspect,
        model: OpenClipModel,
        steps: Sequence[tuple[TaskVector, float]],
        images: ImageSet,
    ) -> list[dict[str, Any]]:
        """Return CA and ASR on the way from a victim to its repair, at equal parts of the way.

        On the way alpha of the first trigger vector grows to what was chosen, then that of the
        next. Neither end is among the points.
        """
        stations = [model]
        for vector, coefficient in steps:
            stations.append(subtract(stations[-1], vector, coefficient))
        points = []
        for k in range(1, _PATH_PARTS if steps else 0):
            done, rest = divmod(k * len(steps), _PATH_PARTS)
            vector, coefficient = steps[done]
            candidate = subtract(stations[done], vector, coefficient * rest / _PATH_PARTS)
            measured = self.measure(candidate, suspect, images)
            points.append(
                {
                    "ca": measured[0].clean_accuracy,
                    "asr": [one.attack_success_rate for one in measured],
                }
            )
        return points

    def _judged(self, suspect: Suspect, result: ScanResult) -> dict[str, Any]:
        targets = [one.target for one in self.backdoors(suspect)]
        found = result.detection
        return {
            "suspect": suspect.name,
            "attack": suspect.attack,
            "seed": suspect.seed,
            "verdict": found.verdict.value,
            "flagged": found.verdict in FINDINGS,
            "score": found.score if found.score is not None else -math.inf,
            "p_value": found.p_value,
            "p_l1": found.smallest_p_l1,
            "family": result.family,
            "target": result.target,
            "target_right": result.target in targets if targets else None,
            "class_scores": {
                result.family: list(found.class_scores),
                **{one.family: list(one.detection.class_scores) for one in result.others},
            },
            "seconds": result.seconds,
        }

    def _details(self, suspect: Suspect, outcome: Outcome) -> dict[str, Any]:
        searches, pictures = list(outcome.details.get("searches", [])), list[dict[str, str]]()
        details: dict[str, Any] = {}
        result = outcome.details.get("detox")
        if isinstance(result, DetoxResult):
            details["scan"] = self._judged(suspect, result.before)
            details["rounds"] = len(result.rounds)
            details["repaired"] = result.repaired
            searches = [one.search for one in result.rounds]
            recovered = [found for one in result.rounds for found in one.triggers]
            pictures = self._pictures(suspect, recovered)
        details["searches"] = [
            {
                "alpha": one.coefficients,
                "ca": one.clean_accuracy,
                "asr": one.attack_success_rate,
                "chosen": one.coefficient,
                "reached": one.reached,
            }
            for one in searches
        ]
        details["pictures"] = pictures
        return details

    def _pictures(
        self, suspect: Suspect, recovered: Sequence[InversionResult]
    ) -> list[dict[str, str]]:
        sample = example_image(self.splits.test, self.seed)[None]
        shown = [
            (f"{suspect.name}, true trigger", one.trigger(sample)[0])
            for one in self.backdoors(suspect)
        ]
        for found in recovered:
            best = found.trigger(found.best())
            shown.append((f"{suspect.name}, recovered", best(sample)[0]))
        return [
            {"caption": caption, "uri": png_data_uri(image.permute(1, 2, 0).numpy())}
            for caption, image in shown
        ]
