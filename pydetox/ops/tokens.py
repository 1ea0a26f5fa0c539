"""`mix_tokens`, its fused update, and `top_swaps`: searches over a frozen embedding table.

`pydetox.ops.reference` defines them in plain PyTorch.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from pydetox.ops import reference


class TokenMixture(NamedTuple):
    """The result of `mix_tokens_forward`.

    Attributes:
        mixed: [R, d], the mixed embeddings.
        softmax: [R, 2], of the logits' dtype: the largest allowed logit of each row, and the
            inverse of the sum of exp((logit - largest) / temperature).
    """

    mixed: Tensor
    softmax: Tensor


def mix_tokens(
    logits: Tensor, table: Tensor, temperature: float | Tensor, allowed: Tensor | None = None
) -> Tensor:
    """Return softmax(logits / temperature) @ table over the allowed tokens, differentiable once."""
    return reference.mix_tokens(logits, table, temperature, allowed)


def mix_tokens_forward(
    logits: Tensor, table: Tensor, temperature: float | Tensor, allowed: Tensor | None = None
) -> TokenMixture:
    """Return `mix_tokens` without autograd, and what `mix_tokens_update` takes."""
    return TokenMixture(*reference.mix_tokens_forward(logits, table, temperature, allowed))


def mix_tokens_update(
    gradient: Tensor,
    mixture: TokenMixture,
    logits: Tensor,
    first: Tensor,
    second: Tensor,
    table: Tensor,
    temperature: float | Tensor,
    allowed: Tensor | None = None,
    *,
    learning_rate: Tensor,
    steps: Tensor,
    active: Tensor,
    betas: tuple[float, float],
    epsilon: float = 1e-8,
) -> None:
    """Take one step of Adam on the logits, in place, from the gradient of the mixed embeddings."""
    reference.mix_tokens_update(
        gradient,
        mixture,
        logits,
        first,
        second,
        table,
        temperature,
        allowed,
        learning_rate=learning_rate,
        steps=steps,
        active=active,
        betas=betas,
        epsilon=epsilon,
    )


def top_swaps(
    gradient: Tensor, table: Tensor, current: Tensor, allowed: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """Return the k tokens of each row with the smallest gradient . (e_token - e_current)."""
    return reference.top_swaps(gradient, table, current, allowed, k)
