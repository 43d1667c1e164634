"""Experts in memory: the most used of all layers in slots, the others read when they are chosen.

All experts are of about one size, so each fits any slot. Which expert sits in which slot is the
NeuronCache's business, with experts in the place of neurons. Some slots more serve those that the
cache does not take, and let reads go on while an expert is computed. Which experts a token needs is
decided in `model`.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from m2c.bundle.shard import BLOCK, align
from m2c.kernels.rows import ExactRows, PackedRows, Rows
from m2c.tiers.blocks import Block, record_offset
from m2c.tiers.cache import ABSENT, NeuronCache
from m2c.tiers.expert_plan import ExpertFact
from m2c.tiers.memory import aligned_buffer
from m2c.tiers.ssd import Pending, SsdReader
from m2c.tiers.upgrades import HitStats

_PROBES: Final = 4

Ids = npt.NDArray[np.int32]
U8 = npt.NDArray[np.uint8]
# from an expert's block and its bytes to operands, and whether they stay valid as long as the bytes
ToRows = Callable[[int, Block, U8], tuple[Rows, bool]]


@dataclass
class _Arriving:
    expert: int  # position in the ranking
    slot: int
    pending: Pending | None  # None: it was there


class ExpertCache:
    """`slots` experts in DRAM, as they are stored, beside those under way.

    blocks: of a layer, all of its experts as one. The slots begin with the most popular experts.
    """

    def __init__(
        self, reader: SsdReader, facts: ExpertFact, blocks: list[Block], slots: int, *,
        policy: str, to_rows: ToRows,
    ) -> None:  # fmt: skip
        self.stats = HitStats()
        self._reader = reader
        self._facts = facts
        self._whole = blocks
        self._blocks: dict[int, Block] = {}  # by position in the ranking
        self._to_rows = to_rows
        self._rows: dict[int, Rows] = {}  # by slot
        self._place = np.empty(facts.total, np.int32)
        self._place[list(facts.ranking)] = np.arange(facts.total, dtype=np.int32)
        self._slots = slots
        self._slot_nbytes = align(facts.slot_nbytes)
        self._buffer = aligned_buffer((slots + facts.window) * self._slot_nbytes)
        self._spare = list(range(slots, slots + facts.window))
        self._cache = NeuronCache(facts.total, slots, policy=policy)
        self._static = policy == "pinned"

    def load(self) -> int:
        """Fill the slots, many reads in flight; the bytes read."""
        hottest = np.arange(self._slots, dtype=np.int32)
        move = self._cache.pin(hottest)
        started = [
            self._read(int(expert), int(slot))
            for expert, slot in zip(move.load_ids, move.load_slots, strict=True)
        ]
        Pending.all_of(started).wait()
        if not self._static:
            self._cache.unpin(hottest)
        return sum(self._block(int(expert)).streamed_nbytes for expert in hottest)

    def rows(self, layer: int, experts: Ids) -> Iterator[Rows]:
        """Operands of a layer's `experts`, in their order; each is valid until the next is asked
        for. Reads begin now. Raises what a failed read raised."""
        found = self._one_by_one(layer, experts)
        next(found)  # a generator that has not begun would not see its end either
        return found

    def _one_by_one(self, layer: int, experts: Ids) -> Iterator[Any]:
        """`rows`, behind a None that comes once reads have begun."""
        wanted = self._place[layer * self._facts.count + experts]
        self._cache.touch(np.sort(wanted))
        waiting: deque[_Arriving] = deque()
        left = iter(wanted.tolist())

        def start() -> None:
            while len(waiting) < self._facts.window and (one := next(left, None)) is not None:
                waiting.append(self._start(one, [other.expert for other in waiting]))

        try:
            start()
            yield None
            while waiting:
                first = waiting[0]
                if first.pending is not None:
                    first.pending.wait()
                    first.pending = None
                yield self._operand(first)
                self._give_back(waiting.popleft())
                start()
        finally:
            for one in waiting:
                self._drop(one)

    def held(self, layer: int) -> list[int]:
        """The layer's experts that are in slots, rising."""
        first = layer * self._facts.count
        slots = self._cache.lookup(np.arange(self._facts.total, dtype=np.int32))
        own = slots[self._place[first : first + self._facts.count]]
        return np.flatnonzero(own != ABSENT).tolist()

    def read_speed(self) -> float:
        """Bytes per second of reading a token's experts, some layers'."""
        nbytes, begin = 0, time.perf_counter()
        for probe in range(_PROBES):
            layer = probe * self._facts.layers // _PROBES
            ids = self._place[layer * self._facts.count :][: len(self._spare)]
            started = [self._read(int(i), slot) for i, slot in zip(ids, self._spare, strict=False)]
            Pending.all_of(started).wait()
            nbytes += sum(self._block(int(i)).streamed_nbytes for i in ids)
        return nbytes / (time.perf_counter() - begin)

    def _start(self, expert: int, under_way: list[int]) -> _Arriving:
        (slot,) = self._cache.lookup([expert])
        if slot != ABSENT:
            self.stats.dram += 1
            return _Arriving(expert, int(slot), None)
        self.stats.ssd += 1
        (slot,) = self._cache.admit([expert], keep=sorted(under_way))
        if slot == ABSENT:
            slot = self._spare.pop()
        one = _Arriving(expert, int(slot), Pending([]))
        try:
            one.pending = self._read(expert, one.slot)
        except BaseException:
            self._drop(one)
            raise
        return one

    def _read(self, expert: int, slot: int) -> Pending:
        self._rows.pop(slot, None)
        return self._block(expert).read(self._reader, self._bytes(slot), now=True)

    def _operand(self, one: _Arriving) -> Rows:
        rows = self._rows.get(one.slot)
        if rows is None:
            layer = self._facts.ranking[one.expert] // self._facts.count
            rows, stays = self._to_rows(layer, self._block(one.expert), self._bytes(one.slot))
            if stays:
                self._rows[one.slot] = rows
        return rows

    def _give_back(self, one: _Arriving) -> None:
        if one.slot >= self._slots:
            self._spare.append(one.slot)

    def _drop(self, one: _Arriving) -> None:
        """One that nobody will use: a slot may not hold what the cache says it does."""
        if one.pending is not None:
            one.pending.cancel()
            if one.slot < self._slots:
                self._cache.evict([one.expert])
        self._give_back(one)

    def _block(self, expert: int) -> Block:
        found = self._blocks.get(expert)
        if found is None:
            layer, number = divmod(self._facts.ranking[expert], self._facts.count)
            whole = self._whole[layer]
            size = whole.shards[0].header.sections[0].records // self._facts.count
            found = replace(whole, start=number * size, end=(number + 1) * size)
            self._blocks[expert] = found
        return found

    def _bytes(self, slot: int) -> U8:
        return self._buffer[slot * self._slot_nbytes : (slot + 1) * self._slot_nbytes]


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
    """The experts of rows that hold all of a layer's, made once each."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._made: dict[tuple[int, int], tuple[Rows, Rows]] = {}

    def of(self, layer: int, whole: Rows, experts: Ids) -> Iterator[Rows]:
        for expert in experts.tolist():
            known = self._made.get((layer, expert))
            if known is None or known[0] is not whole:
                known = self._made[layer, expert] = whole, cut(whole, expert, self.count)
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
