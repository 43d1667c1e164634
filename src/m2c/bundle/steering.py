"""INT4 codes that make up for each other's errors.

Rounding every weight to its nearest code leaves an error that follows the inputs: where two inputs
rise and fall together, an error in the weight of the one can be undone by the weight of the other.
So codes are chosen one after another, each for its weight and for what is left of the errors before
it; none is further than REACH steps from its weight, so that the INT8 code still mends it.

This is GPTQ (Frantar et al., arXiv 2210.17323) with the inputs' second moments given as a diagonal
and a few directions, D + V V^T: what the errors so far ask of the next weight is then a product of
a few numbers (Woodbury's identity), not of a row of an inverse matrix. A few directions are not
only cheaper than all: all of a calibration's moments fit its text too well.

Knows nothing about files, models or torch.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from m2c.bundle.planes import GROUP

REACH: Final = np.float32(0.625)  # scales of the group; docs/FORMAT.md, "The exact plane"
MOST_DIRECTIONS: Final = 64
_DAMP: Final = 0.01  # of the mean: no input is as quiet as it was in the calibration
_FRESH: Final = 256  # steps between inversions: between them errors of rounding add up

F32 = npt.NDArray[np.float32]
I8 = npt.NDArray[np.int8]


@dataclass(frozen=True)
class Factors:
    """For each input: its part in the directions, and what errors along them ask of its weight."""

    directions: F32  # [inputs, rank]
    feedback: F32  # [inputs, rank]


def factors_of(mean_square: F32, directions: F32) -> Factors:
    """mean_square [inputs], directions [inputs, rank], at most MOST_DIRECTIONS of them: the
    diagonal of the inputs' second moments, and their principal directions, each as long as its
    root mean square. Inputs in the order in which codes are chosen.
    """
    v = directions.astype(np.float64)
    rest = np.maximum(mean_square.astype(np.float64) - np.square(v).sum(1), 0)
    rest += _DAMP * mean_square.mean(dtype=np.float64) + 1e-30
    feedback = np.empty_like(v)
    inverse = np.empty(0)
    for i, (own, left) in enumerate(zip(v, rest, strict=True)):
        if i % _FRESH == 0:
            later = v[i:] / rest[i:, None]
            inverse = np.linalg.inv(np.eye(v.shape[1]) + later.T @ v[i:])
        along = inverse @ own
        feedback[i] = along / left
        # without input i: its weight is chosen, and can undo nothing any more
        inverse = inverse + np.outer(along, along) / (left - own @ along)
    return Factors(
        np.ascontiguousarray(directions, np.float32), np.ascontiguousarray(feedback, np.float32)
    )


def steer(values: F32, scales: F32, factors: Factors) -> I8:
    """Codes [inputs, lanes] of weights `values` [inputs, lanes], whose scales are [inputs, lanes].

    Lanes know nothing of each other. kernels/csrc/steer.c gives the same codes.
    """
    codes = np.empty(values.shape, np.int8)
    felt = np.zeros((factors.directions.shape[1], values.shape[1]), np.float32)
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    ratio = np.clip(values * inverse, -9, 9)
    low, high = np.clip(np.ceil(ratio - REACH), -8, 7), np.clip(np.floor(ratio + REACH), -8, 7)
    for i, value in enumerate(values):
        # reductions run along axis 0 in a fixed order
        pull = np.add.reduce(factors.feedback[i][:, None] * felt, axis=0)
        with np.errstate(over="ignore"):  # a scale that all but vanished: the end is taken
            chosen = np.rint((value - pull) * inverse[i])
        q = np.minimum(np.maximum(chosen, low[i]), high[i])
        felt += factors.directions[i][:, None] * (q * scales[i] - value)
        codes[i] = q.astype(np.int8)
    return codes


def spread_scales(scales: F32, length: int) -> F32:
    """Scales of groups [..., groups] to scales of weights [..., length]."""
    return np.repeat(scales, GROUP, axis=-1)[..., :length]
