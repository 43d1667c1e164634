"""From a matrix, or the neurons of a layer, to the records of its three planes.

Works through the rows in small pieces, so that memory stays bounded and pieces fit the processor's
cache: each is read and encoded by one of the workers while another thread writes those before.
Knows nothing about which matrices a model has.
"""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from m2c.bundle.exact import Frames, encode_frames, round_to, widen
from m2c.bundle.planes import GROUP, RecordLayout, group_weights, quantize
from m2c.bundle.shard import PLANES, ShardWriter, shard_writer
from m2c.errors import BadInput
from m2c.kernels.encoder import Encoder
from m2c.kernels.workers import Workers

PIECE_WEIGHTS: Final = 1 << 17
_PIECES_AT_ONCE: Final = 8  # per thread
_FRAME_WEIGHTS: Final = 1 << 14  # smaller frames pay for their entries in the index
_TORCH_TYPES: Final = {"bf16": torch.bfloat16, "f16": torch.float16}

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]

I8 = npt.NDArray[np.int8]


@dataclass(frozen=True)
class Piece:
    """Records in their stored type [n, weights], and the INT4 codes that were chosen for them, laid
    out like them; without any, the nearest are taken."""

    rows: Tensor
    codes: I8 | None = None


Read = Callable[[int, int], Piece]


@dataclass(frozen=True)
class Matrix:
    """What becomes one section, or with those of the same name after it a part of one.

    open: makes ready to read, with the workers' help; returns what reads records [start, stop).
    Both may be called in any thread. check: raises BadInput when such rows hold what is no number.
    """

    name: str
    layout: RecordLayout
    records: int
    open: Callable[[Workers], Read]
    check: Callable[[Tensor], None]
    importance: F32 | None = None  # [vectors, length], mean square of inputs

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

    @cached_property
    def group_weights(self) -> F32:
        """What the scale search weighs errors with: [GROUP, groups of a record]."""
        found = group_weights(self.importance, self.layout, 1)
        shape = (GROUP, self.layout.vectors * self.layout.groups)
        return np.ones(shape, np.float32) if found is None else found


Opened = Iterable[tuple[Matrix, Read]]


@dataclass(frozen=True)
class Encoded:
    int4: U8
    int8: U8
    frames: Frames


@dataclass
class Spent:
    """Seconds by stage, added up over the threads that were busy with it."""

    read: float = 0.0
    encode: float = 0.0
    write: float = 0.0


