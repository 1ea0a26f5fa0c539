import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from pydetox.errors import UsageError
from pydetox.inversion import CollapseObjective, ContrastObjective, TargetObjective

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
