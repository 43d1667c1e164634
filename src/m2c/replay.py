"""Replay a recorded trace through every cache policy, with Belady's optimum as the yardstick.

All policies get the same number of slots per layer and start from the same content, the most
important neurons. Knows nothing about where traces come from, reads no weights and prints nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from m2c.errors import BadInput, UsageError
from m2c.tiers.cache import NeuronCache
from m2c.tiers.policies import POLICY_NAMES, Ids
from m2c.tiers.trace import Trace

REPLAY_NAMES = (*POLICY_NAMES, "belady")


@dataclass(frozen=True)
class ReplayRow:
    """One policy over the whole trace. Loads count every record that was not in a slot."""

    policy: str
    hit_rate: float  # hits / records needed, all layers together
    hit_rate_minus_chance: float  # what the policy knows: random content would score 0
    loads_per_token: float
    nbytes_per_token: float


@dataclass(frozen=True)
class ReplayTable:
    """The trace in numbers, and one row per policy at equal capacity."""

    plane: str
    num_tokens: int
    num_layers: int
    num_neurons: int
    slots_per_layer: int
    record_nbytes: int
    active_share: float  # records needed / neurons: also the overlap of two random sets
    overlap: float  # share of a token's set that the previous token's set held
    rows: tuple[ReplayRow, ...]


def replay(
    trace: Trace,
    *,
    plane: str,
    capacity_nbytes: int,
    record_nbytes: int,
    policies: Sequence[str] = REPLAY_NAMES,
) -> ReplayTable:
    """Hit rates of `policies` over one plane of `trace`, in the order they are named.

    `capacity_nbytes` is for all layers together and is divided evenly into records of
    `record_nbytes`. Raises UsageError for a plane, policy or size that cannot be, BadInput for a
    trace in which nothing was active.
    """
    _check(trace, plane, capacity_nbytes, record_nbytes, policies)
    capacity = min(trace.num_neurons, capacity_nbytes // (trace.num_layers * record_nbytes))
    hits = dict.fromkeys(policies, 0)
    needed = shared = followed = 0
    for layer in range(trace.num_layers):
        sets = [trace.ids(token, layer, plane) for token in range(trace.num_tokens)]
        needed += sum(ids.size for ids in sets)
        followed += sum(ids.size for ids in sets[1:])
        shared += _shared(sets, trace.num_neurons)
        for name in hits:
            hits[name] += count_hits(name, sets, num_neurons=trace.num_neurons, capacity=capacity)
    if not needed:
        raise BadInput(f"the trace has no active neurons in plane {plane}", "record it again")
    return ReplayTable(
        plane=plane,
        num_tokens=trace.num_tokens,
        num_layers=trace.num_layers,
        num_neurons=trace.num_neurons,
        slots_per_layer=capacity,
        record_nbytes=record_nbytes,
        active_share=needed / (trace.num_tokens * trace.num_layers * trace.num_neurons),
        overlap=shared / max(1, followed),
        rows=tuple(
            _row(name, hits[name], needed, capacity / trace.num_neurons, trace, record_nbytes)
            for name in policies
        ),
    )


def count_hits(policy: str, sets: Sequence[Ids], *, num_neurons: int, capacity: int) -> int:
    """Hits of one policy over the active sets of one layer, starting from ids < capacity."""
    if policy == "belady":
        return _belady_hits(sets, num_neurons, capacity)
    cache = NeuronCache(num_neurons, capacity, policy=policy)
    most_important = np.arange(capacity, dtype=np.int32)
    cache.pin(most_important)
    if policy != "pinned":
        cache.unpin(most_important)
    return sum(int(np.count_nonzero(cache.step(ids).hit_mask)) for ids in sets)


def _belady_hits(sets: Sequence[Ids], num_neurons: int, capacity: int) -> int:
    """The most hits any policy could have had, knowing the future.

    After each token it keeps, of what it held and what was just read, the neurons needed again
    soonest. That may drop a neuron the token itself uses, which a running cache cannot do before
    the token is over: so this bounds every policy from above.
    """
    later, due = _next_uses(sets, num_neurons)
    cached = np.zeros(num_neurons, dtype=np.bool_)
    cached[:capacity] = True
    hits = 0
    for ids, next_use in zip(sets, later, strict=True):
        hits += int(np.count_nonzero(cached[ids]))
        due[ids] = next_use
        cached[ids] = True
        held = np.flatnonzero(cached)
        if held.size > capacity:
            ranks = due[held] * num_neurons + held
            surplus = np.partition(ranks, capacity)[capacity:] % num_neurons
            cached[surplus] = False
    return hits


def _next_uses(sets: Sequence[Ids], num_neurons: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Per set, the token at which each id is needed next; and the first use of every neuron.

    Both int64; a neuron never needed again is due at len(sets).
    """
    due = np.full(num_neurons, len(sets), dtype=np.int64)
    later = []
    for token in range(len(sets) - 1, -1, -1):
        later.append(due[sets[token]])
        due[sets[token]] = token
    return later[::-1], due


def _shared(sets: Sequence[Ids], num_neurons: int) -> int:
    """How many records were also needed by the token before."""
    previous = np.zeros(num_neurons, dtype=np.bool_)
    count = 0
    for ids in sets:
        count += int(np.count_nonzero(previous[ids]))
        previous[:] = False
        previous[ids] = True
    return count


def _row(
    name: str, hits: int, needed: int, chance: float, trace: Trace, record_nbytes: int
) -> ReplayRow:
    loads_per_token = (needed - hits) / trace.num_tokens
    return ReplayRow(
        policy=name,
        hit_rate=hits / needed,
        hit_rate_minus_chance=hits / needed - chance,
        loads_per_token=loads_per_token,
        nbytes_per_token=loads_per_token * record_nbytes,
    )


def _check(
    trace: Trace, plane: str, capacity_nbytes: int, record_nbytes: int, policies: Sequence[str]
) -> None:
    if plane not in trace.planes:
        raise UsageError(
            f"the trace has no plane {plane!r}", f"choose from {', '.join(trace.planes)}"
        )
    if capacity_nbytes < 0 or record_nbytes < 1:
        raise UsageError(
            f"a cache of {capacity_nbytes} bytes for records of {record_nbytes} makes no sense",
            "give the cache and the record a size",
        )
    for name in policies:
        if name not in REPLAY_NAMES:
            raise UsageError(
                f"there is no cache policy {name!r}", f"choose from {', '.join(REPLAY_NAMES)}"
            )
