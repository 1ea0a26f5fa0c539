"""The search for warps against a tower that only a warp can satisfy."""

from dataclasses import replace

import pytest
import torch

from pydetox.errors import ArchitectureError, DataError, UsageError
from pydetox.inversion import (
    CollapseObjective,
    ContrastObjective,
    RecoveredWarp,
    TargetObjective,
    WarpConfig,
    invert_warps,
)
from pydetox.inversion.warps import _fields, _warp
from pydetox.models.frozen import FrozenVisionTransformer
from pydetox.ops.reference import to_patch_rows
from pydetox.research.attacks import wanet
from tests.inversion.test_search import PixelModel
from tests.mini import mini_images, mini_model

SIZE = 12


class Column(torch.nn.Module):
    """Embeds an image as (red of column 4, 0.5, 0.1)."""

    def forward(self, images):
        red = (images[:, 0, :, 4] * 0.25 + 0.5).mean(dim=1)
        return torch.stack([red, torch.full_like(red, 0.5), torch.full_like(red, 0.1)], dim=1)


class ColumnModel(PixelModel):
    name = "column"
    image_size = SIZE
    visual = Column()


def ramps(n=20):
    """Images that are dark up to column 4 and bright from column 7 on, all rows alike."""
    generator = torch.Generator().manual_seed(0)
    bright = torch.randint(200, 256, (n, 3, 1, 1), generator=generator)
    ramp = ((torch.arange(SIZE) - 4) / 3).clamp(0, 1)
    return (bright * ramp).round().to(torch.uint8).expand(n, 3, SIZE, SIZE).contiguous()


def objective(count=2):
    return TargetObjective(torch.eye(3)[:2], [0] * count, logit_scale=20.0)


CONFIG = WarpConfig(steps=120, batch_size=8, success_threshold=0.97)


def test_it_finds_the_shift_that_works_and_makes_it_small():
    found = invert_warps(ColumnModel(), ramps(), objective(), CONFIG)
    assert found.working() == [0, 1]
    # Pressed to the least that works, on the images of about three steps.
    assert found.success.min() >= 0.7
    assert found.targets == (0, 0)
    # Red above 0.5 of full takes about two pixels of shift, at column 4 alone; both coordinates
    # count, and nothing is gained below.
    for k in range(2):
        offsets = found.offsets[k]
        assert 1.0 < offsets[0, :, 4].mean() < 4.0
        assert offsets[1].abs().mean() < 0.3
        assert float(found.sizes[k]) == pytest.approx(float(offsets.abs().double().mean()))
        warped = found.trigger(k)(ramps())
        assert warped.dtype == torch.uint8
        assert warped[:, 0, :, 4].float().mean() > 100
    free = replace(CONFIG, schedule=replace(CONFIG.schedule, initial=0.0))
    assert found.sizes.max() < invert_warps(ColumnModel(), ramps(), objective(), free).sizes.min()


def test_a_search_that_never_succeeds_is_said_to_have_failed():
    dark = torch.zeros(6, 3, SIZE, SIZE, dtype=torch.uint8)
    found = invert_warps(ColumnModel(), dark, objective(), replace(CONFIG, steps=3))
    assert found.working() == []
    assert found.sizes.isinf().all()
    assert found.success.tolist() == [0.0, 0.0]
    assert len(found) == 2


def test_the_same_seed_gives_the_same_warps_for_every_chunking_and_thread_count():
    images, search = mini_images(20).images, WarpConfig(steps=4, batch_size=6, seed=3)
    goal = TargetObjective(torch.eye(16)[:3], [0, 1, 2], logit_scale=10.0)
    first = invert_warps(mini_model(), images, goal, search)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        again = invert_warps(mini_model(), images, goal, search)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(first.offsets, again.offsets, rtol=1e-4, atol=1e-4)
    parts = invert_warps(mini_model(), images, goal, replace(search, max_batch=6))
    torch.testing.assert_close(first.offsets, parts.offsets, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first.success, parts.success)
    # Fewer than the images of a step: their embeddings are computed twice.
    split = invert_warps(mini_model(), images, goal, replace(search, max_batch=4))
    torch.testing.assert_close(first.offsets, split.offsets, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first.success, split.success)
    other = invert_warps(mini_model(), images, goal, replace(search, seed=4))
    assert not torch.allclose(first.offsets, other.offsets, atol=1e-2)


def test_it_goes_on_with_fewer_images_than_a_step_has_where_memory_runs_out(monkeypatch):
    images, search = mini_images(20).images, WarpConfig(steps=2, batch_size=6, seed=3)
    goal = TargetObjective(torch.eye(16)[:2], [0, 1], logit_scale=10.0)
    expected = invert_warps(mini_model(), images, goal, search)
    run, sizes = FrozenVisionTransformer.__call__, []

    def small(tower, inputs):
        sizes.append(len(inputs))
        if len(inputs) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return run(tower, inputs)

    monkeypatch.setattr(FrozenVisionTransformer, "__call__", small)
    found = invert_warps(mini_model(), images, goal, search)
    assert max(sizes) > 6
    assert 0 < sizes[-1] <= 3
    torch.testing.assert_close(found.offsets, expected.offsets, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.success, expected.success)


