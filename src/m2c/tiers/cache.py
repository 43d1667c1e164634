"""NeuronCache: which neuron of one layer, in one plane, sits in which slot. Integers only.

The slab of records behind the slots belongs to somebody else. This file knows nothing about bytes,
files, tensors or devices, and leaves the choice of victims to a policy (`policies.py`).

Ids are int32, strictly increasing, in importance order (0 = most important). The same calls always
give the same slots. No call loops over neurons in Python.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from m2c.errors import DoesNotFit
from m2c.tiers.policies import Ids, Mask, Policy, ids_of, make_policy

Slots = NDArray[np.int32]

ABSENT = -1


def checked_ids(ids: ArrayLike, num_neurons: int) -> Ids:
    """`ids` as int32 [n]. Raises ValueError unless they are strictly increasing and in range."""
    array = np.asarray(ids)
    if array.ndim != 1:
        raise ValueError(f"neuron ids have {array.ndim} dimensions, not 1")
    if array.size:
        if array.dtype.kind not in "iu":
            raise ValueError(f"neuron ids are {array.dtype}, not integers")
        if array[0] < 0 or array[-1] >= num_neurons:
            raise ValueError(f"neuron ids are not all between 0 and {num_neurons - 1}")
        if not (array[1:] > array[:-1]).all():
            raise ValueError("neuron ids are not strictly increasing")
    return array.astype(np.int32, copy=False)


class IntegrityError(AssertionError):
    """The cache contradicts itself: a bug in m2c, never the user's doing."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one token means for the slab. `slots` and `hit_mask` are parallel to the ids given."""

    slots: Slots  # [n] int32, ABSENT = transient: read it for this token, it has no slot
    hit_mask: Mask  # [n] bool, its record was in its slot already
    load_ids: Ids  # [m] int32, ascending: read these into ...
    load_slots: Slots  # [m] int32, ... these slots, before anybody uses them


