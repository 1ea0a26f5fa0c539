"""Neural Cleanse's schedule, its outliers, and what the interfaces of its peers write."""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from pydetox.checkpoints import load_checkpoint
from pydetox.compat import NeuralCleanse, backdoorbench, decree, neural_cleanse
from pydetox.compat.cleanse import CleanseRules, FoundMask, Outliers, cleanse, norm_of, outliers
from pydetox.errors import ArchitectureError, DataError, UsageError
from pydetox.models import OpenClipModel

SIZE, CLASSES = 8, 4


class Planted(nn.Module):
    """Classes are the brightest quarter of the image, but for a bright corner pixel: class 2."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(CLASSES + 1, CLASSES)
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(CLASSES, CLASSES + 1) * 10)
            self.head.weight[2, CLASSES] = 80.0
            self.head.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        half = SIZE // 2
        parts = [images[:, :, i : i + half, j : j + half] for i in (0, half) for j in (0, half)]
        means = torch.stack([part.mean(dim=(1, 2, 3)) for part in parts], dim=1)
        corner = (images[:, :, 0, 0].mean(dim=1, keepdim=True) - 0.8).relu()
        return self.head(torch.cat([means, corner], dim=1))


def quarters(count: int) -> tuple[Tensor, Tensor]:
    """Images float32 [N, 3, 8, 8] with one bright quarter, and their classes."""
    labels = torch.arange(count) % CLASSES
    images = torch.rand((count, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0)) * 0.3
    for k, label in enumerate(labels.tolist()):
        top, left = divmod(label, 2)
        images[k, :, top * 4 : top * 4 + 4, left * 4 : left * 4 + 4] += 0.4
    return images, labels


def reference(
    model: nn.Module, batches: list[Tensor], target: int, rules: CleanseRules
) -> tuple[float, int]:
    """The peers' loop for one class, in float64, written once more from their text."""
    model = Planted().double()
    w = torch.ones(1, SIZE, SIZE, dtype=torch.float64, requires_grad=True)
    p = torch.ones(3, SIZE, SIZE, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([w, p], lr=rules.learning_rate, betas=(0.5, 0.9))
    cost, best, best_before, up, down, still = rules.initial_cost, math.inf, math.inf, 0, 0, 0
    was_up = was_down = False
    kept, zero_cost = None, 0
    for number in range(rules.epochs):
        accuracies, norms = [], []
        for x in batches:
            m = torch.tanh(w) / 2 + 0.5
            before = m.detach()
            logits = model((1 - m) * x.double() + m * (torch.tanh(p) / 2 + 0.5))
            norm = m.sum() if rules.norm == 1 else m.square().sum().sqrt()
            picked = torch.log_softmax(logits, 1)[:, target]
            adam.zero_grad()
            (-picked.mean() + cost * norm).backward()
            adam.step()
            accuracies.append(float((logits.argmax(1) == target).double().mean()))
            norms.append(float(norm.detach()))
        accuracy, norm = np.mean(accuracies), np.mean(norms)
        good = accuracy >= rules.success
        unsuccessful = math.isinf(best) and (number == 0 or rules.without == "last")
        if (good and norm < best) or unsuccessful:
            kept = before if rules.keeps == "before" else (torch.tanh(w) / 2 + 0.5).detach()
            best = norm if good else best
        if math.isfinite(best):
            still = still + 1 if best >= rules.early_stop_threshold * best_before else 0
        best_before = min(best_before, best)
        if was_up and was_down and still >= rules.early_stop_patience:
            return float(kept.sum()), number + 1
        zero_cost = zero_cost + 1 if good and rules.resets == "any cost" else 0
        if zero_cost >= rules.patience:
            # As written by ART: the count goes on, so that the cost stays where it began.
            cost, up, down, was_up, was_down = rules.initial_cost, 0, 0, False, False
        up, down = (up + 1, 0) if good else (0, down + 1)
        if up >= rules.patience:
            cost, up, was_up = cost * rules.cost_multiplier, 0, True
        elif down >= rules.patience:
            cost, down, was_down = cost / rules.cost_multiplier**1.5, 0, True
    return float(kept.sum()), rules.epochs


@pytest.mark.parametrize("peer", [("zero cost", "after", "first"), ("any cost", "before", "last")])
def test_the_schedule_is_that_of_the_peers(peer):
    resets, keeps, without = peer
    rules = CleanseRules(
        epochs=60,
        patience=3,
        early_stop_patience=6,
        resets=resets,
        keeps=keeps,
        without=without,
    )
    batches = list(quarters(24)[0].split(8))
    model = Planted().requires_grad_(False)
    ones = torch.ones(CLASSES, 3, SIZE, SIZE)
    found = cleanse(model, lambda _: batches, ones[:, :1], ones, rules, at_once=10)
    for target, one in enumerate(found):
        norm, epochs = reference(model, batches, target, rules)
        assert one.epochs == epochs
        assert one.norm(rules) == pytest.approx(norm, rel=2e-3)
    judged = outliers([one.norm(rules) for one in found])
    assert min(judged.norms) == judged.norms[2]


@pytest.mark.parametrize("without", ["first", "last"])
def test_the_mask_of_a_search_without_success(without):
    rules = CleanseRules(without=without)
    masks = [torch.full((1, 2, 2), value) for value in (0.2, 0.4, 0.6)]
    found = FoundMask(0, masks[2], masks[2])
    for mask in masks[:2]:
        found.judge(0.5, float(mask.sum()), mask, mask, rules)
    assert found.mask is masks[0 if without == "first" else 1]
    found.judge(1.0, 9.0, masks[2], masks[2], rules)
    found.judge(0.5, 1.0, masks[0], masks[0], rules)
    assert found.mask is masks[2], "one that worked stands"


def test_outliers_are_those_of_numpy():
    norms = [30.0, 31.0, 28.0, 4.0, 33.0, 29.0]
    found = outliers(norms)
    median = np.median(norms)
    mad = 1.4826 * np.median(np.abs(np.array(norms) - median))
    assert (found.median, found.mad) == (pytest.approx(median), pytest.approx(mad))
    assert found.anomaly_index == pytest.approx((median - 4) / mad)
    assert found.flagged == (3,)
    assert outliers(norms, lower_middle=True).median == float(torch.tensor(norms).median())
    assert outliers([5.0, 5.0, 5.0, 1.0]).anomaly_index == math.inf
    assert not outliers([5.0, 5.0, 5.0]).backdoored
    with pytest.raises(UsageError, match="at least 3"):
        outliers([1.0, 2.0])


def test_norms_and_rules():
    masks = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(norm_of(masks, 1), masks.abs().flatten(1).sum(1) / 3)
    torch.testing.assert_close(norm_of(masks, 2), masks.flatten(1).norm(dim=1) / 3**0.5)
    assert FoundMask(0, masks[0], masks[0]).norm(CleanseRules()) == pytest.approx(
        float(masks[0].sum() / 3)
    )
    for wrong in ({"epochs": 0}, {"norm": 3}, {"success": 1.5}):
        with pytest.raises(UsageError):
            CleanseRules(**wrong)


def test_art_finds_the_class_and_mitigates_it():
    images, labels = quarters(32)
    x, y = images.numpy(), np.eye(CLASSES)[labels.numpy()]
    model = Planted()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    made = NeuralCleanse(model)(steps=60, norm=1, init_cost=0.3, batch_size=8)
    found, judged = made.search(x)
    assert judged.norms == tuple(pytest.approx(float(one.mask.sum())) for one in found)
    assert made.predict(x).shape == (32, CLASSES)
    assert (made.predict(x).argmax(1) == labels.numpy()).all()
    mask, pattern = made.generate_backdoor(x, y, np.eye(CLASSES)[2])
    assert mask.shape == pattern.shape == (3, SIZE, SIZE)
    np.testing.assert_array_equal(mask, found[2].mask.numpy())
    stamped = (1 - mask) * x + mask * pattern
    assert (made.predict(stamped).argmax(1) == 2).mean() >= 0.99
    made.outlier_detection = lambda *_: [(2, mask, pattern)]  # four classes are few for a median
    clean, backdoored, wanted = made.backdoor_examples(x, y)
    assert clean.shape == backdoored.shape == (8, 3, SIZE, SIZE)
    assert not made.check_backdoor_effective(clean, wanted)
    made.mitigate(x, y, ["filtering"])
    change = (made.get_activations(backdoored) - made.get_activations(clean)).sum(axis=0)
    assert made.top_indices == [int(change.argmax())]
    assert (made.predict(backdoored) == 0).all()
    made.mitigate(x, y, ["unlearning"])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(UsageError, match="mitigation 'prune'"):
        made.mitigate(x, y, ["prune"])
    with pytest.raises(DataError, match="at least batch_size"):
        made.search(x[labels.numpy() < 1][1:])
    with pytest.raises(ArchitectureError, match="is no classifier"):
        NeuralCleanse(3)()


def test_art_prunes_what_the_trigger_uses():
    images, labels = quarters(16)
    x, y = images.numpy(), labels.numpy()
    made = NeuralCleanse(Planted())(batch_size=8)
    mask = np.zeros((3, SIZE, SIZE), np.float32)
    mask[:, 0, 0] = 1
    # ART stamps images of the flagged class alone; with its own labels nothing is wrong there.
    made.outlier_detection = lambda *_: [(0, mask, np.ones_like(mask))]
    stamped = (1 - mask) * x + mask
    assert (made.predict(stamped).argmax(1) == 2).all()
    made.mitigate(x, y, ["pruning"])
    assert (made.predict(stamped).argmax(1) == y).all()


X, Y = quarters(16)[0].numpy(), quarters(16)[1].numpy()


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (X.transpose(0, 2, 3, 1), Y, r"does not take images \[N, 8, 8, 3\].*channels come first"),
        ((X * 255).astype(np.uint8), Y, "images are uint8; expected floats in"),
        (X * 255, Y, r"values from .* to .*; expected \[0, 1\]"),
        (X * np.nan, Y, "values from nan to nan"),
        (X[0], Y, r"images are \[3, 8, 8\]; expected \[N, C, H, W\]"),
        (X[:0], Y[:0], r"images are \[0, 3, 8, 8\]"),
        (X, Y + 7, r"16 of 16 are no class, such as 7; expected 0\.\.3"),
        (X, Y - 1, r"4 of 16 are no class, such as -1"),
        (X, Y + 0.5, "16 of 16 are no class"),
        (X, np.eye(CLASSES)[Y] * np.nan, "16 of 16 are no class"),
        (X, Y[:5], r"labels are int64 \[5\]; expected numbers \[16, 4\] or \[16\]"),
        (X, np.array(list("abcd"))[Y], r"labels are <U1 \[16\]"),
    ],
)
def test_art_refuses_what_is_no_image_and_no_class(images, labels, message):
    made = NeuralCleanse(Convolutional())(steps=1, batch_size=8)
    with pytest.raises(DataError, match=message) as caught:
        made.mitigate(images, labels, ["unlearning"])
    assert "\n" not in str(caught.value)


