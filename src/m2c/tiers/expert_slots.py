"""Which parts of experts one tier holds, and at which place of its memory each lies. Integers only.

A tier has as many places as slots, and some that are spare. Bytes arrive at a spare place; only
then does a part get a slot, and with it that place; the one that the slot had before is spare from
then on. So a slot never holds what has not arrived, and nothing is moved within a tier.
"""

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from m2c.tiers.cache import ABSENT, NeuronCache
from m2c.tiers.expert_plan import ExpertFact


class ExpertSlots:
    """Parts are named by their positions in the ranking. contents: those that the slots begin with,
    ascending, one for each slot.

    Every kind of part (of a mix: each plane) has a NeuronCache of its own, with the slots of its
    share of `contents`: what few tokens use must not drive out what most do.
    """

    def __init__(self, facts: ExpertFact, contents: Sequence[int], spare: int, policy: str) -> None:
        self._facts = facts
        self._contents = np.array(contents, np.int32)
        self._kinds = np.array(facts.ranking, np.int64) // facts.of_a_part
        counts = np.bincount(self._kinds[self._contents], minlength=facts.parts).tolist()
        self._caches = [NeuronCache(facts.total, n, policy=policy) for n in counts]
        self._first = [sum(counts[:n]) for n in range(facts.parts)]  # slot of each
        self._static = policy == "pinned"
        self._places = list(range(len(contents)))  # of each slot
        self._parts = [ABSENT] * len(contents)  # in each slot
        self._at = [ABSENT] * facts.total  # place of each part
        self.places = len(contents) + spare
        self.spare = deque(range(len(contents), self.places))

    def begin(self) -> Iterator[tuple[int, int]]:
        """(part, place) of all that the slots begin with: they are to be filled."""
        for kind, cache in enumerate(self._caches):
            first = self._contents[self._kinds[self._contents] == kind]
            move = cache.pin(first)
            for part, slot in zip(move.load_ids.tolist(), move.load_slots.tolist(), strict=True):
                self._parts[self._first[kind] + slot] = part
                self._at[part] = self._places[self._first[kind] + slot]
                yield part, self._at[part]
            if not self._static:
                cache.unpin(first)

    def touch(self, wanted: Sequence[Sequence[int]]) -> None:
        """A pass uses these parts of experts, of each expert the lowest first."""
        for kind, cache in enumerate(self._caches):
            cache.touch(np.sort([own[kind] for own in wanted if len(own) > kind]))

    def keeps(self, wanted: Sequence[Sequence[int]]) -> list[bool]:
        """Of each kind, whether a slot that it takes is still its own at the next pass, if a pass
        uses in every layer as many as in this one. Where it is not, those that were there first
        serve more: what each layer drives out is what the next pass asks for first."""
        used = [sum(len(own) > kind for own in wanted) for kind in range(self._facts.parts)]
        return [
            n * self._facts.layers <= cache.capacity
            for n, cache in zip(used, self._caches, strict=True)
        ]

    def at(self, part: int) -> int:
        """The place of a part; ABSENT where it has no slot."""
        return self._at[part]

    def take(self, part: int, place: int, keep: Sequence[int]) -> tuple[int, int] | None:
        """A part whose bytes are at `place`, which is nobody's, gets a slot, if the policy has one
        for it: (the place that is nobody's now, the part that was there), each ABSENT where there
        was none. Never at the cost of parts in `keep`."""
        kind = self._kind(part)
        (slot,) = self._caches[kind].admit([part], keep=sorted(keep))
        if slot == ABSENT:
            return None
        at = self._first[kind] + int(slot)
        gone = self._places[at], self._parts[at]
        if gone[1] != ABSENT:
            self._at[gone[1]] = ABSENT
        self._places[at], self._parts[at], self._at[part] = place, part, place
        return gone

    def leave(self, part: int) -> int:
        """A part gives up its slot, which has no place from now on: the place, nobody's now."""
        kind = self._kind(part)
        (slot,) = self._caches[kind].lookup([part])
        self._caches[kind].evict([part])
        at = self._first[kind] + int(slot)
        place = self._places[at]
        self._places[at] = self._parts[at] = self._at[part] = ABSENT
        return place

    def _kind(self, part: int) -> int:
        """Which part of its expert it is."""
        return int(self._kinds[part])
