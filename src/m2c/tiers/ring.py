"""The ring: DRAM that streamed blocks pass through, read ahead in the order of use.

Every pass over the model uses the blocks in the same order, so the next read is always known. Bytes
are given out as in a circular buffer: a block needs its own size, not that of the largest.
Knows nothing about what a block is beyond its size and how it is read.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from m2c.bundle.shard import BLOCK
from m2c.tiers.blocks import Block
from m2c.tiers.memory import aligned_buffer
from m2c.tiers.ssd import Pending, SsdReader

_PROBES: Final = 4  # times that staging is filled to tell the disk's speed

U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class _Held:
    """A block in the ring, or on its way there."""

    start: int
    stop: int
    pending: Pending


class BlockRing:
    """nbytes: at least the largest of `blocks`, which are in order of use."""

    def __init__(self, reader: SsdReader, blocks: Sequence[Block], nbytes: int) -> None:
        self._reader = reader
        self._blocks = blocks
        self._buffer = aligned_buffer(nbytes)
        self._keeps_all = sum(block.streamed_nbytes for block in blocks) <= nbytes
        self._held: deque[_Held] = deque()
        self._started = 0  # of this pass and, read ahead, of those that follow
        self._used = 0
        self._acquired = False
        self._read_ahead()

    @property
    def buffer(self) -> U8:
        """All bytes of the ring; they stay where they are."""
        return self._buffer

    def acquire(self, position: int) -> U8:
        """The payload of block `position` once it has arrived; valid until `release`.

        Blocks must be acquired in order, over and over; a pass that was broken off is followed by
        one from the start.
        """
        if self._acquired or self._used % len(self._blocks) != position:
            self._rewind()
        assert position == self._used % len(self._blocks), f"block {position} is not the next"
        self._acquired = True
        held = self._held[position if self._keeps_all else 0]
        held.pending.wait()
        return self._buffer[held.start : held.stop]

    def release(self) -> None:
        """Give the acquired block's bytes to those that come later."""
        self._used += 1
        self._acquired = False
        if not self._keeps_all:
            self._held.popleft()
            self._read_ahead()

    def settle(self) -> None:
        """Wait for what is read ahead."""
        for held in self._held:
            held.pending.wait()

    def read_speed(self, staging: U8) -> float:
        """Bytes per second of reading blocks into page-aligned `staging`, full a few times."""
        self.settle()
        nbytes, begin = 0, time.perf_counter()
        for i in range(_PROBES):
            nbytes += self._fill(staging, i * len(self._blocks) // _PROBES)
        return nbytes / (time.perf_counter() - begin)

    def _fill(self, staging: U8, start: int) -> int:
        """Read the beginnings of blocks from `start` on, all at once; the bytes read."""
        position, parts = 0, []
        for k in range(len(self._blocks)):
            index = self._blocks[(start + k) % len(self._blocks)].shards[0]
            count = min(len(index.block_hashes), (len(staging) - position) // BLOCK)
            if not count:
                break
            parts.append(self._reader.read(index, [(0, count)], staging[position:]))
            position += min(count * BLOCK, index.header.payload_nbytes)
        Pending.all_of(parts).wait()
        return position

    def close(self) -> None:
        for held in self._held:
            held.pending.cancel()

    def _rewind(self) -> None:
        self.close()  # nothing may land in bytes that are read into again
        self._held.clear()
        self._started = self._used = 0
        self._acquired = False
        self._read_ahead()

    def _read_ahead(self) -> None:
        while not self._keeps_all or self._started < len(self._blocks):
            block = self._blocks[self._started % len(self._blocks)]
            start = self._room_for(block.streamed_nbytes)
            if start is None:
                return
            stop = start + block.streamed_nbytes
            pending = block.read(self._reader, self._buffer[start:stop])
            self._held.append(_Held(start, stop, pending))
            self._started += 1

    def _room_for(self, nbytes: int) -> int | None:
        """Where the next block may go: behind the last one, or at the start if that is free."""
        if not self._held:
            return 0
        first, last = self._held[0].start, self._held[-1].stop
        if last > first:  # in use: [first, last)
            if len(self._buffer) - last >= nbytes:
                return last
            return 0 if first >= nbytes else None
        return last if first - last >= nbytes else None
