"""What a bundle's shards are made of: the matrices of a checkpoint, and the neurons of its layers.

Knows nothing about planes or files.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from m2c.bundle.bundle import shard_name
from m2c.bundle.importance import Importance, LayerImportance
from m2c.bundle.planes import RecordLayout
from m2c.bundle.shard import PLANES
from m2c.bundle.steering import Factors, factors_of
from m2c.encode import F32, Matrix, Opened, Piece, Read
from m2c.kernels.workers import Workers
from m2c.model.attention import MATRICES
from m2c.model.checkpoint import Checkpoint
from m2c.model.experts import SHARED
from m2c.model.tensors import experts_of, ffn_names, shared_names
from m2c.model.weights import matrix_name, require_finite
from m2c.steer import Steering
from m2c.tiers.store import EMBED, FFN

_TILE = 256  # rows and columns that a transposition moves at a time: they stay in the cache


@dataclass(frozen=True)
class Group:
    """Matrices that share three shards: `files`, plane to name. Of those with one name, the parts
    of a section, one is in memory at a time."""

    files: dict[str, str]
    matrices: list[Matrix]

    @property
    def weights(self) -> int:
        return sum(matrix.records * matrix.weights for matrix in self.matrices)

    def open(self, workers: Workers) -> Opened:
        """Parts of a section are opened as the caller comes to them."""
        if len({matrix.name for matrix in self.matrices}) < len(self.matrices):
            return ((matrix, matrix.open(workers)) for matrix in self.matrices)
        return [(matrix, matrix.open(workers)) for matrix in self.matrices]


@dataclass(frozen=True)
class Inputs:
    """What is known of what a matrix is multiplied with."""

    mean_square: F32  # [inputs]
    directions: F32  # [inputs, rank]

    @cached_property
    def factors(self) -> Factors | None:
        """None where no directions are known: then codes are the nearest."""
        if not self.directions.shape[1]:
            return None
        return factors_of(self.mean_square, self.directions)


def shard_groups(
    checkpoint: Checkpoint, importance: Importance, steering: Steering
) -> Iterator[Group]:
    """All groups, in the order they are written."""
    config = checkpoint.config
    head = Inputs(importance.head_input, importance.head_directions)
    # a tied embedding is the head too: what its rows meet there is what their errors cost
    embed = embedding(checkpoint, head if config.tie_word_embeddings else None, steering)
    yield _group("dense", "embed", [embed])
    for layer in range(config.num_hidden_layers):
        known = importance.layers[layer]
        yield _group("dense", layer, _attention_matrices(checkpoint, known, layer, steering))
        neurons = [
            _neurons(checkpoint, known, layer, steering, part) for part in experts_of(config)
        ]
        yield _group("neurons", layer, neurons)
    if not config.tie_word_embeddings:
        matrix = _matrix(checkpoint, "lm_head.weight", "lm_head", head, steering)
        yield _group("dense", "head", [matrix])


def _group(kind: str, name: str | int, matrices: list[Matrix]) -> Group:
    return Group({plane: shard_name(kind, name, plane) for plane in PLANES}, matrices)


def embedding(
    checkpoint: Checkpoint, inputs: Inputs | None = None, steering: Steering | None = None
) -> Matrix:
    return _matrix(checkpoint, "model.embed_tokens.weight", EMBED, inputs, steering)


def _attention_matrices(
    checkpoint: Checkpoint, known: LayerImportance, layer: int, steering: Steering
) -> list[Matrix]:
    same = Inputs(known.attn_input, known.attn_directions)
    inputs = dict.fromkeys(MATRICES, same) | {"o_proj": Inputs(known.o_input, known.o_directions)}
    matrices = [
        _matrix(checkpoint, matrix_name(layer, short), short, inputs[short], steering, held=True)
        for short in MATRICES
    ]
    if checkpoint.config.shared_expert_intermediate_size:
        matrices.append(_shared_neurons(checkpoint, known, layer, steering))
    return matrices


def _matrix(
    checkpoint: Checkpoint, name: str, section: str, inputs: Inputs | None = None,
    steering: Steering | None = None, *, held: bool = False,
) -> Matrix:  # fmt: skip
    """held: all of it is read when it is opened; otherwise piece by piece, as it may be large."""
    rows, columns = checkpoint.shape(name)

    def opened(workers: Workers) -> Read:
        factors = None if inputs is None else inputs.factors
        whole = checkpoint.read(name) if held else None

        def read(start: int, stop: int) -> Piece:
            some = checkpoint.read(name, start, stop) if whole is None else whole[start:stop]
            if inputs is None or steering is None or factors is None:
                return Piece(some)
            return Piece(some, steering.rows(some, inputs.mean_square, factors))

        return read

    weight = None if inputs is None else inputs.mean_square[None, :]
    layout = RecordLayout(1, columns)
    return Matrix(section, layout, rows, opened, _checks(checkpoint, [name]), weight)


def _neurons(
    checkpoint: Checkpoint, known: LayerImportance, layer: int, steering: Steering,
    expert: int | None,
) -> Matrix:  # fmt: skip
    """A layer's neurons, or those of an expert, in importance order."""
    size = checkpoint.config.intermediate_size
    first = size * (expert or 0)
    stored = known.order[first : first + size]  # of the layer's neurons
    names = ffn_names(layer, expert, gated=checkpoint.config.gated)
    order = stored.astype(np.int64) - first
    return _ffn(
        checkpoint, FFN, names, order, known, steering, partial(_down_factors, known, stored)
    )


