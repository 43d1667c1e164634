"""Blocks on their way into memory: many reads in flight, so that the disk is never idle.

On a GPU a block is in DRAM only until it was copied: no more of them are read ahead than `_AHEAD`.
Knows nothing about what a block is for.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from m2c.kernels.rows import EXACT_DTYPES, ExactRows
from m2c.tiers.blocks import Block
from m2c.tiers.fetch import Decode, rows_at_once
from m2c.tiers.memory import aligned_buffer
from m2c.tiers.ssd import Pending, SsdReader

U8 = npt.NDArray[np.uint8]
_AHEAD: Final = 256 << 20  # bytes read ahead into DRAM for a GPU
_PIECE_WEIGHTS: Final = 1 << 22  # about 6.5 MB as stored, read while as many are decoded


class Loading:
    """`put` is called with each block's bytes, in the order they were started."""

    def __init__(self, device: torch.device) -> None:
        self._bounded = device.type != "cpu"
        self._started: deque[tuple[U8, Pending, Callable[[U8], None]]] = deque()
        self._ahead = 0

    def start(self, reader: SsdReader, block: Block, put: Callable[[U8], None]) -> None:
        """Raises what an earlier read raised."""
        raw = aligned_buffer(block.streamed_nbytes)
        while self._bounded and self._started and self._ahead + len(raw) > _AHEAD:
            self._finish_one()
        self._started.append((raw, block.read(reader, raw), put))
        self._ahead += len(raw)

    def finish(self) -> None:
        while self._started:
            self._finish_one()

    def _finish_one(self) -> None:
        raw, pending, put = self._started.popleft()
        pending.wait()
        put(raw)
        self._ahead -= len(raw)


def load_exact(
    reader: SsdReader, block: Block, name: str, decode: Decode, device: torch.device,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> ExactRows:  # fmt: skip
    """Section `name` of an exact block, decoded to 16 bits on `device`.

    A piece at a time, so that little memory is needed beside the rows themselves.
    """
    section = block.shards[-1].header.section(name)  # the exact plane's: it knows its frames
    layout, count = section.layout, block.count(section)
    out = _room(count, layout.vectors * layout.length, EXACT_DTYPES[block.exact_type], device)
    pieces = _pieces(block, name, rows_at_once(layout, section.frame_records, _PIECE_WEIGHTS))
    step = rows_at_once(layout, section.frame_records)
    buffers = [aligned_buffer(max(piece.streamed_nbytes for piece in pieces)) for _ in range(2)]
    pending = pieces[0].read(reader, buffers[0])
    try:
        for i, piece in enumerate(pieces):
            pending.wait()
            if i + 1 < len(pieces):
                pending = pieces[i + 1].read(reader, buffers[(i + 1) % 2])
            rows = piece.rows(buffers[i % 2])[name]
            for start in range(0, len(rows), step):
                stop, at = min(start + step, len(rows)), piece.start - block.start
                out[at + start : at + stop] = decode(rows.part(start, stop))
            progress(piece.streamed_nbytes)
    finally:
        pending.cancel()
    return ExactRows(layout, out)


def _pieces(block: Block, name: str, records: int) -> list[Block]:
    stop = block.start + block.count(block.shards[0].header.section(name))
    return [
        replace(block, only=name, start=start, end=min(start + records, stop), held=0)
        for start in range(block.start, stop, records)
    ]


def _room(count: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[count, width], in huge pages on the host."""
    if device.type != "cpu":
        return torch.empty((count, width), dtype=dtype, device=device)
    nbytes = count * width * dtype.itemsize
    return torch.from_numpy(aligned_buffer(nbytes))[:nbytes].view(dtype).view(count, width)
