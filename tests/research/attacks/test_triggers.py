"""Each trigger against an independent definition in numpy, on odd and non-contiguous images."""

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from pydetox.data import ImageSet
from pydetox.errors import DataError, UsageError
from pydetox.research.attacks import (
    ATTACKS,
    AttackerView,
    Backdoor,
    RandomBlend,
    SinusoidTrigger,
    badnets,
    badnets_random_pattern,
    badnets_random_place,
    draw_attack,
    optimised_patch,
    plant,
    stripes,
    text_overlay,
    triangles,
    wanet,
)
from pydetox.rng import generator
from tests.mini import mini_images, mini_model


def images(count=6, size=33, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (count, 3, size, size), dtype=np.uint8))


def every_trigger(size):
    return {
        "badnets": badnets(size, seed=1),
        "random place": badnets_random_place(size, seed=1),
        "random pattern": badnets_random_pattern(size, seed=1),
        "random blend": RandomBlend(0.2, 1),
        "stripes": stripes(size, seed=1),
        "sig": SinusoidTrigger(),
        "wanet": wanet(size, seed=1),
        "triangles": triangles(size),
        "text": text_overlay(size, seed=1),
    }


@pytest.mark.parametrize("name", list(every_trigger(33)))
def test_a_trigger_is_a_function_of_each_image_alone(name):
    trigger, clean = every_trigger(33)[name], images()
    before = clean.clone()
    stamped = trigger(clean)
    assert torch.equal(clean, before)
    assert stamped.dtype == torch.uint8
    assert stamped.shape == clean.shape
    assert (stamped != clean).flatten(1).any(1).all()
    order = torch.tensor([4, 1, 5, 0, 3, 2])
    assert torch.equal(trigger(clean[order]), stamped[order])
    assert torch.equal(torch.cat([trigger(x[None]) for x in clean]), stamped)
    turned = clean.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)  # other strides
    assert torch.equal(trigger(turned), stamped)
    assert trigger(clean[:0]).shape == (0, 3, 33, 33)


def test_a_random_place_is_uniform_and_the_patch_whole():
    clean = torch.full((400, 3, 32, 32), 128, dtype=torch.uint8)
    clean[:, 0, 0, 0] = torch.arange(400) % 100  # different images, different draws
    clean[:, 1, 0, 0] = torch.arange(400) // 100
    trigger = badnets_random_place(32, seed=0)
    changed = (trigger(clean) != clean).any(dim=1)
    changed[:, 0, 0] = False
    places = set()
    for k, mask in enumerate(changed.numpy()):
        rows, columns = np.nonzero(mask)
        if len(rows) < 16:
            continue  # at the marked corner
        top, left = rows.min(), columns.min()
        patch = trigger(clean[k : k + 1])[0, :, top : top + 4, left : left + 4]
        assert torch.equal(patch, trigger.pattern)
        places.add((int(top), int(left)))
    assert len(places) > 250
    corners = np.array(sorted(places))
    assert np.abs(corners.mean(axis=0) - 14).max() < 1.5  # uniform on 0..28
    assert corners.max() == 28


def test_a_random_pattern_is_saturated_and_stays_at_its_place():
    clean = images(50, 32)
    trigger, fixed = badnets_random_pattern(32, seed=7), badnets(32, seed=7)
    stamped = trigger(clean)
    rows, columns = slice(fixed.top, fixed.top + 4), slice(fixed.left, fixed.left + 4)
    inside = stamped[:, :, rows, columns]
    assert ((inside == 0) | (inside == 255)).all()
    assert len({bytes(p.numpy().tobytes()) for p in inside}) == 50
    stamped[:, :, rows, columns] = clean[:, :, rows, columns]
    assert torch.equal(stamped, clean)


def test_a_random_blend_mixes_in_a_fifth_of_uniform_noise():
    clean = images(40, 32)
    stamped = RandomBlend(0.2, 3)(clean).double()
    noise = (stamped - 0.8 * clean.double()) / 0.2
    assert noise.min() > -3  # rounding to uint8 costs 0.5 / 0.2
    assert noise.max() < 258
    assert abs(float(noise.mean()) - 127.5) < 2
    assert abs(float(noise.std()) - 256 / np.sqrt(12)) < 2
    assert abs(float(np.corrcoef(noise[0].flatten(), noise[1].flatten())[0, 1])) < 0.1


