"""Comparing logits that are the same up to a factor."""

from __future__ import annotations

from torch import Tensor


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest error of the best positive multiple of `ours`, beside the largest value.

    Ratios of single logits say nothing: a logit near zero is rounding.
    """
    factor = (theirs * ours).sum() / ours.square().sum()
    assert float(factor) > 0
    return float((factor * ours - theirs).abs().max() / theirs.abs().max())
