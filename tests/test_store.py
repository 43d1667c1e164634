"""The cache is transparent: wherever a weight lies, the logits are the same, bit for bit."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import (
    MIXES,
    PROMPT,
    GiB,
    Run,
    budgets,
    decode,
    options_for,
    plan_of,
    same,
    smallest_dram,
)
from tiny_models import pack_folder, write_checkpoint

from m2c.bundle.bundle import Bundle
from m2c.engine import Engine
from m2c.errors import DoesNotFit, UsageError
from m2c.model.mix import Mix
from m2c.tiers.policies import POLICY_NAMES

ALL_MIXES = pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)


# -- the grid --------------------------------------------------------------------------------------


@ALL_MIXES
def test_memory_does_not_change_a_bit(
    deep_bundle: Bundle, reference: dict[Mix, Run], mix: Mix
) -> None:
    """From everything streamed to everything resident; cold, then once more warm."""
    streamed = []
    for dram in budgets(deep_bundle, options_for(mix)):
        with Engine(deep_bundle, options_for(mix, dram=dram)) as engine:
            streamed.append(len(engine.plan.streamed))
            assert same(decode(engine), reference[mix])
            assert same(decode(engine), reference[mix])
    assert streamed == sorted(streamed, reverse=True)
    assert streamed[0] > len(engine.plan.footprint.blocks) // 2


@ALL_MIXES
def test_three_tiers_do_not_change_a_bit(
    deep_bundle: Bundle, reference: dict[Mix, Run], mix: Mix
) -> None:
    """HBM from the smallest that works upwards, with DRAM scarce and plenty."""
    with pytest.raises(DoesNotFit) as caught:
        plan_of(deep_bundle, options_for(mix, hbm=1))
    smallest = hinted_size(caught.value)
    for extra in (0, 300 << 10, 2 << 20, GiB):
        hbm = smallest + extra
        least = smallest_dram(deep_bundle, options_for(mix, hbm=hbm))
        for dram in (least, least + (1 << 20)):
            with Engine(deep_bundle, options_for(mix, hbm=hbm, dram=dram)) as engine:
                assert engine.plan.used_hbm <= hbm
                assert engine.plan.used_dram <= dram
                assert same(decode(engine), reference[mix])


@pytest.mark.parametrize("kernel", ["auto", "torch"])
@pytest.mark.parametrize("mix", ["100/0/0", "0/100/0", "0/0/100"])
def test_pieces_do_not_change_a_bit(
    deep_bundle: Bundle, mix: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers of which a part is resident, and a part streams."""
    options = options_for(MIXES[mix], kernel=kernel)
    with Engine(deep_bundle, options) as engine:
        expected = decode(engine)
    monkeypatch.setattr("m2c.model.footprint.PIECE_NBYTES", 1)
    split = 0
    # the reference is slow: nothing resident, and half
    for dram in [*budgets(deep_bundle, options)][:: 2 if kernel == "torch" else 1]:
        with Engine(deep_bundle, replace(options, dram=dram)) as engine:
            uses = [u for (kind, _), u in engine.store._uses.items() if kind == "neurons"]
            split += sum(len({use.rows is None for use in parts}) == 2 for parts in uses)
            assert same(decode(engine), expected)
            read = bytes_read(engine, engine.model.forward)
            read -= bytes_read(engine, engine.store.embed)
            assert read == 3 * engine.plan.ssd_nbytes_per_token
    assert split
    hbm = plan_of(deep_bundle, replace(options, hbm=GiB)).used_hbm - (1 << 20)
    with Engine(deep_bundle, replace(options, hbm=hbm)) as engine:
        assert same(decode(engine), expected)