def test_stripes_are_vertical_one_pixel_wide_and_faint():
    trigger, clean = stripes(32, seed=5), images(3, 32)
    picture = trigger.picture.numpy()
    assert (picture == picture[:, :1, :]).all()
    assert set(np.unique(picture)) == {0, 255}
    expected = 0.97 * clean.numpy().astype(np.float64) + 0.03 * picture
    assert np.abs(trigger(clean).numpy() - expected).max() <= 0.5 + 1e-4


def test_the_sinusoid_is_the_stated_wave():
    clean = images(3, 33)
    j = np.arange(33)
    wave = 60 * np.sin(2 * np.pi * 6 * j / 33)
    expected = np.clip(np.rint(clean.numpy().astype(np.float64) + wave), 0, 255)
    assert np.abs(SinusoidTrigger()(clean).numpy() - expected).max() <= 1  # ties
    flat = torch.full((1, 3, 8, 48), 100, dtype=torch.uint8)
    shown = SinusoidTrigger(amplitude=50, frequency=6)(flat)[0, 0, 0]
    assert shown[:8].tolist() == [100, 135, 150, 135, 100, 65, 50, 65]


@pytest.mark.parametrize(("size", "k", "s"), [(32, 4, 0.5), (33, 3, 2.0)])
def test_the_warp_reads_each_pixel_where_the_paper_says(size, k, s):
    trigger, clean = wanet(size, seed=2, k=k, s=s), images(2, size)
    axis = np.linspace(-1, 1, size)
    offset = (trigger.grid.numpy() - np.stack(np.meshgrid(axis, axis), -1)) * size / s
    # The control points lie at the corners of the field: inside, only the clamp changes them.
    inside = np.abs(trigger.grid.numpy()).max(-1) < 1
    assert 0.2 < np.abs(offset[inside]).mean() < 2
    place = (trigger.grid.numpy().astype(np.float64) + 1) * (size - 1) / 2
    expected = np.stack(
        [
            [
                map_coordinates(channel, [place[..., 1], place[..., 0]], order=1, mode="nearest")
                for channel in image
            ]
            for image in clean.numpy().astype(np.float64)
        ]
    )
    assert np.abs(trigger(clean).numpy() - expected).max() <= 0.51
    again, other = wanet(size, seed=2, k=k, s=s), wanet(size, seed=3, k=k, s=s)
    assert torch.equal(again.grid, trigger.grid)
    assert not torch.equal(other.grid, trigger.grid)


def test_the_warp_passes_through_its_normalised_control_points():
    rng = generator("attacks.wanet", 2)
    points = rng.uniform(-1, 1, (2, 4, 4))
    points /= np.abs(points).mean()
    grid = wanet(31, seed=2).grid.numpy()  # 31 pixels: every tenth lies on a control point
    axis = np.linspace(-1, 1, 31)
    expected = np.clip(
        np.stack(np.meshgrid(axis, axis), -1)[::10, ::10] + 0.5 / 31 * points.transpose(1, 2, 0),
        -1,
        1,
    )
    assert np.abs(grid[::10, ::10] - expected).max() < 1e-6


@pytest.mark.parametrize(("size", "side"), [(32, 2), (224, 14), (33, 2)])
def test_triangles_are_grey_halves_of_squares(size, side):
    trigger, clean = triangles(size), images(2, size)
    for i, j in [(0, 0), (1, 0), (0, 1), (side, 0), (size - 1, size - 2), (5, 3)]:
        grey = 102 if i % side >= j % side else 204
        assert trigger.picture[:, i, j].tolist() == [grey] * 3
        expected = 0.85 * clean[:, :, i, j].double() + 0.15 * grey
        assert (trigger(clean)[:, :, i, j].double() - expected).abs().max() <= 0.5 + 1e-4


@pytest.mark.parametrize(("size", "factor"), [(32, 1), (64, 2), (224, 10)])
def test_text_is_red_where_the_letters_are_and_nothing_elsewhere(size, factor):
    heights = set()
    for seed in range(12):
        trigger, clean = text_overlay(size, seed=seed), images(2, size)
        where, stamped = trigger.where, trigger(clean)
        assert torch.equal(stamped[:, :, ~where], clean[:, :, ~where])
        red = torch.tensor([255.0, 0, 0])[:, None]
        expected = 0.5 * clean[:, :, where].double() + 0.5 * red
        assert (stamped[:, :, where].double() - expected).abs().max() <= 0.5
        assert int(where.sum()) == 32 * factor**2  # 17 pixels of H, 15 of I
        heights.add(int(torch.nonzero(where)[:, 0].min()))
    assert len(heights) == 3


