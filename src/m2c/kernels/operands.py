"""Operands of the kernels other than rows: a norm to apply first, and what attention needs.

Knows nothing about layers or where anything lies.
"""

from dataclasses import dataclass

from torch import Tensor

from m2c.kernels.rows import Rows


@dataclass(frozen=True)
class Norm:
    """An RMS norm that a kernel applies to its input."""

    weight: Tensor  # [length] f32
    eps: float


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention, whatever the tokens. Tensors are f32 unless said.

    Rotary positions turn pairs (i, i + dim / 2) of a head, as Hugging Face models do.
    """

    projections: tuple[Rows, Rows, Rows, Rows]  # q, k, v, o
    biases: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
    keys: Tensor  # [kv_heads, positions, dim] f16 or f32; written where the new tokens are
    values: Tensor
    cosines: Tensor  # [positions, dim / 2]
    sines: Tensor
    heads: int
    scale: float  # of the scores
    qk_norms: tuple[Norm | None, Norm | None] = (None, None)  # of every head, before it is turned
    window: int | None = None  # how many positions a token sees, its own included; None: all
