import pytest
import torch

from pydetox.data import ImageSet
from pydetox.errors import DataError, UsageError
from pydetox.research.attacks import BlendTrigger, PatchTrigger, badnets, blended, poison


def images(n=20, size=32, labels=True):
    x = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)
    return ImageSet(x, torch.arange(n) % 4 if labels else None, None, "x")


def test_patch_changes_its_square_and_nothing_else():
    clean = images().images
    trigger = PatchTrigger(torch.full((3, 2, 5), 7, dtype=torch.uint8), top=3, left=20)
    stamped = trigger(clean)
    changed = torch.zeros(32, 32, dtype=torch.bool)
    changed[3:5, 20:25] = True
    assert (stamped[..., changed] == 7).all()
    assert torch.equal(stamped[..., ~changed], clean[..., ~changed])


@pytest.mark.parametrize(("size", "side"), [(32, 4), (64, 5), (224, 16)])
def test_badnets_scales_with_the_image_and_depends_on_its_seed(size, side):
    trigger = badnets(size, seed=3)
    assert trigger.pattern.shape == (3, side, side)
    again = badnets(size, seed=3)
    assert torch.equal(again.pattern, trigger.pattern)
    assert (again.top, again.left) == (trigger.top, trigger.left)
    assert not torch.equal(badnets(size, seed=4).pattern, trigger.pattern)
    places = [badnets(size, seed=s) for s in range(50)]
    assert max(p.top for p in places) <= size - side
    assert len({(p.top, p.left) for p in places}) > 40


def test_blended_is_the_stated_mixture():
    trigger = blended(8, seed=0, blend=0.25)
    clean = images(size=8).images
    exact = (0.75 * clean.double() + 0.25 * trigger.picture.double()).round()
    assert (trigger(clean).double() - exact).abs().max() <= 1  # ties may round either way
    assert torch.equal(BlendTrigger(trigger.picture, 0.0)(clean), clean)
    assert torch.equal(BlendTrigger(trigger.picture, 1.0)(clean[:1])[0], trigger.picture)


def test_triggers_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="overhangs"):
        PatchTrigger(torch.zeros(3, 4, 4, dtype=torch.uint8), 30, 0)(images().images)
    with pytest.raises(UsageError, match="patch of 40"):
        badnets(32, seed=0, patch_size=40)
    with pytest.raises(UsageError, match="blend"):
        blended(32, seed=0, blend=1.5)
    with pytest.raises(UsageError, match="shape"):
        blended(16, seed=0)(images().images)


def test_poisoning_stamps_and_relabels_the_chosen_images_only():
    clean = images(40)
    trigger = badnets(32, seed=0)
    poisoned, chosen = poison(clean, trigger, 2, rate=0.1, seed=5)
    assert len(chosen) == 4
    assert (clean.labels[chosen] != 2).all()
    assert (poisoned.labels[chosen] == 2).all()
    assert torch.equal(poisoned.images[chosen], trigger(clean.images[chosen]))
    rest = torch.ones(40, dtype=torch.bool)
    rest[chosen] = False
    assert torch.equal(poisoned.images[rest], clean.images[rest])
    assert torch.equal(poisoned.labels[rest], clean.labels[rest])
    assert torch.equal(poison(clean, trigger, 2, rate=0.1, seed=5)[1], chosen)
    assert len(poison(clean, trigger, 2, rate=1e-6, seed=5)[1]) == 1


def test_impossible_poisoning_is_refused():
    trigger = badnets(32, seed=0)
    with pytest.raises(DataError, match="labels"):
        poison(images(labels=False), trigger, 0, rate=0.1, seed=0)
    with pytest.raises(UsageError, match="rate"):
        poison(images(), trigger, 0, rate=0.0, seed=0)
    with pytest.raises(DataError, match="to poison"):
        poison(images(), trigger, 0, rate=1.0, seed=0)