@pytest.mark.parametrize("policy", POLICY_NAMES)
@pytest.mark.parametrize("mix", [MIXES["5/15/80"], MIXES["50/50/0"]], ids=str)
def test_policies_do_not_change_a_bit(
    deep_bundle: Bundle, reference: dict[Mix, Run], mix: Mix, policy: str
) -> None:
    plan = plan_of(deep_bundle, options_for(mix))
    for dram in (plan.used_dram - (1 << 19), plan.used_dram - (3 << 19)):
        with Engine(deep_bundle, options_for(mix, policy=policy, dram=dram)) as engine:
            for _ in range(2):
                assert same(decode(engine), reference[mix])
            for upgrade in engine.store._upgrades.values():
                if upgrade.cache is not None:
                    upgrade.cache.check_integrity()
    hbm = plan_of(deep_bundle, options_for(mix, hbm=GiB)).used_hbm - (1 << 20)
    with Engine(deep_bundle, options_for(mix, policy=policy, hbm=hbm)) as engine:
        assert engine.plan.slab_slots
        for _ in range(2):
            assert same(decode(engine), reference[mix])
        assert engine.store.stats.upgrades["fp16"].compute > 0


@pytest.mark.parametrize("threads", [2, 3])
@ALL_MIXES
def test_threads_do_not_change_a_bit(
    deep_bundle: Bundle, reference: dict[Mix, Run], mix: Mix, threads: int
) -> None:
    with Engine(deep_bundle, options_for(mix, threads=threads)) as engine:
        assert same(decode(engine), reference[mix])
    dram = smallest_dram(deep_bundle, options_for(mix, threads=threads))
    with Engine(deep_bundle, options_for(mix, threads=threads, dram=dram)) as engine:
        assert same(decode(engine), reference[mix])


@pytest.mark.parametrize("depth", [1, 2, 3, 30])
def test_read_ahead_does_not_change_a_bit(
    deep_bundle: Bundle, reference: dict[Mix, Run], depth: int
) -> None:
    for mix in (MIXES["100/0/0"], MIXES["0/0/100"], MIXES["5/15/80"]):
        dram = smallest_dram(deep_bundle, options_for(mix, depth=depth))
        with Engine(deep_bundle, options_for(mix, depth=depth, dram=dram)) as engine:
            assert same(decode(engine), reference[mix])
            largest = max(b.streamed_nbytes for b in engine.plan.footprint.blocks)
            assert engine.plan.ring_nbytes <= (depth + 1) * largest


@pytest.mark.parametrize("dense", ["int4", "int8", "fp16"])
def test_the_precision_outside_the_ffn_is_kept_in_every_tier(
    deep_bundle: Bundle, dense: str
) -> None:
    mix = MIXES["0/25/75"]
    with Engine(deep_bundle, options_for(mix, dense=dense)) as engine:
        expected = decode(engine)
    dram = smallest_dram(deep_bundle, options_for(mix, dense=dense))
    with Engine(deep_bundle, options_for(mix, dense=dense, dram=dram)) as engine:
        assert same(decode(engine), expected)


def test_tied_embeddings_and_relu(tmp_path: Path) -> None:
    config = {"tie_word_embeddings": True, "hidden_act": "relu", "num_hidden_layers": 5}
    bundle = pack_folder(write_checkpoint(tmp_path / "c", config), tmp_path / "b.m2c")
    for mix in (MIXES["100/0/0"], MIXES["5/15/80"], MIXES["0/0/100 drop 30"]):
        with Engine(bundle, options_for(mix)) as engine:
            expected = decode(engine)
        dram = smallest_dram(bundle, options_for(mix))
        with Engine(bundle, options_for(mix, dram=dram)) as engine:
            assert engine.plan.streamed
            assert same(decode(engine), expected)


# -- budgets ---------------------------------------------------------------------------------------


def hinted_size(error: DoesNotFit) -> int:
    """Bytes of the size that the hint says is the smallest that works."""
    found = re.search(r"the smallest that works is --(?:dram|hbm) (\d+)MiB", error.hint)
    assert found, error.hint
    return int(found[1]) << 20


