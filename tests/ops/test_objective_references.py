"""The plain-PyTorch definitions of the objectives and the update, against independent ones."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from pydetox.inversion import CollapseObjective, TargetObjective
from pydetox.ops import reference

F64 = torch.float64


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sizes", [(3, 5, 7), (1, 2, 1), (2, 17, 64)])
def test_collapse_is_the_mean_over_pairs(sizes: tuple[int, int, int]) -> None:
    z = randn(*sizes)
    cosines = cosine_similarity(z[:, :, None], z[:, None], dim=-1)
    expected = cosines[:, ~torch.eye(sizes[1], dtype=torch.bool)].mean(dim=1)
    torch.testing.assert_close(reference.embedding_collapse(z), expected)
    ours, _ = CollapseObjective()(z, slice(None))
    torch.testing.assert_close(ours.double(), -expected, rtol=1e-5, atol=1e-6)


def test_gradients() -> None:
    z = randn(2, 3, 4).requires_grad_()
    head, targets = normalize(randn(5, 4, seed=1), dim=-1), torch.tensor([4, 0])
    assert torch.autograd.gradcheck(reference.embedding_collapse, z)
    assert torch.autograd.gradcheck(lambda e: reference.zero_shot_loss(e, head, targets, 7.0)[0], z)


def test_a_row_of_zeros_is_orthogonal_to_all_and_gets_no_gradient() -> None:
    z = randn(1, 4, 6)
    z[0, 1] = 0
    z.requires_grad_()
    value = reference.embedding_collapse(z)
    units = normalize(z.detach()[0, [0, 2, 3]], dim=-1)
    torch.testing.assert_close(value, ((units @ units.T).sum()[None] - 3) / 12)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert not gradient[0, 1].any()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(value: float) -> None:
    z = randn(2, 3, 4)
    z[1, 2, 3] = value
    head = normalize(randn(5, 4, seed=1), dim=-1)
    loss, _ = reference.zero_shot_loss(z, head, torch.tensor([0, 1]), 7.0)
    for found in (reference.embedding_collapse(z), loss):
        assert found.isnan().tolist() == [False, True]


def test_zero_shot_loss_is_cross_entropy() -> None:
    z, targets = randn(3, 6, 8), torch.tensor([4, 0, 4])
    head = normalize(randn(5, 8, seed=1), dim=-1)
    loss, success = reference.zero_shot_loss(z, head, targets, 20.0)
    for k, target in enumerate(targets):
        logits = 20 * normalize(z[k], dim=-1) @ head.T
        torch.testing.assert_close(loss[k], cross_entropy(logits, target.expand(6)))
        torch.testing.assert_close(success[k], (logits.argmax(1) == target).double().mean())
    ours, share = TargetObjective(head, targets.tolist(), 20.0)(z, slice(None))
    torch.testing.assert_close(ours.double(), loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(share.double(), success)


def test_update_is_adam_on_each_active_trigger() -> None:
    count, betas = 4, (0.5, 0.9)
    logits = randn(count, 5, 3), randn(count, 2, 5, 3, seed=1)
    first, second = (tuple(map(torch.zeros_like, logits)) for _ in range(2))
    cost = torch.tensor([0.0, 1e-3, 0.1, 0.2], dtype=F64)
    rates = torch.tensor([0.5, 0.1, 0.05, 0.1], dtype=F64)
    steps = torch.zeros(count, dtype=torch.int64)
    # Trigger 2 rests at every other step, trigger 3 never moves.
    leaves = [[t[k].clone().requires_grad_() for t in logits] for k in range(count)]
    optimizers = [
        torch.optim.Adam(leaves[k], lr=float(rates[k]), betas=betas) for k in range(count)
    ]
    start = [t[3].clone() for t in logits]
    for step in range(7):
        active = torch.tensor([True, True, step % 2 == 0, False])
        gradients = randn(count, 5, 3, seed=10 + step), randn(count, 2, 5, 3, seed=20 + step)
        norms = reference.trigger_update(
            logits,
            gradients,
            first,
            second,
            cost=cost,
            learning_rate=rates,
            steps=steps,
            active=active,
            betas=betas,
        )
        for k in range(count):
            if not active[k]:
                assert norms[k].isnan()
                continue
            share = (torch.tanh(leaves[k][0]) / 2 + 0.5).sum()
            torch.testing.assert_close(norms[k], share.detach())
            optimizers[k].zero_grad()
            loss = cost[k] * share + sum(
                (leaf * gradient[k]).sum()
                for leaf, gradient in zip(leaves[k], gradients, strict=True)
            )
            loss.backward()
            optimizers[k].step()
            for found, leaf in zip(logits, leaves[k], strict=True):
                torch.testing.assert_close(found[k], leaf.detach(), rtol=1e-12, atol=1e-12)
    assert steps.tolist() == [7, 7, 4, 0]
    assert all(torch.equal(t[3], s) for t, s in zip(logits, start, strict=True))
    assert not any(t[3].any() for t in (*first, *second))
