"""The principal directions of a matrix's inputs: along which of them calibration texts move most.

Knows nothing about models or quantization.
"""

from typing import Final

import torch
from torch import Tensor

RANK: Final = 8  # 16 and 32 bring nothing measurable
_MORE: Final = 8  # of random vectors than directions, so that the last of these are right too
_ROUNDS: Final = 3


def principal_directions(x: Tensor, rank: int = RANK) -> Tensor:
    """Of x [samples, n] f32: [n, rank], each as long as the root mean square of x along it.

    Randomised subspace iteration (Halko, Martinsson, Tropp, arXiv 0909.4061). Zeros where x has
    fewer directions.
    """
    generator = torch.Generator().manual_seed(0)
    wanted = min(rank + _MORE, *x.shape)
    basis = torch.randn(x.shape[1], wanted, generator=generator)
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(x.T @ (x @ basis)).Q
    found = torch.linalg.svd(x @ basis, full_matrices=False)
    directions = (found.Vh @ basis.T)[:rank] * (found.S[:rank, None] / len(x) ** 0.5)
    out = torch.zeros(x.shape[1], rank)
    out[:, : len(directions)] = directions.T
    return out
