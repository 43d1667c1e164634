"""NeuronCache against a plain dict model, and what each policy is for."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from m2c.errors import DoesNotFit
from m2c.tiers.cache import ABSENT, IntegrityError, NeuronCache
from m2c.tiers.policies import POLICY_NAMES, Ema, Policy, ids_of, make_policy

NUM_NEURONS = 12
DECAY, MARGIN = 0.5, 0.1  # halves are exact in floating point, so the model can compare with ==

id_sets = st.sets(st.integers(0, NUM_NEURONS - 1)).map(sorted)
POLICIES_THAT_CACHE = [name for name in POLICY_NAMES if name != "pinned"]


def fresh_policy(name: str) -> Policy:
    if name == "ema":
        return Ema(NUM_NEURONS, decay=DECAY, margin=MARGIN)
    return make_policy(name, NUM_NEURONS)


class Model:
    """What the cache should hold, one neuron at a time and by definition."""

    def __init__(self, policy: str, capacity: int) -> None:
        self.policy = policy
        self.capacity = capacity
        self.held: set[int] = set()
        self.pinned: set[int] = set()
        self.history: list[set[int]] = []

    def score(self, neuron: int) -> float:
        uses = [token for token, ids in enumerate(self.history, start=1) if neuron in ids]
        if self.policy in ("lru", "atu"):
            return max(uses, default=0)
        if self.policy == "lfu":
            return len(uses)
        if self.policy == "ema":
            return sum((1 - DECAY) * DECAY ** (len(self.history) - token) for token in uses)
        return 0

    def rank(self, neuron: int) -> tuple[float, int]:
        # scores are ordered as f32: old uses that this does not tell apart are equal
        return float(np.float32(self.score(neuron))), -neuron

    def wins(self, newcomer: int, victim: int) -> bool:
        if self.policy == "lfu":
            return self.rank(newcomer) > self.rank(victim)
        if self.policy == "ema":
            return self.score(newcomer) - self.score(victim) > MARGIN
        return True

    def queue(self, absent: list[int], priority: dict[int, float]) -> list[int]:
        if self.policy == "pinned":
            return []
        if self.policy == "atu":
            return sorted(absent, key=lambda neuron: (-priority[neuron], neuron))
        if self.policy == "lru":
            return sorted(absent)
        return sorted(absent, key=self.rank, reverse=True)

    def bring(self, newcomers: list[int], keep: set[int], *, forced: bool = False) -> None:
        protected = keep | self.pinned
        for newcomer in newcomers:
            if len(self.held) == self.capacity:
                evictable = self.held - protected
                if not evictable:
                    return
                victim = min(evictable, key=self.rank)
                if not forced and not self.wins(newcomer, victim):
                    continue
                self.held.remove(victim)
            self.held.add(newcomer)
            protected.add(newcomer)


class CacheMachine(RuleBasedStateMachine):
    policy = ""

    @initialize(capacity=st.integers(0, NUM_NEURONS))
    def start(self, capacity: int) -> None:
        self.cache, self.twin = (
            NeuronCache(NUM_NEURONS, capacity, policy=fresh_policy(self.policy)) for _ in range(2)
        )
        self.model = Model(self.policy, capacity)
        self.slots: dict[int, int] = {}

    def check(self, came: set[int]) -> None:
        """The cache agrees with the model, and who stayed did not move."""
        self.cache.check_integrity()
        held = self.cache.ids
        assert set(held.tolist()) == self.model.held
        assert set(self.cache.pinned_ids.tolist()) == self.model.pinned
        assert self.cache.size == len(self.model.held) <= self.cache.capacity
        slots = dict(zip(held.tolist(), self.cache.lookup(held).tolist(), strict=True))
        for neuron, slot in slots.items():
            assert self.slots.get(neuron, slot) == slot or neuron in came
        self.slots = slots
        everyone = np.arange(NUM_NEURONS)
        assert np.array_equal(self.cache.lookup(everyone), self.twin.lookup(everyone))

    @rule(ids=id_sets, scores=st.lists(st.integers(0, 3), min_size=12, max_size=12))
    def step(self, ids: list[int], scores: list[int]) -> None:
        before = set(self.model.held)
        priority = np.array([scores[neuron] for neuron in ids], dtype=np.float32)
        step = self.cache.step(ids, priority=priority)
        self.twin.step(ids, priority=priority)
        self.model.history.append(set(ids))
        absent = [neuron for neuron in ids if neuron not in before]
        self.model.bring(self.model.queue(absent, dict(enumerate(scores))), set(ids))
        came = set(absent) & self.model.held
        assert step.hit_mask.tolist() == [neuron in before for neuron in ids]
        assert set(ids) & before <= self.model.held
        assert step.load_ids.tolist() == sorted(came)
        assert step.load_slots.tolist() == self.cache.lookup(step.load_ids).tolist()
        assert step.slots.tolist() == self.cache.lookup(ids).tolist()
        self.check(came)

    @rule(ids=id_sets, keep=id_sets)
    def admit(self, ids: list[int], keep: list[int]) -> None:
        kept = set(keep) & self.model.held
        absent = [neuron for neuron in ids if neuron not in self.model.held]
        slots = self.cache.admit(ids, keep=keep)
        self.twin.admit(ids, keep=keep)
        queue = self.model.queue(absent, dict.fromkeys(ids, 0.0))
        self.model.bring(queue, set(keep) | set(ids))
        assert slots.tolist() == self.cache.lookup(ids).tolist()
        assert kept <= self.model.held
        self.check(set(absent))

    @rule(ids=id_sets)
    def touch(self, ids: list[int]) -> None:
        self.cache.touch(ids)
        self.twin.touch(ids)
        self.model.history.append(set(ids))
        self.check(set())

    @rule(ids=id_sets)
    def evict(self, ids: list[int]) -> None:
        if set(ids) & self.model.pinned:
            with pytest.raises(ValueError, match="pinned"):
                self.cache.evict(ids)
        else:
            self.cache.evict(ids)
            self.twin.evict(ids)
            self.model.held -= set(ids)
        self.check(set())

    @rule(ids=id_sets)
    def pin(self, ids: list[int]) -> None:
        absent = [neuron for neuron in ids if neuron not in self.model.held]
        if len(self.model.pinned | set(ids)) > self.cache.capacity:
            with pytest.raises(DoesNotFit):
                self.cache.pin(ids)
        else:
            step = self.cache.pin(ids)
            self.twin.pin(ids)
            self.model.bring(absent, set(ids), forced=True)
            self.model.pinned |= set(ids)
            assert step.load_ids.tolist() == absent
            assert step.load_slots.tolist() == self.cache.lookup(absent).tolist()
            assert step.slots.tolist() == self.cache.lookup(ids).tolist()
            assert (step.slots != ABSENT).all()
        self.check(set(absent))

    @rule(ids=id_sets)
    def unpin(self, ids: list[int]) -> None:
        self.cache.unpin(ids)
        self.twin.unpin(ids)
        self.model.pinned -= set(ids)
        self.check(set())

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.twin.clear()
        self.model = Model(self.policy, self.cache.capacity)
        self.check(set())


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_behaves_like_the_model(name: str) -> None:
    machine = type(f"{name.title()}Machine", (CacheMachine,), {"policy": name})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=50, stateful_step_count=30, deadline=None)
    )


def hits(cache: NeuronCache, sets: list[list[int]]) -> int:
    return sum(int(cache.step(ids).hit_mask.sum()) for ids in sets)


def test_cyclic_scan_starves_lru_but_not_a_pinned_set() -> None:
    rounds, capacity = 10, 5
    scan = [[neuron] for _ in range(rounds) for neuron in range(NUM_NEURONS)]
    lru = NeuronCache(NUM_NEURONS, capacity, policy="lru")
    assert hits(lru, scan) == 0
    pinned = NeuronCache(NUM_NEURONS, capacity, policy="pinned")
    pinned.pin(np.arange(capacity))
    assert hits(pinned, scan) == rounds * capacity


def random_sets(count: int, size: int, *, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [sorted(rng.choice(NUM_NEURONS, size, replace=False).tolist()) for _ in range(count)]


def test_atu_loads_exactly_the_difference() -> None:
    cache = NeuronCache(NUM_NEURONS, 5, policy="atu")
    before: set[int] = set()
    for ids in random_sets(50, 5, seed=1):
        step = cache.step(ids)
        assert step.load_ids.tolist() == sorted(set(ids) - before)
        assert cache.ids.tolist() == ids
        before = set(ids)


def test_atu_is_lru_while_the_set_fits() -> None:
    atu, lru = (NeuronCache(NUM_NEURONS, 8, policy=name) for name in ("atu", "lru"))
    for ids in random_sets(50, 5, seed=2):
        assert atu.step(ids).slots.tolist() == lru.step(ids).slots.tolist()
        assert set(ids) <= set(atu.ids.tolist())


def test_atu_seats_by_priority_when_the_set_does_not_fit() -> None:
    cache = NeuronCache(NUM_NEURONS, 2, policy="atu")
    step = cache.step([1, 4, 6, 9], priority=np.array([0.1, 0.9, 0.9, 0.5]))
    assert cache.ids.tolist() == [4, 6]
    assert (step.slots == ABSENT).tolist() == [True, False, False, True]
    assert not step.hit_mask.any()
    assert step.load_ids.tolist() == [4, 6]


def test_lru_keeps_the_most_recent() -> None:
    cache = NeuronCache(NUM_NEURONS, 3, policy="lru")
    for neuron in (0, 1, 2, 0, 3):
        cache.step([neuron])
    assert cache.ids.tolist() == [0, 2, 3]


def test_lfu_keeps_the_most_frequent_and_remembers_the_evicted() -> None:
    cache = NeuronCache(NUM_NEURONS, 1, policy="lfu")
    for neuron in (7, 7, 8):
        cache.step([neuron])
    assert cache.ids.tolist() == [7]
    cache.step([8])
    assert cache.ids.tolist() == [7], "equal counts: the lower id stays"
    cache.step([8])
    assert cache.ids.tolist() == [8]
    cache.step([7])
    assert cache.ids.tolist() == [7], "equal counts: the lower id gets in"


def test_ema_is_not_polluted_by_neurons_used_once() -> None:
    steady = [0, 1]
    sets = [steady] * 20 + [[visitor] for visitor in range(2, 12)]
    lru = NeuronCache(NUM_NEURONS, 3, policy="lru")
    ema = NeuronCache(NUM_NEURONS, 3, policy=Ema(NUM_NEURONS, decay=0.9, margin=0.01))
    for ids in sets:
        lru.step(ids)
        ema.step(ids)
    assert set(steady).isdisjoint(lru.ids.tolist())
    assert set(steady) <= set(ema.ids.tolist())


def test_ema_follows_a_change_of_topic() -> None:
    ema, lfu = (NeuronCache(NUM_NEURONS, 2, policy=name) for name in ("ema", "lfu"))
    for ids in [[0, 1]] * 100 + [[5, 6]] * 20:
        ema.step(ids)
        lfu.step(ids)
    assert ema.ids.tolist() == [5, 6]
    assert lfu.ids.tolist() == [0, 1]


def test_ema_margin_separates_close_scores() -> None:
    def ids_after(margin: float) -> list[int]:
        policy = Ema(NUM_NEURONS, decay=0.5, margin=margin)
        cache = NeuronCache(NUM_NEURONS, 1, policy=policy)
        cache.step([3])  # 0.5, then 0.25 when 4 arrives with 0.5: a lead of 0.25
        cache.step([4])
        return cache.ids.tolist()

    assert ids_after(0.24) == [4]
    assert ids_after(0.25) == [3]


def test_ema_stays_finite_and_ordered_over_long_runs() -> None:
    policy = Ema(NUM_NEURONS, decay=0.5, margin=0.0)
    everyone = np.arange(NUM_NEURONS, dtype=np.int32)
    policy.touch(np.array([11], dtype=np.int32))
    for _ in range(500):  # five times the range that one rescale covers
        policy.touch(np.array([0, 2], dtype=np.int32))
        policy.touch(np.array([2, 5], dtype=np.int32))
    order = ids_of(np.sort(policy.rank(everyone))[::-1])
    assert order.tolist()[:3] == [2, 5, 0]
    assert (policy.rank(everyone) >= 0).all()
    assert order.tolist()[3:] == [1, 3, 4, 6, 7, 8, 9, 10, 11], "forgotten means zero"


def test_pinned_admits_nobody_even_into_free_slots() -> None:
    cache = NeuronCache(NUM_NEURONS, 4, policy="pinned")
    cache.pin([2, 3])
    step = cache.step([1, 2, 3])
    assert step.hit_mask.tolist() == [False, True, True]
    assert step.load_ids.size == 0
    assert cache.admit([5], keep=[]).tolist() == [ABSENT]
    assert cache.ids.tolist() == [2, 3]


@pytest.mark.parametrize("name", POLICIES_THAT_CACHE)
def test_pinned_neurons_survive_any_policy(name: str) -> None:
    cache = NeuronCache(NUM_NEURONS, 4, policy=name)
    cache.pin([0, 1])
    for ids in random_sets(30, 6, seed=3):
        cache.step(ids)
        assert {0, 1} <= set(cache.ids.tolist())
        cache.check_integrity()


@pytest.mark.parametrize("ids", [[3, 2], [1, 1], [-1, 2], [5, 12], [[1], [2]], [0.5], [2**32]])
def test_refuses_ids_that_are_not_a_set_in_order(ids: list[int]) -> None:
    cache = NeuronCache(NUM_NEURONS, 4, policy="lru")
    with pytest.raises(ValueError, match="neuron ids"):
        cache.step(ids)


def test_refuses_impossible_settings() -> None:
    with pytest.raises(ValueError, match="capacity 13"):
        NeuronCache(NUM_NEURONS, 13, policy="lru")
    with pytest.raises(ValueError, match="capacity -1"):
        NeuronCache(NUM_NEURONS, -1, policy="lru")
    with pytest.raises(ValueError, match="no cache policy 'mru'"):
        NeuronCache(NUM_NEURONS, 4, policy="mru")
    with pytest.raises(ValueError, match="2 priorities for 1"):
        NeuronCache(NUM_NEURONS, 4, policy="atu").step([1], priority=np.zeros(2))
    with pytest.raises(ValueError, match="decay"):
        Ema(4, decay=1.0)
    with pytest.raises(ValueError, match="margin"):
        Ema(4, margin=-0.1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda cache: cache._slot_of.__setitem__(1, 0),  # two neurons in one slot
        lambda cache: cache._id_of.__setitem__(0, 9),
        lambda cache: cache._slot_of.__setitem__(0, 77),
        lambda cache: cache._slot_of.__setitem__(0, ABSENT),
        lambda cache: cache._pinned.__setitem__(3, True),
        lambda cache: cache._free.__setitem__(0, 0),
        lambda cache: setattr(cache, "_num_free", 1),
    ],
)
def test_check_integrity_notices(damage) -> None:
    cache = NeuronCache(NUM_NEURONS, 4, policy="lru")
    cache.step([0, 1])
    cache.check_integrity()
    damage(cache)
    with pytest.raises(IntegrityError):
        cache.check_integrity()
