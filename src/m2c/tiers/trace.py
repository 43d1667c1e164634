"""Recorded active sets of a decode: which neurons each (token, layer, plane) needed.

Knows nothing about how the sets were chosen, about text or token ids (a trace reveals neither), nor
about caches: `m2c.replay` runs policies over what is read here. Decode only, one token at a time.

File: magic, u32 version, u32 size of the facts, facts (JSON); then blocks; then an end mark.
A block is u32 tokens (> 0), u32 nbytes, one zstd frame with a checksum. It holds whole tokens; a
token is num_layers * num_planes bitmaps of ceil(num_neurons / 8) bytes, layer by layer and plane by
plane; neuron i is bit i % 8 of byte i // 8. The end mark is u32 0, u32 tokens in the file.
Integers are little endian. Bitmaps because random 20 % sets of 11,008 neurons then take 1,011 bytes
(the entropy is 993); differences between tokens pay only above 50 % overlap.
"""

import json
import os
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
import zstandard
from numpy.typing import ArrayLike, NDArray

from m2c.bundle.files import disk_errors
from m2c.bundle.strict import parse_object
from m2c.errors import BadInput
from m2c.tiers.cache import checked_ids
from m2c.tiers.policies import Ids

MAGIC = b"m2ctrace"
VERSION = 1
_PAIR = struct.Struct("<II")
_PLANE_NAME = re.compile(r"[a-z0-9]{1,32}")

MAX_LAYERS = 1 << 12
MAX_NEURONS = 1 << 24
MAX_PLANES = 8
MAX_FACTS_NBYTES = 1 << 12
MAX_BLOCK_NBYTES = 1 << 24  # decoded; a token must fit in one block
MAX_TRACE_NBYTES = 4 << 30  # decoded and held in memory by read_trace
# and no more than this for each byte of the file: sets that differ compress four times, empty ones
# ten thousand times
_MAX_GROWTH = 64
_SMALL_NBYTES = 32 << 20  # of which nobody asks
_FLUSH_NBYTES = 1 << 20


@dataclass(frozen=True)
class Trace:
    """A trace in memory. `bitmaps` is [tokens, layers, planes, ceil(num_neurons / 8)] uint8."""

    num_layers: int
    num_neurons: int
    planes: tuple[str, ...]
    bitmaps: NDArray[np.uint8]

    @property
    def num_tokens(self) -> int:
        return len(self.bitmaps)

    def ids(self, token: int, layer: int, plane: str) -> Ids:
        """The active set: int32, ascending. Raises ValueError for a plane the trace lacks."""
        row = self.bitmaps[token, layer, self.planes.index(plane)]
        bits = np.unpackbits(row, count=self.num_neurons, bitorder="little")
        return np.flatnonzero(bits).astype(np.int32)


