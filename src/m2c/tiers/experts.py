"""Experts in memory: the most used of all layers in slots, the others read when they are chosen.

All experts are of about one size, so each fits any slot; with a mix a slot holds one plane of an
expert, and planes are of about one size too. Which of these *parts* sits in which slot is the
business of a NeuronCache, with parts in the place of neurons. Some slots more serve those that the
cache does not take, and let reads go on while an expert is computed. Which experts a token needs,
and at which precision, is decided in `model`.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from torch import Tensor

from m2c.bundle.shard import BLOCK, PLANES, align
from m2c.kernels.rows import ExactRows, PackedRows, Rows
from m2c.tiers.blocks import Block, record_offset
from m2c.tiers.cache import ABSENT, NeuronCache
from m2c.tiers.expert_plan import ExpertFact
from m2c.tiers.link import Link
from m2c.tiers.memory import aligned_buffer
from m2c.tiers.ssd import Pending, SsdReader
from m2c.tiers.upgrades import HitStats

EXPERTS: Final = "experts"  # whose hits are counted beside those of the planes of neurons
_PROBES: Final = 4

Ids = npt.NDArray[np.int32]
U8 = npt.NDArray[np.uint8]
# from the blocks of an expert's parts and their bytes to operands, and whether they stay valid as
# long as the bytes
ToRows = Callable[[int, list[tuple[Block, U8]]], tuple[Rows, bool]]


@dataclass
class _Arriving:
    part: int  # position in the ranking
    slot: int
    pending: Pending | None  # None: it was there


@dataclass(frozen=True)
class _Made:
    """Operands, and what of which slots they are of."""

    slots: list[int]
    fills: list[int]
    rows: Rows


class ExpertCache:
    """`slots` parts of experts in DRAM, as they are stored, beside those under way.

    blocks: of a layer, all of its experts as one. The slots begin with what most tokens use.
    """

    def __init__(
        self, reader: SsdReader, facts: ExpertFact, blocks: list[Block], slots: int, *,
        policy: str, to_rows: ToRows,
    ) -> None:  # fmt: skip
        self._reader = reader
        self._facts = facts
        self._names = [EXPERTS]  # of the parts
        if facts.parts > 1:
            self._names = [f"{EXPERTS} {plane}" for plane in PLANES[: facts.parts]]
        self.reset_stats()
        self._whole = [parts_of(block, facts.parts) for block in blocks]
        self._blocks: dict[int, Block] = {}  # by position in the ranking
        self._to_rows = to_rows
        self._made: dict[tuple[int, int], _Made] = {}  # by the first slot and how many parts
        self._place = np.empty(facts.total, np.int32)
        self._place[list(facts.ranking)] = np.arange(facts.total, dtype=np.int32)
        self._slots = slots
        self._slot_nbytes = align(facts.slot_nbytes)
        self.buffer = aligned_buffer((slots + facts.window) * self._slot_nbytes)
        self._spare = list(range(slots, slots + facts.window))
        self._fills = [0] * (slots + facts.window)  # reads into each slot
        # a cache of its own for each part: what few tokens use must not drive out what most do
        hottest = np.array(facts.ranking[:slots], np.int64) // facts.of_a_part
        counts = np.bincount(hottest, minlength=facts.parts).tolist()
        self._caches = [NeuronCache(facts.total, n, policy=policy) for n in counts]
        self._first = [sum(counts[:n]) for n in range(facts.parts)]  # slot of each
        self._static = policy == "pinned"

    def reset_stats(self) -> None:
        self.stats = {name: HitStats() for name in self._names}

    def load(self) -> int:
        """Fill the slots, many reads in flight; the bytes read."""
        kinds = np.array([self._kind(part) for part in range(self._slots)], np.int32)
        started = list[Pending]()
        for kind, cache in enumerate(self._caches):
            hottest = np.flatnonzero(kinds == kind).astype(np.int32)
            move = cache.pin(hottest)
            for part, slot in zip(move.load_ids, move.load_slots, strict=True):
                started.append(self._read(int(part), self._first[kind] + int(slot)))
            if not self._static:
                cache.unpin(hottest)
        Pending.all_of(started).wait()
        return sum(self._block(part).streamed_nbytes for part in range(self._slots))

    def rows(self, layer: int, experts: Ids, planes: Ids) -> Iterator[Rows]:
        """Operands of a layer's `experts`, each at its so many lowest `planes`, in their order;
        each is valid until the next is asked for. Reads begin now. Raises what a failed read
        raised."""
        parts = planes if self._facts.parts > 1 else np.ones_like(planes)
        found = self._one_by_one(layer, experts, parts)
        next(found)  # a generator that has not begun would not see its end either
        return found

    def _one_by_one(self, layer: int, experts: Ids, parts: Ids) -> Iterator[Any]:
        """`rows`, behind a None that comes once reads have begun."""
        first = layer * self._facts.count + experts
        steps = np.arange(self._facts.parts) * self._facts.of_a_part
        wanted = [self._place[steps[:n] + one] for one, n in zip(first, parts, strict=True)]
        for kind, cache in enumerate(self._caches):
            cache.touch(np.sort([own[kind] for own in wanted if len(own) > kind]))
        waiting: deque[list[_Arriving]] = deque()
        left = deque(one.tolist() for one in wanted)

        def start() -> None:
            while left and sum(map(len, waiting)) + len(left[0]) <= self._facts.window:
                waiting.append([])
                for part in left.popleft():
                    under_way = [other.part for group in waiting for other in group]
                    waiting[-1].append(self._start(part, under_way))

        try:
            start()
            yield None
            while waiting:
                for one in waiting[0]:
                    if one.pending is not None:
                        one.pending.wait()
                        one.pending = None
                yield self._operand(layer, waiting[0])
                for one in waiting.popleft():
                    self._give_back(one)
                start()
        finally:
            for group in waiting:
                for one in group:
                    self._drop(one)

    def held(self, layer: int) -> list[int]:
        """The layer's experts whose first part is in a slot, rising."""
        first = layer * self._facts.count
        slots = self._caches[0].lookup(np.arange(self._facts.total, dtype=np.int32))
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

    def _start(self, part: int, under_way: list[int]) -> _Arriving:
        kind = self._kind(part)
        cache, stats = self._caches[kind], self.stats[self._names[kind]]
        (slot,) = cache.lookup([part])
        if slot != ABSENT:
            stats.dram += 1
            return _Arriving(part, self._first[kind] + int(slot), None)
        stats.ssd += 1
        (slot,) = cache.admit([part], keep=sorted(under_way))
        at = self._spare.pop() if slot == ABSENT else self._first[kind] + int(slot)
        one = _Arriving(part, at, Pending([]))
        try:
            one.pending = self._read(part, one.slot)
        except BaseException:
            self._drop(one)
            raise
        return one

    def _read(self, part: int, slot: int) -> Pending:
        self._fills[slot] += 1
        return self._block(part).read(self._reader, self._bytes(slot), now=True)

    def _operand(self, layer: int, group: list[_Arriving]) -> Rows:
        slots = [one.slot for one in group]
        fills, key = [self._fills[slot] for slot in slots], (slots[0], len(slots))
        made = self._made.get(key)
        if made is not None and made.slots == slots and made.fills == fills:
            return made.rows
        parts = [(self._block(one.part), self._bytes(one.slot)) for one in group]
        rows, stays = self._to_rows(layer, parts)
        if stays:
            self._made[key] = _Made(slots, fills, rows)
        return rows

    def _give_back(self, one: _Arriving) -> None:
        if one.slot >= self._slots:
            self._spare.append(one.slot)

    def _drop(self, one: _Arriving) -> None:
        """One that nobody will use: a slot may not hold what the cache says it does."""
        if one.pending is not None:
            one.pending.cancel()
            if one.slot < self._slots:
                self._caches[self._kind(one.part)].evict([one.part])
        self._give_back(one)

    def _kind(self, part: int) -> int:
        """Which part of its expert it is."""
        return self._facts.ranking[part] // self._facts.of_a_part

    def _block(self, part: int) -> Block:
        found = self._blocks.get(part)
        if found is None:
            kind, expert = divmod(self._facts.ranking[part], self._facts.of_a_part)
            layer, number = divmod(expert, self._facts.count)
            whole = self._whole[layer][kind]
            size = whole.shards[0].header.sections[0].records // self._facts.count
            found = replace(whole, start=number * size, end=(number + 1) * size)
            self._blocks[part] = found
        return found

    def _bytes(self, slot: int) -> U8:
        return self.buffer[slot * self._slot_nbytes : (slot + 1) * self._slot_nbytes]


def parts_of(whole: Block, parts: int) -> list[Block]:
    """The block of all of a layer's experts as one part, or as one part for every plane."""
    if parts == 1:
        return [whole]
    return [replace(whole, shards=whole.shards[: n + 1], held=n) for n in range(parts)]


def joined(
    parts: list[tuple[Block, U8]], below: Mapping[str, PackedRows] | None, link: Link | None
) -> Mapping[str, PackedRows]:
    """Operands of an expert's parts, the lowest first, copied to HBM if there is a link.

    below: of all of the layer's experts in the planes that are held besides."""
    raw = [payload[: block.streamed_nbytes] for block, payload in parts]
    pieces: Sequence[U8 | Tensor] = raw
    if link is not None:
        pieces = link.move(*raw).split([len(piece) for piece in raw])
    for (block, _), piece in zip(parts, pieces, strict=True):
        below = block.rows(piece, below)
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
