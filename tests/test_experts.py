"""A mixture of experts: the same bits wherever an expert lies, within the memory that was given."""

import json
import shutil
from dataclasses import replace
from itertools import islice
from math import prod
from pathlib import Path
from random import Random
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from command_line import m2c
from running import TOKENS, GiB, Run, decode, options_for, plan_of, same, smallest_dram
from test_store_failures import flip
from tiny_models import (
    CONFIG,
    IDS,
    digest,
    job_for,
    profile_folder,
    run_pack,
    run_repair,
    write_checkpoint,
)
from trials import trials

from m2c import encode, speculate
from m2c.bundle.bundle import Bundle, open_bundle
from m2c.bundle.importance import write_importance
from m2c.bundle.shard import BLOCK, PAGE
from m2c.check import check_bundle, compare_with_source
from m2c.contents import config_of, importance_of
from m2c.engine import Engine, RunOptions
from m2c.errors import BadInput, UsageError
from m2c.expert_profile import ENOUGH
from m2c.generate import generate_step, prefill
from m2c.kernels.dispatch import gather_ffn
from m2c.model import experts
from m2c.model.checkpoint import HfCheckpoint, open_checkpoint
from m2c.model.config import ModelConfig
from m2c.model.experts import exact_rows
from m2c.model.footprint import RunShape, batch_tokens, footprint_of_bundle, footprint_of_config
from m2c.model.mix import Mix
from m2c.model.tensors import dense_matrices, parameter_count, router_name, small_tensors
from m2c.model.weights import vector_tensors
from m2c.modes import exact_options
from m2c.pack import PackJob
from m2c.sampling import Sampler, SamplingParams
from m2c.speculate import Speculator
from m2c.tiers.expert_plan import ExpertFact
from m2c.tiers.policies import POLICY_NAMES
from m2c.tiers.ssd import THREADS

EXPERTS, ACTIVE, SIZE, LAYERS = 6, 2, 600, 3
SHAPE: dict[str, Any] = {
    "model_type": "mixtral", "num_local_experts": EXPERTS, "num_experts_per_tok": ACTIVE,
    "intermediate_size": SIZE, "num_hidden_layers": LAYERS, "hidden_size": 120, "head_dim": 24,
}  # fmt: skip
SHARED_SIZE = 700
SHARED: dict[str, Any] = {
    **SHAPE, "model_type": "qwen2_moe", "num_experts": EXPERTS, "moe_intermediate_size": SIZE,
    "shared_expert_intermediate_size": SHARED_SIZE,
}  # fmt: skip
SHAPES = {"plain": SHAPE, "shared": SHARED}
MIXES = {"fp16": Mix(100, 0, 0), "int8": Mix(0, 100, 0), "int4": Mix(0, 0, 100)}
every_precision = pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
# the first expert of each token above the second; tests/test_expert_mixes.py has more
MIXED = {"0/50/50": Mix(0, 50, 50), "50/0/50": Mix(50, 0, 50)}
every_mix = pytest.mark.parametrize("mix", (MIXES | MIXED).values(), ids=MIXES | MIXED)