class Convolutional(nn.Module):
    """A head that is a convolution of one pixel, beside a linear layer that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, CLASSES, 1)
        self.unused = nn.Linear(6, 9)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.body(images).relu().mean(dim=(2, 3), keepdim=True)).flatten(1)


class Twice(Planted):
    """A classifier whose answers are the mean of two heads."""

    def forward(self, images: Tensor) -> Tensor:
        return (super().forward(images) + super().forward(1 - images)) / 2


def test_art_looks_at_the_layer_that_gives_the_answers():
    torch.manual_seed(0)
    module = Convolutional()
    made = NeuralCleanse(module)(steps=1, batch_size=8)
    with pytest.raises(UsageError, match="has seen no images yet"):
        _ = made.nb_classes
    with torch.no_grad():
        expected = module(torch.from_numpy(X))
        features = module.body(torch.from_numpy(X)).relu().mean(dim=(2, 3))
    np.testing.assert_array_equal(made.predict(X), expected.numpy())
    np.testing.assert_allclose(made.get_activations(X), features.numpy(), rtol=1e-6)
    assert made.nb_classes == CLASSES
    made._silence(2)
    assert (made.model.fc.weight[:, 2] == 0).all()
    with pytest.raises(DataError, match=r"y_target has 1 values; expected one-hot \[4\]"):
        made.generate_backdoor(X, Y, np.array(2))
    with pytest.raises(ArchitectureError, match="a Twice is not searched: its answers are not"):
        NeuralCleanse(Twice())().predict(X)
    for change, message in (
        ({"steps": "2"}, "steps is '2'; expected a whole number of at least 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"patience": 1.5}, "patience is 1.5"),
        ({"init_cost": math.nan}, "init_cost is nan; expected a finite number"),
        ({"cost_multiplier": None}, "cost_multiplier is None"),
    ):
        with pytest.raises(UsageError, match=message):
            NeuralCleanse(module)(**change)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """A folder as BackdoorBench has it, and images of five classes."""
    folder = tmp_path_factory.mktemp("bench")
    torch.manual_seed(0)
    state = torchvision.models.shufflenet_v2_x0_5(num_classes=5).state_dict()
    (folder / "record" / "badnet").mkdir(parents=True)
    content = {
        "model_name": "shufflenet_v2_x0_5",
        "num_classes": 5,
        "model": state,
        "clean_data": "cifar10",
    }
    torch.save(content, folder / "record" / "badnet" / "attack_result.pt")
    rng = np.random.default_rng(0)
    for label in "abcde":
        (folder / "photos" / label).mkdir(parents=True)
        for k in range(4):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / label / f"{k}.png")
    return folder


def test_backdoorbenchs_files(record, monkeypatch):
    monkeypatch.chdir(record)
    args = Namespace(result_file="badnet", batch_size=8, nc_epoch=2, epochs=1, ratio=0.5, amp=None)
    found = neural_cleanse(args, images="photos", test_images="photos", device="cpu")
    folder = record / "record" / "badnet" / "defense" / "nc"
    assert found.folder.resolve() == folder.resolve()
    assert len(found.outliers.norms) == len(found.masks) == 5
    lines = (folder / "nc" / "trigger" / "cifar10_output_clean.txt").read_text().splitlines()
    assert [float(v) for v in lines[-1].split(", ")] == list(found.outliers.norms)
    assert len((folder / "log" / "index.txt").read_text().split()) == 10
    for name in ("mask", "pattern", "trigger"):
        with Image.open(folder / "log" / "4" / f"{name}.png") as picture:
            assert picture.size == (32, 32)
    table = (folder / "nc_df_summary.csv").read_text().splitlines()
    assert float(table[1].split(",")[1]) == found.accuracy
    result = torch.load(folder / "defense_result.pt", weights_only=True)
    assert (result["model_name"], result["num_classes"]) == ("shufflenet_v2_x0_5", 5)
    source = torch.load(record / "record" / "badnet" / "attack_result.pt", weights_only=True)
    changed = [k for k, v in result["model"].items() if not torch.equal(v, source["model"][k])]
    assert bool(changed) == found.outliers.backdoored
    again = OpenClipModel.from_checkpoint(load_checkpoint(folder / "defense_result.pt"))
    assert again.image_size == 32
    with pytest.raises(UsageError, match="no argument 'batchsize'"):
        neural_cleanse(result_file="badnet", batchsize=3)
    with pytest.raises(UsageError, match="result_file is missing"):
        neural_cleanse()


def test_a_flagged_class_is_unlearned(record, monkeypatch):
    monkeypatch.chdir(record)
    monkeypatch.setattr(
        backdoorbench, "outliers", lambda norms, **_: Outliers(tuple(norms), 1.0, 1.0, 3.0, (1,))
    )
    found = neural_cleanse(
        {"result_file": "badnet", "nc_epoch": 1, "epochs": 2, "ratio": 1.0, "batch_size": 10},
        images="photos",
        log="elsewhere/",
        unlearning_ratio=0.5,
    )
    source = torch.load("record/badnet/attack_result.pt", weights_only=True)["model"]
    assert found.accuracy is None
    moved = [k for k, v in found.model.items() if not torch.equal(v, source[k])]
    assert "fc.weight" in moved
    assert "conv1.1.running_mean" in moved
    assert Path("elsewhere/1/mask.png").exists()


def test_decrees_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pydetox.compat.encoders._EPOCHS", 3)
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None)
    parts = [
        nn.Conv2d(3, 64, 3, 1, 1, bias=False) if name == "conv1" else part
        for name, part in network.named_children()
        if not isinstance(part, nn.Linear | nn.MaxPool2d)
    ]
    state = nn.Sequential(*parts).state_dict()
    torch.save({"state_dict": {f"f.f.{k}": v for k, v in state.items()}}, "encoder.pth")
    Path("data/cifar10").mkdir(parents=True)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    np.savez("data/cifar10/test.npz", x=pixels, y=np.arange(60)[:, None] % 10)
    found = decree(
        Namespace(encoder_path="encoder.pth", model_flag="clean", batch_size=3, lr=0.5),
        result_file="norms.txt",
    )
    assert found.epochs <= 3
    assert found.mask.shape == (32, 32)
    path, flag, norm, seconds = Path("norms.txt").read_text().strip().split(",")
    assert (path, flag) == ("encoder.pth", "clean")
    assert float(norm) == pytest.approx(found.l1, abs=1e-4)
    assert float(seconds) == pytest.approx(found.seconds, abs=1e-3)
    assert found.backdoored == (found.l1 / 3072 < 0.1)
    assert sorted(p.name.split("_")[0] for p in found.folder.iterdir()) == ["fus", "mask", "patch"]
    with pytest.raises(ArchitectureError, match="do not fit encoder_usage_info 'cifar10'"):
        decree(encoder_path="encoder.pth", arch="resnet34")
    with pytest.raises(UsageError, match="encoder_usage_info is 'mnist'"):
        decree(encoder_path="encoder.pth", encoder_usage_info="mnist")
    with pytest.raises(UsageError, match="encoder_path is missing"):
        decree()
