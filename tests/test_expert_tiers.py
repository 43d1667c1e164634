"""Experts in HBM, in DRAM and on the SSD: the same bits wherever they lie, and nothing lies twice
that could lie once. On a CPU whose memory is also HBM, and on a GPU that is not there."""

import json
import re
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from command_line import m2c
from running import GiB, Run, decode, options_for, plan_of, same, smallest_dram
from strict_gpu import CUDA, Event, StrictGpu, install
from test_expert_mixes import SHAPE as MIXED_SHAPE
from test_experts import SHAPE
from test_gpu import smallest_hbm, speculated
from test_on_gpu import without
from test_store_failures import flip
from tiny_models import IDS, pack_folder, write_checkpoint
from trials import trials

from m2c.bundle.bundle import Bundle, open_bundle
from m2c.bundle.shard import BLOCK, PAGE
from m2c.cli.runs import describe_plan, plan_facts
from m2c.engine import Engine, RunOptions
from m2c.errors import BadInput
from m2c.kernels.gpu import GpuKernels
from m2c.model.mix import Mix
from m2c.predict import Speeds, predicted_tps
from m2c.tiers.cache import ABSENT
from m2c.tiers.expert_plan import ExpertFact
from m2c.tiers.expert_slots import ExpertSlots
from m2c.tiers.experts import ExpertCache
from m2c.tiers.parts import dram_parts, hbm_parts
from m2c.tiers.policies import POLICY_NAMES

INT4, QUARTER, ALL = Mix(0, 0, 100), Mix(0, 25, 75), 1 << 20
MIXES = [INT4, Mix(100, 0, 0), QUARTER, Mix(25, 25, 50)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """24 experts a layer, 8 a token."""
    folder = tmp_path_factory.mktemp("mixed")
    return pack_folder(write_checkpoint(folder / "checkpoint", MIXED_SHAPE), folder / "b.m2c")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """6 experts a layer, 2 a token."""
    folder = tmp_path_factory.mktemp("small")
    return pack_folder(write_checkpoint(folder / "checkpoint", SHAPE), folder / "b.m2c")


@pytest.fixture(scope="module")
def expected(bundle: Bundle) -> dict[Mix, Run]:
    """With every expert in memory."""
    found = {}
    for mix in MIXES:
        with Engine(bundle, options_for(mix)) as engine:
            found[mix] = decode(engine)
    return found


def slotted(bundle: Bundle, options: RunOptions, hbm: int, dram: int) -> RunOptions:
    """With so many slots for experts in HBM and in DRAM, as far as there are experts."""
    options = replace(options, hbm=GiB, dram=GiB)
    options = replace(options, hbm=plan_of(bundle, options).used_hbm - 1)
    most = plan_of(bundle, options)
    facts = most.footprint.experts
    assert facts is not None
    own = most.used_hbm - most.hbm_experts_nbytes  # all that is no expert
    hbm = min(hbm, most.hbm_expert_slots)
    options = replace(options, hbm=own + facts.in_hbm_nbytes(hbm))
    least = smallest_dram(bundle, options)
    options = replace(options, dram=least + min(dram, facts.total) * facts.slot_nbytes)
    plan = plan_of(bundle, options)
    assert plan.hbm_expert_slots == hbm
    moves = options.policy != "pinned" and hbm < facts.total
    assert plan.expert_slots == min(dram, facts.total - (0 if moves else hbm))
    return options


def consistent(cache: ExpertCache) -> None:
    """Every place is a slot's or spare; what has a slot has a place of its own."""
    for tier, places in (
        (cache.memory.dram, cache.memory.dram.places),
        (cache.memory.hbm, cache.memory.hbm.places),
    ):
        slots = sum(own.capacity for own in tier._caches)
        assert len(tier._places) == slots
        assert sorted([*tier._places, *tier.spare]) == list(range(places))
        for own in tier._caches:
            own.check_integrity()
        held = [int(part) for own in tier._caches for part in own.ids]
        assert sorted(tier.at(part) for part in held) == sorted(tier._places)
    assert len(cache.memory.dram.spare) == cache._facts.window


def hits(engine: Engine) -> tuple[int, int, int]:
    """Served by HBM, DRAM, SSD."""
    found = engine.store.stats.upgrades.values()
    return tuple(sum(getattr(one, tier) for one in found) for tier in ("compute", "dram", "ssd"))  # type: ignore[return-value]


# -- the same bits ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mix", "policy"), [*((mix, "lru") for mix in MIXES), (INT4, "pinned"), (QUARTER, "pinned")]
)
def test_where_experts_lie_does_not_change_a_bit(
    bundle: Bundle, expected: dict[Mix, Run], mix: Mix, policy: str
) -> None:
    options = options_for(mix, policy=policy)
    for hbm, dram in ((0, 0), (1, 0), (3, 5), (20, 9), (ALL, 4), (18, ALL)):
        with Engine(bundle, slotted(bundle, options, hbm, dram)) as engine:
            for _ in range(2):
                assert same(decode(engine), expected[mix])
            served, cache = hits(engine), engine.store._experts
            assert cache is not None
            consistent(cache)
            assert (served[0] > 0) == (hbm > 0)
            assert (served[2] == 0) == (dram == ALL)