@pytest.fixture(scope="module", params=SHAPES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts") / "checkpoint"
    return write_checkpoint(folder, SHAPES[request.param])


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Bundle:
    run_pack(job_for(checkpoint), checkpoint.parent / "bundle.m2c")
    return open_bundle(checkpoint.parent / "bundle.m2c")


@pytest.fixture(scope="module")
def expected(bundle: Bundle) -> dict[Mix, Run]:
    """With every expert in memory."""
    found = {}
    for mix in (MIXES | MIXED).values():
        with Engine(bundle, options_for(mix)) as engine:
            assert engine.plan.expert_slots is None
            found[mix] = decode(engine)
    return found


def least(bundle: Bundle, options: RunOptions) -> int:
    """The smallest --dram, which leaves no slot for experts beyond those under way."""
    dram = smallest_dram(bundle, options)
    assert plan_of(bundle, replace(options, dram=dram)).expert_slots == 0
    return dram


def with_slots(bundle: Bundle, options: RunOptions, slots: int) -> RunOptions:
    dram = least(bundle, options)
    facts = plan_of(bundle, options).footprint.experts
    assert facts is not None
    found = replace(options, dram=dram + (slots + 1) * facts.slot_nbytes - 1)
    return found


# -- the same bits ---------------------------------------------------------------------------------


@every_mix
def test_memory_does_not_change_a_bit(bundle: Bundle, expected: dict[Mix, Run], mix: Mix) -> None:
    """From no expert kept to all; cold, then once more warm."""
    slots = []
    options = options_for(mix)
    for count in (0, 1, 4, 7):
        with Engine(bundle, with_slots(bundle, options, count)) as engine:
            assert engine.plan.expert_slots is not None
            slots.append(engine.plan.expert_slots)
            assert same(decode(engine), expected[mix])
            assert same(decode(engine), expected[mix])
            assert all(hits.ssd > 0 for hits in engine.store.stats.upgrades.values())
    assert slots == sorted(set(slots))


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_policies_do_not_change_a_bit(
    bundle: Bundle, expected: dict[Mix, Run], policy: str
) -> None:
    mix = MIXES["int4"]
    options = with_slots(bundle, options_for(mix, policy=policy), 5)
    with Engine(bundle, options) as engine:
        assert engine.plan.policy == policy
        assert same(decode(engine), expected[mix])
        hits = engine.store.stats.upgrades["experts"]
        assert hits.dram > 0
        assert hits.ssd > 0


@every_mix
def test_three_tiers_do_not_change_a_bit(
    bundle: Bundle, expected: dict[Mix, Run], mix: Mix
) -> None:
    """HBM with everything but the experts, and with them; DRAM scarce and plenty."""
    most = plan_of(bundle, options_for(mix, hbm=GiB)).used_hbm
    facts = plan_of(bundle, options_for(mix, hbm=GiB)).footprint.experts
    assert facts is not None
    for hbm in (GiB, most - 1):
        whole = plan_of(bundle, options_for(mix, hbm=hbm))
        assert (whole.expert_slots is None) == (hbm == GiB)
        need = smallest_dram(bundle, options_for(mix, hbm=hbm))
        for dram in (need, need + 5 * facts.slot_nbytes):
            with Engine(bundle, options_for(mix, hbm=hbm, dram=dram)) as engine:
                assert engine.plan.used_hbm <= hbm
                assert engine.plan.used_dram <= dram
                assert same(decode(engine), expected[mix])


@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("drafts", [True, False])
def test_exact_mode_gives_the_tokens_of_one_by_one_decoding_from_the_ssd(
    bundle: Bundle, precision: str, drafts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafts from INT4 planes in memory with experts above them on the SSD, and from the text."""
    monkeypatch.setattr(speculate.Depth, "again", lambda _, sure, following=None: len(sure) < 3)
    if drafts:
        monkeypatch.setattr(speculate.Lookup, "propose", lambda *_: [])
    options = exact_options(options_for(MIXES["int4"], ctx_size=64), precision)
    greedy = Sampler(SamplingParams())
    ids = [1, 2, 3, 1, 2, 3, 1, 2, 3]
    with Engine(bundle, replace(options, speculate=False)) as engine:
        known = list(islice(generate_step(engine.model, ids, greedy), 24))
    for dram in range(2 << 20, 60 << 20, 1 << 19):
        try:
            plan = plan_of_speculative(bundle, replace(options, dram=dram))
        except BaseException:
            continue
        if plan.expert_slots is not None and (plan.footprint.draft is not None) == drafts:
            break
    else:
        pytest.fail("no budget gives this way of drafting")
    with Engine(bundle, replace(options, dram=dram)) as engine:
        assert (engine.draft is not None) == drafts
        speculator = Speculator(engine.model, engine.draft, greedy, engine.shape.at_once)
        found = list(speculator.tokens(prefill(engine.model, ids), ids, 24))
        assert engine.store.stats.upgrades["experts"].ssd > 0
    assert found == known


def plan_of_speculative(bundle: Bundle, options: RunOptions) -> Any:
    from m2c.modes import planner_of_bundle

    return planner_of_bundle(bundle).plan(options)[1]


@pytest.mark.campaign
def test_any_budget_policy_and_batching_gives_the_same_tokens(
    bundle: Bundle, expected: dict[Mix, Run]
) -> None:
    kind = "-shared" if config_of(bundle).shared_expert_intermediate_size else ""
    for trial in trials(f"moe-tiers{kind}", ci=12, campaign=20_000):
        with trial as seed:
            random = Random(seed)
            mix = random.choice(list((MIXES | MIXED).values()))
            options = options_for(
                mix, policy=random.choice(POLICY_NAMES), threads=random.randint(1, 3)
            )
            slots = random.randrange(8)
            with Engine(bundle, with_slots(bundle, options, slots)) as engine:
                for _ in range(random.randint(1, 3)):
                    # what is in the slots before must not matter
                    engine.model.kv.truncate(0)
                    noise = [random.randrange(300) for _ in range(random.randint(1, 16))]
                    engine.model.forward(np.array(noise, np.int32))
                assert same(decode(engine), expected[mix])


# -- the cap ---------------------------------------------------------------------------------------


@every_mix
def test_the_budget_is_kept_and_what_is_planned_is_allocated(bundle: Bundle, mix: Mix) -> None:
    options = options_for(mix)
    before, most = -1, plan_of(bundle, options).used_dram
    for dram in np.linspace(least(bundle, options), most, 40).astype(int).tolist():
        plan = plan_of(bundle, replace(options, dram=dram))
        assert plan.used_dram <= dram
        if plan.expert_slots is not None:
            assert plan.expert_slots >= before
            before = plan.expert_slots
    with Engine(bundle, with_slots(bundle, options, 4)) as engine:
        cache = engine.store._experts
        assert cache is not None
        assert len(cache.memory.buffer) <= engine.plan.experts_nbytes
    assert plan_of(bundle, replace(options, dram=most)).expert_slots is None


def test_what_is_read_a_token_is_what_the_plan_expects_of_one_that_misses_all(
    bundle: Bundle,
) -> None:
    options = with_slots(bundle, options_for(MIXES["int4"]), 0)
    with Engine(bundle, options) as engine:
        engine.model.forward(np.array([5], np.int32))
        engine.store.reset_stats()
        engine.model.forward(np.array([9], np.int32))
        hits, read = engine.store.stats.upgrades["experts"], engine.store.stats.ssd.nbytes
        assert (hits.dram, hits.ssd) == (0, ACTIVE * LAYERS)
        expected = engine.plan.expert_reads()
        assert (
            0.8 * expected
            < read - engine.plan.streamed_nbytes_per_token
            < 1.25 * expected + 2 * BLOCK
        )


def test_popular_experts_are_missed_less() -> None:
    plain = ExpertFact(2, 4, (2,), 100, (100,))
    shares = ((0.9, 0.1, 0.5, 0.5), (0.25, 0.75, 0.5, 0.5))
    known = replace(plain, popularity=shares)
    assert known.ranking[:2] == (0, 5)
    assert plain.ranking[:3] == (0, 4, 1)
    assert plain.missed(0) == known.missed(0) == pytest.approx([4])
    assert known.missed(2) == pytest.approx([4 - 0.9 - 0.75])
    assert known.missed(8) == [0]
    assert 4 < plain.missed(0, 2)[0] < 8 == round(plain.missed(0, 1000)[0])


def test_what_every_token_uses_is_in_memory_before_any_expert(
    bundle: Bundle, expected: dict[Mix, Run]
) -> None:
    """A shared expert is read once; after that only experts are."""
    mix = MIXES["int4"]
    options = options_for(mix)
    facts = plan_of(bundle, options).footprint.experts
    assert facts is not None
    most = plan_of(bundle, options).used_dram
    with Engine(bundle, replace(options, dram=most - facts.slot_nbytes)) as engine:
        kinds = [block.kind for block in engine.plan.footprint.blocks]
        resident = {kinds[i] for i in engine.plan.in_dram}
        assert (resident, engine.plan.streamed) == ({"dense", "head"}, ())
        assert engine.plan.expert_slots is not None
        assert 0 < engine.plan.expert_slots < facts.total
        engine.store.reset_stats()
        assert same(decode(engine), expected[mix])
        stats = engine.store.stats
    embeddings = (1 + TOKENS) * 2 * BLOCK
    assert 0 < stats.ssd.nbytes <= stats.upgrades["experts"].ssd * facts.slot_nbytes + embeddings
    dense = [
        block.streamed_nbytes for block in engine.plan.footprint.blocks if block.kind != "neurons"
    ]
    assert sum(dense) > 2 * BLOCK  # one more pass over these would have been seen


def test_sizes_by_formula_are_those_of_the_bundle(bundle: Bundle, checkpoint: Path) -> None:
    """Of what is no expert, to the byte: in planes without frames, and decoded."""
    config, known = config_of(bundle), importance_of(bundle)
    assert (config.shared_expert_intermediate_size > 0) == (config.model_type == "qwen2_moe")
    for precision, drafts in (("int4", False), ("int8", False), ("int8", True), ("fp16", False)):
        shape = RunShape(MIXES[precision], precision, 32, "f16", 1, drafts=drafts)
        true = footprint_of_bundle(bundle, config, shape, known.hit_share)
        made = footprint_of_config(config, shape, bundle.manifest.exact_type)
        assert true.experts is not None
        assert true.experts.shared == (config.shared_expert_intermediate_size > 0)
        pairs = zip(true.blocks, made.blocks, strict=True)
        for one, other in (pair for pair in pairs if pair[0].kind == "dense"):
            assert one.resident_nbytes == other.resident_nbytes
            assert precision == "fp16" or one.streamed_nbytes == other.streamed_nbytes
    # the last was fp16, decoded: 2 bytes a weight of attention and of the shared expert
    matrices = dense_matrices(config).items()
    attention = sum(n * m for name, (n, m) in matrices if name.startswith("model.layers.0."))
    weights = attention + 3 * config.shared_expert_intermediate_size * config.hidden_size
    assert true.blocks[0].resident_nbytes == 2 * weights
    # and pack counts every weight that is in a plane
    small = sum(prod(size) for size in small_tensors(config).values())
    job = PackJob(open_checkpoint(checkpoint), known, {}, "bf16", "", 0.0)
    assert job.weights == parameter_count(config) - small


def test_the_larger_expert_decides_how_many_tokens_share_a_batch() -> None:
    config = ModelConfig.from_hf({**CONFIG, **SHARED})
    large = replace(config, shared_expert_intermediate_size=50_000)
    plain = replace(config, intermediate_size=50_000)
    assert batch_tokens(large) == batch_tokens(plain) < batch_tokens(config)


# -- failures --------------------------------------------------------------------------------------


def test_a_damaged_expert_ends_the_pass_and_is_not_kept(
    bundle: Bundle, expected: dict[Mix, Run], tmp_path: Path
) -> None:
    shutil.copytree(bundle.path, tmp_path / "copy.m2c")
    mix, layer = MIXES["int4"], 0
    options = with_slots(bundle, options_for(mix), 3)
    path = tmp_path / f"copy.m2c/neurons/{layer:05d}.int4"
    blocks = range(PAGE + 100, path.stat().st_size - PAGE, BLOCK)
    with Engine(open_bundle(tmp_path / "copy.m2c"), options) as engine:
        for at in blocks:
            flip(path, at)
        name = rf"neurons/{layer:05d}\.int4: damaged at byte"
        for _ in range(3):
            with pytest.raises(BadInput, match=name):
                engine.model.forward(np.array(IDS[:16], np.int32))
        for at in blocks:
            flip(path, at)
        assert same(decode(engine), expected[mix])


@pytest.mark.parametrize("taken", [0, 1])
def test_experts_that_nobody_waits_for_are_not_kept(
    bundle: Bundle, expected: dict[Mix, Run], taken: int
) -> None:
    """Whoever asked for several takes the first, or none, and goes before the others are there."""
    mix, go_on = MIXES["int4"], Event()
    with Engine(bundle, with_slots(bundle, options_for(mix), 7)) as engine:
        assert engine.store._experts is not None
        held = set(engine.store._experts.held(0))
        assert 0 < len(held) < EXPERTS
        ids = np.array([min(held), *sorted(set(range(EXPERTS)) - held)], np.int32)
        busy = [engine.store.reader._helpers.submit(go_on.wait) for _ in range(THREADS)]
        rows = engine.store.experts(0, ids, np.ones_like(ids))
        assert len(list(islice(rows, taken))) == taken
        del rows
        go_on.set()
        assert all(one.result() for one in busy)
        assert same(decode(engine), expected[mix])


def test_experts_are_read_while_the_shared_one_is_computed(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after it: it takes as long as several of them."""
    if not config_of(bundle).shared_expert_intermediate_size:
        pytest.skip("there is none")
    with Engine(bundle, with_slots(bundle, options_for(MIXES["int4"]), 0)) as engine:
        reads = list[int]()

        def spied(x: torch.Tensor, rows: Any, *given: Any, **more: Any) -> None:
            if len(rows) == SHARED_SIZE:
                reads.append(engine.store.stats.upgrades["experts"].ssd)
            gather_ffn(x, rows, *given, **more)

        monkeypatch.setattr(experts, "gather_ffn", spied)
        engine.model.forward(np.array([5], np.int32))
        assert reads == [ACTIVE, 2 * ACTIVE, 3 * ACTIVE]


def test_an_expert_whose_read_cannot_begin_is_not_kept(
    bundle: Bundle, expected: dict[Mix, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    mix = MIXES["int4"]
    with Engine(bundle, with_slots(bundle, options_for(mix), 7)) as engine:
        assert engine.store._experts is not None
        held = engine.store._experts.held(0)
        absent = np.array(sorted(set(range(EXPERTS)) - set(held)), np.int32)
        with monkeypatch.context() as patch:
            patch.setattr(engine.store.reader, "_open", lambda path: path.no_such_thing)
            with pytest.raises(AttributeError):
                next(engine.store.experts(0, absent, np.ones_like(absent)))
        assert same(decode(engine), expected[mix])


# -- router, profile, pack -------------------------------------------------------------------------


def test_bf16_rows_add_up_to_the_router(checkpoint: Path) -> None:
    plain = torch.randn(5, 70, generator=torch.Generator().manual_seed(1))
    rows = exact_rows(plain)
    assert len(rows) == 15
    assert torch.equal(sum(rows.weights.float().split(5)), plain)
    stored = vector_tensors(open_checkpoint(checkpoint))[router_name(0)]
    assert len(exact_rows(stored)) == EXPERTS  # BF16 already


def test_an_expert_that_no_token_uses_is_judged_by_all_tokens(tmp_path: Path) -> None:
    """Two routes are the same, so the second is never taken."""
    folder = write_checkpoint(tmp_path / "a", {**SHAPE, "num_experts_per_tok": 1})
    checkpoint = open_checkpoint(folder)
    read = type(checkpoint).read

    def twins(self: Any, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        tensor = read(self, name, start, stop)
        if name.endswith("mlp.gate.weight"):
            tensor[3] = tensor[1]
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(checkpoint), "read", twins)
        known = profile_folder(folder).layers
    for layer in known:
        shares = layer.frequency[::SIZE]
        assert shares[3] == 0
        assert shares.sum() == pytest.approx(1)
        own = slice(3 * SIZE, 4 * SIZE)
        assert (layer.mean[own] > 0).all()
        assert layer.down_directions[own].any()
        assert sorted(layer.order[own]) == list(range(own.start, own.stop))
        assert (np.diff(layer.mean[layer.order[own]]) <= 0).all()
    assert len(IDS) > ENOUGH


def test_pack_keeps_experts_apart_whatever_the_threads(
    checkpoint: Path, bundle: Bundle, tmp_path: Path
) -> None:
    run_pack(job_for(checkpoint), tmp_path / "again.m2c", threads=3)
    assert digest(tmp_path / "again.m2c") == digest(bundle.path)
    assert list(check_bundle(bundle.path, read_data=True)) == []
    assert list(compare_with_source(bundle, open_checkpoint(checkpoint))) == []


def test_check_compares_every_matrix_with_the_source(
    checkpoint: Path, bundle: Bundle, tmp_path: Path
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    other = open_checkpoint(write_checkpoint(tmp_path / "other", config, seed=1))
    found = [" ".join(line.split(": ")[1].split()) for line in compare_with_source(bundle, other)]
    sections = {
        f"{Path(name).parent} {int(Path(name).stem)} {section.name}"
        for name, index in bundle.shards.items() if Path(name).stem.isdigit()
        for section in index.header.sections
    }  # fmt: skip
    assert sections <= set(found)


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What happens to layer 1: ("read", expert), and ("wrote", 0) after records of any matrix."""
    found: list[tuple[str, int]] = []
    read, write = HfCheckpoint.read, encode._write_records

    def reading(self: Any, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        if ".layers.1.mlp.experts." in name:
            found.append(("read", int(name.split(".")[5])))
        return read(self, name, start, stop)

    def writing(*arguments: Any) -> None:
        write(*arguments)
        found.append(("wrote", 0))

    monkeypatch.setattr(HfCheckpoint, "read", reading)
    monkeypatch.setattr(encode, "_write_records", writing)
    return found


def require_one_at_a_time(order: list[tuple[str, int]]) -> None:
    """An expert's matrices are read when those of the expert before are written."""
    for expert in range(1, EXPERTS):
        assert order[order.index(("read", expert)) - 1][0] == "wrote"


def test_pack_holds_one_expert_at_a_time(
    checkpoint: Path, tmp_path: Path, order: list[tuple[str, int]]
) -> None:
    job = job_for(checkpoint)
    order.clear()
    run_pack(job, tmp_path / "a.m2c")
    require_one_at_a_time(order)


def test_repair_holds_one_expert_at_a_time(
    checkpoint: Path, bundle: Bundle, tmp_path: Path, order: list[tuple[str, int]]
) -> None:
    copy, job = tmp_path / "copy.m2c", job_for(checkpoint)
    shutil.copytree(bundle.path, copy)
    flip(copy / "neurons" / "00001.int8", PAGE)
    order.clear()
    assert run_repair(job, copy) == ["neurons/00001.int8"]
    assert digest(copy) == digest(bundle.path)
    require_one_at_a_time(order)


def test_an_order_that_mixes_experts_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    known = profile_folder(checkpoint)
    first = known.layers[0]
    swapped = first.order.copy()
    swapped[[0, SIZE]] = swapped[[SIZE, 0]]
    wrong = replace(known, layers=[replace(first, order=swapped), *known.layers[1:]])
    with pytest.raises(UsageError, match="does not belong"):
        run_pack(job_for(checkpoint, wrong), tmp_path / "a.m2c")


# -- command line ----------------------------------------------------------------------------------


def test_commands_take_a_mixture_of_experts(checkpoint: Path, tmp_path: Path) -> None:
    write_importance(tmp_path / "known.safetensors", profile_folder(checkpoint))
    ssd = tmp_path / "ssd"
    ssd.mkdir()
    base = ("pack", checkpoint, "--ssd", ssd, "--profile", tmp_path / "known.safetensors")
    assert m2c(*base, "--name", "eight", "--bits", "9").code == 0
    assert open_bundle(ssd / "eight.m2c").manifest.mix.percent == (0, 100, 0)
    packed = m2c(*base)
    assert packed.code == 0, packed.err
    path = packed.out.strip()
    assert open_bundle(Path(path)).manifest.mix.percent == (0, 0, 100)
    run = ("run", path, "--prompt", "a", "--max-tokens", "4", "--threads", "1")
    plenty = m2c(*run, "--mode", "mixed")
    assert plenty.code == 0, plenty.err
    scarce = m2c(*run, "--mode", "mixed", "--dram", "24MiB")
    assert scarce.out == plenty.out
    dropped = m2c(*run, "--drop", "10")
    assert dropped.code == 2
    assert "--drop 10: nothing of a mixture of experts can be dropped" in dropped.reason
    auto = m2c(*run)
    assert auto.code == 0, auto.err
    assert m2c("check", path, "--source", checkpoint).code == 0
    shown = m2c("show", path)
    assert shown.code == 0, shown.err
    planned = m2c("plan", path, "--dram", "24MiB", "--mode", "mixed")
    assert "experts: 2 of 6 a layer and token" in planned.out


@pytest.mark.parametrize(
    ("alias", "mix"),
    [
        ("qwen3-30b-a3b", "0/25/75"), ("mixtral-8x7b", "0/0/100"),
        ("qwen1.5-moe-a2.7b", "0/25/75"), ("qwen2-57b-a14b", "0/25/75"),
    ],
)  # fmt: skip
def test_a_plan_needs_no_weights(alias: str, mix: str) -> None:
    planned = m2c("plan", alias, "--dram", "8GiB", "--mode", "mixed", "--ssd-speed", "2GB",
                  "--dram-speed", "20GB")  # fmt: skip
    assert planned.code == 0, planned.err
    assert f"mix {mix} (FP16/INT8/INT4), attention and head int8" in planned.out
    assert "cached in DRAM (LRU)" in planned.out
