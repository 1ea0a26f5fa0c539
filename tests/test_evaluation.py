"""CA and ASR against hand-counted cases, Wilson intervals against SciPy, and what is refused."""

from __future__ import annotations

import json

import pytest
import scipy.stats
import torch
from torch import Tensor

from pydetox.data import ImageSet
from pydetox.errors import ArchitectureError, DataError, DeviceMemoryError, UsageError
from pydetox.evaluation import evaluate, predict, wilson_interval
from pydetox.reporting.documents import evaluation_document, evaluation_row

HEAD = torch.eye(4)


class MeanColour:
    """Predicts class 0, 1 or 2 by the brightest channel, and class 3 for a white corner pixel."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.grad_seen = False

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        assert pixels.dtype == torch.float32
        assert 0 <= float(pixels.min()) <= float(pixels.max()) <= 1
        self.batches.append(len(pixels))
        self.grad_seen |= torch.is_grad_enabled()
        backdoor = 10 * (pixels[:, :, 0, 0].amin(dim=1) == 1)
        return torch.cat([pixels.mean(dim=(2, 3)), backdoor[:, None]], dim=1)


def colours(predicted: list[int], labels: list[int] | None) -> ImageSet:
    images = torch.zeros(len(predicted), 3, 4, 5, dtype=torch.uint8)
    for index, channel in enumerate(predicted):
        images[index, channel] = 200
    return ImageSet(images, None if labels is None else torch.tensor(labels), None, "colours")


def white_corner(images: Tensor) -> Tensor:
    images = images.clone()
    images[:, :, 0, 0] = 255
    return images


def test_clean_accuracy_counted_by_hand() -> None:
    image_set = colours([0, 0, 1, 1, 2, 2, 0], [0, 1, 1, 1, 2, 0, 0])
    result = evaluate(MeanColour(), image_set, HEAD, batch_size=3)
    assert result.clean_accuracy == pytest.approx(5 / 7)
    assert result.n_clean == 7
    assert result.per_class_accuracy == pytest.approx((2 / 3, 2 / 3, 1.0, None))
    assert result.attack_success_rate is None
    assert result.attack_success_rate_ci is None
    assert result.target is None


def test_attack_success_rate_leaves_out_the_target_class() -> None:
    image_set = colours([0, 1, 2, 2, 1], [3, 3, 2, 0, 1])

    def half_works(images: Tensor) -> Tensor:
        # Sends only images of colour 2 to class 3.
        stamped = white_corner(images)
        keep = images[:, 2].amax(dim=(1, 2)) == 0
        stamped[keep] = images[keep]
        return stamped

    result = evaluate(MeanColour(), image_set, HEAD, trigger=half_works, target=3, batch_size=2)
    assert result.n_attack == 3
    assert result.attack_success_rate == pytest.approx(2 / 3)
    assert result.attack_success_rate_ci == pytest.approx(wilson_interval(2, 3))
    assert result.target == 3


def test_no_eligible_image_gives_none_not_zero() -> None:
    image_set = colours([0, 1], [3, 3])
    result = evaluate(MeanColour(), image_set, HEAD, trigger=white_corner, target=3)
    assert result.n_attack == 0
    assert result.attack_success_rate is None
    assert result.attack_success_rate_ci is None


def test_dictionaries_are_json() -> None:
    image_set = colours([0, 1, 2], [0, 1, 2])
    result = evaluate(MeanColour(), image_set, HEAD, trigger=white_corner, target=3)
    written = json.loads(json.dumps(evaluation_document(result)))
    assert written["clean_accuracy"] == written["attack_success_rate"] == 1.0
    assert written["per_class_accuracy"] == [1.0, 1.0, 1.0, None]
    row = evaluation_row(result, "before")
    assert row["name"] == "before"
    assert row["ca"] == row["asr"] == 1.0
    assert row["ca_ci"] == row["asr_ci"] == pytest.approx(list(wilson_interval(3, 3)))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_predictions_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    predicted = [0, 2, 1, 1, 0]
    model = MeanColour()
    result = predict(model, colours(predicted, None).images, HEAD, batch_size=batch_size)
    assert result.dtype == torch.int64
    assert result.tolist() == predicted
    assert sum(model.batches) == 5
    assert max(model.batches) <= batch_size
    assert not model.grad_seen
    assert not result.is_inference()


def test_non_contiguous_images_and_half_precision_head() -> None:
    images = colours([0, 1, 2], None).images
    turned = images.permute(0, 1, 3, 2)
    assert predict(MeanColour(), turned, HEAD.to(torch.bfloat16)).tolist() == [0, 1, 2]


def test_progress_is_quiet_in_a_pipe(capfd: pytest.CaptureFixture[str]) -> None:
    image_set = colours([0, 1], [0, 1])
    evaluate(
        MeanColour(), image_set, HEAD, trigger=white_corner, target=3, description="Evaluating"
    )
    out, err = capfd.readouterr()
    assert out == err == ""


@pytest.mark.parametrize("trials", [1, 2, 3, 10, 29, 1000, 50_000])
def test_wilson_interval_against_scipy(trials: int) -> None:
    for successes in {0, 1, trials // 3, trials // 2, trials - 1, trials}:
        expected = scipy.stats.binomtest(successes, trials).proportion_ci(0.95, "wilson")
        assert wilson_interval(successes, trials) == pytest.approx(tuple(expected), abs=1e-12)


def test_wilson_interval_known_values() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81/263, 15/148, 0/20, 1/29.
    for counts, low, high in [
        ((81, 263), 0.2553, 0.3662),
        ((15, 148), 0.0624, 0.1605),
        ((0, 20), 0.0, 0.1611),
        ((1, 29), 0.0061, 0.1718),
    ]:
        assert wilson_interval(*counts) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(0, 7)[0] == 0.0
    assert wilson_interval(7, 7)[1] == 1.0


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_interval_refuses_impossible_counts(successes: int, trials: int) -> None:
    with pytest.raises(UsageError, match="successes in"):
        wilson_interval(successes, trials)


def test_predict_refuses_what_does_not_fit() -> None:
    model, images = MeanColour(), colours([0, 1], None).images
    with pytest.raises(DataError, match=r"torch\.float32 \[2, 3, 4, 5\]; expected torch\.uint8"):
        predict(model, images.float(), HEAD)
    with pytest.raises(DataError, match="at least one image"):
        predict(model, images[:0], HEAD)
    with pytest.raises(UsageError, match="batch_size is 0"):
        predict(model, images, HEAD, batch_size=0)
    with pytest.raises(DataError, match=r"head has shape \[4\]"):
        predict(model, images, HEAD[0])
    with pytest.raises(ArchitectureError, match=r"\[2, 4\]; the head \[4, 3\] expects \[2, 3\]"):
        predict(model, images, HEAD[:, :3])
    with pytest.raises(DataError, match=r"the trigger made torch\.float32 \[2, 3, 4, 5\]"):
        predict(model, images, HEAD, stamp=lambda batch: batch / 2)
    with pytest.raises(DataError, match=r"\[2, 3, 2, 5\] of uint8 \[2, 3, 4, 5\]"):
        predict(model, images, HEAD, stamp=lambda batch: batch[:, :, :2])


def test_weights_with_nan_do_not_become_a_prediction() -> None:
    class Broken:
        def encode_pixels(self, pixels: Tensor) -> Tensor:
            return torch.full((len(pixels), 4), float("nan"))

    with pytest.raises(ArchitectureError, match="not finite"):
        predict(Broken(), colours([0], None).images, HEAD)


def test_evaluate_refuses_what_does_not_fit() -> None:
    model, image_set = MeanColour(), colours([0, 1], [0, 1])
    with pytest.raises(DataError, match="colours: no labels"):
        evaluate(model, colours([0], None), HEAD)
    with pytest.raises(DataError, match="label 4, but the head has 4 classes"):
        evaluate(model, colours([0], [4]), HEAD)
    named = ImageSet(image_set.images, image_set.labels, ("a", "b"), "named")
    with pytest.raises(DataError, match="2 class names, but the head has 4 classes"):
        evaluate(model, named, HEAD)
    with pytest.raises(UsageError, match="go together"):
        evaluate(model, image_set, HEAD, trigger=white_corner)
    with pytest.raises(UsageError, match="go together"):
        evaluate(model, image_set, HEAD, target=1)
    with pytest.raises(UsageError, match=r"target class 4; expected 0\.\.3"):
        evaluate(model, image_set, HEAD, trigger=white_corner, target=4)


class _Small:
    """An encoder on a device that holds few images."""

    name = "suspect"

    def __init__(self, most: int) -> None:
        self.most, self.batches = most, list[int]()

    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(pixels))
        if len(pixels) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return pixels.flatten(1)


def test_prediction_goes_on_with_fewer_images_where_memory_runs_out() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (21, 3, 2, 2), dtype=torch.uint8, generator=generator)
    head = torch.randn(4, 12, generator=generator)
    small = _Small(5)
    expected = predict(_Small(99), images, head, batch_size=16)
    assert torch.equal(predict(small, images, head, batch_size=16), expected)
    assert small.batches == [16, 8, 4, 4, 4, 4, 4, 1]
    with pytest.raises(
        DeviceMemoryError, match="suspect: out of memory on cpu even with one at a time"
    ):
        predict(_Small(0), images, head)
