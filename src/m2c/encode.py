"""From a matrix, or the neurons of a layer, to the records of its three planes.

Works through the rows in small pieces, so that memory stays bounded and pieces fit the processor's
cache. Knows nothing about which matrices a model has.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from m2c.bundle.exact import Frames, encode_frames, round_to, widen
from m2c.bundle.planes import RecordLayout, quantize
from m2c.bundle.shard import PLANES, ShardWriter, shard_writer
from m2c.errors import BadInput
from m2c.kernels.workers import Workers

PIECE_WEIGHTS: Final = 1 << 17
_PIECES_AT_ONCE: Final = 4  # per thread
_FRAME_WEIGHTS: Final = 1 << 14  # smaller frames pay for their own entropy table
_TORCH_TYPES: Final = {"bf16": torch.bfloat16, "f16": torch.float16}

U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Matrix:
    """What becomes one section. `read(start, stop)`: rows in their stored type, [n, weights]."""

    name: str
    layout: RecordLayout
    records: int
    read: Callable[[int, int], Tensor]
    importance: npt.NDArray[np.float32] | None = None  # [vectors, length], mean square of inputs

    @property
    def weights(self) -> int:
        """Weights of one record."""
        return self.layout.vectors * self.layout.length

    @property
    def frame_records(self) -> int:
        """Neurons are fetched one by one, so each is a frame; rows of a matrix share frames."""
        if self.layout.vectors > 1:
            return 1
        return min(
            256, 1 << max(0, (_FRAME_WEIGHTS // self.weights - 1).bit_length()), self.records
        )


@dataclass(frozen=True)
class Encoded:
    int4: U8
    int8: U8
    frames: Frames


def write_planes(
    paths: dict[str, Path], recipe: str, matrices: Iterable[Matrix], *, exact_type: str,
    workers: Workers, progress: Callable[[int], None],
) -> None:  # fmt: skip
    """Write the three shards at `paths` (plane to file). `progress` is told weights done."""
    with ExitStack() as stack:
        writers = {
            plane: stack.enter_context(shard_writer(paths[plane], plane, recipe))
            for plane in PLANES
        }
        for matrix in matrices:
            _write_section(matrix, writers, exact_type, workers, progress)


def encode_piece(rows: Tensor, matrix: Matrix, exact_type: str) -> Encoded:
    """All planes of `rows` [n, weights]; n a multiple of frame_records, or the last rows.

    Raises BadInput when a weight is beyond the range of `exact_type`.
    """
    if rows.dtype == _TORCH_TYPES[exact_type]:
        bits = rows.contiguous().view(torch.int16).numpy().view(np.uint16)
    else:
        bits = round_to(np.ascontiguousarray(rows.float().numpy()), exact_type)
    values = widen(np.ascontiguousarray(bits), exact_type)
    if not np.isfinite(values).all():
        raise BadInput(
            f"{matrix.name}: a weight does not fit in {exact_type}", "use --exact-type bf16"
        )
    shape = (len(rows), matrix.layout.vectors, matrix.layout.length)
    int4, int8, approximate = quantize(values.reshape(shape), matrix.importance)
    base = round_to(approximate, exact_type).reshape(bits.shape)
    return Encoded(int4, int8, encode_frames(bits, base, matrix.frame_records))


def _write_section(
    matrix: Matrix, writers: dict[str, ShardWriter], exact_type: str, workers: Workers,
    progress: Callable[[int], None],
) -> None:  # fmt: skip
    per_frame = matrix.frame_records
    piece = max(1, PIECE_WEIGHTS // matrix.weights // per_frame) * per_frame
    window = piece * _PIECES_AT_ONCE * workers.threads
    for start in range(0, matrix.records, window):
        rows = matrix.read(start, min(start + window, matrix.records))
        count = -(-len(rows) // piece)

        def work(i: int, rows: Tensor = rows) -> Encoded:
            return encode_piece(rows[i * piece : (i + 1) * piece], matrix, exact_type)

        for encoded in workers.map(work, count):
            writers["int4"].write(encoded.int4)
            writers["int8"].write(encoded.int8)
            writers["fp16"].write_frames(encoded.frames)
        progress(rows.numel())
    for plane, writer in writers.items():
        frames = per_frame if plane == "fp16" else 0
        writer.end_section(matrix.name, matrix.layout, matrix.records, frames)