@ALL_MIXES
def test_the_size_named_in_the_hint_works(
    deep_bundle: Bundle, reference: dict[Mix, Run], mix: Mix
) -> None:
    with pytest.raises(DoesNotFit, match=r"--dram 1\.00 MiB is too small") as caught:
        plan_of(deep_bundle, options_for(mix, dram=1 << 20))
    dram = hinted_size(caught.value)
    with Engine(deep_bundle, options_for(mix, dram=dram)) as engine:
        assert engine.plan.used_dram <= dram
        assert same(decode(engine), reference[mix])
    with pytest.raises(DoesNotFit):
        plan_of(deep_bundle, options_for(mix, dram=dram - (1 << 20)))


def test_the_hint_for_dram_behind_hbm_works(deep_bundle: Bundle) -> None:
    mix = MIXES["5/15/80"]
    with pytest.raises(DoesNotFit) as caught:
        plan_of(deep_bundle, options_for(mix, hbm=1))
    hbm = hinted_size(caught.value)
    with pytest.raises(DoesNotFit) as caught:
        plan_of(deep_bundle, options_for(mix, hbm=hbm, dram=1))
    plan_of(deep_bundle, options_for(mix, hbm=hbm, dram=hinted_size(caught.value)))


@ALL_MIXES
def test_what_is_allocated_is_within_the_plan(deep_bundle: Bundle, mix: Mix) -> None:
    for dram in budgets(deep_bundle, options_for(mix)):
        with Engine(deep_bundle, options_for(mix, dram=dram)) as engine:
            store, plan = engine.store, engine.plan
            resident = sum(
                sum(t.nbytes for t in tensors_of(rows))
                for uses in store._uses.values()
                for use in uses
                for rows in (use.rows or {}).values()
            )
            assert resident <= sum(plan.footprint.blocks[i].resident_nbytes for i in plan.in_dram)
            slabs = [u._slab.nbytes for u in store._upgrades.values() if u._slab is not None]
            assert sum(slabs) == plan.slab_nbytes
            assert len(store._staging) <= plan.footprint.staging_nbytes
            assert plan.used_dram <= dram


def tensors_of(rows: Any) -> list[torch.Tensor]:
    found = (getattr(rows, name, None) for name in ("int4", "int8", "weights"))
    return [tensor for tensor in found if tensor is not None]


# -- traffic ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [2, 30])
@pytest.mark.parametrize("mix", ["100/0/0", "0/100/0", "0/0/100 drop 30"])
def test_reads_per_token_are_what_the_plan_says(deep_bundle: Bundle, mix: str, depth: int) -> None:
    """With a depth of 30 the ring holds all that streams: each block is read once."""
    options = options_for(MIXES[mix], depth=depth)
    for dram in budgets(deep_bundle, options):
        with Engine(deep_bundle, replace(options, dram=dram)) as engine:
            decode(engine)
            read = bytes_read(engine, engine.model.forward)
            embeddings = bytes_read(engine, engine.store.embed)
            assert read - embeddings == 3 * engine.plan.ssd_nbytes_per_token
            assert embeddings > 0


def bytes_read(engine: Engine, use: Callable[[np.ndarray], Any]) -> int:
    """Bytes from the SSD for what `use` needs when it is called with each of three tokens."""
    before = read_ahead(engine)
    engine.store.reset_stats()
    for token in (3, 4, 5):
        use(np.array([token], np.int32))
    after = read_ahead(engine)
    return engine.store.stats.ssd.nbytes + before - after


def read_ahead(engine: Engine) -> int:
    """Bytes that wait in the ring, once they have arrived and are counted."""
    ring = engine.store._ring
    if ring is None or ring._keeps_all:
        return 0
    ring.settle()
    return sum(held.stop - held.start for held in ring._held)


