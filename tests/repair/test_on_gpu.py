"""Unlearning on a pretended GPU: images are sent once, as bytes, and nothing is mixed."""

from __future__ import annotations

import pytest
import torch

from pydetox.data import ImageSet
from pydetox.inversion import RecoveredTrigger
from pydetox.models import attention
from pydetox.models.frozen import freeze
from pydetox.prototypes import image_prototypes
from pydetox.repair.alpha import search_coefficient
from pydetox.repair.configuration import AdvancedUnlearnConfig, UnlearnConfig
from pydetox.repair.task_vectors import TaskVector
from pydetox.repair.trigger_vector import trigger_vector
from tests.mini import CLASS_NAMES, mini_images, mini_model
from tests.pretended import PretendedGpu


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(attention, "_chosen", {})
    # A pretended GPU knows no tensors without version counters.
    monkeypatch.setattr(torch, "inference_mode", lambda mode=True: torch.set_grad_enabled(not mode))
    with PretendedGpu() as pretended:
        yield pretended


def triggers():
    """Two that stamp a corner, as a search gives them: on the CPU."""
    mask = torch.zeros(16, 16)
    mask[:3, :3] = 1
    return [RecoveredTrigger(mask, torch.full((3, 16, 16), level), 0) for level in (0.1, 0.9)]


def model_on(place):
    model = mini_model().to(place)
    return model, model.zero_shot_head(CLASS_NAMES, ["a {c}"])


def test_a_trigger_vector_sends_the_forget_set_once(gpu):
    images = mini_images(40).images
    vectors = []
    for place in ("cpu", "cuda"):
        model, head = model_on(place)
        freeze(model.visual)
        sent = {}
        for steps in (4, 8):
            gpu.sent = 0
            config = UnlearnConfig(steps=steps, batch_size=8)
            vector = trigger_vector(model, images, triggers(), head, 0, config)
            sent[steps] = gpu.sent
        vectors.append({key: value.cpu() for key, value in vector.tensors.items()})
        assert sent[4] == 0 if place == "cpu" else sent[4] >= images.nbytes
        # A step of 8 images of 768 bytes sends which they are, and two masks and patterns.
        assert (sent[8] - sent[4]) / 4 < 20_000 < 2 * images.nbytes
    for key, value in vectors[0].items():
        torch.testing.assert_close(vectors[1][key], value, atol=1e-5, rtol=1e-3)


def test_images_are_not_sent_again_for_every_alpha(gpu):
    images = mini_images(60)
    found, sent = {}, {}
    for place in ("cpu", "cuda"):
        model, head = model_on(place)
        freeze(model.visual)
        vector = TaskVector(
            {k: 0.01 * v for k, v in model.clip.state_dict().items() if k.startswith("visual.")}
        )
        for count in (2, 6):
            gpu.sent = 0
            coefficients = tuple(k / 4 for k in range(count))
            every = AdvancedUnlearnConfig(alpha_stride=1)
            config = UnlearnConfig(coefficients=coefficients, advanced=every)
            found[place] = search_coefficient(
                model,
                vector,
                ImageSet(images.images, images.labels, CLASS_NAMES),
                triggers(),
                head,
                [0, 1],
                config,
            )
            sent[count] = gpu.sent
        if place == "cuda":
            # Of four more values of alpha: the mean and deviation of each batch, nothing else.
            assert sent[6] - sent[2] < 4 * 200
            assert sent[2] >= images.images.nbytes
    assert found["cuda"].attack_success_rate == found["cpu"].attack_success_rate
    assert found["cuda"].clean_accuracy == found["cpu"].clean_accuracy


def test_prototypes_of_images_are_those_of_the_cpu(gpu):
    images = mini_images(40).images
    expected = image_prototypes(mini_model(), images)
    found = image_prototypes(mini_model().to("cuda"), images)
    torch.testing.assert_close(found.cpu(), expected, atol=1e-5, rtol=1e-4)
