"""Step sizes of a trigger vector, relative to the weights.

One learning rate does not fit all towers: 4e-4 is right for four blocks of 128 channels and ruinous
for a ViT-L. Adam moves every weight by about the rate in each step, whatever the size of the weight
or the width of the layer. Two things change with the width n of a layer:

* Weights become smaller: their root mean square falls like 1/sqrt(n). A step should be in
  proportion to it, as in LARS (You et al. 2017), LAMB (You et al. 2020) and Adafactor (Shazeer and
  Stern 2018, section 8).
* Adam's changes have low rank: all n of them move an output the same way, and the weights' own
  contributions cancel like a random sum. Relative to the weights, a change counts sqrt(n) times
  more.

Together, the rate of a matrix is RATE * rms / sqrt(n), with n the inputs of one output. For weights
of the usual size, 1/sqrt(n), this is the 1/n of the maximal update parametrisation (Yang and Hu
2022, Tensor Programs V, table 3). Vectors (biases, gains of norms) have one rate, as there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

#: Chosen so that the matrices of the CLIP of the demo and of `research.foundation`, whose mean root
#: mean square is 0.055 at 128 inputs, keep the rate 4e-4 that was found best for them.
RATE = 4e-4 * math.sqrt(128) / 0.055

#: The rate of biases, gains of norms, and other vectors.
VECTOR_RATE = 4e-4


def relative_rates(parameters: Sequence[Tensor]) -> list[float]:
    """Return the learning rate of each parameter at its present value.

    A matrix of zeros, which has no size to be relative to, gets the rate of weights of the size
    1/sqrt(n).
    """
    return [_rate(one.detach()) for one in parameters]


def _rate(value: Tensor) -> float:
    if value.ndim < 2:
        return VECTOR_RATE
    inputs = max(1, value.numel() // value.shape[0])
    size = float(value.double().square().mean().sqrt()) or 1 / math.sqrt(inputs)
    return RATE * size / math.sqrt(inputs)