@pytest.mark.parametrize("policy", ["atu", "lru", "pinned"])
def test_every_upgrade_is_served_by_one_tier(deep_bundle: Bundle, policy: str) -> None:
    mix = MIXES["5/15/80"]
    counts = mix.counts(700)
    dram = plan_of(deep_bundle, options_for(mix)).used_dram - (1 << 20)
    with Engine(deep_bundle, options_for(mix, policy=policy, dram=dram)) as engine:
        engine.model.forward(PROMPT)
        engine.store.reset_stats()
        for token in (3, 4, 5):
            engine.model.forward(np.array([token], np.int32))
        served = engine.store.stats.upgrades
    for plane in ("int8", "fp16"):
        assert served[plane].total >= 3 * 8 * counts[plane]
        assert served[plane].dram + served[plane].ssd > 0


def test_with_memory_for_everything_at_most_embeddings_are_read(deep_bundle: Bundle) -> None:
    with Engine(deep_bundle, options_for(MIXES["5/15/80"])) as engine:
        decode(engine)
        read = bytes_read(engine, engine.model.forward)
        assert read == bytes_read(engine, engine.store.embed)


def test_options_that_mean_nothing(deep_bundle: Bundle) -> None:
    for changes in ({"policy": "magic"}, {"ctx_size": 100_000}):
        with pytest.raises(UsageError):
            plan_of(deep_bundle, options_for(MIXES["0/25/75"], **changes))


def test_stats_are_a_snapshot(deep_bundle: Bundle) -> None:
    options = options_for(Mix(100, 0, 0))
    options = replace(options, dram=smallest_dram(deep_bundle, options))
    with Engine(deep_bundle, options) as engine:
        engine.model.forward(np.asarray([1, 2], np.int32))
        before = engine.store.stats
        known = before.ssd.nbytes
        engine.model.forward(np.asarray([3], np.int32))
        assert engine.store.stats.ssd.nbytes > known == before.ssd.nbytes


@pytest.mark.parametrize("mix", [Mix(100, 0, 0), Mix(0, 0, 100)], ids=str)
def test_with_memory_to_spare_embeddings_are_not_read(deep_bundle: Bundle, mix: Mix) -> None:
    plan = plan_of(deep_bundle, options_for(mix))
    assert plan.holds_embed
    with Engine(deep_bundle, options_for(mix)) as engine:
        expected = decode(engine)
        assert bytes_read(engine, engine.model.forward) == 0
    less = options_for(mix, dram=plan.used_dram - 1)
    with Engine(deep_bundle, less) as engine:
        assert not engine.plan.holds_embed
        assert same(decode(engine), expected)
        assert bytes_read(engine, engine.store.embed) > 0


LONG = [(5 * i * i + i) % 300 for i in range(45)]


@pytest.mark.parametrize("kernel", ["auto", "torch"])
@pytest.mark.parametrize("mix", [Mix(100, 0, 0), Mix(5, 15, 80), Mix(0, 0, 100)], ids=str)
def test_a_long_prompt_does_not_see_the_tiers(
    deep_bundle: Bundle, mix: Mix, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole layers and heads, then pieces of them."""
    options = options_for(mix, ctx_size=64, kernel=kernel)
    found = []
    for dram in [GiB, *budgets(deep_bundle, options)]:
        if dram != GiB:
            monkeypatch.setattr("m2c.model.footprint.PIECE_NBYTES", 1)
        with Engine(deep_bundle, replace(options, dram=dram)) as engine:
            batch = engine.model.forward(np.asarray(LONG, np.int32), all_logits=True)
            one = engine.model.forward(np.asarray([7], np.int32))
            found.append(torch.cat((batch, one[None])))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_every_device_decodes_like_the_first(deep_bundle: Bundle, device: str) -> None:
    """On a GPU: the same greedy tokens as the torch kernels on the CPU. Runs where there is one."""
    runs = []
    for options in (
        options_for(Mix(0, 25, 75), kernel="torch"),
        options_for(Mix(0, 25, 75), kernel="torch", device=device, hbm=64 << 20),
    ):
        with Engine(deep_bundle, options) as engine:
            runs.append(decode(engine)[0])
    assert runs[0] == runs[1]
