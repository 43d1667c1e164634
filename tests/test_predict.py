"""The speed that a plan promises follows from its slowest link."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from running import MIXES, decode, options_for, plan_of, same, smallest_dram

from m2c import predict
from m2c.bundle.bundle import Bundle
from m2c.engine import Engine
from m2c.predict import Speeds, measured_speeds, predicted_tps
from m2c.tiers.ssd import LinkStats
from m2c.tiers.traffic import StoreStats
from m2c.units import MiB


@pytest.fixture
def streaming(deep_bundle: Bundle) -> Iterator[Engine]:
    options = options_for(MIXES["0/0/100"])
    dram = smallest_dram(deep_bundle, options)
    with Engine(deep_bundle, replace(options, dram=dram)) as engine:
        yield engine


def test_the_slowest_link_decides(streaming: Engine) -> None:
    plan = streaming.plan
    by_ssd = predicted_tps(plan, Speeds(ssd=1e3, link=0, memory=1e15))
    assert by_ssd == pytest.approx(1e3 / plan.ssd_nbytes_per_token)
    assert predicted_tps(plan, Speeds(ssd=2e3, link=0, memory=1e15)) == pytest.approx(2 * by_ssd)
    by_memory = predicted_tps(plan, Speeds(ssd=1e15, link=0, memory=1e3))
    assert by_memory == pytest.approx(0.88e3 / plan.compute_nbytes_per_token, rel=0.01)


def test_with_all_in_memory_the_disk_does_not_count(deep_bundle: Bundle) -> None:
    plan = plan_of(deep_bundle, options_for(MIXES["0/0/100"]))
    assert predicted_tps(plan, Speeds(ssd=1.0, link=0, memory=1e9)) > 10
    assert predicted_tps(plan, Speeds(0, 0, 0)) == 0


def test_upgrades_cost_more_than_their_own_bytes(deep_bundle: Bundle) -> None:
    """The floor's codes are read again for INT8, and its down columns are taken back."""
    plain, mixed = (plan_of(deep_bundle, options_for(MIXES[m])) for m in ("0/0/100", "0/25/75"))
    extra = mixed.compute_nbytes_per_token - plain.compute_nbytes_per_token
    fact = mixed.footprint.upgrades[0]
    assert extra > 8 * fact.active * (fact.slot_nbytes + 1)


def test_a_run_that_was_faster_than_the_probe_counts(
    streaming: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert streaming.store.read_speed() > 0
    monkeypatch.setattr(streaming.store, "read_speed", lambda: 1e6)
    stats = StoreStats(LinkStats(1 << 30, 0.5), LinkStats())
    assert measured_speeds(streaming).ssd == 1e6
    assert measured_speeds(streaming, stats).ssd == (1 << 30) / 0.5
    little = StoreStats(LinkStats(1 << 10, 1e-9), LinkStats())
    assert measured_speeds(streaming, little).ssd == 1e6


@pytest.mark.parametrize(("held", "read"), [(20 * MiB, 64 * MiB), (80 * MiB, 80 * MiB)])
def test_what_a_gpu_caches_does_not_measure_its_memory(
    monkeypatch: pytest.MonkeyPatch, held: int, read: int
) -> None:
    """An H100's second level holds 50 MB."""
    found = list[int]()
    zeros = torch.zeros(64 * MiB, dtype=torch.uint8)
    monkeypatch.setattr(predict, "_zeros", lambda device: zeros)
    monkeypatch.setattr(predict, "_read_on_gpu", lambda data: found.append(data.nbytes))
    largest = torch.zeros(held, dtype=torch.uint8)
    store = SimpleNamespace(largest_resident=largest, device=torch.device("cuda"))
    engine: Any = SimpleNamespace(store=store, workers=SimpleNamespace(host=None))
    assert predict._memory_speed(engine) > 0
    assert set(found) == {read}


def test_a_probe_leaves_the_model_as_it_was(streaming: Engine) -> None:
    expected = decode(streaming)
    streaming.store.read_speed()
    assert same(decode(streaming), expected)
