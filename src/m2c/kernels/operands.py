"""Operands of the kernels other than rows: a norm to apply first, and what attention needs.

Knows nothing about layers or where anything lies.
"""

from dataclasses import dataclass

from torch import Tensor

from m2c.kernels.rows import ExactRows, Rows


@dataclass(frozen=True)
class Norm:
    """A norm that a kernel applies to its input: with a bias a layer norm, else an RMS norm."""

    weight: Tensor  # [length] f32
    eps: float
    bias: Tensor | None = None  # [length] f32


@dataclass(frozen=True)
class Router:
    """Which experts a token goes to, and with what weight."""

    rows: ExactRows  # [parts, experts + shared]: parts that add up
    experts: int
    active: int
    sums_to_one: bool  # the weights of a token's experts
    shared: bool = False  # the last row of a part is the gate of the shared expert


def activation_of(act: str) -> tuple[str, float]:
    """Name and threshold of an activation: "silu", "gelu", "gelu_pytorch_tanh", "relu",
    "fatrelu:0.01"."""
    name, _, threshold = act.partition(":")
    return name, float(threshold or 0)


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention, whatever the tokens. Tensors are f32 unless said.

    Rotary positions turn pairs (i, i + rotary / 2) of the first `rotary` values of a head, as
    Hugging Face models do.
    """

    projections: tuple[Rows, Rows, Rows, Rows]  # q, k, v, o
    biases: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
    keys: Tensor  # [kv_heads, positions, dim] f16 or f32; written where the new tokens are
    values: Tensor
    cosines: Tensor | None  # [positions, rotary / 2]; None: nothing is turned
    sines: Tensor | None
    heads: int
    scale: float  # of the scores
    qk_norms: tuple[Norm | None, Norm | None] = (None, None)  # of every head, before it is turned
    out_norm: Norm | None = None  # of what is added to the residual stream
    softcap: float | None = None  # scores s become softcap * tanh(s / softcap)
    window: int | None = None  # how many positions a token sees, its own included; None: all

    @property
    def rotary(self) -> int:
        """How many values of a head are turned."""
        return 0 if self.cosines is None else 2 * self.cosines.shape[1]


@dataclass(frozen=True)
class LayerCall:
    """One layer whose rows are all in memory: attention, then its FFN at one precision."""

    attention: AttentionCall
    attn_norm: Norm
    neurons: Rows
    ffn_norm: Norm
    act: str
    up_bias: Tensor | None = None  # [neurons], of neurons without a gate
    down_bias: Tensor | None = None  # [hidden]


@dataclass(frozen=True)
class Stack:
    """Layers that are computed one after the other, nothing between them."""

    layers: tuple[LayerCall, ...]
    parallel: bool = False  # both parts of a layer read what the layer was given