class NeuronCache:
    """`capacity` slots for `num_neurons` neurons, filled as `policy` (a name or an object) says.

    A policy object holds the history of one cache: do not share it. Raises ValueError when the
    capacity is negative or larger than the number of neurons.
    """

    def __init__(self, num_neurons: int, capacity: int, *, policy: str | Policy) -> None:
        if not 0 <= capacity <= num_neurons:
            raise ValueError(f"capacity {capacity} is not between 0 and {num_neurons} neurons")
        self.num_neurons = num_neurons
        self.capacity = capacity
        self.policy = make_policy(policy, num_neurons) if isinstance(policy, str) else policy
        self._slot_of = np.empty(num_neurons, dtype=np.int32)
        self._id_of = np.empty(capacity, dtype=np.int32)
        self._pinned = np.empty(capacity, dtype=np.bool_)
        self._free = np.empty(capacity, dtype=np.int32)  # a stack, its top is _num_free - 1
        self.clear()

    # -- questions ---------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Slots in use."""
        return self.capacity - self._num_free

    @property
    def ids(self) -> Ids:
        """The cached ids, ascending."""
        return np.flatnonzero(self._slot_of != ABSENT).astype(np.int32)

    @property
    def pinned_ids(self) -> Ids:
        """The pinned ids, ascending."""
        return np.sort(self._id_of[self._pinned])

    def lookup(self, ids: ArrayLike) -> Slots:
        """The slot of each id, int32, ABSENT where it has none. Changes nothing."""
        return self._slot_of[checked_ids(ids, self.num_neurons)]

    # -- actions -----------------------------------------------------------------------------------

    def step(self, ids: ArrayLike, *, priority: NDArray[np.generic] | None = None) -> Step:
        """One token's active set: lookup, touch and admit, never evicting a member of the set.

        `priority`, parallel to `ids`, larger is better, breaks the competition under `atu` when
        the set does not fit; other policies ignore it.
        """
        active = checked_ids(ids, self.num_neurons)
        slots = self._slot_of[active]
        hit_mask = slots != ABSENT
        self.policy.touch(active)
        missed = ~hit_mask
        absent = active[missed]
        if absent.size:
            self._bring(absent, _at(priority, missed, len(active)), slots[hit_mask])
            slots[missed] = self._slot_of[absent]
        load_slots = slots[missed]
        seated = load_slots != ABSENT
        return Step(slots, hit_mask, absent[seated], load_slots[seated])

    def touch(self, ids: ArrayLike) -> None:
        """Tell the policy that one token used `ids`, cached or not."""
        self.policy.touch(checked_ids(ids, self.num_neurons))

    def admit(
        self, ids: ArrayLike, *, keep: ArrayLike, priority: NDArray[np.generic] | None = None
    ) -> Slots:
        """Bring absent ids in and return the slot of each id, ABSENT where it was not admitted.

        Evicts neither `keep`, nor `ids`, nor pinned neurons. Does not touch: what is admitted ahead
        of its use ranks by its history.
        """
        wanted = checked_ids(ids, self.num_neurons)
        slots = self._slot_of[wanted]
        missed = slots == ABSENT
        absent = wanted[missed]
        if absent.size:
            protected = np.concatenate(
                [slots[~missed], self._slot_of[checked_ids(keep, self.num_neurons)]]
            )
            protected = protected[protected != ABSENT]
            self._bring(absent, _at(priority, missed, len(wanted)), protected)
            slots[missed] = self._slot_of[absent]
        return slots

    def evict(self, ids: ArrayLike) -> None:
        """Free the slots of `ids`; absent ids are ignored. Raises ValueError if one is pinned."""
        slots = self.lookup(ids)
        slots = slots[slots != ABSENT]
        if self._pinned[slots].any():
            raise ValueError("cannot evict a pinned neuron: unpin it first")
        self._slot_of[self._id_of[slots]] = ABSENT
        self._id_of[slots] = ABSENT
        self._free[self._num_free : self._num_free + slots.size] = slots
        self._num_free += slots.size

    def pin(self, ids: ArrayLike) -> Step:
        """Bring all `ids` in, whatever the policy says, and hold them until `unpin`.

        Evicts unpinned neurons if it must, so call it between tokens. Raises DoesNotFit, before
        anything changes, if more neurons would be pinned than there are slots.
        """
        wanted = checked_ids(ids, self.num_neurons)
        slots = self._slot_of[wanted]
        hit_mask = slots != ABSENT
        absent = wanted[~hit_mask]
        num_pinned = int(self._pinned.sum()) + int((~self._pinned[slots[hit_mask]]).sum())
        if num_pinned + absent.size > self.capacity:
            raise DoesNotFit(
                f"{num_pinned + absent.size} neurons cannot be pinned in {self.capacity} slots",
                "raise the memory budget or pin fewer",
            )
        self._pinned[slots[hit_mask]] = True
        self._seat(absent, slots[:0], contested=False)
        slots = self._slot_of[wanted]
        self._pinned[slots] = True
        return Step(slots, hit_mask, absent, slots[~hit_mask])

    def unpin(self, ids: ArrayLike) -> None:
        """Let `ids` be evicted again; ids that are not pinned are ignored."""
        slots = self.lookup(ids)
        self._pinned[slots[slots != ABSENT]] = False

    def clear(self) -> None:
        """Empty every slot, pinned ones too, and forget the policy's history."""
        self._slot_of[:] = ABSENT
        self._id_of[:] = ABSENT
        self._pinned[:] = False
        self._free[:] = np.arange(self.capacity, dtype=np.int32)[::-1]
        self._num_free = self.capacity
        self.policy.clear()

    def check_integrity(self) -> None:
        """Raise IntegrityError if the two maps, the free list and the pins disagree. O(neurons)."""
        held = np.flatnonzero(self._slot_of != ABSENT)
        slots = self._slot_of[held]
        used = np.flatnonzero(self._id_of != ABSENT)
        free = self._free[: self._num_free]
        checks = {
            "a slot number is out of range": bool(((slots >= 0) & (slots < self.capacity)).all()),
            "slots in use and neurons held differ": np.array_equal(np.sort(slots), used),
            "size is wrong": 0 <= self._num_free == self.capacity - used.size,
            "the free list is wrong": np.array_equal(
                np.sort(free), np.flatnonzero(self._id_of == ABSENT)
            ),
            "an empty slot is pinned": not self._pinned[self._id_of == ABSENT].any(),
        }
        for complaint, fine in checks.items():
            if not fine:
                raise IntegrityError(f"neuron cache: {complaint}")
        if not np.array_equal(self._id_of[slots], held):
            raise IntegrityError("neuron cache: id_of and slot_of disagree")

    # -- inside ------------------------------------------------------------------------------------

    def _bring(self, absent: Ids, priority: NDArray[np.generic] | None, keep: Slots) -> None:
        """Seat absent ids as the policy allows, leaving the slots in `keep` alone."""
        self._seat(self.policy.wants(absent, priority), keep, contested=True)

    def _seat(self, newcomers: Ids, keep: Slots, *, contested: bool) -> None:
        """Seat newcomers in order, first in free slots, then in those of victims."""
        late = self._fill(newcomers)
        if not late.size:
            return
        just_filled = self._slot_of[newcomers[: newcomers.size - late.size]]
        victims = self._victims(late.size, np.concatenate([keep, just_filled]))
        late = late[: victims.size]
        if contested:
            won = self.policy.wins(late, victims)
            late, victims = late[won], victims[won]
        self._replace(late, victims)

    def _fill(self, newcomers: Ids) -> Ids:
        """Seat newcomers in free slots while there are any; return those left standing."""
        count = min(newcomers.size, self._num_free)
        slots = self._free[self._num_free - count : self._num_free][::-1]
        self._num_free -= count
        self._slot_of[newcomers[:count]] = slots
        self._id_of[slots] = newcomers[:count]
        return newcomers[count:]

    def _victims(self, count: int, keep: Slots) -> Ids:
        """Up to `count` evictable ids of a full cache, the one the policy needs least first."""
        evictable = ~self._pinned
        evictable[keep] = False
        ranks = self.policy.rank(self._id_of[evictable])
        if count < ranks.size:
            ranks = np.partition(ranks, count)[:count]
        return ids_of(np.sort(ranks))

    def _replace(self, newcomers: Ids, victims: Ids) -> None:
        slots = self._slot_of[victims]
        self._slot_of[victims] = ABSENT
        self._slot_of[newcomers] = slots
        self._id_of[slots] = newcomers


def _at(priority: NDArray[np.generic] | None, mask: Mask, count: int) -> NDArray[np.generic] | None:
    if priority is None:
        return None
    if len(priority) != count:
        raise ValueError(f"{len(priority)} priorities for {count} neurons")
    return priority[mask]