def _shared_neurons(
    checkpoint: Checkpoint, known: LayerImportance, layer: int, steering: Steering
) -> Matrix:
    """Those of the expert that every token uses, as in the checkpoint: none is read apart from the
    others. What their down columns meet is not known, so each of these codes is the nearest."""
    size = checkpoint.config.shared_expert_intermediate_size
    nothing = Factors(np.zeros((size, 1), np.float32), np.zeros((size, 1), np.float32))
    return _ffn(
        checkpoint, SHARED, shared_names(layer), np.arange(size), known, steering, lambda: nothing
    )


def _ffn(
    checkpoint: Checkpoint, section: str, names: tuple[str, ...], order: npt.NDArray[np.int64],
    known: LayerImportance, steering: Steering, down_factors: Callable[[], Factors],
) -> Matrix:  # fmt: skip
    """Neurons of the matrices `names` in `order`. All of these matrices are read when it is
    opened."""
    hidden, size = checkpoint.config.hidden_size, len(order)
    inputs = Inputs(known.ffn_input, known.ffn_directions)

    def opened(workers: Workers) -> Read:
        rows = workers.map(lambda i: checkpoint.read(names[i]), len(names) - 1)
        matrices = *rows, _columns(checkpoint, names[-1], workers)
        factors, down = inputs.factors, None
        if factors is not None:
            columns = matrices[-1].index_select(0, torch.from_numpy(order))
            down = steering.columns(columns, down_factors(), workers)

        def read(start: int, stop: int) -> Piece:
            rows = _gathered(matrices, torch.from_numpy(order[start:stop]))
            if factors is None or down is None:
                return Piece(rows)
            parts = [
                steering.rows(part, inputs.mean_square, factors)
                for part in rows.split(hidden, dim=1)[:-1]
            ]
            codes = [part for part in parts if part is not None]
            chosen = len(codes) == len(parts)
            return Piece(rows, np.hstack([*codes, down[start:stop]]) if chosen else None)

        return read

    # the down column meets the neuron's own activation: one number for the whole vector
    flat = np.ones_like(known.ffn_input)
    weight = np.stack((*[known.ffn_input] * (len(names) - 1), flat))
    layout = RecordLayout(len(names), hidden)
    checks = _checks(checkpoint, names)
    return Matrix(section, layout, size, opened, checks, weight)


def _down_factors(known: LayerImportance, order: npt.NDArray[np.int32]) -> Factors:
    """Of the activations of neurons `order`, the most important first: their errors are mended by
    the many that follow."""
    norms = np.maximum(known.down_norm, np.float32(1e-20))
    mean_square = np.square(np.sqrt(known.energy) / norms)[order].astype(np.float32)
    return factors_of(mean_square, known.down_directions[order])


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
