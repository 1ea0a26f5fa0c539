"""The demo: a small CLIP on the digits, and two suspects, of which one is backdoored.

The defender has what a user of pydetox has: two checkpoint files, the base model that they were
fine-tuned from, and 360 images. The seed decides the attack (patch, place, target class). The
attack is used only to plant the backdoor and, at the end, to measure its remaining success.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..api import calibrate, detox, scan
from ..atomic import refuse_foreign_folder, write_file
from ..checkpoints import Provenance, save_checkpoint
from ..data import DIGIT_NAMES, DIGIT_TEMPLATES, ImageSet, load_digits
from ..detect.configuration import ScanConfig
from ..detect.result import ScanResult
from ..evaluation import Evaluation, evaluate, predict
from ..inversion import InversionConfig
from ..models import OpenClipModel
from ..progress import Laps
from ..repair.result import DetoxResult
from ..repair.subtraction import subtract
from ..reporting import to_json, write_detox_report
from ..reporting.documents import evaluation_row, scan_document
from ..reporting.pictures import example_image
from ..rng import child_seed, generator
from ..session import as_model
from ..training import TrainConfig, train_on_prompts
from .attacks import PatchTrigger, badnets, poison

_IMAGE_SIZE = 32

#: open_clip's `CLIP` class, small: two towers of 2 and 3 layers, patches of 8 pixels.
MINI_CLIP: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": _IMAGE_SIZE,
        "layers": 3,
        "width": 96,
        "head_width": 32,
        "patch_size": 8,
    },
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 64,
        "heads": 2,
        "layers": 2,
    },
}

_POISON_RATE = 0.1

# Half of the images of a default search, for a demo that is over soon. Its trigger is a patch that
# always works, which takes no more.
_SEARCH = InversionConfig(steps=100, batch_size=12)

FINE_TUNING_RATE = 3e-4


@dataclass(frozen=True, eq=False)
class Attack:
    """The attack: `trigger` stamps uint8 images, and `target` is the index of its class."""

    trigger: PatchTrigger
    target: int


@dataclass(frozen=True, eq=False)
class DemoResult:
    """summary: what summary.json holds. report: the parts of `write_detox_report`."""

    summary: dict[str, Any]
    report: dict[str, Any]


def run_demo(
    output: str | Path, seed: int = 0, *, device: torch.device | str = "cpu"
) -> DemoResult:
    """Run the demo.

    Writes to `output`: checkpoints/ (base, clean, backdoored, repaired), report.html and
    summary.json; what an earlier run left there is replaced. seed: of the model, its training, the
    attack and the defence. device: where models are trained, scanned, repaired and evaluated. The
    summary's shares (ca, asr) are in [0, 1], measured on test images that neither side used; ASR
    leaves the target class out; p_l1 is that of the class that looks weakest relative to the clean
    references.

    Raises OutputError, before the work, if `output` cannot be written or holds files of these
    names that are not of a demo, and DataError if scikit-learn is not installed.
    """
    folder = Path(output)
    digits = load_digits(_IMAGE_SIZE)
    begin_folder(folder, seed)
    clock = Laps()
    attacker, defender, test = digits.split((0.5, 0.2, 0.3), seed=seed)
    attack = draw_attack(seed)
    paths = make_suspects(attacker, attack, folder / "checkpoints", seed, device=device)
    clock.lap("make the models")

    config = replace(demo_scan_config(seed), inversion=_SEARCH)
    calibration = calibrate(
        as_model(paths["base"]).to(device), defender, templates=DIGIT_TEMPLATES, config=config
    )
    clock.lap("calibrate")
    clean = scan(
        as_model(paths["clean"]).to(device),
        defender,
        calibration=calibration,
        templates=DIGIT_TEMPLATES,
        config=config,
    )
    clock.lap("scan the clean suspect")
    result = detox(
        as_model(paths["backdoored"]).to(device),
        defender,
        calibration=calibration,
        output=folder / "checkpoints" / "repaired",
        overwrite=True,
        templates=DIGIT_TEMPLATES,
        config=config,
    )
    steps = {f"backdoored suspect: {step}": value for step, value in result.seconds.items()}
    clock = Laps({**clock.seconds, **steps})

    backdoored = as_model(paths["backdoored"]).to(device)
    repaired = backdoored if result.path is None else as_model(result.path).to(device)
    before, after = (_evaluate(model, test, attack) for model in (backdoored, repaired))
    curve = _true_asr_curve(backdoored, result, test, attack)
    clock.lap("evaluate")
    summary = _summary(clean, result, before, after, attack, clock.seconds)
    report = _report(summary, clean, result, before, after, attack, curve, test, seed)
    write_detox_report(folder / "report.html", report)
    write_file(folder / "summary.json", to_json(summary) + "\n")
    return DemoResult(summary, report)


def begin_folder(folder: Path, seed: int) -> None:
    """Write the first file of a demo, and remove the last one of an earlier demo.

    Raises OutputError if the folder cannot be written, or holds files of these names that are not
    of a demo.
    """
    refuse_foreign_folder(
        folder,
        ("seed.txt", "summary.json", "report.html", "checkpoints"),
        {"seed.txt": r"\d+\n$"},
    )
    # A run that is cut short must not leave the last run's summary beside this run's models.
    (folder / "summary.json").unlink(missing_ok=True)
    write_file(folder / "seed.txt", f"{seed}\n")


def demo_scan_config(seed: int) -> ScanConfig:
    """Return how the demo's suspects are scanned; the demo itself takes fewer images (`_SEARCH`).

    The references are trained as the suspects were.
    """
    return ScanConfig(
        references=3,
        reference_training=TrainConfig(epochs=10, learning_rate=FINE_TUNING_RATE),
        seed=seed,
    )


def draw_attack(seed: int) -> Attack:
    """Return the attack that a seed stands for."""
    target = int(generator("demo.target", seed).integers(len(DIGIT_NAMES)))
    return Attack(badnets(_IMAGE_SIZE, seed=seed), target)


def make_suspects(
    images: ImageSet,
    attack: Attack,
    folder: Path,
    seed: int,
    *,
    device: torch.device | str = "cpu",
) -> dict[str, Path]:
    """Train the base, fine-tune a clean and a poisoned copy, and write all three."""
    base = train_on_prompts(
        OpenClipModel.from_config(MINI_CLIP, seed=seed, name="base").to(device),
        images,
        DIGIT_TEMPLATES,
        TrainConfig(epochs=25, learning_rate=1e-3, train_text=True, seed=seed),
        description="training the base model",
    )
    poisoned, _ = poison(images, attack.trigger, attack.target, rate=_POISON_RATE, seed=seed)
    models = {"base": base}
    for name, data in {"clean": images, "backdoored": poisoned}.items():
        tuning = TrainConfig(
            epochs=15, learning_rate=FINE_TUNING_RATE, seed=child_seed("demo.suspect", seed, name)
        )
        models[name] = train_on_prompts(
            base, data, DIGIT_TEMPLATES, tuning, description=f"fine-tuning the {name} suspect"
        )
    return {
        name: save_checkpoint(
            folder / name,
            model.storage_state_dict(),
            model_config=model.model_config,
            preprocess_config=None,
            provenance=Provenance(method=f"demo, {name}", seeds={"demo": seed}),
            overwrite=True,
        )
        for name, model in models.items()
    }


def _evaluate(model: OpenClipModel, test: ImageSet, attack: Attack) -> Evaluation:
    head = model.zero_shot_head(DIGIT_NAMES, DIGIT_TEMPLATES)
    return evaluate(model, test, head, trigger=attack.trigger, target=attack.target)


def _true_asr_curve(
    model: OpenClipModel, result: DetoxResult, test: ImageSet, attack: Attack
) -> list[float]:
    """Return the ASR of the true trigger over the first round's coefficients."""
    if not result.rounds:
        return []
    first = result.rounds[0]
    head = model.zero_shot_head(DIGIT_NAMES, DIGIT_TEMPLATES)
    assert test.labels is not None
    attacked = attack.trigger(test.images[test.labels != attack.target])
    return [
        float(
            (predict(subtract(model, first.vector, a), attacked, head) == attack.target)
            .double()
            .mean()
        )
        for a in first.search.coefficients
    ]


