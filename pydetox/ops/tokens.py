"""`mix_tokens`, its fused update, and `top_swaps`: searches over a frozen embedding table.

Native kernels and the checks of arguments are in csrc/mix_tokens; what they compute is written out
in its core.h and, in plain PyTorch, in `pydetox.ops.reference`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pydetox.errors import UsageError
from pydetox.ops import _library


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
    """Return softmax(logits / temperature) @ table, the softmax over the allowed tokens alone.

    This relaxes the choice of a token in each of R places to a distribution over the vocabulary
    (GBDA, Guo et al., EMNLP 2021; DBS, Shen et al., ICML 2022). The logits and their gradient are
    all that is stored of the size R x V: probabilities are computed from the logits where they are
    needed, in the forward and in the backward pass (as in attention: Dao et al. 2022). The table is
    read once in each, in its own dtype. The more tokens are not allowed, the faster both are on
    the CPU.

    The result is differentiable once, in the logits. A row's result does not depend on the other
    rows, and all results have the same bits for any number of threads, any instruction set and on
    CUDA.

    Args:
        logits: [R, V], float32 or float64. A logit of -infinity has the probability 0. Below
            exp(-87) of the largest in float32 (exp(-708) in float64), a probability is exactly 0.
        table: embeddings [V, d] of the logits' dtype, or bfloat16 for float32 logits. It gets no
            gradient.
        temperature: a positive number, or one for each row [R] in the logits' dtype. A tensor's
            values are not checked: to look at them would wait for a GPU.
        allowed: bool [V], the tokens that a row can be mixed of; None for all. Logits and
            embeddings of other tokens have no effect, and their gradient is 0.

    Returns:
        [R, d] of the logits' dtype. A row is NaN if no token is allowed, if all its allowed logits
        are -infinity, or if one is NaN or +infinity.

    Raises:
        UsageError: Shapes, dtypes or devices do not fit together, the table requires a gradient, or
            the temperature is not a positive number.
    """
    _check_table("mix_tokens", table)
    rows = _temperature_of_rows("mix_tokens", logits, temperature)
    mixed: Tensor
    mixed, _ = _library.call("mix_tokens", logits, table, rows, allowed)
    return mixed


@torch.no_grad()
def mix_tokens_forward(
    logits: Tensor, table: Tensor, temperature: float | Tensor, allowed: Tensor | None = None
) -> TokenMixture:
    """Return `mix_tokens` without autograd, with what `mix_tokens_update` needs.

    Arguments and errors are those of `mix_tokens`.
    """
    rows = _temperature_of_rows("mix_tokens", logits, temperature)
    return TokenMixture(
        *_library.call("mix_tokens", logits.detach(), table.detach(), rows, allowed)
    )


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
    """Take one step of Adam on the logits, in place, from the gradient of the mixed embeddings.

    The gradient of the logits, p (g . e - g . mixed) / temperature, goes into the step where it is
    computed and is not stored: logits and moments are read and written once. Adam is algorithm 1 of
    Kingma and Ba (2015). Rows that are not active and tokens that are not allowed are neither read
    nor written. The bits are the same for any number of threads and on CUDA, and nothing waits for
    the device.

    Args:
        gradient: [R, d], of an objective by `mixture.mixed`, in the logits' dtype.
        mixture: the result of `mix_tokens_forward` for these logits, table, temperature and
            allowed tokens.
        logits: [R, V], float32 or float64. Logits and moments are contiguous, and each has memory
            that nothing else shares.
        first: the first moments, like the logits; zeros before the first step.
        second: the second moments, like the logits; zeros before the first step.
        table: as in `mix_tokens`.
        temperature: as in `mix_tokens`.
        allowed: as in `mix_tokens`.
        learning_rate: float32 or float64 [R].
        steps: int64 [R], the number of steps taken so far. It is increased for active rows.
        active: bool [R], whether the row takes this step.
        betas: the decay rates of the moments, in [0, 1).
        epsilon: the non-negative number that is added to the denominator.

    Raises:
        UsageError: Shapes, dtypes, devices or memory do not fit together.
    """
    rows = _temperature_of_rows("mix_tokens_update", logits, temperature)
    _library.call(
        "mix_tokens_update",
        gradient.detach(),
        mixture.mixed.detach(),
        mixture.softmax.detach(),
        logits.detach(),
        first.detach(),
        second.detach(),
        table.detach(),
        rows,
        allowed,
        learning_rate,
        steps,
        active,
        *betas,
        epsilon,
    )


@torch.no_grad()
def top_swaps(
    gradient: Tensor, table: Tensor, current: Tensor, allowed: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """Return, for each row, the k tokens with the smallest gradient . (e_token - e_current).

    This is the first-order change of an objective when the current token is replaced (HotFlip,
    Ebrahimi et al., ACL 2018; GCG, Zou et al. 2023). The scores of all tokens are never stored:
    each is compared with the best so far when it is computed. The current token competes as well,
    with the score 0, if it is allowed. The results are the same for any number of threads, any
    instruction set and on CUDA.

    Args:
        gradient: [R, d], of the objective by the embedding of each place, float32 or float64.
        table: embeddings [V, d] of the gradient's dtype, or bfloat16 for a float32 gradient.
        current: int64 [R], the token of each place. On CUDA, checking it would wait for the device;
            there, a row with another number gets the score NaN for all tokens.
        allowed: bool [V], the tokens to choose from; None for all.
        k: from 1 to 256, at most V.

    Returns:
        Scores [R, k] of the gradient's dtype in ascending order, and tokens int64 [R, k]. Of equal
        scores the smaller token comes first; NaN comes after all numbers. If fewer than k tokens
        are allowed, the rest has the score infinity and the token -1.

    Raises:
        UsageError: Shapes, dtypes or devices do not fit together, or k or a current token is out of
            range.
    """
    scores: Tensor
    tokens: Tensor
    scores, tokens = _library.call(
        "top_swaps", gradient.detach(), table.detach(), current, allowed, k
    )
    return scores, tokens


def _check_table(operator: str, table: Tensor) -> None:
    if table.requires_grad and torch.is_grad_enabled():
        raise UsageError(f"{operator}: table gets no gradient, only logits do: pass table.detach()")


def _temperature_of_rows(operator: str, logits: Tensor, temperature: float | Tensor) -> Tensor:
    if isinstance(temperature, Tensor):
        return temperature.detach()
    if not (temperature > 0 and math.isfinite(temperature)):
        raise UsageError(f"{operator}: temperature must be a positive number, found {temperature}")
    rows = logits.shape[:1] if logits.dim() else (0,)
    return logits.new_full(rows, temperature, requires_grad=False)


def _mix_fake(
    logits: Tensor, table: Tensor, temperature: Tensor, allowed: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return logits.new_empty((rows, table.shape[1])), logits.new_empty((rows, 2))


def _mix_backward_fake(
    gradient: Tensor, mixed: Tensor, softmax: Tensor, logits: Tensor, *_: Any
) -> Tensor:
    return logits.new_empty(logits.shape)


def _update_fake(*_: Any) -> None:
    return None


def _swaps_fake(
    gradient: Tensor, table: Tensor, current: Tensor, allowed: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    shape = (gradient.shape[0], k)
    return gradient.new_empty(shape), gradient.new_empty(shape, dtype=torch.int64)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    mixed, softmax = output
    ctx.mark_non_differentiable(softmax)
    ctx.save_for_backward(mixed, softmax, *inputs)


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    result: Tensor = _library.call("mix_tokens_backward", gradient, *ctx.saved_tensors)
    return result, None, None, None


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass


def _refuse_double_backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
    raise UsageError(
        "mix_tokens cannot be differentiated twice: mix_tokens_backward has no gradient; "
        "pydetox.ops.reference.mix_tokens has one"
    )


torch.library.register_fake("pydetox::mix_tokens", _mix_fake)
torch.library.register_fake("pydetox::mix_tokens_backward", _mix_backward_fake)
torch.library.register_fake("pydetox::mix_tokens_update", _update_fake)
torch.library.register_fake("pydetox::top_swaps", _swaps_fake)
torch.library.register_autograd("pydetox::mix_tokens", _backward, setup_context=_save)
torch.library.register_autograd(
    "pydetox::mix_tokens_backward", _refuse_double_backward, setup_context=_save_nothing
)
