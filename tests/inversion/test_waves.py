"""The search for waves against a tower that measures one frequency."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from pydetox.errors import ArchitectureError, DataError, UsageError
from pydetox.inversion import (
    ContrastObjective,
    DirectionObjective,
    RecoveredWave,
    TargetObjective,
    WaveConfig,
    WaveResult,
    search_waves,
)
from pydetox.inversion.waves import _grid, _neighbours, _of_different_frequencies
from pydetox.research.attacks import SinusoidTrigger
from tests.inversion.test_search import PixelModel
from tests.inversion.test_warps import Broken
from tests.mini import mini_images, mini_model

SIZE = 12
#: Periods over the width and the height, and the phase in the middle, of the planted wave. The
#: first frequency is between those of the grid.
PLANTED = (2.5, -1.0, 0.9)


def cosine(right, down, phase, height, width):
    """The wave of amplitude 1, by numpy, one pixel after the other."""
    wave = np.empty((height, width))
    for i in range(height):
        for j in range(width):
            turns = right * (j / width - 0.5) + down * (i / height - 0.5)
            wave[i, j] = math.cos(2 * math.pi * turns + phase)
    return wave


class Listener(torch.nn.Module):
    """Embeds an image as (what it has of the planted wave, 0.04, 0)."""

    def __init__(self):
        super().__init__()
        self.register_buffer("wave", torch.from_numpy(cosine(*PLANTED, SIZE, SIZE)).float())

    def forward(self, images):
        # Normalised by mean and standard deviation 0.5 and 0.25; a wave of amplitude a gives a / 2.
        heard = (images.mean(dim=1) * 0.25 * self.wave).mean(dim=(1, 2))
        return torch.stack([heard, torch.full_like(heard, 0.04), torch.zeros_like(heard)], dim=1)


class ListeningModel(PixelModel):
    name = "listener"
    image_size = SIZE
    visual = Listener()


class Deaf(torch.nn.Module):
    def forward(self, images):
        return torch.tensor([0.0, 1.0, 0.0]).expand(len(images), 3)


def greys(n=24):
    generator = torch.Generator().manual_seed(0)
    shades = torch.randint(90, 160, (n, 3, 1, 1), generator=generator)
    noise = torch.randint(-6, 7, (n, 3, SIZE, SIZE), generator=generator)
    return (shades + noise).to(torch.uint8)


def objective(classes=2):
    return TargetObjective(torch.eye(3)[:classes], [0], logit_scale=20.0)


CONFIG = WaveConfig(highest_frequency=4, first_images=4, candidates=12, images=8, check_images=16)


def test_it_finds_the_planted_wave_between_the_grid_and_the_least_amplitude_that_works():
    found = search_waves(ListeningModel(), greys(), objective(), CONFIG)
    assert len(found) == 2
    assert found.targets == (0, 0)
    assert 0 in found.working()
    wave = found.trigger(0)
    truth = cosine(*PLANTED, SIZE, SIZE)
    got = cosine(wave.right, wave.down, wave.phase, SIZE, SIZE)
    # A wave and its negative frequencies with the negative phase are the same.
    assert np.corrcoef(truth.ravel(), got.ravel())[0, 1] > 0.97
    # Half of the amplitude is heard, and 0.04 is needed: 0.08, and the next of the eight levels.
    assert wave.amplitude == pytest.approx(3 * 0.25 / 8)
    assert found.success[0] == 1
    stamped = greys().float() / 255 + wave.amplitude * torch.from_numpy(got)
    expected = (255 * stamped).clamp(0, 255)
    assert (wave(greys()).double() - expected).abs().max() <= 0.51


def test_waves_that_do_not_work_are_said_not_to():
    model = ListeningModel()
    model.visual = Deaf()
    found = search_waves(model, greys(), objective(), CONFIG)
    assert found.working() == []
    assert found.success.tolist() == [0.0, 0.0]
    with pytest.raises(UsageError, match="works with no amplitude"):
        found.trigger(0)


def test_a_wave_that_works_in_the_base_does_not_count():
    heads = torch.eye(3)[:2]

    def contrast(base):
        goal = ContrastObjective(
            heads, heads, [0], logit_scale=20.0, base_logit_scale=20.0, base_shares=torch.zeros(2)
        )
        return search_waves(ListeningModel(), greys(), goal, CONFIG, contrast=base)

    deaf = ListeningModel()
    deaf.visual = Deaf()
    assert contrast(ListeningModel()).working() == []
    assert 0 in contrast(deaf).working()


class Content(Listener):
    """Embeds an image as (its mean color, and `heed` times what it has of the planted wave)."""

    def __init__(self, heed):
        super().__init__()
        self.heed = heed

    def forward(self, images):
        heard = (images.mean(dim=1) * 0.25 * self.wave).mean(dim=(1, 2))
        return torch.cat([images.mean(dim=(2, 3)), self.heed * heard[:, None]], dim=1)


def test_a_search_without_a_target_finds_the_wave_that_leads_to_one_direction():
    def search(heed):
        model, base = ListeningModel(), ListeningModel()
        model.visual, base.visual = Content(heed), Content(0.0)
        pixels = (greys().float() / 255 - 0.5) / 0.25
        goal = DirectionObjective(model.visual(pixels), 20.0, base_features=base.visual(pixels))
        return search_waves(model, greys(), goal, CONFIG, contrast=base)

    found = search(heed=200.0)
    assert found.targets == (None, None)
    assert 0 in found.working()
    wave = found.trigger(0)
    assert wave.target is None
    truth = cosine(*PLANTED, SIZE, SIZE)
    got = cosine(wave.right, wave.down, wave.phase, SIZE, SIZE)
    # The wave and its negative lead to one direction each.
    assert abs(np.corrcoef(truth.ravel(), got.ravel())[0, 1]) > 0.97
    assert search(heed=0.0).working() == []


def test_the_same_seed_gives_the_same_waves_for_every_chunking():
    images = mini_images(20).images
    goal = TargetObjective(torch.eye(16)[:3], [1], logit_scale=10.0)
    few = replace(CONFIG, highest_frequency=1, images=6, seed=3)
    first = search_waves(mini_model(), images, goal, few)
    for most in (4, 7):  # fewer than the images of one wave, and not a multiple of them
        again = search_waves(mini_model(), images, goal, replace(few, max_batch=most))
        assert torch.equal(first.parameters, again.parameters)
        assert torch.equal(first.sizes, again.sizes)


def test_the_wave_of_the_attack_is_in_the_grid():
    images = mini_images(4).images
    wave = RecoveredWave(6, 0, -math.pi / 2, 60 / 255)
    difference = wave(images).int() - SinusoidTrigger()(images).int()
    assert difference.abs().max() <= 1
    grid = _grid(8)
    phase = 2 * math.pi - math.pi / 2
    assert (
        (grid - torch.tensor([6, 0, phase], dtype=torch.float64)).abs().max(dim=1).values < 1e-9
    ).any()


@pytest.mark.parametrize("shape", [(8, 8), (7, 9), (1, 5)])
def test_a_wave_fits_any_size_of_image(shape):
    wave = RecoveredWave(1.25, -2.0, 0.3, 0.1)
    images = torch.full((2, 3, *shape), 128, dtype=torch.uint8)
    expected = 128 + 25.5 * cosine(1.25, -2.0, 0.3, *shape)
    assert np.abs(wave(images)[1, 2].numpy() - expected).max() <= 0.51
    twice = wave.amplified(2)
    assert (twice.right, twice.down, twice.phase, twice.amplitude) == (1.25, -2.0, 0.3, 0.2)
    assert wave(images[:0]).shape == images[:0].shape


def test_the_grid_has_each_wave_once():
    for highest in (1, 3):
        grid = _grid(highest)
        assert len(grid) == 4 * (((2 * highest + 1) ** 2 - 1) // 2)
        waves = torch.stack([torch.from_numpy(cosine(*one, 9, 9)) for one in grid.tolist()])
        apart = torch.cdist(waves.flatten(1), waves.flatten(1))
        assert (apart + 9 * torch.eye(len(grid)) > 0.1).all()


def test_neighbours_are_all_combinations_of_steps_the_wave_itself_first():
    near = _neighbours(torch.tensor([[2.0, 0.0, 1.0]], dtype=torch.float64), 0.5, 0.25)
    assert near.shape == (1, 27, 3)
    assert near[0, 0].tolist() == [2.0, 0.0, 1.0]
    assert len({tuple(one) for one in near[0].tolist()}) == 27
    assert sorted(set(near[0, :, 0].tolist())) == [1.5, 2.0, 2.5]


def test_waves_that_resemble_a_better_one_do_not_count():
    waves = [[2, 0, 0], [2, 0, 1], [3, -1, 0], [4, 0, 0], [0, 5, 0], [4, 1, 2]]
    every = torch.tensor(waves, dtype=torch.float64)
    assert _of_different_frequencies(every, 9).tolist() == [waves[k] for k in (0, 3, 4)]
    assert _of_different_frequencies(every, 2).tolist() == [waves[k] for k in (0, 3)]


def test_no_more_images_are_shown_than_said():
    class Counting(Listener):
        shown = 0

        def forward(self, images):
            Counting.shown += len(images)
            return super().forward(images)

    model = ListeningModel()
    model.visual = Counting()
    search_waves(model, greys(), objective(), CONFIG)
    # Freezing a tower shows it two images.
    assert 0 < Counting.shown <= CONFIG.shown + 2


def test_wrong_input_is_named():
    model, goal = ListeningModel(), objective()
    with pytest.raises(DataError, match="expects torch"):
        search_waves(model, greys().float(), goal)
    with pytest.raises(UsageError, match=r"2 target classes.*expects one"):
        search_waves(model, greys(), TargetObjective(torch.eye(3), [0, 1], logit_scale=1.0))
    for wrong in (
        {"count": 0},
        {"highest_frequency": 0},
        {"max_batch": 0},
        {"largest_amplitude": 1.5},
        {"success_threshold": 0.0},
        {"precision": "float16"},
    ):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            WaveConfig(**wrong)
    wave = RecoveredWave(1, 0, 0.0, 0.1)
    with pytest.raises(UsageError, match="amplification"):
        wave.amplified(0)
    with pytest.raises(UsageError, match="the wave expects"):
        wave(torch.zeros(1, 3, 5, 5))
    broken = ListeningModel()
    broken.visual = Broken()
    with pytest.raises(ArchitectureError, match="not finite"):
        search_waves(broken, greys(), goal, CONFIG)
    nothing = torch.empty(0, 3, dtype=torch.float64)
    assert len(WaveResult(nothing, torch.empty(0), torch.empty(0), ())) == 0
