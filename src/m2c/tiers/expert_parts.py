"""Experts as parts of their layers' records: what is read of each, and operands of one expert.

Knows nothing about which of them are in memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from torch import Tensor

from m2c.bundle.shard import BLOCK
from m2c.kernels.rows import ExactRows, PackedRows, Rows
from m2c.tiers.blocks import Block, record_offset

Ids = npt.NDArray[np.int32]
U8 = npt.NDArray[np.uint8]


def parts_of(whole: Block, parts: int) -> list[Block]:
    """The block of all of a layer's experts as one part, or as one part for every plane."""
    if parts == 1:
        return [whole]
    return [replace(whole, shards=whole.shards[: n + 1], held=n) for n in range(parts)]


def joined(
    parts: Sequence[tuple[Block, U8 | Tensor]], below: Mapping[str, PackedRows] | None
) -> Mapping[str, PackedRows]:
    """Operands of an expert's parts, the lowest first, which lie where kernels read them.

    below: of all of the layer's experts in the planes that are held besides."""
    for block, payload in parts:
        below = block.rows(payload, below)
    assert below is not None
    return below


def expert_nbytes(whole: Block, count: int) -> npt.NDArray[np.int64]:
    """Bytes that each of the `count` experts of a layer reads: [count]."""
    total = np.zeros(count, np.int64)
    for index in whole.shards[whole.held :]:
        (section,) = index.header.sections
        size = section.records // count
        if section.frames:
            nbytes = index.frame_nbytes[section.name].astype(np.int64)
            ends = np.concatenate(([0], np.cumsum(nbytes)))[::size]
        else:
            ends = np.arange(count + 1, dtype=np.int64) * record_offset(index, section, size)
        first, stop = ends[:-1] // BLOCK * BLOCK, -(-ends[1:] // BLOCK) * BLOCK
        total += np.minimum(stop, index.header.payload_nbytes) - first
    return total


class ExpertParts:
    """The experts of rows that hold all of a layer's, made once each at each precision."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._made: dict[tuple[int, int, int], tuple[Rows, Rows]] = {}

    def of(self, layer: int, whole: Rows, experts: Ids, planes: Ids) -> Iterator[Rows]:
        for expert, lowest in zip(experts.tolist(), planes.tolist(), strict=True):
            key = layer, expert, lowest
            known = self._made.get(key)
            if known is None or known[0] is not whole:
                own = cut(whole, expert, self.count)
                own = own if isinstance(own, ExactRows) else own.lowest(lowest)
                known = self._made[key] = whole, own
            yield known[1]


def cut(rows: Rows, expert: int, count: int) -> Rows:
    """One expert's rows of all `count` experts' rows, which are not copied."""
    size = len(rows) // count
    some = slice(expert * size, (expert + 1) * size)
    if isinstance(rows, ExactRows):
        return ExactRows(rows.layout, rows.weights[some])
    assert rows.frames is None or rows.frames.frame_records == 1
    frames = rows.frames
    if frames is not None:
        ends = np.concatenate(([0], np.cumsum(frames.nbytes, dtype=np.int64)))
        data = frames.data[ends[some.start] : ends[some.stop]]
        frames = replace(
            frames, data=data, nbytes=frames.nbytes[some], escapes=frames.escapes[some]
        )
    int8 = None if rows.int8 is None else rows.int8[some]
    return PackedRows(rows.layout, rows.int4[some], int8, frames)
