"""Predictors of an FFN's neurons in closed form, and how well each of them does.

A predictor of rank r replaces gate and up (W, [2 neurons, hidden]) by A B: B [r, hidden] and A
[2 neurons, r], the rank-r matrix that errs least on calibration activations, each row weighted by
what an error there does to the output. Knows nothing about drafts or models as a whole.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from m2c.bundle.planes import RecordLayout, quantize
from m2c.kernels.rows import PackedRows

RANKS: Final = (16, 32, 64, 128, 256)
SHARES: Final = (30, 50, 70)  # percent of the neurons


@dataclass(frozen=True)
class Packed:
    """A predictor as INT4 rows: x to features, features to gates and ups."""

    features: PackedRows  # B: [rank] of 1 x hidden
    neurons: PackedRows  # A: [neurons] of 2 x rank

    @classmethod
    def of(cls, after: Tensor, before: Tensor) -> "Packed":
        """after: A [2 neurons, rank] f32, before: B [rank, hidden] f32."""
        both = after.view(2, -1, after.shape[1]).transpose(0, 1)
        return cls(_packed(before[:, None]), _packed(both))

    @property
    def nbytes(self) -> int:
        return self.features.int4.nbytes + self.neurons.int4.nbytes


def _packed(values: Tensor) -> PackedRows:
    """values: [rows, vectors, length] f32."""
    int4, _, _ = quantize(np.ascontiguousarray(values.numpy()))
    return PackedRows(RecordLayout(*values.shape[1:]), torch.from_numpy(int4))


@dataclass(frozen=True)
class Weights:
    """A layer's INT4 values, f32 [neurons, hidden] each, and the column norms [neurons]."""

    gate: Tensor
    up: Tensor
    down: Tensor
    norms: Tensor

    @classmethod
    def of(cls, neurons: PackedRows) -> "Weights":
        gate, up, down = neurons.values(0, len(neurons)).unbind(1)
        return cls(gate, up, down, down.norm(dim=1))


def low_rank(weights: Weights, x: Tensor, source: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A [2 neurons, hidden] and B [hidden, hidden]: the first r columns and rows are rank r's.

    x: [tokens, hidden], the FFN's inputs. source: what predicts instead of them, same shape.
    """
    seen = x if source is None else source
    second = seen.T @ seen / len(seen)
    second += 1e-4 * second.diagonal().mean() * torch.eye(len(second))
    target = torch.cat((weights.gate, weights.up))
    if source is not None:
        target = target @ torch.linalg.solve(second, seen.T @ x / len(x)).T
    gate, up = x @ weights.gate.T, x @ weights.up.T
    on, slope = F.silu(gate), torch.sigmoid(gate) * (1 + gate * (1 - torch.sigmoid(gate)))
    errs = torch.cat([(slope * up).square().mean(0), on.square().mean(0)]).sqrt()
    errs *= weights.norms.repeat(2)
    root = torch.linalg.cholesky(second)
    spread = target @ root
    weighted = spread * errs[:, None]
    _, directions = torch.linalg.eigh(weighted.T @ weighted)
    directions = directions.flip(1)
    before = torch.linalg.solve_triangular(root, directions.T, upper=False, left=False)
    return spread @ directions, before


def scores_by(after: Tensor, before: Tensor, norms: Tensor, x: Tensor) -> Tensor:
    """Predicted scores [tokens, neurons]."""
    gate, up = (x @ before.T @ after.T).chunk(2, dim=1)
    return (F.silu(gate) * up).abs() * norms


def regressed(features: Tensor, scores: Tensor) -> Tensor:
    """Ridge regression: features [tokens, features] to [features, neurons]."""
    square = features.T @ features / len(features)
    square += 1e-3 * torch.eye(len(square))
    return torch.linalg.solve(square, features.T @ scores / len(features))


def quadratic(before: Tensor, x: Tensor) -> Tensor:
    """Features z = B x, their squares, and one: [tokens, 2 rank + 1]."""
    z = x @ before.T
    return torch.cat((z, z.square() - 1, torch.ones(len(x), 1)), dim=1)


def guesses(
    weights: Weights, seen: tuple[Tensor, Tensor], asked: tuple[Tensor, Tensor]
) -> Iterator[tuple[str, float, Tensor]]:
    """Name, bytes at INT4 as a share of the layer's, and predicted scores [tokens, neurons].

    seen, asked: calibration and held-out inputs of this layer, and those of the layer before.
    """
    neurons, hidden = weights.gate.shape
    layer = 3 * neurons * hidden
    known = scores_of(weights, seen[0])
    mean, now = known.mean(0), scores_of(weights, asked[0])
    before_one = torch.roll(now, 1, 0)
    moved, base = (known[1:] - mean) * (known[:-1] - mean), (known - mean).square().mean(0)
    yield "static", 0, mean.expand(len(now), -1)
    yield "static and the token before", 0, mean + moved.mean(0) / base * (before_one - mean)
    on = F.silu(asked[0] @ weights.gate.T).abs()
    size = (seen[0] @ weights.up.T).abs().mean(0)
    yield "gate alone, exact", 1 / 3, on * size * weights.norms
    after, before = low_rank(weights, seen[0])
    for r in RANKS:
        cost = r * (hidden + 2 * neurons) / layer
        yield f"rank {r}", cost, scores_by(after[:, :r], before[:r], weights.norms, asked[0])
    packed = Packed.of(after[:, :128].contiguous(), before[:128].contiguous())
    a, b = packed.neurons.values(0, neurons), packed.features.values(0, 128)[:, 0]
    a = a.transpose(0, 1).reshape(2 * neurons, -1)
    yield (
        "rank 128 at INT4",
        128 * (hidden + 2 * neurons) / layer,
        scores_by(a, b, weights.norms, asked[0]),
    )
    for r in (64, 128):
        fitted = regressed(quadratic(before[:r], seen[0]), known)
        yield (
            f"score itself from {r} features and their squares",
            r * (hidden + 2 * neurons) / layer, quadratic(before[:r], asked[0]) @ fitted,
        )  # fmt: skip
    after, before = low_rank(weights, seen[0], seen[1])
    for r in (128, 256):
        cost = r * (hidden + 2 * neurons) / layer
        yield (
            f"rank {r} from the layer before", cost,
            scores_by(after[:, :r], before[:r], weights.norms, asked[1]),
        )  # fmt: skip


def scores_of(weights: Weights, x: Tensor) -> Tensor:
    return (F.silu(x @ weights.gate.T) * (x @ weights.up.T)).abs() * weights.norms


def judge(weights: Weights, x: Tensor, guess: Tensor) -> list[float]:
    """Per share: recall, energy kept, and relative error of the FFN's output."""
    activations = F.silu(x @ weights.gate.T) * (x @ weights.up.T)
    scores, whole = activations.abs() * weights.norms, activations @ weights.down
    found = []
    for share in SHARES:
        count = scores.shape[1] * share // 100
        mine = torch.zeros_like(scores).scatter_(1, guess.topk(count, 1).indices, 1)
        true = torch.zeros_like(scores).scatter_(1, scores.topk(count, 1).indices, 1)
        lost = (activations * (1 - mine)) @ weights.down
        energy = scores.square()
        found += [
            float((mine * true).sum() / true.sum()),
            float(((energy * mine).sum(1) / energy.sum(1)).mean()),
            float((lost.norm(dim=1) / whole.norm(dim=1)).mean()),
        ]
    return found