class TraceWriter:
    """Writes a trace as the tokens come; use it as a context manager.

    Leaving the context, also by an exception, ends the file after the last whole token. A process
    that is killed leaves a file without its end mark, which `read_trace` refuses.
    Raises ValueError for shapes beyond the limits above; disk errors as `disk_errors` does.
    """

    def __init__(
        self, path: str | Path, *, num_layers: int, num_neurons: int, planes: Sequence[str]
    ) -> None:
        complaint = _shape_complaint(num_layers, num_neurons, list(planes))
        if complaint:
            raise ValueError(complaint)
        self.path = Path(path)
        self.num_layers = num_layers
        self.num_neurons = num_neurons
        self.planes = tuple(planes)
        token_shape = (num_layers, len(self.planes), _row_nbytes(num_neurons))
        tokens_per_block = max(1, _FLUSH_NBYTES // int(np.prod(token_shape)))
        self._block = np.zeros((tokens_per_block, *token_shape), dtype=np.uint8)
        self._compressor = zstandard.ZstdCompressor(level=1, write_checksum=True)
        self._num_pending = 0  # whole tokens in the block
        self._num_written = 0  # whole tokens in the file
        self._next = 0  # which (layer, plane) of the current token comes next
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        with disk_errors(self.path):
            self._file = self.path.open("wb")
            facts = {
                "num_layers": self.num_layers,
                "num_neurons": self.num_neurons,
                "planes": list(self.planes),
            }
            text = json.dumps(facts, separators=(",", ":")).encode()
            self._file.write(MAGIC + _PAIR.pack(VERSION, len(text)) + text)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with disk_errors(self.path), self._opened() as file:
            self._file = None
            self._write_block(file)
            file.write(_PAIR.pack(0, self._num_written))

    def write(self, layer: int, plane: str, ids: ArrayLike) -> None:
        """Record one active set (strictly increasing ids, possibly none).

        Calls run through the planes of layer 0, then of layer 1, ..., then the next token; raises
        ValueError when one is left out or repeated.
        """
        file = self._opened()
        due_layer, due_plane = divmod(self._next, len(self.planes))
        if (layer, plane) != (due_layer, self.planes[due_plane]):
            raise ValueError(
                f"trace: got layer {layer} plane {plane!r} where layer {due_layer} "
                f"plane {self.planes[due_plane]!r} comes next"
            )
        active = np.zeros(self.num_neurons, dtype=np.bool_)
        active[checked_ids(ids, self.num_neurons)] = True
        bitmap = np.packbits(active, bitorder="little")
        self._block[self._num_pending, due_layer, due_plane] = bitmap
        self._next += 1
        if self._next == self.num_layers * len(self.planes):
            self._next = 0
            self._num_pending += 1
            if self._num_pending == len(self._block):
                with disk_errors(self.path):
                    self._write_block(file)

    def _opened(self) -> BinaryIO:
        if self._file is None:
            raise ValueError("trace: the writer is not open, use it in a with statement")
        return self._file

    def _write_block(self, file: BinaryIO) -> None:
        if self._num_pending:
            frame = self._compressor.compress(self._block[: self._num_pending].tobytes())
            file.write(_PAIR.pack(self._num_pending, len(frame)) + frame)
            self._num_written += self._num_pending
            self._num_pending = 0
        file.flush()


def read_trace(path: str | Path, *, max_tokens: int | None = None) -> Trace:
    """The trace in `path`, or its first `max_tokens` tokens.

    Peak memory: the decoded bitmaps (at most MAX_TRACE_NBYTES) and one block. Raises BadInput for
    a file that is missing, truncated, damaged, too large or not a trace, StorageError when the
    disk cannot be read.
    """
    path = Path(path)
    with disk_errors(path), path.open("rb") as file:
        return _read(file, path, max_tokens)


def _read(file: BinaryIO, path: Path, max_tokens: int | None) -> Trace:
    num_layers, num_neurons, planes = _read_facts(file, path)
    token_shape = (num_layers, len(planes), _row_nbytes(num_neurons))
    token_nbytes = int(np.prod(token_shape))
    first_block = file.tell()
    num_tokens = sum(tokens for tokens, _ in _blocks(file, path, token_nbytes))
    if max_tokens is not None:
        num_tokens = min(num_tokens, max(0, max_tokens))
    nbytes = num_tokens * token_nbytes
    if nbytes > max(_MAX_GROWTH * os.fstat(file.fileno()).st_size, _SMALL_NBYTES):
        raise _bad(path, f"it is {num_tokens} tokens in which next to nothing was active")
    if nbytes > MAX_TRACE_NBYTES:
        most = MAX_TRACE_NBYTES // token_nbytes
        raise BadInput(
            f"{path} holds {num_tokens} tokens, {most} fit in memory", "record fewer tokens"
        )
    bitmaps = np.empty((num_tokens, *token_shape), dtype=np.uint8)
    start = 0
    file.seek(first_block)
    for tokens, nbytes in _blocks(file, path, token_nbytes):
        if start >= num_tokens:
            break
        raw = _decompress(_exactly(file, nbytes, path), tokens * token_nbytes, path)
        take = min(tokens, num_tokens - start)
        bitmaps[start : start + take] = np.frombuffer(raw, np.uint8).reshape(tokens, *token_shape)[
            :take
        ]
        start += take
    if num_neurons % 8 and (bitmaps[..., -1] >> (num_neurons % 8)).any():
        raise _bad(path, f"it names neurons beyond {num_neurons - 1}")
    return Trace(num_layers, num_neurons, planes, bitmaps)


def _read_facts(file: BinaryIO, path: Path) -> tuple[int, int, tuple[str, ...]]:
    if file.read(len(MAGIC)) != MAGIC:
        raise _bad(path, "it does not start like a trace")
    version, nbytes = _PAIR.unpack(_exactly(file, _PAIR.size, path))
    if version != VERSION:
        raise BadInput(
            f"{path} is a trace of version {version}, this m2c reads {VERSION}", "record it again"
        )
    if nbytes > MAX_FACTS_NBYTES:
        raise _bad(path, f"its facts claim {nbytes} bytes")
    text = _exactly(file, nbytes, path)
    facts = parse_object(text, path)
    if facts.keys() != {"num_layers", "num_neurons", "planes"}:
        raise _bad(path, "its facts have missing or unknown names")
    complaint = _shape_complaint(facts["num_layers"], facts["num_neurons"], facts["planes"])
    if complaint:
        raise _bad(path, complaint)
    return facts["num_layers"], facts["num_neurons"], tuple(facts["planes"])


def _blocks(file: BinaryIO, path: Path, token_nbytes: int) -> Iterator[tuple[int, int]]:
    """(tokens, nbytes) of each block, the file standing at its frame; checks the end mark."""
    file_nbytes = os.fstat(file.fileno()).st_size
    total = 0
    while True:
        tokens, nbytes = _PAIR.unpack(_exactly(file, _PAIR.size, path))
        offset = file.tell()
        if tokens == 0:
            if nbytes != total or offset != file_nbytes:
                raise _bad(path, "its end mark does not match its blocks")
            return
        if tokens * token_nbytes > MAX_BLOCK_NBYTES:
            raise _bad(path, f"a block claims {tokens} tokens")
        if nbytes > file_nbytes - offset:
            raise _truncated(path)
        yield tokens, nbytes
        total += tokens
        file.seek(offset + nbytes)


def _decompress(frame: bytes, nbytes: int, path: Path) -> bytes:
    try:
        # The size in the frame sizes the output buffer, so it is compared first.
        if zstandard.frame_content_size(frame) != nbytes:
            raise _bad(path, "a block has the wrong size")
        return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise _bad(path, "a block is damaged") from error


def _exactly(file: BinaryIO, nbytes: int, path: Path) -> bytes:
    data = file.read(nbytes)
    if len(data) != nbytes:
        raise _truncated(path)
    return data


def _row_nbytes(num_neurons: int) -> int:
    return (num_neurons + 7) // 8


def _shape_complaint(num_layers: object, num_neurons: object, planes: object) -> str:
    """What is wrong with the facts of a trace, or nothing. Values may come from a file."""
    if type(num_layers) is not int or not 1 <= num_layers <= MAX_LAYERS:
        return f"num_layers is not between 1 and {MAX_LAYERS}"
    if type(num_neurons) is not int or not 1 <= num_neurons <= MAX_NEURONS:
        return f"num_neurons is not between 1 and {MAX_NEURONS}"
    if not isinstance(planes, list) or not 1 <= len(planes) <= MAX_PLANES:
        return f"planes are not a list of 1 to {MAX_PLANES} names"
    if not all(isinstance(name, str) and _PLANE_NAME.fullmatch(name) for name in planes):
        return "a plane's name is not 1 to 32 lower-case letters and digits"
    if len(set(planes)) != len(planes):
        return "two planes have the same name"
    if num_layers * len(planes) * _row_nbytes(num_neurons) > MAX_BLOCK_NBYTES:
        return f"one token takes more than {MAX_BLOCK_NBYTES} bytes"
    return ""


def _bad(path: Path, complaint: str) -> BadInput:
    return BadInput(f"{path} is not a usable trace: {complaint}", "record it again")


def _truncated(path: Path) -> BadInput:
    return BadInput(f"the trace {path} is truncated", "record it again")