class Aside:
    """A thread that works while the caller goes on: one thing after another, as they were given."""

    def __init__(self) -> None:
        self.busy = 0.0  # seconds
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="m2c-pack")
        self._given: Future[Any] | None = None

    def give(self, work: Callable[[], Any]) -> Future[Any]:
        """Returns once all that was given before is done; raises what that raised, but `work` is
        done all the same, so that whatever it has to clean up is."""
        before, given = self._given, self._pool.submit(self._timed, work)
        self._given = given
        if before is not None:
            before.result()
        return given

    def wait(self) -> None:
        """Until all is done. Raises what the work raised."""
        if self._given is not None:
            self._given.result()

    def __enter__(self) -> "Aside":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=True)
        if kind is None:
            self.wait()

    def _timed(self, work: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        try:
            return work()
        finally:
            self.busy += time.perf_counter() - begin


@dataclass(frozen=True)
class Tools:
    """What all sections of a bundle are encoded with."""

    exact_type: str  # "bf16" or "f16"
    workers: Workers
    encoder: Encoder | None  # None: the numpy reference
    progress: Callable[[int], None]  # told weights done
    spent: Spent  # the time that sections take is added to it


def write_planes(
    paths: dict[str, Path], recipe: str, opened: Opened, tools: Tools
) -> Callable[[], None]:
    """Write the three shards at `paths` (plane to file); they appear once the result is called.

    That makes them durable, which takes time and may run in another thread.
    """
    with ExitStack() as stack:
        writers = {
            plane: stack.enter_context(shard_writer(paths[plane], plane, recipe))
            for plane in PLANES
        }
        with Aside() as aside:
            for _, parts in groupby(opened, key=lambda part: part[0].name):
                records = 0
                for matrix, read in parts:
                    _write_records(matrix, read, writers, tools, aside)
                    records += matrix.records
                aside.give(partial(_end_section, writers, matrix, records))
        tools.spent.write += aside.busy
        return stack.pop_all().close


def bits_of(rows: Tensor, exact_type: str) -> U16:
    """The 16-bit weights that rows are stored as, of the same shape."""
    if rows.dtype == _TORCH_TYPES[exact_type]:
        return rows.contiguous().view(torch.int16).numpy().view(np.uint16)
    return round_to(np.ascontiguousarray(rows.float().numpy()), exact_type)


def encode_piece(
    piece: Piece, matrix: Matrix, exact_type: str, *, encoder: Encoder | None
) -> Encoded:
    """All planes of some records: a multiple of frame_records, or the last ones.

    encoder: None for the numpy reference. Raises BadInput when a weight is no number, or beyond the
    range of `exact_type`.
    """
    bits = bits_of(piece.rows, exact_type)
    if encoder is None:
        encoded = _encode_slowly(bits, piece.codes, matrix, exact_type)
    else:
        encoded = _encode_natively(bits, piece.codes, matrix, exact_type, encoder)
    if encoded is None:
        matrix.check(piece.rows)
        raise BadInput(
            f"{matrix.name}: a weight does not fit in {exact_type}", "use --exact-type bf16"
        )
    return encoded


def _encode_slowly(bits: U16, codes: I8 | None, matrix: Matrix, exact_type: str) -> Encoded | None:
    """The reference; None if a weight is no number."""
    values = widen(np.ascontiguousarray(bits), exact_type)
    if not np.isfinite(values).all():
        return None
    shape = (len(bits), matrix.layout.vectors, matrix.layout.length)
    chosen = None if codes is None else codes.reshape(shape)
    int4, int8, _ = quantize(values.reshape(shape), matrix.importance, chosen)
    frames = encode_frames(
        bits, int4, int8, matrix.layout, exact_type=exact_type, frame_records=matrix.frame_records
    )
    return Encoded(int4, int8, frames)


def _encode_natively(
    bits: U16, codes: I8 | None, matrix: Matrix, exact_type: str, encoder: Encoder
) -> Encoded | None:
    planes = encoder.encode(
        bits, matrix.group_weights, matrix.layout, exact_type=exact_type,
        frame_records=matrix.frame_records, codes=codes,
    )  # fmt: skip
    return None if planes is None else Encoded(*planes)


def _write_records(
    matrix: Matrix, read: Read, writers: dict[str, ShardWriter], tools: Tools, aside: Aside
) -> None:
    per_frame, threads = matrix.frame_records, tools.workers.threads
    piece = max(1, PIECE_WEIGHTS // matrix.weights // per_frame) * per_frame
    pieces, window = -(-matrix.records // piece), _PIECES_AT_ONCE * threads

    def work(i: int) -> tuple[Encoded, float, float]:
        begin = time.perf_counter()
        records = read(i * piece, min((i + 1) * piece, matrix.records))
        middle = time.perf_counter()
        encoded = encode_piece(records, matrix, tools.exact_type, encoder=tools.encoder)
        return encoded, middle - begin, time.perf_counter() - middle

    for first in range(0, pieces, window):
        last = min(first + window, pieces)
        done = tools.workers.map(lambda i, first=first: work(first + i), last - first)  # type: ignore[misc]
        aside.give(partial(_write, writers, [encoded for encoded, _, _ in done]))
        tools.spent.read += sum(seconds for _, seconds, _ in done)
        tools.spent.encode += sum(seconds for _, _, seconds in done)
        tools.progress((min(last * piece, matrix.records) - first * piece) * matrix.weights)


def _write(writers: dict[str, ShardWriter], pieces: list[Encoded]) -> None:
    for encoded in pieces:
        writers["int4"].write(encoded.int4)
        writers["int8"].write(encoded.int8)
        writers["fp16"].write_frames(encoded.frames)


def _end_section(writers: dict[str, ShardWriter], matrix: Matrix, records: int) -> None:
    for plane, writer in writers.items():
        frames = matrix.frame_records if plane == "fp16" else 0
        writer.end_section(matrix.name, matrix.layout, records, frames)
