"""Experts in memory: the most used of all layers in slots, the others read when they are chosen.

All experts are of about one size, so each fits any slot; with a mix a slot holds one plane of an
expert, and planes are of about one size too. Which of these *parts* is in which tier is the
business of `expert_memory`. Some places more serve those that are under way, and let reads go on
while an expert is computed. Which experts a token needs, and at which precision, is decided in
`model`.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from torch import Tensor

from m2c.bundle.shard import PLANES
from m2c.kernels.rows import Rows
from m2c.tiers.blocks import Block
from m2c.tiers.cache import ABSENT
from m2c.tiers.expert_memory import Arriving, ExpertMemory
from m2c.tiers.expert_plan import ExpertFact
from m2c.tiers.ssd import Pending
from m2c.tiers.upgrades import HitStats

EXPERTS: Final = "experts"  # whose hits are counted beside those of the planes of neurons
_PROBES: Final = 4

Ids = npt.NDArray[np.int32]
U8 = npt.NDArray[np.uint8]
# from the blocks of an expert's parts and their bytes, where kernels read them, to operands
ToRows = Callable[[int, list[tuple[Block, "U8 | Tensor"]]], Rows]


@dataclass(frozen=True)
class _Made:
    """Operands, and what of which places they are of."""

    places: list[int]
    fills: list[int]
    rows: Rows


class ExpertCache:
    """Parts of experts, as they are stored, in the slots of `memory`, which begin with what most
    tokens use."""

    def __init__(self, facts: ExpertFact, memory: ExpertMemory, to_rows: ToRows) -> None:
        self.memory = memory
        self._facts = facts
        self._names = [EXPERTS]  # of the parts
        if facts.parts > 1:
            self._names = [f"{EXPERTS} {plane}" for plane in PLANES[: facts.parts]]
        self.reset_stats()
        self._to_rows = to_rows
        self._made: dict[tuple[bool, int, int], _Made] = {}  # by the first place and how many parts
        self._position = np.empty(facts.total, np.int32)
        self._position[list(facts.ranking)] = np.arange(facts.total, dtype=np.int32)

    def reset_stats(self) -> None:
        self.stats = {name: HitStats() for name in self._names}

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
        for tier in (self.memory.dram, self.memory.hbm):
            tier.touch(wanted)
        to_hbm = self.memory.hbm.keeps(wanted)
        waiting: deque[list[Arriving]] = deque()
        left = deque(wanted)

        def under_way() -> list[int]:
            return [one.part for group in waiting for one in group]

        def start() -> None:
            while left and len(under_way()) + len(left[0]) <= self._facts.window:
                waiting.append([])
                for kind, part in enumerate(left.popleft()):
                    one = self._found(kind, part)
                    waiting[-1].append(one)
                    if to_hbm[kind] and not one.in_hbm and one.pending is None:
                        self.memory.promote(one, under_way())

        try:
            start()
            yield None
            while waiting:
                for kind, one in enumerate(waiting[0]):
                    if one.pending is not None:
                        self.memory.arrived(one, under_way(), to_hbm=to_hbm[kind])
                yield self._operand(layer, waiting[0])
                for one in waiting.popleft():
                    self.memory.give_back(one)
                start()
        finally:
            for group in waiting:
                for one in group:
                    self.memory.give_back(one)

    def held(self, layer: int) -> list[int]:
        """The layer's experts whose first part is in a slot, rising."""
        first = layer * self._facts.count
        own = self._position[first : first + self._facts.count].tolist()
        tiers = (self.memory.dram, self.memory.hbm)
        return [i for i, part in enumerate(own) if any(t.at(part) != ABSENT for t in tiers)]

    def read_speed(self) -> float:
        """Bytes per second of reading a token's experts, some layers'."""
        memory, nbytes, begin = self.memory, 0, time.perf_counter()
        for probe in range(_PROBES):
            layer, places = probe * self._facts.layers // _PROBES, list(memory.dram.spare)
            ids = self._position[layer * self._facts.count :][: len(places)].tolist()
            started = [memory.read(i, at) for i, at in zip(ids, places, strict=False)]
            Pending.all_of(started).wait()
            nbytes += sum(memory.block(i).streamed_nbytes for i in ids)
        return nbytes / (time.perf_counter() - begin)

    def _found(self, kind: int, part: int) -> Arriving:
        one = self.memory.find(part)
        stats = self.stats[self._names[kind]]
        if one.in_hbm:
            stats.compute += 1
        elif one.pending is None:
            stats.dram += 1
        else:
            stats.ssd += 1
        return one

    def _operand(self, layer: int, group: list[Arriving]) -> Rows:
        """Kernels asked for from now on find its bytes."""
        memory = self.memory
        for one in group:
            memory.ready(one)
        moved = [one for one in group if memory.link is not None and not one.in_hbm]
        places = [one.place for one in group]
        fills = [memory.fills(one) for one in group]
        key = group[0].in_hbm, places[0], len(places)
        made = self._made.get(key)
        if made is not None and not moved and made.places == places and made.fills == fills:
            return made.rows
        came = iter(memory.moved(moved))
        parts = [
            (memory.block(one.part), next(came) if one in moved else memory.held(one))
            for one in group
        ]  # fmt: skip
        rows = self._to_rows(layer, parts)
        if not moved:
            self._made[key] = _Made(places, fills, rows)
        return rows