@pytest.mark.campaign
def test_any_split_and_policy_gives_the_same_tokens(
    bundle: Bundle, expected: dict[Mix, Run]
) -> None:
    for trial in trials("moe-hbm", ci=12, campaign=10_000):
        with trial as seed:
            random = Random(seed)
            mix = random.choice(MIXES)
            options = options_for(mix, policy=random.choice(POLICY_NAMES))
            hbm, dram = random.randrange(50), random.choice([random.randrange(50), ALL])
            with Engine(bundle, slotted(bundle, options, hbm, dram)) as engine:
                for _ in range(random.randint(1, 3)):
                    engine.model.kv.truncate(0)
                    noise = [random.randrange(300) for _ in range(random.randint(1, 16))]
                    engine.model.forward(np.array(noise, np.int32))
                assert same(decode(engine), expected[mix])
                assert engine.store._experts is not None
                consistent(engine.store._experts)


# -- what lies where -------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["lru", "lfu", "pinned"])
def test_two_tiers_that_hold_all_between_them_read_nothing(bundle: Bundle, policy: str) -> None:
    """And go on to: what HBM drives out takes the place of what it took."""
    for mix in (INT4, QUARTER):
        options = slotted(bundle, options_for(mix, policy=policy), 18, 0)
        facts = plan_of(bundle, options).footprint.experts
        assert facts is not None
        options = slotted(bundle, options, 18, facts.total - 18)
        with Engine(bundle, options) as engine:
            assert engine.plan.ssd_nbytes_per_token == 0
            cache = engine.store._experts
            assert cache is not None
            before = [cache.memory.hbm.at(part) for part in range(facts.total)]
            decode(engine)
            after = [cache.memory.hbm.at(part) for part in range(facts.total)]
            assert (before == after) == (policy == "pinned")
            for part in range(facts.total):
                assert (cache.memory.hbm.at(part) == ABSENT) != (
                    cache.memory.dram.at(part) == ABSENT
                )
            assert hits(engine)[2] == 0


def test_nothing_goes_back_to_dram_that_is_there(bundle: Bundle) -> None:
    with Engine(bundle, slotted(bundle, options_for(INT4), 18, ALL)) as engine:
        assert engine.store._experts is not None
        fetched = list[int]()
        engine.store._link.fetch = lambda *_: fetched.append(1)  # type: ignore[method-assign]
        engine.store.reset_stats()
        decode(engine)
        served, facts = hits(engine), engine.plan.footprint.experts
        assert facts is not None
        assert served[0] > 0
        assert served[1] > 0
        assert fetched == []
        moved = engine.store.stats.link.nbytes
        assert 0.9 * moved < served[1] * facts.stored_nbytes[0] < 1.1 * moved


def test_what_was_used_last_is_in_hbm_unless_a_pass_would_drive_it_out(bundle: Bundle) -> None:
    """A prompt uses more experts than there are slots: those that most tokens use stay."""
    with Engine(bundle, slotted(bundle, options_for(INT4), 18, ALL)) as engine:
        cache = engine.store._experts
        assert cache is not None

        def held() -> list[int]:
            return [part for part in range(48) if cache.memory.hbm.at(part) != ABSENT]

        assert held() == list(range(18))
        engine.model.forward(np.array(IDS[:16], np.int32))
        assert held() == list(range(18))
        coldest = np.array([cache._facts.ranking[-1] % 24], np.int32)
        layer = cache._facts.ranking[-1] // 24
        for taken in (1, 0, 0):  # from DRAM once
            engine.store.reset_stats()
            list(engine.store.experts(layer, coldest, np.ones(1, np.int32)))
            assert hits(engine) == (1 - taken, taken, 0)
        assert len(held()) == 18
        assert held()[-1] == 47