def _summary(
    clean: ScanResult,
    result: DetoxResult,
    before: Evaluation,
    after: Evaluation,
    attack: Attack,
    seconds: dict[str, float],
) -> dict[str, Any]:
    rescan = result.after
    return {
        "clean": {
            "verdict": clean.verdict.value,
            "p_l1": clean.detection.smallest_p_l1,
        },
        "backdoored": {
            "verdict": result.verdict.value,
            "p_l1": result.before.detection.smallest_p_l1,
            "target_true": DIGIT_NAMES[attack.target],
            "target_inferred": result.before.target_name,
        },
        "before": {"ca": before.clean_accuracy, "asr": before.attack_success_rate},
        "after": {"ca": after.clean_accuracy, "asr": after.attack_success_rate},
        "rescan": {
            "verdict": None if rescan is None else rescan.verdict.value,
            "p_l1": None if rescan is None else rescan.detection.smallest_p_l1,
        },
        "seconds": {step: round(value, 2) for step, value in seconds.items()},
    }


def _report(
    summary: dict[str, Any],
    clean: ScanResult,
    result: DetoxResult,
    before: Evaluation,
    after: Evaluation,
    attack: Attack,
    true_asr: list[float],
    test: ImageSet,
    seed: int,
) -> dict[str, Any]:
    found = summary["backdoored"]
    right = found["target_true"] == found["target_inferred"]
    scans = [scan_document(clean), scan_document(result.before)]
    names = ["clean suspect", "backdoored suspect"]
    if result.after is not None:
        scans.append(scan_document(result.after))
        names.append("repaired model, re-scan")
    report: dict[str, Any] = {
        "title": "pydetox demo",
        "subtitle": f"a mini CLIP on the UCI digits, BadNets, seed {seed}",
        "summary": [
            _card("Clean suspect", summary["clean"]["verdict"], good="clean"),
            _card("Backdoored suspect", found["verdict"], good="backdoored"),
            {
                "label": "Target class: true, inferred",
                "value": f"{found['target_true']}, {found['target_inferred']}",
                "tone": "good" if right else "bad",
            },
            _card("Repaired model", summary["rescan"]["verdict"] or "not repaired", good="clean"),
        ],
        "scans": [one | {"name": name} for one, name in zip(scans, names, strict=True)],
        "triggers": _pictures(result, attack, test, seed),
        "evaluation": [
            evaluation_row(before, "backdoored"),
            evaluation_row(after, "repaired"),
        ],
        "provenance": {"seed": seed, "sha256 of the backdoored file": result.before.sha256},
        "seconds": summary["seconds"],
    }
    if result.rounds:
        search = result.rounds[0].search
        report["alpha_search"] = {
            "alpha": list(search.coefficients),
            "ca": list(search.clean_accuracy),
            "asr": {"recovered": list(search.attack_success_rate), "true": true_asr},
            "chosen": search.coefficient,
        }
    return report


def _card(label: str, value: str, *, good: str) -> dict[str, str]:
    return {"label": label, "value": value, "tone": "good" if value == good else "bad"}


def _pictures(
    result: DetoxResult, attack: Attack, test: ImageSet, seed: int
) -> list[dict[str, Any]]:
    sample = example_image(test, seed)[None]
    pictures = [("clean image", sample[0]), ("with the true trigger", attack.trigger(sample)[0])]
    if result.rounds:
        patches = result.rounds[0].triggers[0]
        best = patches.trigger(patches.best())
        mask = (255 * best.mask).round().to(torch.uint8)
        visible = (255 * best.mask * best.pattern).round().to(torch.uint8)
        pictures += [
            ("with the recovered trigger", best(sample)[0]),
            ("recovered mask", mask),
            ("recovered mask × pattern", visible),
        ]
    return [{"caption": caption, "image": _as_picture(image)} for caption, image in pictures]


def _as_picture(image: Tensor) -> Any:
    return (image.permute(1, 2, 0) if image.ndim == 3 else image).contiguous().numpy()
