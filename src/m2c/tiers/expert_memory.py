"""Memory of experts: slots in DRAM and, with a GPU, in HBM, and the ways of a part between them.

What HBM takes from DRAM changes places with what it drives out, so that together they hold the most
parts, and what was used last lies nearest; where DRAM holds that part anyway, nothing has to go
back. Under `pinned` nothing ever moves. Which parts a token needs is the business of `experts`.

Copies over the link come late. So a place in DRAM knows the last copy out of it or into it, before
whose end nothing may be read into it, and a place in HBM the one that kernels must wait for.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from m2c.bundle.shard import align
from m2c.tiers.blocks import Block
from m2c.tiers.cache import ABSENT
from m2c.tiers.expert_parts import parts_of
from m2c.tiers.expert_slots import ExpertSlots
from m2c.tiers.link import Copied, Link, finished
from m2c.tiers.memory import aligned_buffer
from m2c.tiers.plan import Plan
from m2c.tiers.ssd import Pending, SsdReader

U8 = npt.NDArray[np.uint8]


@dataclass(eq=False)
class Arriving:
    """A part that a pass uses: where it is, or will be."""

    part: int  # position in the ranking
    place: int
    in_hbm: bool = False
    spare: bool = False  # the place is no slot's
    pending: Pending | None = None  # None: it is there


class ExpertMemory:
    """blocks: of a layer, all of its experts as one. link: to HBM, where there is any. Slots are
    the plan's, beside places in DRAM for parts under way, and one in HBM."""

    def __init__(
        self, reader: SsdReader, plan: Plan, blocks: list[Block], link: Link | None
    ) -> None:
        facts, slots, hbm_slots = plan.footprint.experts, plan.expert_slots, plan.hbm_expert_slots
        assert facts is not None
        assert slots is not None
        self.link = link
        self._reader = reader
        self._facts = facts
        self.whole = [parts_of(block, facts.parts) for block in blocks]
        self._blocks: dict[int, Block] = {}  # by position in the ranking
        self._slot_nbytes = align(facts.slot_nbytes)
        # the coldest of what HBM has are in DRAM besides where all others are
        start = min(hbm_slots, facts.total - slots)
        self.dram = ExpertSlots(facts, range(start, start + slots), facts.window, plan.policy)
        self.hbm = ExpertSlots(facts, range(hbm_slots), int(hbm_slots > 0), plan.policy)
        self.buffer = aligned_buffer(self.dram.places * self._slot_nbytes)
        shape, device = (self.hbm.places, self._slot_nbytes), link.device if link else None
        self.hbm_buffer = torch.empty(shape, dtype=torch.uint8, device=device)
        # reads and copies into each place, in DRAM and in HBM
        self._fills = {False: [0] * self.dram.places, True: [0] * self.hbm.places}
        self._leaving: list[Copied] = [None] * self.dram.places
        self._coming: list[Copied] = [None] * self.hbm.places

    def load(self) -> int:
        """Fill the slots, many reads in flight; the bytes read."""
        loaded = [(part, self.read(part, place)) for part, place in self.dram.begin()]
        Pending.all_of([pending for _, pending in loaded]).wait()
        nbytes = sum(self.block(part).streamed_nbytes for part, _ in loaded)
        if self.link is not None:
            self.link.pin(self.buffer)  # now that its pages are there
        return nbytes + self._load_hbm()

    def _load_hbm(self) -> int:
        """What DRAM does not hold is read into its spare places; the bytes read."""
        under_way: deque[tuple[Arriving, int]] = deque()
        nbytes = 0

        def finish() -> None:
            one, place = under_way.popleft()
            if one.pending is not None:
                one.pending.wait()
            self._copy(one, place)
            if one.spare:
                self.dram.spare.append(one.place)

        for part, place in self.hbm.begin():
            at = self.dram.at(part)
            one = Arriving(part, at)
            if at == ABSENT:
                while not self.dram.spare:
                    finish()
                one = Arriving(part, self.dram.spare.popleft(), spare=True)
                one.pending = self.read(part, one.place)
                nbytes += self.block(part).streamed_nbytes
            under_way.append((one, place))
        while under_way:
            finish()
        return nbytes

    def find(self, part: int) -> Arriving:
        """Where a part is, a read of it under way if it is in no tier."""
        if (place := self.hbm.at(part)) != ABSENT:
            return Arriving(part, place, in_hbm=True)
        if (place := self.dram.at(part)) != ABSENT:
            return Arriving(part, place)
        one = Arriving(part, self.dram.spare.popleft(), spare=True)
        try:
            one.pending = self.read(part, one.place)
        except BaseException:
            self.give_back(one)
            raise
        return one

    def arrived(self, one: Arriving, keep: Sequence[int], *, to_hbm: bool) -> None:
        """Wait for a part that is read; only then may it take a slot, in the highest tier that has
        one for it. Never at the cost of parts in `keep`."""
        assert one.pending is not None
        one.pending.wait()
        one.pending = None
        if to_hbm and self.promote(one, keep):
            return
        taken = self.dram.take(one.part, one.place, keep)
        if taken is not None:
            self.dram.spare.append(taken[0])
            one.spare = False

    def promote(self, one: Arriving, keep: Sequence[int]) -> bool:
        """A part in DRAM gets a slot in HBM, if the policy has one for it. What was there goes to
        the place that becomes free, unless DRAM has it."""
        place = self.hbm.spare[0] if self.hbm.spare else ABSENT
        taken = self.hbm.take(one.part, place, keep)
        if taken is None:
            return False
        self.hbm.spare[0], gone = taken
        self._copy(one, place)
        if self.dram.at(gone) == ABSENT:
            self._demote(gone, self.hbm.spare[0], one, keep)
        else:
            self.give_back(one)
        one.place, one.in_hbm, one.spare = place, True, False
        return True

    def _demote(self, part: int, place: int, one: Arriving, keep: Sequence[int]) -> None:
        """A part that was driven out of HBM, where it still lies at `place`, goes to the place in
        DRAM from which `one` was copied, if it gets a slot there."""
        assert self.link is not None
        if not one.spare:
            self.dram.leave(one.part)
        taken = self.dram.take(part, one.place, keep)
        if taken is None:
            self.dram.spare.append(one.place)
            return
        nbytes = self.block(part).streamed_nbytes
        into = self._bytes(one.place)[:nbytes]
        self._leaving[one.place] = self.link.fetch(self.hbm_buffer[place, :nbytes], into)
        self._fills[False][one.place] += 1
        if taken[0] != ABSENT:
            self.dram.spare.append(taken[0])

    def _copy(self, one: Arriving, place: int) -> None:
        """Bytes in DRAM to a place in HBM."""
        assert self.link is not None
        nbytes = self.block(one.part).streamed_nbytes
        copied = self.link.put(self._bytes(one.place)[:nbytes], self.hbm_buffer[place, :nbytes])
        self._leaving[one.place] = self._coming[place] = copied
        self._fills[True][place] += 1

    def read(self, part: int, place: int) -> Pending:
        finished(self._leaving[place])  # else the copy would take what is read now
        self._leaving[place] = None
        self._fills[False][place] += 1
        return self.block(part).read(self._reader, self._bytes(place), now=True)

    def give_back(self, one: Arriving) -> None:
        """The pass is done with a part, or does without it."""
        if one.pending is not None:
            one.pending.cancel()
        if one.spare:
            self.dram.spare.append(one.place)
            one.spare = False

    def fills(self, one: Arriving) -> int:
        """Changes when something else comes to its place."""
        return self._fills[one.in_hbm][one.place]

    def ready(self, one: Arriving) -> None:
        """Kernels asked for from now on find what is in HBM."""
        if one.in_hbm and (copied := self._coming[one.place]) is not None:
            assert self.link is not None
            self.link.await_copy(copied)
            self._coming[one.place] = None

    def held(self, one: Arriving) -> U8 | Tensor:
        """A part's bytes where they lie."""
        nbytes = self.block(one.part).streamed_nbytes
        if one.in_hbm:
            return self.hbm_buffer[one.place, :nbytes]
        return self._bytes(one.place)[:nbytes]

    def moved(self, parts: Sequence[Arriving]) -> Sequence[Tensor]:
        """The bytes of parts in DRAM, copied to HBM for kernels that are asked for from now on;
        valid until the next but one are moved."""
        if self.link is None or not parts:
            return []
        raw = [self._bytes(one.place)[: self.block(one.part).streamed_nbytes] for one in parts]
        slot = self.link.move(*raw)
        for one in parts:
            self._leaving[one.place] = self.link.last
        return slot.split([len(piece) for piece in raw])

    def block(self, part: int) -> Block:
        found = self._blocks.get(part)
        if found is None:
            kind, expert = divmod(self._facts.ranking[part], self._facts.of_a_part)
            layer, number = divmod(expert, self._facts.count)
            whole = self.whole[layer][kind]
            size = whole.shards[0].header.sections[0].records // self._facts.count
            found = replace(whole, start=number * size, end=(number + 1) * size)
            self._blocks[part] = found
        return found

    def _bytes(self, place: int) -> U8:
        return self.buffer[place * self._slot_nbytes : (place + 1) * self._slot_nbytes]
