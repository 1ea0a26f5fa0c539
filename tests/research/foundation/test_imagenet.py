"""A pretrained tower: its weights under timm's names, its classes, and a run of seconds."""

from __future__ import annotations

import io
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from pydetox.detect.configuration import ScanConfig
from pydetox.errors import ArchitectureError
from pydetox.evaluation import predict
from pydetox.models import OpenClipModel
from pydetox.models.classifiers import build_classifier
from pydetox.repair.configuration import UnlearnConfig
from pydetox.research.foundation import imagenet, imagenet_benchmark
from pydetox.research.foundation.imagenet import (
    ImagenetLab,
    ImagenetPlan,
    chosen_classes,
    class_names,
    load_efficientnet,
    quick_imagenet_plan,
)
from pydetox.research.foundation.imagenet_benchmark import run_imagenet, summarize_imagenet
from tests.proportional import relative_error


def test_what_is_reported_is_the_default() -> None:
    plan = ImagenetPlan()
    assert (plan.scan, plan.repair, plan.classes) == (ScanConfig(), UnlearnConfig(), None)


def archive(state: dict[str, torch.Tensor]) -> zipfile.ZipFile:
    """Return the package's archive with these weights, under names that are not timm's."""
    weights, content = io.BytesIO(), io.BytesIO()
    torch.save({f"_{k}": v for k, v in state.items()}, weights)
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("efficientnet-lite0.pth", weights.getvalue())
    return zipfile.ZipFile(content)


def test_weights_are_taken_in_order_and_classes_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = timm.create_model("tf_efficientnet_lite0").eval()
    state = network.state_dict()
    monkeypatch.setattr(imagenet, "open_archive", lambda _: archive(state))
    model = load_efficientnet(32, classes=4)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = network(images * 2 - 1)[:, [0, 250, 500, 750]]
        rows = model.zero_shot_head(class_names(4), ("{c}",))
        ours = model.encode_pixels(images) @ rows.T
    assert relative_error(ours, theirs) < 1e-4
    assert class_names(4)[0] == "tench"
    assert len(set(class_names(None))) == 1000 == len(chosen_classes(None))

    monkeypatch.setattr(imagenet, "open_archive", lambda _: archive(dict(list(state.items())[1:])))
    with pytest.raises(ArchitectureError, match=f"has {len(state)} tensors"):
        load_efficientnet(32)
    first = next(iter(state))
    damaged = {**state, first: state[first][:1]}
    monkeypatch.setattr(imagenet, "open_archive", lambda _: archive(damaged))
    with pytest.raises(ArchitectureError, match=f"{first} has the shape"):
        load_efficientnet(32)


def test_figures_count_what_they_say() -> None:
    planted = {
        "kind": "backdoored",
        "target_right": True,
        "asr_before": 0.9,
        "asr_after": 0.1,
        "agreement_before": 0.8,
        "agreement_after": 0.7,
        "rescan": "clean",
        "seconds": 5.0,
    }
    clean = [{"kind": "clean", "verdict": verdict} for verdict in ("clean", "suspicious")]
    assert summarize_imagenet([planted, *clean]) == {
        "imagenet.target_right": 1.0,
        "imagenet.asr_before": 0.9,
        "imagenet.asr": 0.1,
        "imagenet.agreement_before": 0.8,
        "imagenet.agreement": 0.7,
        "imagenet.repaired": 1.0,
        "imagenet.seconds": 5.0,
        "imagenet.fpr": 0.5,
    }


def pictures(classes: int, side: int) -> tuple[tuple[str, ...], list[list[Image.Image]]]:
    """Return squares of random colours in place of photographs."""
    colours = np.random.default_rng(0).integers(0, 256, (classes, 3))
    made = [[Image.new("RGBA", (side, side), (*map(int, c), 255))] for c in colours]
    return tuple(str(k) for k in range(classes)), made


def test_a_quick_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Colours stand for photographs, and a small network for the large one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def small(image_size: int, classes: int | None) -> OpenClipModel:
        torch.manual_seed(0)
        vision = {
            "image_size": image_size,
            "library": "timm",
            "architecture": "test_resnet",
            "classes": classes,
        }
        config = {"embed_dim": 1, "layout": "classifier", "vision_cfg": vision, "text_cfg": {}}
        network = build_classifier(config).eval()
        network.settle(image_size)
        config["embed_dim"] = network.rows().shape[1]
        return OpenClipModel(network, model_config=config, name="small")

    monkeypatch.setattr(imagenet, "photograph_pictures", pictures)
    monkeypatch.setattr(imagenet, "load_efficientnet", small)
    plan = replace(quick_imagenet_plan(), clean=1, rates=(1e-5, 1e-4))
    lines = list[str]()
    found = run_imagenet(plan, lines.append)
    assert any("rendered" in line for line in lines)
    assert [row["kind"] for row in found["rows"]] == ["backdoored", "clean"]
    assert 0 <= found["summary"]["imagenet.agreement"] <= 1
    monkeypatch.setattr(imagenet_benchmark, "scan", None)
    monkeypatch.setattr(imagenet_benchmark, "detox", None)
    monkeypatch.setattr(imagenet_benchmark, "calibrate", None)
    assert run_imagenet(plan) == found

    lab = ImagenetLab(plan)
    parts = lab.images
    assert {k: len(v) for k, v in parts.items()} == {"attacker": 72, "defender": 24, "test": 24}
    # The clean model answers as the labels say, and is surer of what was kept than of the rest.
    for part in parts.values():
        assert part.labels is not None
        assert torch.equal(predict(lab.base, part.images, lab.head), part.labels)
    every = ImagenetLab(replace(plan, test=48, sure=1.0)).images["test"]

    def margins(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            best = (lab.base.encode_pixels(lab.base.pixels(images)) @ lab.head.T).topk(2, dim=1)
        return (best.values[:, 0] - best.values[:, 1]).sort().values

    torch.testing.assert_close(margins(every.images)[24:], margins(parts["test"].images))