def test_the_model_is_not_changed_and_a_base_can_be_the_contrast():
    model, base, images = mini_model(seed=1), mini_model(seed=2), mini_images(8).images
    before = {name: value.clone() for name, value in model.visual.state_dict().items()}
    head = torch.eye(16)[:3]
    goal = ContrastObjective(
        head,
        head,
        [0, 2],
        logit_scale=10.0,
        base_logit_scale=10.0,
        base_shares=torch.full((3,), 1 / 3),
    )
    for precision in ("float32", "bfloat16"):
        search = WarpConfig(steps=2, batch_size=4, precision=precision)
        found = invert_warps(model, images, goal, search, contrast=base)
        assert found.offsets.shape == (2, 2, model.image_size, model.image_size)
        assert found.offsets.isfinite().all()
    assert all(torch.equal(before[n], v) for n, v in model.visual.state_dict().items())


def test_warping_by_whole_pixels_moves_them_and_repeats_the_edge():
    images = torch.randint(0, 256, (3, 3, 5, 7), dtype=torch.uint8)
    offsets = torch.zeros(2, 5, 7)
    assert torch.equal(RecoveredWarp(offsets)(images), images)
    offsets[0], offsets[1] = 2.0, -1.0
    columns = (torch.arange(7) + 2).clamp(max=6)
    rows = (torch.arange(5) - 1).clamp(min=0)
    assert torch.equal(RecoveredWarp(offsets)(images), images[:, :, rows][..., columns])
    half = RecoveredWarp(offsets).amplified(0.5)
    assert torch.equal(half.offsets[0], torch.ones(5, 7))
    for k, field in enumerate((offsets, half.offsets)):
        several = _warp(images.float(), torch.stack([offsets, half.offsets]))[k]
        torch.testing.assert_close(several, _warp(images.float(), field[None])[0])
    one_pixel = torch.full((2, 3, 1, 1), 7, dtype=torch.uint8)
    assert torch.equal(RecoveredWarp(torch.ones(2, 1, 1))(one_pixel), one_pixel)
    none = torch.zeros(0, 3, 5, 7, dtype=torch.uint8)
    assert RecoveredWarp(offsets)(none).shape == none.shape
    turned = images.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(half(turned), half(images))


def test_it_can_say_what_wanet_says():
    """The attack's trigger is in the family: the same warp, and from 4 x 4 control points."""
    images, attack = mini_images(6).images, wanet(16, seed=3, s=3.0)
    axis = torch.linspace(-1, 1, 16)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    offsets = (attack.grid - torch.stack([x, y], dim=-1)).permute(2, 0, 1) * 15 / 2
    same = RecoveredWarp(offsets)(images).int() - attack(images).int()
    assert same.abs().max() <= 1
    control = torch.randn(1, 2, 4, 4)
    assert _fields(control, 16).shape == (1, 2, 16, 16)
    torch.testing.assert_close(_fields(control, 16)[..., ::15, ::15], control[..., ::3, ::3])


def test_gradients_of_the_warp_are_those_of_finite_differences():
    images = torch.rand(2, 3, 6, 6, dtype=torch.float64)
    control = (0.3 * torch.randn(2, 2, 3, 3, dtype=torch.float64)).requires_grad_()

    def warped(points):
        return _warp(images, _fields(points, 6))

    # Linear interpolation has kinks; random offsets keep away from them.
    assert torch.autograd.gradcheck(warped, (control,), eps=1e-6, atol=1e-4)


def test_patch_rows_are_what_unfold_gives():
    images = torch.randn(2, 3, 8, 8)
    expected = torch.nn.functional.unfold(images, 4, stride=4).transpose(1, 2)
    assert torch.equal(to_patch_rows(images, 4), expected)


def test_wrong_input_is_named():
    model, goal = ColumnModel(), objective()
    with pytest.raises(DataError, match="expects torch"):
        invert_warps(model, ramps().float(), goal)
    with pytest.raises(DataError, match="at least 2"):
        invert_warps(model, ramps(1), goal)
    with pytest.raises(UsageError, match="target classes"):
        invert_warps(model, ramps(), CollapseObjective())
    for wrong in (
        {"steps": 0},
        {"control_points": 1},
        {"max_batch": 0},
        {"learning_rate": 0.0},
        {"initial_offset": -1.0},
        {"success_threshold": 1.5},
        {"precision": "float16"},
    ):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            WarpConfig(**wrong)
    warp = RecoveredWarp(torch.zeros(2, 4, 4))
    with pytest.raises(UsageError, match="amplification"):
        warp.amplified(0)
    with pytest.raises(UsageError, match="the warp expects"):
        warp(torch.zeros(1, 3, 5, 5, dtype=torch.uint8))
    broken = ColumnModel()
    broken.visual = Broken()
    with pytest.raises(ArchitectureError, match="not finite"):
        invert_warps(broken, ramps(), goal, replace(CONFIG, steps=1))


class Broken(torch.nn.Module):
    def forward(self, images):
        return images[:, :, 0, 0] * torch.nan
