"""Who deserves a slot: the replacement policies of a NeuronCache, a few lines of numpy each.

A policy remembers something per neuron (last use, count, moving score), ranks the neurons that
could be evicted, and says which newcomers it wants. It does not know who sits in which slot, how
many slots there are, or what a record weighs.

Ids are in importance order, so of two neurons that rank the same the lower id stays.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]
Ranks = NDArray[np.int64]
Mask = NDArray[np.bool_]

# A rank is score * 2**32 + (2**32 - 1 - id): unique, ordered by score and then by lower id, and the
# id can be read back from it, so that selecting victims is one np.partition with no ties.
_SCORE_SHIFT = 32
_ID_MASK = (1 << _SCORE_SHIFT) - 1


def ids_of(ranks: Ranks) -> Ids:
    """The ids that a rank array speaks about: int32, same shape and order."""
    return (_ID_MASK - (ranks & _ID_MASK)).astype(np.int32)


def _rank_of(ids: Ids, score: int | Ranks) -> Ranks:
    return (_ID_MASK - ids.astype(np.int64)) + (score << _SCORE_SHIFT)


class Policy(Protocol):
    """What a NeuronCache asks of its policy. All ids are int32, in range, without duplicates."""

    def touch(self, ids: Ids) -> None:
        """One token used `ids` (cached or not)."""

    def rank(self, ids: Ids) -> Ranks:
        """int64, unique, parallel to `ids`; the smallest is evicted first."""

    def wants(self, ids: Ids, priority: NDArray[np.generic] | None) -> Ids:
        """Those of the absent `ids` (ascending) that should get a slot if there is one, best first.

        `priority` is parallel to `ids`, larger is better.
        """

    def wins(self, newcomers: Ids, victims: Ids) -> Mask:
        """bool, parallel to both: may `newcomers[k]` take the slot of `victims[k]`?"""

    def clear(self) -> None:
        """Forget all history."""


class Lru:
    """Evict what was used longest ago; always admit. Newcomers that compete: lower ids first."""

    def __init__(self, num_neurons: int) -> None:
        self._rank = np.empty(num_neurons, dtype=np.int64)
        self.clear()

    def clear(self) -> None:
        self._clock = 0
        self._rank[:] = _rank_of(np.arange(len(self._rank), dtype=np.int32), 0)

    def touch(self, ids: Ids) -> None:
        self._clock += 1
        self._rank[ids] = _rank_of(ids, self._clock)

    def rank(self, ids: Ids) -> Ranks:
        return self._rank[ids]

    def wants(self, ids: Ids, priority: NDArray[np.generic] | None) -> Ids:
        return ids

    def wins(self, newcomers: Ids, victims: Ids) -> Mask:
        return np.ones(len(newcomers), dtype=np.bool_)


class Atu(Lru):
    """Adjacent-token update (M2Cache): after a token the cache holds that token's active set.

    Only the neurons that differ from the previous token are replaced. Slots beyond the active set
    keep the most recently used neurons, so ATU is LRU as long as the active set fits; when it does
    not, newcomers are seated by `priority` and the rest of the set is transient.
    """

    def wants(self, ids: Ids, priority: NDArray[np.generic] | None) -> Ids:
        if priority is None:
            return ids
        # Reversing both ways makes the stable ascending sort a descending one with low ids first.
        return ids[::-1][np.argsort(priority[::-1], kind="stable")][::-1]


class Lfu:
    """Keep what was used most often since the start. A newcomer must outrank its victim.

    Counts survive eviction, so a neuron used often is not starved by losing its slot once.
    """

    def __init__(self, num_neurons: int) -> None:
        self._rank = np.empty(num_neurons, dtype=np.int64)
        self.clear()

    def clear(self) -> None:
        self._rank[:] = _rank_of(np.arange(len(self._rank), dtype=np.int32), 0)

    def touch(self, ids: Ids) -> None:
        self._rank[ids] += 1 << _SCORE_SHIFT

    def rank(self, ids: Ids) -> Ranks:
        return self._rank[ids]

    def wants(self, ids: Ids, priority: NDArray[np.generic] | None) -> Ids:
        return _best_first(self._rank[ids])

    def wins(self, newcomers: Ids, victims: Ids) -> Mask:
        return self._rank[newcomers] > self._rank[victims]


class Ema:
    """Exponential moving average of activity with an admission threshold.

    The score of a neuron tends to 1 when every token uses it and decays by `decay` per token
    otherwise; one use is worth `1 - decay`. A newcomer takes a slot only if its score exceeds the
    victim's by more than `margin`, so neurons used once do not push out steady ones.
    """

    _RESCALE_AT = 1e30

    def __init__(self, num_neurons: int, *, decay: float = 0.8, margin: float = 0.01) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(f"decay must lie between 0 and 1, not {decay}")
        if not 0.0 <= margin < 1.0:
            raise ValueError(f"margin must lie in [0, 1), not {margin}")
        self._decay = decay
        self._margin = margin
        self._score = np.zeros(num_neurons, dtype=np.float64)
        self.clear()

    def clear(self) -> None:
        self._score[:] = 0.0
        self._one = 1.0

    def touch(self, ids: Ids) -> None:
        # Instead of decaying N scores per token, let the unit grow and rescale now and then.
        self._one /= self._decay
        self._score[ids] += (1.0 - self._decay) * self._one
        if self._one > self._RESCALE_AT:
            self._score /= self._one
            self._score[self._score < 1.0 / self._RESCALE_AT] = 0.0
            self._one = 1.0

    def rank(self, ids: Ids) -> Ranks:
        # Non-negative floats order like their bits read as integers.
        bits = self._score[ids].astype(np.float32).view(np.int32)
        return _rank_of(ids, bits.astype(np.int64))

    def wants(self, ids: Ids, priority: NDArray[np.generic] | None) -> Ids:
        return _best_first(self.rank(ids))

    def wins(self, newcomers: Ids, victims: Ids) -> Mask:
        lead: NDArray[np.float64] = self._score[newcomers] - self._score[victims]
        return lead > self._margin * self._one


class Pinned:
    """A static set: whatever was pinned stays, nobody else ever gets a slot."""

    def touch(self, ids: Ids) -> None:
        pass

    def rank(self, ids: Ids) -> Ranks:
        return _rank_of(ids, 0)

    def wants(self, ids: Ids, priority: NDArray[np.generic] | None) -> Ids:
        return ids[:0]

    def wins(self, newcomers: Ids, victims: Ids) -> Mask:
        return np.zeros(len(newcomers), dtype=np.bool_)

    def clear(self) -> None:
        pass


def _best_first(ranks: Ranks) -> Ids:
    return ids_of(np.sort(ranks)[::-1])


POLICY_NAMES = ("pinned", "lru", "lfu", "atu", "ema")


def make_policy(name: str, num_neurons: int) -> Policy:
    """A fresh policy by its name in POLICY_NAMES, with its default settings. Raises ValueError."""
    makers: dict[str, Callable[[], Policy]] = {
        "pinned": Pinned,
        "lru": lambda: Lru(num_neurons),
        "lfu": lambda: Lfu(num_neurons),
        "atu": lambda: Atu(num_neurons),
        "ema": lambda: Ema(num_neurons),
    }
    if name not in makers:
        raise ValueError(f"no cache policy {name!r}: one of {', '.join(POLICY_NAMES)}")
    return makers[name]()
