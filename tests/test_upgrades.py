"""Walks of 50 random calls: the NeuronCache against its model, an UpgradePlane against the SSD.

Whatever is fetched, evicted, broken off or refused by the disk: no stale record, no slot too many.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from test_cache import CacheMachine
from trials import trials

from m2c.bundle.bundle import Bundle
from m2c.bundle.shard import ShardIndex
from m2c.errors import StorageError
from m2c.kernels.dispatch import exact_weights
from m2c.kernels.rows import EXACT_DTYPES, PackedRows
from m2c.tiers import fetch
from m2c.tiers.blocks import block_of
from m2c.tiers.fetch import PlaneSource, staging_nbytes
from m2c.tiers.memory import aligned_buffer
from m2c.tiers.policies import POLICY_NAMES
from m2c.tiers.ssd import SsdReader
from m2c.tiers.store import FFN
from m2c.tiers.upgrades import UpgradePlane

LAYER, NEURONS = 3, 700
PIECE = 7  # neurons decoded at a time, so that a fetch has several steps
STEPS = 50
# a few anywhere, or neighbours
id_sets = st.one_of(
    st.sets(st.integers(0, NEURONS - 1), max_size=20).map(sorted),
    st.tuples(st.integers(0, NEURONS - 1), st.integers(1, 60)).map(
        lambda part: list(range(part[0], min(NEURONS, part[0] + part[1])))
    ),
)


def walk(machine: type[RuleBasedStateMachine], number: int) -> None:
    """One random walk; what hypothesis tries first, the empty one, does not count."""
    run_state_machine_as_test(
        seed(number)(machine),
        settings=settings(
            max_examples=2, stateful_step_count=STEPS, deadline=None, database=None,
            phases=[Phase.generate], suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


@pytest.mark.campaign
def test_the_cache_is_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    for trial in trials("R18-cache", ci=10, campaign=2_000):
        with trial as number:
            policy = POLICY_NAMES[number % len(POLICY_NAMES)]
            walk(type("Machine", (CacheMachine,), {"policy": policy}), number)


class FailingReader(SsdReader):
    """A disk that fails at the `left`-th read on demand, having left rubbish in the buffer."""

    left = -1
    error: type[BaseException] = StorageError

    def read_now(self, index: ShardIndex, runs: Sequence[tuple[int, int]], into: Any) -> None:
        self.left -= 1
        if self.left == 0:
            into[:] = 0xA5
            raise self.error("the disk")
        super().read_now(index, runs, into)


class Planes:
    """One layer of a bundle, and what its upgrade planes hold."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.reader = FailingReader(threads=1)
        block = block_of(bundle, "neurons", LAYER, "int4")
        raw = aligned_buffer(block.streamed_nbytes)
        block.read(self.reader, raw).wait()
        self.floor: PackedRows = block.rows(raw)[FFN]
        everyone = np.arange(NEURONS, dtype=np.int32)
        self.true = {
            plane: self.upgrade(plane, 0, 0, "lru").records(everyone, self.floor, step=False)
            for plane in ("int8", "fp16")
        }

    def source(self, plane: str, prefix: int) -> PlaneSource:
        index = self.bundle.shard("neurons", LAYER, plane)
        # as small as allowed: a fetch takes several reads
        source = PlaneSource(
            self.reader, index, index.header.section(FFN), aligned_buffer(staging_nbytes(1))
        )
        source.pin_prefix(prefix)
        return source

    def upgrade(self, plane: str, slots: int, prefix: int, policy: str) -> UpgradePlane:
        layout = self.floor.layout
        exact = self.bundle.manifest.exact_type if plane == "fp16" else None
        width = layout.vectors * layout.length if exact else layout.nbytes("int8")
        slab = None
        if slots:
            dtype = EXACT_DTYPES[exact] if exact else torch.uint8
            slab = torch.zeros((slots, width), dtype=dtype)
        return UpgradePlane(
            self.source(plane, prefix), self.source("int8", prefix // 2) if exact else None,
            exact_type=exact, slab=slab, neurons=NEURONS, policy=policy,
            device=torch.device("cpu"), copied=lambda nbytes, seconds: None, decode=exact_weights,
        )  # fmt: skip


class UpgradeMachine(RuleBasedStateMachine):
    planes: Planes
    policy = ""

    @initialize(
        plane=st.sampled_from(["int8", "fp16"]), slots=st.integers(0, 80),
        prefix=st.sampled_from([0, 0, 1, 90, NEURONS]),
    )  # fmt: skip
    def start(self, plane: str, slots: int, prefix: int) -> None:
        self.planes.reader.left = -1
        self.true = self.planes.true[plane]
        self.upgrade = self.planes.upgrade(plane, slots, prefix, self.policy)
        self.slots = slots
        self.asked = 0

    def records(self, ids: list[int], step: bool) -> torch.Tensor:
        wanted = np.asarray(ids, np.int32)
        return self.upgrade.records(wanted, self.planes.floor, step=step)

    @rule(ids=id_sets, step=st.booleans())
    def fetch(self, ids: list[int], step: bool) -> None:
        before = self.upgrade.stats.total
        found = self.records(ids, step)
        assert torch.equal(found, self.true[torch.tensor(ids, dtype=torch.int64)])
        # whoever fills a pinned slab serves more than was asked for
        assert self.upgrade.stats.total - before >= len(ids)

    @rule(
        ids=id_sets, step=st.booleans(), left=st.integers(1, 4),
        error=st.sampled_from([StorageError, KeyboardInterrupt, MemoryError]),
    )  # fmt: skip
    def break_off(
        self, ids: list[int], step: bool, left: int, error: type[BaseException]
    ) -> None:  # fmt: skip
        reader = self.planes.reader
        reader.left, reader.error = left, error
        try:
            found = self.records(ids, step)
        except error:
            assert reader.left == 0
        else:  # it needed fewer reads
            assert torch.equal(found, self.true[torch.tensor(ids, dtype=torch.int64)])
        finally:
            reader.left = -1

    @precondition(lambda self: self.upgrade.cache is not None and self.policy != "pinned")
    @rule(ids=id_sets)
    def evict(self, ids: list[int]) -> None:
        cache = self.upgrade.cache
        assert cache is not None
        cache.evict(ids)

    @invariant()
    def what_is_cached_is_true(self) -> None:
        cache, slab = getattr(self, "upgrade", None) and self.upgrade.cache, None
        if cache is None:
            return
        cache.check_integrity()
        slab = self.upgrade._slab
        assert slab is not None
        assert cache.size <= len(slab) == self.slots
        ids = cache.ids
        held = slab[torch.from_numpy(cache.lookup(ids).astype(np.int64))]
        assert torch.equal(held, self.true[torch.from_numpy(ids.astype(np.int64))])


@pytest.fixture(scope="module")
def planes(deep_bundle: Bundle) -> Iterator[Planes]:
    with pytest.MonkeyPatch.context() as patch:
        found = Planes(deep_bundle)
        layout = found.floor.layout
        patch.setattr(fetch, "DECODE_WEIGHTS", PIECE * layout.vectors * layout.length)
        yield found
        found.reader.close()


@pytest.mark.campaign
def test_no_record_is_stale(planes: Planes) -> None:
    for trial in trials("R18-upgrades", ci=15, campaign=2_000):
        with trial as number:
            policy = POLICY_NAMES[number % len(POLICY_NAMES)]
            facts = {"policy": policy, "planes": planes}
            walk(type("Machine", (UpgradeMachine,), facts), number)