def test_a_part_takes_no_slot_of_one_that_is_under_way() -> None:
    """Nor of another kind; it brings its place, and leaves with it."""
    facts = ExpertFact(1, 4, (2, 1), 100, (100, 100))
    assert facts.ranking == (0, 1, 2, 3, 4, 5, 6, 7)  # four of each kind
    slots = ExpertSlots(facts, [2, 3, 4], 2, "lru")
    assert dict(slots.begin()) == {2: 0, 3: 1, 4: 2}
    assert list(slots.spare) == [3, 4]
    slots.touch([[2], [3, 7]])
    assert slots.take(1, 3, keep=[3, 2]) is None
    assert slots.take(1, 3, keep=[2]) == (1, 3)
    assert [slots.at(part) for part in range(8)] == [ABSENT, 3, 0, ABSENT, 2, *[ABSENT] * 3]
    assert slots.take(7, 4, keep=[1]) == (2, 4)
    assert slots.leave(1) == 3
    assert slots.take(0, 1, keep=[]) == (ABSENT, ABSENT)
    assert (slots.at(0), slots.at(1), slots.at(7)) == (1, ABSENT, 4)
    assert slots.keeps([[0, 4], [1]]) == [True, True]
    assert slots.keeps([[0, 4], [1], [2, 5]]) == [False, False]


def test_a_run_says_which_tier_served(bundle: Bundle, tmp_path: Path) -> None:
    options = slotted(bundle, options_for(INT4, ctx_size=None), 20, ALL)
    run = ("run", bundle.path, "-p", "a", "-n", 4, "-t", 1, "--mode", "mixed", "--mix", "0/0/100",
           "--hbm", f"{(options.hbm or 0) >> 10}KiB", "--dram", "1GiB")  # fmt: skip
    said = m2c(*run, "--stats", tmp_path / "stats.json", "--report", tmp_path / "report.html")
    assert said.code == 0, said.err
    assert re.search(r"experts from \d+% HBM \+ \d+% DRAM", said.err)
    assert "HBM (" in (tmp_path / "report.html").read_text()
    served = json.loads((tmp_path / "stats.json").read_text())["upgrades"]["experts"]
    assert served["hbm_or_cache"] > 0
    assert served["dram"] > 0
    assert served["ssd"] == 0


# -- plans -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_what_is_planned_is_allocated_and_more_hbm_moves_less(bundle: Bundle, mix: Mix) -> None:
    moved, tps = list[int](), list[float]()
    for hbm in (0, 1, 6, 20, ALL):
        options = slotted(bundle, options_for(mix), hbm, 7)
        plan = plan_of(bundle, options)
        assert plan.used_hbm <= plan.budget.hbm
        assert sum(hbm_parts(plan).values()) == plan.used_hbm
        assert sum(dram_parts(plan).values()) == plan.used_dram
        assert plan_facts(plan)["hbm_expert_slots"] == plan.hbm_expert_slots
        moved.append(plan.link_nbytes_per_token)
        tps.append(predicted_tps(plan, Speeds(0, 1e6, 1e9)))
        with Engine(bundle, options) as engine:
            cache = engine.store._experts
            assert cache is not None
            assert cache.memory.hbm_buffer.nbytes == plan.hbm_experts_nbytes
            assert len(cache.memory.buffer) == plan.experts_nbytes
            words = describe_plan(plan, engine.shape, None)
            said = f"{plan.hbm_expert_slots} in HBM and {plan.expert_slots} of "
            assert any(said in line for line in words) == (hbm > 0)
    assert moved == sorted(set(moved), reverse=True)
    assert tps == sorted(set(tps))
    facts = plan.footprint.experts
    assert facts is not None
    assert moved[0] == pytest.approx(facts.layers * facts.used_nbytes, rel=1e-6)


# -- failures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("hbm", [1, 18])
def test_a_damaged_expert_ends_the_pass_and_is_in_no_slot(
    bundle: Bundle, expected: dict[Mix, Run], tmp_path: Path, hbm: int
) -> None:
    shutil.copytree(bundle.path, tmp_path / "copy.m2c")
    path = tmp_path / "copy.m2c/neurons/00001.int8"
    blocks = range(PAGE + 100, path.stat().st_size - PAGE, BLOCK)
    options = slotted(bundle, options_for(QUARTER), hbm, 6)
    with Engine(open_bundle(tmp_path / "copy.m2c"), options) as engine:
        for at in blocks:
            flip(path, at)
        for ids in (IDS[:16], IDS[:1], IDS[1:2]):
            with pytest.raises(BadInput, match=r"neurons/00001\.int8: damaged at byte"):
                engine.model.forward(np.array(ids, np.int32))
        for at in blocks:
            flip(path, at)
        assert same(decode(engine), expected[QUARTER])
        assert engine.store._experts is not None
        consistent(engine.store._experts)


