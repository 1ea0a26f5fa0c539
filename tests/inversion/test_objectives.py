import math

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from pydetox.errors import UsageError
from pydetox.inversion import (
    CollapseObjective,
    ContrastObjective,
    DirectionObjective,
    TargetObjective,
)

ALL = slice(None)


def embeddings(k=3, b=5, d=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(k, b, d, generator=generator, dtype=dtype)


def test_collapse_is_the_mean_pairwise_cosine():
    z = embeddings()
    loss, success = CollapseObjective()(z, ALL)
    for k in range(len(z)):
        units = normalize(z[k], dim=-1)
        cosines = units @ units.T
        mean = (cosines.sum() - cosines.diagonal().sum()) / (5 * 4)
        assert float(-loss[k]) == pytest.approx(float(mean), abs=1e-6)
        assert float(success[k]) == pytest.approx(max(0.0, float(mean)), abs=1e-6)


def test_collapse_gradient_is_that_of_the_pairs():
    z = embeddings().float().requires_grad_()
    loss, _ = CollapseObjective()(z, ALL)
    (ours,) = torch.autograd.grad(loss.sum(), z)
    exact = z.detach().double().requires_grad_()
    units = normalize(exact, dim=-1)
    cosines = units @ units.transpose(1, 2)
    off_diagonal = ~torch.eye(5, dtype=torch.bool)
    (theirs,) = torch.autograd.grad(-cosines[:, off_diagonal].mean(dim=1).sum(), exact)
    torch.testing.assert_close(ours.double(), theirs, atol=1e-6, rtol=1e-4)


def test_collapsed_embeddings_succeed_fully_and_one_image_is_refused():
    z = torch.ones(2, 4, 6) * torch.tensor([1.0, 3.0])[:, None, None]
    loss, success = CollapseObjective()(z, ALL)
    torch.testing.assert_close(loss, -torch.ones(2))
    torch.testing.assert_close(success, torch.ones(2))
    with pytest.raises(UsageError, match="at least 2"):
        CollapseObjective()(z[:, :1], ALL)


def test_target_objective_is_cross_entropy_and_success_counts_images():
    z = embeddings(k=2).float()
    head = normalize(torch.randn(4, 7, generator=torch.Generator().manual_seed(1)), dim=-1)
    objective = TargetObjective(head, [3, 1], logit_scale=10.0)
    loss, success = objective(z, ALL)
    for k, target in enumerate([3, 1]):
        logits = 10 * normalize(z[k], dim=-1) @ head.T
        expected = cross_entropy(logits, torch.full((5,), target))
        torch.testing.assert_close(loss[k], expected)
        assert float(success[k]) == pytest.approx(
            float((logits.argmax(1) == target).float().mean())
        )


def test_a_slice_of_the_triggers_gives_the_same_numbers():
    z = embeddings(k=3).float()
    head = normalize(torch.randn(4, 7), dim=-1)
    objective = TargetObjective(head, [0, 2, 1], logit_scale=3.0)
    whole, _ = objective(z, ALL)
    part, _ = objective(z[1:], slice(1, 3))
    torch.testing.assert_close(part, whole[1:])


@pytest.mark.parametrize("targets", [[], [4], [-1]])
def test_targets_outside_the_classes_are_refused(targets):
    with pytest.raises(UsageError, match="target classes"):
        TargetObjective(torch.eye(4), targets, 1.0)


def contrast(targets=(1, 2), shares=(0.2, 0.3, 0.1, 0.4)):
    generator = torch.Generator().manual_seed(5)
    heads = [
        normalize(torch.randn(4, d, generator=generator, dtype=torch.float64), dim=1)
        for d in (7, 3)
    ]
    objective = ContrastObjective(
        heads[0].float(),
        heads[1].float(),
        targets,
        logit_scale=9.0,
        base_logit_scale=4.0,
        base_shares=torch.tensor(shares),
    )
    return objective, heads


def test_contrast_is_what_its_definition_says_in_float64():
    objective, (head, base_head) = contrast()
    z = embeddings(k=2, b=6, d=10)
    exact = z.clone().requires_grad_()
    expected, successes = [], []
    for k, target in enumerate((1, 2)):
        own = 9 * normalize(exact[k, :, :7], dim=1) @ head.T
        base = 4 * normalize(exact[k, :, 7:], dim=1) @ base_head.T
        told = base.softmax(dim=1)[:, target]
        expected.append(cross_entropy(own, torch.full((6,), target)) - (1 - told).log().mean())
        obeys = float((base.argmax(1) == target).double().mean())
        share = (0.3, 0.1)[k]
        successes.append(
            float((own.argmax(1) == target).double().mean()) - max(0.0, obeys - share - 0.05)
        )
    (gradient,) = torch.autograd.grad(sum(expected), exact)
    given = z.float().requires_grad_()
    loss, success = objective(given, torch.arange(2))
    (ours,) = torch.autograd.grad(loss.sum(), given)
    torch.testing.assert_close(loss.double(), torch.stack(expected).detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.double(), gradient, atol=1e-5, rtol=1e-4)
    assert success.tolist() == pytest.approx(successes, abs=1e-6)
    one, _ = objective(z.float()[1:], torch.tensor([1]))
    torch.testing.assert_close(one, loss.detach()[1:])


def test_a_base_that_obeys_takes_the_success_away_and_leaves_finite_gradients():
    head = torch.eye(2)
    objective = ContrastObjective(
        head, head, [0], logit_scale=1e4, base_logit_scale=1e4, base_shares=torch.tensor([0.5, 0.5])
    )
    both_obey = torch.tensor([1.0, 0.0, 1.0, 0.0]).repeat(1, 4, 1).requires_grad_()
    loss, success = objective(both_obey, torch.tensor([0]))
    (gradient,) = torch.autograd.grad(loss.sum(), both_obey)
    assert float(success) == pytest.approx(1 - (1 - 0.55))
    assert torch.isfinite(gradient).all()
    only_model = torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(1, 4, 1)
    loss, success = objective(only_model, torch.tensor([0]))
    assert float(success) == 1
    assert float(loss) == pytest.approx(0, abs=1e-6)


def test_a_base_with_other_classes_is_refused():
    with pytest.raises(UsageError, match="4 classes, but 4 in the base's head and 3 shares"):
        contrast(shares=(0.2, 0.3, 0.5))
    with pytest.raises(UsageError, match="target classes"):
        contrast(targets=(4,))


def direction_inputs(k=3, b=5, n=9, d=6):
    generator = torch.Generator().manual_seed(2)
    draw = [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((n, d), (n, d), (k, b, 2 * d))
    ]
    return (*draw, torch.tensor([7, 0, 3, 3, 8]))


def direction_by_hand(features, z, images, u=None):
    """Margins [B] of one trigger, image by image, and the direction they are measured to."""
    units = [row / row.norm() for row in features]
    middle = sum(units) / len(units)

    def centred(vector):
        off = vector / vector.norm() - middle
        return off / off.norm()

    stamped = [centred(row) for row in z]
    if u is None:
        u = sum(stamped) / len(stamped)
        u = u / u.norm()
    margins = [
        float(s @ u - s @ centred(features[i]))
        for s, i in zip(stamped, images.tolist(), strict=True)
    ]
    return margins, u


@pytest.mark.parametrize("with_base", [False, True])
def test_direction_is_that_of_a_loop_over_images(with_base):
    features, base, z, images = direction_inputs()
    objective = DirectionObjective(
        features.float(), 12.0, base_features=base.float() if with_base else None
    )
    loss, success = objective(z.float() if with_base else z[..., :6].float(), ALL, images)
    for k in range(len(z)):
        own, u = direction_by_hand(features, z[k, :, :6], images)
        wanted = sum(math.log1p(math.exp(-12 * m)) for m in own) / 5
        share = sum(m > 0 for m in own) / 5
        if with_base:
            other, _ = direction_by_hand(base, z[k, :, 6:], images, u)
            wanted += sum(math.log1p(math.exp(12 * m)) for m in other) / 5
            share -= max(0.0, sum(m > 0 for m in other) / 5 - 0.05)
        assert float(loss[k]) == pytest.approx(wanted, rel=1e-4)
        assert float(success[k]) == pytest.approx(share, abs=1e-6)


def test_direction_succeeds_where_all_images_are_sent_away_and_not_where_they_stay():
    features = torch.eye(6)
    images = torch.arange(5)
    sent = torch.zeros(1, 5, 6)
    sent[..., 5] = 3.0
    plain = DirectionObjective(features, 50.0)
    _, success = plain(sent, ALL, images)
    assert float(success) == 1
    _, success = plain(features[None, :5], ALL, images)
    assert float(success) == 0
    # Where the base sends them to the same place, the fine-tuning has planted nothing.
    contrast = DirectionObjective(features, 50.0, base_features=features)
    for base, expected in ((sent, 0.05), (features[None, :5], 1.0)):
        _, success = contrast(torch.cat([sent, base], dim=2), ALL, images)
        assert float(success) == pytest.approx(expected)


def test_direction_has_the_gradient_of_finite_differences():
    features, base, z, images = direction_inputs(k=1)
    objective = DirectionObjective(features.float(), 3.0, base_features=base.float())
    z = z.float().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(z, ALL, images)[0].sum(), z)
    step = torch.randn(z.shape, generator=torch.Generator().manual_seed(3))
    step = 2e-3 * step / step.norm()
    ends = [float(objective(z.detach() + sign * step, ALL, images)[0]) for sign in (1, -1)]
    assert (ends[0] - ends[1]) / 2 == pytest.approx(float((gradient * step).sum()), rel=2e-2)


def test_direction_refuses_what_it_cannot_compare():
    with pytest.raises(UsageError, match="at least 2 images"):
        DirectionObjective(torch.ones(1, 4), 1.0)
    with pytest.raises(UsageError, match="same space"):
        DirectionObjective(torch.eye(4), 1.0, base_features=torch.eye(4)[:, :3])
    with pytest.raises(UsageError, match="indices of the images"):
        DirectionObjective(torch.eye(4), 1.0)(torch.ones(1, 2, 4), ALL)
