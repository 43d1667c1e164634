"""The reference kernels: dense rows and FFN neurons times activations, in torch, f32.

Every faster kernel is tested against these. A call is cut into chunks of CHUNK rows and partial
sums are added in chunk order, so the result depends neither on the threads nor on the tier the rows
lie in. Knows nothing about layers, caches or files.
"""

from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from m2c.kernels.rows import Rows
from m2c.kernels.workers import Workers

CHUNK: Final = 256
ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {"silu": F.silu, "relu": F.relu}


def matmul_rows(x: Tensor, rows: Rows, workers: Workers) -> Tensor:
    """x [tokens, length] f32 times every row of a dense matrix: [tokens, rows] f32."""

    def piece(i: int) -> Tensor:
        values = rows.values(*_bounds(i, rows)).to(x.device)
        return F.linear(x, values[:, 0])

    return torch.cat(workers.map(piece, _chunks(rows)), dim=1)


def gate_up(x: Tensor, rows: Rows, act: str, workers: Workers) -> Tensor:
    """act(x . gate) * (x . up) of every neuron: x [tokens, hidden] f32 to [tokens, rows] f32."""
    activation = ACTIVATIONS[act]

    def piece(i: int) -> Tensor:
        values = rows.values(*_bounds(i, rows), first=0, last=2).to(x.device)
        return activation(F.linear(x, values[:, 0])) * F.linear(x, values[:, 1])

    return torch.cat(workers.map(piece, _chunks(rows)), dim=1)


def down(activations: Tensor, rows: Rows, workers: Workers) -> Tensor:
    """Sum over neurons of activation * down column: [tokens, rows] f32 to [tokens, hidden]."""

    def piece(i: int) -> Tensor:
        start, stop = _bounds(i, rows)
        values = rows.values(start, stop, first=2, last=3).to(activations.device)
        return activations[:, start:stop] @ values[:, 0]

    return _sum(workers.map(piece, _chunks(rows)))


def gather_ffn(
    x: Tensor, rows: Rows, act: str, workers: Workers, *, mask: Tensor | None = None
) -> Tensor:
    """The FFN output of gathered neurons: x [tokens, hidden] f32 to [tokens, hidden] f32.

    mask: [tokens, rows] f32 or None, multiplies each neuron's activation: with several tokens in
    one pass, a neuron may be active for some of them only.
    """
    activation = ACTIVATIONS[act]

    def piece(i: int) -> Tensor:
        start, stop = _bounds(i, rows)
        values = rows.values(start, stop).to(x.device)
        hidden = activation(F.linear(x, values[:, 0])) * F.linear(x, values[:, 1])
        if mask is not None:
            hidden = hidden * mask[:, start:stop]
        return hidden @ values[:, 2]

    if not len(rows):
        return torch.zeros_like(x)
    return _sum(workers.map(piece, _chunks(rows)))


def _chunks(rows: Rows) -> int:
    return -(-len(rows) // CHUNK)


def _bounds(i: int, rows: Rows) -> tuple[int, int]:
    return i * CHUNK, min((i + 1) * CHUNK, len(rows))


def _sum(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