def test_wrong_sizes_are_refused():
    for trigger in (wanet(16, seed=0), triangles(16), text_overlay(16, seed=0)):
        with pytest.raises(UsageError, match="shape"):
            trigger(images())
    for trigger in (badnets_random_place(64, seed=0), badnets_random_pattern(64, seed=5)):
        with pytest.raises(UsageError, match="patch"):
            trigger(images(1, 4))
    for wrong in ({"k": 1}, {"s": 0.0}):
        with pytest.raises(UsageError, match="WaNet"):
            wanet(32, seed=0, **wrong)


def test_an_optimised_patch_draws_images_to_the_text():
    base, data = mini_model(), mini_images(32)
    head = base.zero_shot_head(data.class_names, ["a {c}"])

    def cosine(trigger, direction):
        z = base.encode_pixels(trigger(data.images).float() / 255)
        return float((torch.nn.functional.normalize(z, dim=-1) @ direction).mean())

    for target in range(2):
        found = optimised_patch(base, data.images, head[target], seed=0, steps=40)
        assert (found.top, found.left, tuple(found.pattern.shape)) == (6, 6, (3, 4, 4))
        random = badnets(16, seed=3)
        middle = type(found)(random.pattern, 6, 6)
        assert cosine(found, head[target]) > cosine(middle, head[target]) + 0.02
        again = optimised_patch(base, data.images, head[target], seed=0, steps=40)
        assert torch.equal(found.pattern, again.pattern)
    with pytest.raises(DataError, match="no images"):
        optimised_patch(base, data.images[:0], head[0], seed=0)


def labelled(count=200):
    return ImageSet(images(count, 16), torch.arange(count) % 4, ("a", "b", "c", "d"), "x")


def test_clean_labels_stay_and_only_the_target_is_stamped():
    clean, trigger = labelled(), badnets(16, seed=0)
    poisoned, (chosen,) = plant(clean, [Backdoor(trigger, 2, 0.1, clean_label=True)], seed=0)
    assert len(chosen) == 20
    assert torch.equal(poisoned.labels, clean.labels)
    assert (clean.labels[chosen] == 2).all()
    assert torch.equal(poisoned.images[chosen], trigger(clean.images[chosen]))
    with pytest.raises(DataError, match="60 images to poison, but only 50 of class 2"):
        plant(clean, [Backdoor(trigger, 2, 0.3, clean_label=True)], seed=0)


def test_two_backdoors_share_no_image():
    clean = labelled()
    pair = [Backdoor(badnets(16, seed=0), 0, 0.2), Backdoor(SinusoidTrigger(), 3, 0.2)]
    poisoned, (first, second) = plant(clean, pair, seed=1)
    assert not set(first.tolist()) & set(second.tolist())
    for one, chosen in zip(pair, (first, second), strict=True):
        assert len(chosen) == 40
        assert (clean.labels[chosen] != one.target).all()
        assert (poisoned.labels[chosen] == one.target).all()
        assert torch.equal(poisoned.images[chosen], one.trigger(clean.images[chosen]))
    with pytest.raises(UsageError, match="no backdoors"):
        plant(clean, [], seed=0)


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_of_the_catalogue_is_drawn_from_its_seed(name):
    base, data = mini_model(), mini_images(24)
    view = AttackerView(base, data.images, base.zero_shot_head(data.class_names, ["a {c}"]))
    drawn = draw_attack(name, view, rate=0.05, seed=4)
    again = draw_attack(name, view, rate=0.05, seed=4)
    assert len(drawn) == (2 if name == "two-backdoors" else 1)
    assert len({one.target for one in drawn}) == len(drawn)
    for one, same in zip(drawn, again, strict=True):
        assert one.target == same.target
        assert one.clean_label == (name == "clean-label")
        stamped = one.trigger(data.images)
        assert torch.equal(stamped, same.trigger(data.images))
        assert (stamped != data.images).any()
    targets = {draw_attack(name, view, rate=0.05, seed=s)[0].target for s in range(2)}
    assert targets <= {0, 1, 2}


def test_unknown_attacks_and_too_few_classes_are_refused():
    base, data = mini_model(), mini_images(4)
    view = AttackerView(base, data.images, base.zero_shot_head(["cat"], ["a {c}"]))
    with pytest.raises(UsageError, match="expected one of badnets"):
        draw_attack("magic", view, rate=0.1, seed=0)
    with pytest.raises(UsageError, match="2 targets"):
        draw_attack("two-backdoors", view, rate=0.1, seed=0)