# -- on a GPU --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "policy", "splits"),
    [
        ("0/0/100", "lru", [(0, 0), (1, 0), (7, 0), (9, 3), (9, ALL), (3, ALL)]),
        ("0/50/50", "lru", [(1, 0), (9, 3), (12, ALL)]),
        ("0/50/50", "pinned", [(9, 3)]),
    ],
)
def test_a_gpu_gives_the_bits_of_its_kernels(
    small: Bundle, emulated: GpuKernels, gpu: StrictGpu, precision: str, policy: str,
    splits: list[tuple[int, int]],
) -> None:  # fmt: skip
    """Whose copies are as late as can be."""
    options = options_for(Mix.parse(precision), device="cuda", policy=policy)
    with torch._C.DisableTorchFunction():
        expected = without(small, replace(options, hbm=GiB), emulated)
    for hbm, dram in splits:
        with Engine(small, slotted(small, options, hbm, dram)) as engine:
            assert engine.store.device == CUDA
            for _ in range(2):
                ids, logits = decode(engine)
                assert same((ids, logits.cpu()), expected)
            assert engine.store._experts is not None
            consistent(engine.store._experts)


@pytest.mark.parametrize("precision", ["100/0/0", "0/100/0"])
def test_exact_mode_on_a_gpu(
    small: Bundle, emulated: GpuKernels, gpu: StrictGpu, precision: str
) -> None:
    options = options_for(Mix.parse(precision), hbm=GiB, device="cuda")
    with torch._C.DisableTorchFunction():
        ids, _ = without(small, options, emulated)
        options = replace(options, speculate=True)
        for hbm in range(smallest_hbm(small, options).hbm or 0, GiB, 1 << 19):
            options = replace(options, hbm=hbm)
            if plan_of(small, options).hbm_expert_slots > 5:
                break
        facts = plan_of(small, options).footprint.experts
        assert facts is not None
        dram = smallest_dram(small, options) + 4 * facts.slot_nbytes
    with Engine(small, replace(options, dram=dram)) as engine:
        assert engine.plan.hbm_expert_slots > 5
        assert engine.plan.expert_slots == 4
        assert speculated(engine, len(ids)) == ids
        assert all(hits(engine))


def test_a_gpu_that_is_not_waited_for_is_found_out(
    small: Bundle, emulated: GpuKernels, gpu: StrictGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The three waits, each left out once: this is what the tests above rely on."""
    options = options_for(INT4, device="cuda")
    with torch._C.DisableTorchFunction():
        expected = without(small, replace(options, hbm=GiB), emulated)
    options = slotted(small, options, 7, 0)

    def right() -> bool:
        with Engine(small, options) as engine, suppress(BadInput):  # output that is not finite
            ids, logits = decode(engine)
            return same((ids, logits.cpu()), expected)
        return False

    assert right()
    with monkeypatch.context() as patch:
        patch.setattr("m2c.tiers.expert_memory.finished", lambda copied: None)
        assert not right()
    with monkeypatch.context() as patch:
        patch.setattr("m2c.tiers.link.Link.await_copy", lambda *_: None)
        assert not right()
    record = Event.record

    def forgets(event: Event, stream: Any) -> None:
        if stream is not gpu.computes:
            record(event, stream)

    monkeypatch.setattr(Event, "record", forgets)
    with pytest.raises(RuntimeError, match="a kernel may be reading"):
        right()


def test_slots_in_dram_are_pinned(
    small: Bundle, emulated: GpuKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = emulated._launch.__self__  # type: ignore[attr-defined]
    for refuses in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            strict, pinned = install(patch, launcher)
            pinned.refuses = refuses
            with strict:
                options = slotted(small, options_for(INT4, device="cuda"), 3, 4)
                with Engine(small, options) as engine:
                    assert engine.store._experts is not None
                    address = engine.store._experts.memory.buffer.ctypes.data
                    assert (address in pinned) != refuses
                    assert decode(engine)[0]
            assert not pinned
