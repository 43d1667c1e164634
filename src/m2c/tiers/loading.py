"""Blocks on their way into memory: many reads in flight, so that the disk is never idle.

On a GPU a block is in DRAM only until it was copied: no more of them are read ahead than `_AHEAD`.
Knows nothing about what a block is for.
"""

from collections import deque
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from m2c.tiers.blocks import Block
from m2c.tiers.memory import aligned_buffer
from m2c.tiers.ssd import Pending, SsdReader

U8 = npt.NDArray[np.uint8]
_AHEAD: Final = 256 << 20  # bytes read ahead into DRAM for a GPU


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
