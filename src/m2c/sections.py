"""What a bundle's shards are made of: the matrices of a checkpoint, and the neurons of its layers.

Knows nothing about planes or files.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from m2c.bundle.bundle import shard_name
from m2c.bundle.importance import Importance
from m2c.bundle.planes import RecordLayout
from m2c.bundle.shard import PLANES
from m2c.encode import F32, Matrix, Read
from m2c.kernels.workers import Workers
from m2c.model.attention import MATRICES
from m2c.model.checkpoint import Checkpoint
from m2c.model.config import ffn_names
from m2c.model.weights import matrix_name, require_finite
from m2c.tiers.store import EMBED, FFN

_TILE = 256  # rows and columns that a transposition moves at a time: they stay in the cache


@dataclass(frozen=True)
class Group:
    """Matrices that share three shards: `files`, plane to name."""

    files: dict[str, str]
    matrices: list[Matrix]

    @property
    def weights(self) -> int:
        return sum(matrix.records * matrix.weights for matrix in self.matrices)


def shard_groups(checkpoint: Checkpoint, importance: Importance) -> Iterator[Group]:
    """All groups, in the order they are written."""
    config = checkpoint.config
    yield _group("dense", "embed", [embedding(checkpoint)])
    for layer in range(config.num_hidden_layers):
        yield _group("dense", layer, _attention_matrices(checkpoint, importance, layer))
        yield _group("neurons", layer, [_neurons(checkpoint, importance, layer)])
    if not config.tie_word_embeddings:
        head = _matrix(checkpoint, "lm_head.weight", "lm_head", importance.head_input)
        yield _group("dense", "head", [head])


def _group(kind: str, name: str | int, matrices: list[Matrix]) -> Group:
    return Group({plane: shard_name(kind, name, plane) for plane in PLANES}, matrices)


def embedding(checkpoint: Checkpoint) -> Matrix:
    return _matrix(checkpoint, "model.embed_tokens.weight", EMBED, None)


def _attention_matrices(checkpoint: Checkpoint, importance: Importance, layer: int) -> list[Matrix]:
    known = importance.layers[layer]
    return [
        _matrix(
            checkpoint, matrix_name(layer, short), short,
            known.o_input if short == "o_proj" else known.attn_input, held=True,
        )
        for short in MATRICES
    ]  # fmt: skip


def _matrix(
    checkpoint: Checkpoint, name: str, section: str, importance: F32 | None, *, held: bool = False
) -> Matrix:
    """held: all of it is read when it is opened; otherwise piece by piece, as it may be large."""
    rows, columns = checkpoint.shape(name)

    def opened(workers: Workers) -> Read:
        if not held:
            return partial(checkpoint.read, name)
        matrix = checkpoint.read(name)
        return lambda start, stop: matrix[start:stop]

    weight = None if importance is None else importance[None, :]
    layout = RecordLayout(1, columns)
    return Matrix(section, layout, rows, opened, _checks(checkpoint, [name]), weight)


def _neurons(checkpoint: Checkpoint, importance: Importance, layer: int) -> Matrix:
    """A layer's neurons in importance order. All matrices of the FFN are read when it is opened."""
    known = importance.layers[layer]
    order = known.order.astype(np.int64)
    names = ffn_names(layer)

    def opened(workers: Workers) -> Read:
        gate, up = workers.map(lambda i: checkpoint.read(names[i]), 2)
        matrices = gate, up, _columns(checkpoint, names[2], workers)
        return lambda start, stop: _gathered(matrices, torch.from_numpy(order[start:stop]))

    # the down column meets the neuron's own activation: one number for the whole vector
    flat = np.ones_like(known.ffn_input)
    weight = np.stack((known.ffn_input, known.ffn_input, flat))
    layout = RecordLayout(3, checkpoint.config.hidden_size)
    checks = _checks(checkpoint, names)
    return Matrix(FFN, layout, checkpoint.config.intermediate_size, opened, checks, weight)


def _gathered(matrices: tuple[Tensor, ...], ids: Tensor) -> Tensor:
    """Rows `ids` of all matrices side by side, [n, sum of columns]."""
    return torch.cat([matrix.index_select(0, ids) for matrix in matrices], dim=1)


def _columns(checkpoint: Checkpoint, name: str, workers: Workers) -> Tensor:
    """A matrix transposed, [columns, rows], contiguous; read strip by strip, turned by tiles."""
    rows, columns = checkpoint.shape(name)
    strips = [(start, min(start + _TILE, rows)) for start in range(0, rows, _TILE)]
    first = checkpoint.read(name, *strips[0])
    out = torch.empty((columns, rows), dtype=first.dtype)

    def turn(i: int) -> None:
        strip = checkpoint.read(name, *strips[i]) if i else first
        for start in range(0, columns, _TILE):
            out[start : start + _TILE, slice(*strips[i])] = strip[:, start : start + _TILE].T

    workers.map(turn, len(strips))
    return out


def _checks(checkpoint: Checkpoint, names: list[str] | tuple[str, ...]) -> Callable[[Tensor], None]:
    """Raises BadInput for the first tensor whose part of the rows holds what is no number."""

    def check(rows: Tensor) -> None:
        for name, part in zip(names, rows.chunk(len(names), dim=1), strict=True):
            require_finite(part, checkpoint, name)

    return check
