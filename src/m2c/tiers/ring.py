"""The ring: DRAM slots that streamed layers pass through, read ahead in the order of use.

Every pass over the model uses the layers in the same order, so the next read is always known.
Knows nothing about what a layer is made of beyond its blocks' sizes.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from m2c.tiers.blocks import Block
from m2c.tiers.memory import aligned_buffer
from m2c.tiers.ssd import Pending, SsdReader

U8 = npt.NDArray[np.uint8]
_NOTHING: Final = Pending([])


class LayerRing:
    """`slots` buffers for `layers`: (layer number, its streamed blocks), in order of use."""

    def __init__(
        self, reader: SsdReader, layers: Sequence[tuple[int, list[Block]]], slots: int, nbytes: int
    ) -> None:
        self._reader = reader
        self._layers = layers
        self._buffers = [aligned_buffer(nbytes) for _ in range(slots)]
        self._pending = [_NOTHING] * slots
        self._next = 0  # layers acquired so far, over all passes
        self._acquired = False
        for i in range(slots):
            self._start(i)

    def acquire(self, layer: int) -> list[U8]:
        """The payloads of the layer's blocks, once they have arrived; valid until `release`.

        Layers must be acquired in their order, over and over; a pass that was broken off is
        followed by one from the start.
        """
        number, blocks = self._layers[self._next % len(self._layers)]
        if self._acquired or number != layer:
            self._rewind()
            number, blocks = self._layers[0]
        assert number == layer, f"layer {layer} acquired, layer {number} is next"
        self._acquired = True
        slot = self._next % len(self._buffers)
        self._pending[slot].wait()
        payloads, position = [], 0
        for block in blocks:
            payloads.append(self._buffers[slot][position : position + block.streamed_nbytes])
            position += block.streamed_nbytes
        return payloads

    def release(self) -> None:
        """Give the acquired layer's slot to the layer that many places ahead."""
        if len(self._layers) > len(self._buffers):  # else every layer keeps its slot
            self._start(self._next + len(self._buffers))
        self._next += 1
        self._acquired = False

    def close(self) -> None:
        for pending in self._pending:
            pending.cancel()

    def _rewind(self) -> None:
        self.close()  # nothing may land in a buffer that is read into again
        self._next = 0
        for i in range(len(self._buffers)):
            self._start(i)

    def _start(self, position: int) -> None:
        _, blocks = self._layers[position % len(self._layers)]
        slot = position % len(self._buffers)
        parts, offset = [], 0
        for block in blocks:
            parts.append(block.read(self._reader, self._buffers[slot][offset:]))
            offset += block.streamed_nbytes
        self._pending[slot] = Pending.all_of(parts)
