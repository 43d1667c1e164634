"""What a bundle's shards are made of: the matrices of a checkpoint, and the neurons of its layers.

Knows nothing about planes or files.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from m2c.bundle.importance import Importance
from m2c.bundle.planes import RecordLayout
from m2c.encode import F32, Matrix, Read
from m2c.kernels.workers import Workers
from m2c.model.attention import MATRICES
from m2c.model.checkpoint import Checkpoint
from m2c.model.config import ffn_names
from m2c.model.weights import matrix_name, require_finite
from m2c.tiers.store import EMBED, FFN

_TILE = 256  # rows and columns that a transposition moves at a time: they stay in the cache


def shard_groups(
    checkpoint: Checkpoint, importance: Importance
) -> Iterator[tuple[str, int | str, list[Matrix]]]:
    """(kind, name, its matrices) of every group of shards, in the order they are written."""
    config = checkpoint.config
    yield "dense", "embed", [embedding(checkpoint)]
    for layer in range(config.num_hidden_layers):
        yield "dense", layer, _attention_matrices(checkpoint, importance, layer)
        yield "neurons", layer, [_neurons(checkpoint, importance, layer)]
    if not config.tie_word_embeddings:
        head = importance.head_input
        yield "dense", "head", [_whole_matrix(checkpoint, "lm_head.weight", "lm_head", head)]


def embedding(checkpoint: Checkpoint) -> Matrix:
    return _whole_matrix(checkpoint, "model.embed_tokens.weight", EMBED, None)


def _attention_matrices(checkpoint: Checkpoint, importance: Importance, layer: int) -> list[Matrix]:
    known = importance.layers[layer]
    return [
        _whole_matrix(
            checkpoint, matrix_name(layer, short), short,
            known.o_input if short == "o_proj" else known.attn_input,
        )
        for short in MATRICES
    ]  # fmt: skip


def _whole_matrix(
    checkpoint: Checkpoint, name: str, section: str, importance: F32 | None
) -> Matrix:
    rows, columns = checkpoint.shape(name)

    def opened(workers: Workers) -> Read:
        return lambda start, stop: checkpoint.read(name, start, stop)

    weight = None if importance is None else importance[None, :]
    layout = RecordLayout(1, columns)
    return Matrix(section, layout, rows, opened, _checks(checkpoint, [name]), weight)


def _neurons(checkpoint: Checkpoint, importance: Importance, layer: int) -> Matrix:
    """A layer's neurons in importance order. Opened, it holds the matrices of the layer's FFN."""
    known = importance.layers[layer]
    order = known.order.astype(np.int64)
    names = ffn_names(layer)

    def opened(workers: Workers) -> Read:
        gate, up, down = workers.map(lambda i: checkpoint.read(names[i]), len(names))
        matrices = gate, up, _transposed(down, workers)
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


def _transposed(matrix: Tensor, workers: Workers) -> Tensor:
    """[columns, rows], contiguous, tile by tile: torch would walk it against the grain."""
    rows, columns = matrix.shape
    out = torch.empty((columns, rows), dtype=matrix.dtype)

    def strip(i: int) -> None:
        to = slice(i * _TILE, (i + 1) * _TILE)
        for start in range(0, rows, _TILE):
            out[to, start : start + _TILE] = matrix[start : start + _TILE, to].T

    workers.map(strip, -(-columns // _TILE))
    return out


def _checks(checkpoint: Checkpoint, names: list[str] | tuple[str, ...]) -> Callable[[Tensor], None]:
    """Raises BadInput for the first tensor whose part of the rows holds what is no number."""

    def check(rows: Tensor) -> None:
        for name, part in zip(names, rows.chunk(len(names), dim=1), strict=True):
            require_finite(part, checkpoint, name)

    return check
