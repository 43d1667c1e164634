"""Experts in memory: the most used of all layers in slots, the others read when they are chosen.

All experts are of about one size, so each fits any slot; with a mix a slot holds one plane of an
expert, and planes are of about one size too. Which of these *parts* sits in which slot is the
business of `expert_slots`. Some places more serve those that are under way, and let reads go on
while an expert is computed. Which experts a token needs, and at which precision, is decided in
`model`.

With a GPU there are slots in HBM too, for the hottest; the slots in DRAM begin with those that come
next. What HBM takes from DRAM changes places with what it drives out, so that together they hold
the most parts, and what was used last lies nearest; where DRAM holds that part anyway, nothing has
to go back. Under `pinned` nothing ever moves.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from m2c.bundle.shard import PLANES, align
from m2c.kernels.rows import Rows
from m2c.tiers.blocks import Block
from m2c.tiers.cache import ABSENT
from m2c.tiers.expert_parts import parts_of
from m2c.tiers.expert_plan import ExpertFact
from m2c.tiers.expert_slots import ExpertSlots
from m2c.tiers.link import Copied, Link, finished
from m2c.tiers.memory import aligned_buffer
from m2c.tiers.ssd import Pending, SsdReader
from m2c.tiers.upgrades import HitStats

EXPERTS: Final = "experts"  # whose hits are counted beside those of the planes of neurons
_PROBES: Final = 4

Ids = npt.NDArray[np.int32]
U8 = npt.NDArray[np.uint8]
# from the blocks of an expert's parts and their bytes, where kernels read them, to operands
ToRows = Callable[[int, list[tuple[Block, "U8 | Tensor"]]], Rows]


@dataclass
class _Arriving:
    part: int  # position in the ranking
    place: int
    in_hbm: bool = False
    spare: bool = False  # the place is no slot's
    pending: Pending | None = None  # None: it is there


@dataclass(frozen=True)
class _Made:
    """Operands, and what of which places they are of."""

    places: list[int]
    fills: list[int]
    rows: Rows


class ExpertCache:
    """Parts of experts in DRAM, as they are stored, beside those under way; the hottest in HBM.

    blocks: of a layer, all of its experts as one. slots: in DRAM. link: to HBM, where there is any,
    with `hbm_slots` there, and one place more.
    """

    def __init__(
        self, reader: SsdReader, facts: ExpertFact, blocks: list[Block], slots: int, *,
        policy: str, to_rows: ToRows, link: Link | None = None, hbm_slots: int = 0,
    ) -> None:  # fmt: skip
        self._reader = reader
        self._facts = facts
        self._link = link
        self._names = [EXPERTS]  # of the parts
        if facts.parts > 1:
            self._names = [f"{EXPERTS} {plane}" for plane in PLANES[: facts.parts]]
        self.reset_stats()
        self._whole = [parts_of(block, facts.parts) for block in blocks]
        self._blocks: dict[int, Block] = {}  # by position in the ranking
        self._to_rows = to_rows
        self._made: dict[tuple[bool, int, int], _Made] = {}  # by the first place and how many parts
        self._position = np.empty(facts.total, np.int32)
        self._position[list(facts.ranking)] = np.arange(facts.total, dtype=np.int32)
        self._slot_nbytes = align(facts.slot_nbytes)
        # the coldest of what HBM has are in DRAM besides where all others are
        start = min(hbm_slots, facts.total - slots)
        self._dram = ExpertSlots(facts, range(start, start + slots), facts.window, policy)
        self._hbm = ExpertSlots(facts, range(hbm_slots), int(hbm_slots > 0), policy)
        self.buffer = aligned_buffer(self._dram.places * self._slot_nbytes)
        shape, device = (self._hbm.places, self._slot_nbytes), link.device if link else None
        self.hbm_buffer = torch.empty(shape, dtype=torch.uint8, device=device)
        # of each place: reads or copies into it, and the last copy that must have ended before it
        # is used: out of or into DRAM by the host, into HBM by kernels
        self._fills = {False: [0] * self._dram.places, True: [0] * self._hbm.places}
        self._leaving: list[Copied] = [None] * self._dram.places
        self._coming: list[Copied] = [None] * self._hbm.places

    def reset_stats(self) -> None:
        self.stats = {name: HitStats() for name in self._names}

    # -- loading -----------------------------------------------------------------------------------

    def load(self) -> int:
        """Fill the slots, many reads in flight; the bytes read."""
        loaded = [(part, self._read(part, place)) for part, place in self._dram.begin()]
        Pending.all_of([pending for _, pending in loaded]).wait()
        nbytes = sum(self._block(part).streamed_nbytes for part, _ in loaded)
        if self._link is not None:
            self._link.pin(self.buffer)  # now that its pages are there
        return nbytes + self._load_hbm()

    def _load_hbm(self) -> int:
        """What DRAM does not hold is read into its spare places; the bytes read."""
        under_way: deque[tuple[_Arriving, int]] = deque()
        nbytes = 0

        def finish() -> None:
            one, place = under_way.popleft()
            if one.pending is not None:
                one.pending.wait()
            self._copy(one, place)
            if one.spare:
                self._dram.spare.append(one.place)

        for part, place in self._hbm.begin():
            at = self._dram.at(part)
            one = _Arriving(part, at)
            if at == ABSENT:
                while not self._dram.spare:
                    finish()
                one = _Arriving(part, self._dram.spare.popleft(), spare=True)
                one.pending = self._read(part, one.place)
                nbytes += self._block(part).streamed_nbytes
            under_way.append((one, place))
        while under_way:
            finish()
        return nbytes

    # -- what a pass uses --------------------------------------------------------------------------

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
        wanted = [
            self._position[steps[:n] + one].tolist() for one, n in zip(first, parts, strict=True)
        ]
        for tier in (self._dram, self._hbm):
            tier.touch(wanted)
        to_hbm = self._hbm.keeps(wanted)
        waiting: deque[list[_Arriving]] = deque()
        left = deque(wanted)

        def under_way() -> list[int]:
            return [one.part for group in waiting for one in group]

        def start() -> None:
            while left and len(under_way()) + len(left[0]) <= self._facts.window:
                waiting.append([])
                for kind, part in enumerate(left.popleft()):
                    one = self._start(kind, part)
                    waiting[-1].append(one)
                    if to_hbm[kind] and not one.in_hbm and one.pending is None:
                        self._promote(one, under_way())

        try:
            start()
            yield None
            while waiting:
                for kind, one in enumerate(waiting[0]):
                    if one.pending is not None:
                        self._arrived(one, under_way(), to_hbm=to_hbm[kind])
                yield self._operand(layer, waiting[0])
                for one in waiting.popleft():
                    self._give_back(one)
                start()
        finally:
            for group in waiting:
                for one in group:
                    if one.pending is not None:
                        one.pending.cancel()
                    self._give_back(one)

    def held(self, layer: int) -> list[int]:
        """The layer's experts whose first part is in a slot, rising."""
        first = layer * self._facts.count
        own = self._position[first : first + self._facts.count].tolist()
        tiers = (self._dram, self._hbm)
        return [i for i, part in enumerate(own) if any(t.at(part) != ABSENT for t in tiers)]

    def read_speed(self) -> float:
        """Bytes per second of reading a token's experts, some layers'."""
        nbytes, begin = 0, time.perf_counter()
        for probe in range(_PROBES):
            layer = probe * self._facts.layers // _PROBES
            ids = self._position[layer * self._facts.count :][: len(self._dram.spare)].tolist()
            started = [self._read(i, at) for i, at in zip(ids, self._dram.spare, strict=False)]
            Pending.all_of(started).wait()
            nbytes += sum(self._block(i).streamed_nbytes for i in ids)
        return nbytes / (time.perf_counter() - begin)

    # -- one part ----------------------------------------------------------------------------------

    def _start(self, kind: int, part: int) -> _Arriving:
        stats = self.stats[self._names[kind]]
        if (place := self._hbm.at(part)) != ABSENT:
            stats.compute += 1
            return _Arriving(part, place, in_hbm=True)
        if (place := self._dram.at(part)) != ABSENT:
            stats.dram += 1
            return _Arriving(part, place)
        stats.ssd += 1
        one = _Arriving(part, self._dram.spare.popleft(), spare=True)
        try:
            one.pending = self._read(part, one.place)
        except BaseException:
            self._give_back(one)
            raise
        return one

    def _arrived(self, one: _Arriving, keep: Sequence[int], *, to_hbm: bool) -> None:
        """Wait for a part that is read; only then may it take a slot, in the highest tier that has
        one for it."""
        assert one.pending is not None
        one.pending.wait()
        one.pending = None
        if to_hbm and self._promote(one, keep):
            return
        taken = self._dram.take(one.part, one.place, keep)
        if taken is not None:
            self._dram.spare.append(taken[0])
            one.spare = False

    def _promote(self, one: _Arriving, keep: Sequence[int]) -> bool:
        """A part in DRAM gets a slot in HBM, if the policy has one for it. What was there goes to
        the place that becomes free, unless DRAM has it."""
        place = self._hbm.spare[0] if self._hbm.spare else ABSENT
        taken = self._hbm.take(one.part, place, keep)
        if taken is None:
            return False
        self._hbm.spare[0], gone = taken
        self._copy(one, place)
        if self._dram.at(gone) == ABSENT:
            self._demote(gone, self._hbm.spare[0], one, keep)
        else:
            self._give_back(one)
        one.place, one.in_hbm, one.spare = place, True, False
        return True

    def _demote(self, part: int, place: int, one: _Arriving, keep: Sequence[int]) -> None:
        """A part that was driven out of HBM, where it still lies at `place`, goes to the place in
        DRAM from which `one` was copied, if it gets a slot there."""
        assert self._link is not None
        if not one.spare:
            self._dram.leave(one.part)
        taken = self._dram.take(part, one.place, keep)
        if taken is None:
            self._dram.spare.append(one.place)
            return
        nbytes = self._block(part).streamed_nbytes
        into = self._bytes(one.place)[:nbytes]
        self._leaving[one.place] = self._link.fetch(self.hbm_buffer[place, :nbytes], into)
        self._fills[False][one.place] += 1
        if taken[0] != ABSENT:
            self._dram.spare.append(taken[0])

    def _copy(self, one: _Arriving, place: int) -> None:
        """Bytes in DRAM to a place in HBM."""
        assert self._link is not None
        nbytes = self._block(one.part).streamed_nbytes
        copied = self._link.put(self._bytes(one.place)[:nbytes], self.hbm_buffer[place, :nbytes])
        self._leaving[one.place] = self._coming[place] = copied
        self._fills[True][place] += 1

    def _read(self, part: int, place: int) -> Pending:
        finished(self._leaving[place])  # else the copy would take what is read now
        self._leaving[place] = None
        self._fills[False][place] += 1
        return self._block(part).read(self._reader, self._bytes(place), now=True)

    def _operand(self, layer: int, group: list[_Arriving]) -> Rows:
        """Kernels asked for from now on find its bytes."""
        moved = [one for one in group if self._link is not None and not one.in_hbm]
        for one in group:
            if one.in_hbm and (copied := self._coming[one.place]) is not None:
                assert self._link is not None
                self._link.await_copy(copied)
                self._coming[one.place] = None
        places = [one.place for one in group]
        fills = [self._fills[one.in_hbm][one.place] for one in group]
        key = group[0].in_hbm, places[0], len(places)
        made = self._made.get(key)
        if made is not None and not moved and made.places == places and made.fills == fills:
            return made.rows
        came = iter(self._moved(moved))
        parts = [
            (self._block(one.part), next(came) if one in moved else self._held(one))
            for one in group
        ]  # fmt: skip
        rows = self._to_rows(layer, parts)
        if not moved:
            self._made[key] = _Made(places, fills, rows)
        return rows

    def _held(self, one: _Arriving) -> U8 | Tensor:
        """A part's bytes where they lie."""
        nbytes = self._block(one.part).streamed_nbytes
        if one.in_hbm:
            return self.hbm_buffer[one.place, :nbytes]
        return self._bytes(one.place)[:nbytes]

    def _moved(self, parts: list[_Arriving]) -> Sequence[Tensor]:
        """Parts that have no slot in HBM, copied there for once."""
        if self._link is None or not parts:
            return []
        raw = [self._bytes(one.place)[: self._block(one.part).streamed_nbytes] for one in parts]
        slot = self._link.move(*raw)
        for one in parts:
            self._leaving[one.place] = self._link.last
        return slot.split([len(piece) for piece in raw])

    def _give_back(self, one: _Arriving) -> None:
        if one.spare:
            self._dram.spare.append(one.place)
            one.spare = False

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

    def _bytes(self, place: int) -> U8:
        return self.buffer[place * self._slot_nbytes : (place + 1) * self._slot_nbytes]
