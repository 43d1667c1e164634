"""A mixture of experts at several precisions: the router's weights say which expert gets which."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from command_line import m2c
from running import PROMPT, GiB, Run, decode, options_for, plan_of, same
from test_experts import with_slots
from test_store_failures import flip
from tiny_models import IDS, job_for, profile_folder, run_pack, write_checkpoint
from trials import trials

from m2c.bundle.bundle import Bundle, open_bundle
from m2c.bundle.importance import Importance, write_importance
from m2c.bundle.shard import BLOCK, PAGE
from m2c.contents import config_of, importance_of, vectors_of
from m2c.engine import Engine, plan_without_weights
from m2c.errors import BadInput
from m2c.kernels.dispatch import gather_ffn
from m2c.kernels.native import LIBRARY
from m2c.kernels.reference import matmul_rows, route
from m2c.kernels.rows import PackedRows
from m2c.kernels.workers import Workers
from m2c.mixsearch import expert_candidates, search_by_error
from m2c.model.aliases import ALIASES
from m2c.model.experts import expert_ffn, planes_by_rank, router_of
from m2c.model.mix import Mix
from m2c.predict import Speeds, expert_decode_s, predicted_tps
from m2c.tiers.expert_parts import expert_nbytes, parts_of
from m2c.tiers.experts import ExpertCache
from m2c.tiers.policies import POLICY_NAMES
from m2c.tiers.store import FFN

EXPERTS, ACTIVE, SIZE, LAYERS = 24, 8, 600, 2
SHAPE: dict[str, Any] = {
    "model_type": "qwen3_moe", "num_experts": EXPERTS, "num_experts_per_tok": ACTIVE,
    "moe_intermediate_size": SIZE, "num_hidden_layers": LAYERS, "hidden_size": 120, "head_dim": 24,
    "norm_topk_prob": True,
}  # fmt: skip
QUARTER = Mix(0, 25, 75)
MIXES = [QUARTER, Mix(25, 25, 50), Mix(50, 50, 0), Mix(25, 0, 75)]
every_mix = pytest.mark.parametrize("mix", MIXES, ids=map(str, MIXES))
KERNELS = ["torch", *(["scalar", "auto"] if LIBRARY.exists() else [])]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("mixes") / "checkpoint", SHAPE)


@pytest.fixture(scope="module")
def known(checkpoint: Path) -> Importance:
    return profile_folder(checkpoint)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, known: Importance) -> Bundle:
    run_pack(job_for(checkpoint, known), checkpoint.parent / "bundle.m2c")
    return open_bundle(checkpoint.parent / "bundle.m2c")


@pytest.fixture(scope="module")
def expected(bundle: Bundle) -> dict[Mix, Run]:
    """With every expert in memory."""
    found = {}
    for mix in MIXES:
        with Engine(bundle, options_for(mix)) as engine:
            assert engine.plan.expert_slots is None
            found[mix] = decode(engine)
    return found


# -- which expert gets which precision -------------------------------------------------------------


@pytest.mark.parametrize(
    ("mix", "experts", "levels"),
    [
        ("0/25/75", 8, [2, 2, 1, 1, 1, 1, 1, 1]),
        ("0/50/50", 2, [2, 1]),
        ("0/25/75", 2, [2, 1]),  # half an expert is rounded up
        ("0/24/76", 2, [1, 1]),
        ("5/15/80", 8, [2, 1, 1, 1, 1, 1, 1, 1]),
        ("6.25/0/93.75", 8, [3, 1, 1, 1, 1, 1, 1, 1]),
        ("50/50/0", 3, [3, 3, 2]),
        ("25/25/50", 4, [3, 2, 1, 1]),
        ("1/98/1", 4, [2, 2, 2, 2]),
        ("0/0/100", 1, [1]),
        ("100/0/0", 2, [3, 3]),
    ],
)
def test_shares_are_of_whole_experts_rounded_half_up(
    mix: str, experts: int, levels: list[int]
) -> None:
    asked = Mix.parse(mix)
    assert list(asked.by_rank(experts)) == levels
    assert asked.among(experts).among(experts) == asked.among(experts)
    assert asked.among(experts).is_uniform == (len(set(levels)) == 1)


def test_any_mix_has_a_level_for_every_expert() -> None:
    for experts in range(1, 65):
        for fp16 in range(0, 101, 3):
            for int8 in range(0, 101 - fp16, 4):
                levels = Mix(fp16, int8, 100 - fp16 - int8).by_rank(experts)
                assert len(levels) == experts
                assert list(levels) == sorted(levels, reverse=True)
                assert abs(levels.count(3) - experts * fp16 / 100) <= 0.5 + 1e-6


def test_the_largest_weights_get_the_most_planes_and_of_equals_the_lower_expert() -> None:
    weights = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25], [0.1, 0.3, 0.3, 0.3]])
    found = planes_by_rank(weights, (3, 2, 1, 1))
    assert found.tolist() == [[1, 3, 1, 2], [3, 2, 1, 1], [1, 3, 2, 1]]
    for token, planes in zip(weights, found, strict=True):  # whoever shares the call
        assert torch.equal(planes_by_rank(token[None], (3, 2, 1, 1))[0], planes)
    assert planes_by_rank(weights, (2, 2, 2, 2)).tolist() == [[2] * 4] * 3


@every_mix
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_layer_is_the_sum_of_its_experts_each_at_its_own_precision(
    bundle: Bundle, known: Importance, mix: Mix, kernel: str
) -> None:
    """Of tokens together and of each alone, against experts put together by hand."""
    config = config_of(bundle)
    router = router_of(config, vectors_of(bundle, config), 0)
    x, levels = torch.from_numpy(known.layers[0].sample[:9]), mix.by_rank(ACTIVE)
    workers = Workers(2, kernel=kernel)
    with Engine(bundle, options_for(mix, kernel=kernel)) as engine:

        def rows_of(ids: Any, planes: Any) -> Iterator[Any]:
            return engine.store.experts(0, ids, planes)

        norm = engine.model._layers[0].ffn_norm
        more: dict[str, Any] = {"norm": norm, "act": "silu", "workers": workers, "stay": True}
        together = expert_ffn(x, router, rows_of, levels=levels, **more)
        for i, token in enumerate(x):
            alone = expert_ffn(token[None], router, rows_of, levels=levels, **more)
            if kernel != "torch":  # whose sums depend on how many tokens share a product
                assert torch.equal(alone[0], together[i])
            assert torch.allclose(alone[0], together[i], atol=1e-4)
            assert torch.equal(alone, by_hand(engine, token[None], router, levels, workers))
    workers.close()


def by_hand(
    engine: Engine, x: torch.Tensor, router: Any, levels: tuple[int, ...], workers: Workers
) -> torch.Tensor:
    """One token's experts, looked up in the layer's own rows."""
    from m2c.kernels import dispatch

    norm = engine.model._layers[0].ffn_norm
    chosen, weights, _ = dispatch.route(x, router, workers, norm=norm)
    by_weight = sorted(range(ACTIVE), key=lambda i: (-float(weights[0, i]), i))
    (uses,) = engine.store.uses("neurons", 0)
    whole, out = uses[FFN], x.clone()
    assert isinstance(whole, PackedRows)
    for i, expert in enumerate(chosen[0].tolist()):
        rows, planes = whole, levels[by_weight.index(i)]
        own = slice(expert * SIZE, (expert + 1) * SIZE)
        if planes == 3:
            one = whole.part(own.start, own.stop)
        else:
            int8 = rows.int8[own] if planes == 2 and rows.int8 is not None else None
            one = PackedRows(rows.layout, rows.int4[own], int8)
        part = torch.zeros_like(x)
        gather_ffn(x, one, "silu", workers, norm=norm, into=part)
        out += part * weights[0, i]
    return out


@every_mix
def test_a_prompt_in_one_batch_gives_the_bits_of_token_by_token(bundle: Bundle, mix: Mix) -> None:
    """Though two of its tokens want one expert at different precisions."""
    with Engine(bundle, with_slots(bundle, options_for(mix), 9)) as engine:
        asked = list[tuple[int, ...]]()
        together = engine.model.forward(PROMPT, all_logits=True)
        engine.model.kv.truncate(0)
        given = engine.store.experts

        def spied(layer: int, ids: Any, planes: Any) -> Iterator[Any]:
            asked.append(tuple(planes.tolist()))
            return given(layer, ids, planes)

        engine.store.experts = spied  # type: ignore[method-assign]
        apart = [engine.model.forward(PROMPT[i : i + 1]) for i in range(len(PROMPT))]
        assert {tuple(sorted(one, reverse=True)) for one in asked} == {mix.by_rank(ACTIVE)}
    if LIBRARY.exists():
        assert torch.equal(together, torch.stack(apart))


@every_mix
@pytest.mark.parametrize("slots", [0, 5, 20])
def test_memory_does_not_change_a_bit(
    bundle: Bundle, expected: dict[Mix, Run], mix: Mix, slots: int
) -> None:
    """Two of these planes of an expert may be in memory, or only one."""
    for policy in ("lru", "pinned"):
        options = with_slots(bundle, options_for(mix, policy=policy), slots)
        with Engine(bundle, options) as engine:
            for _ in range(2):
                assert same(decode(engine), expected[mix])
            assert engine.plan.expert_slots is not None
            assert engine.plan.expert_slots >= min(slots, 1)


@pytest.mark.campaign
def test_any_tiers_policy_and_batching_give_the_same_tokens(
    bundle: Bundle, expected: dict[Mix, Run]
) -> None:
    for trial in trials("moe-mixes", ci=8, campaign=5_000):
        with trial as seed:
            random = Random(seed)
            mix = random.choice(MIXES)
            options = options_for(
                mix, policy=random.choice(POLICY_NAMES), threads=random.randint(1, 3),
                hbm=random.choice([None, None, GiB]),
            )  # fmt: skip
            if options.hbm:
                options = replace(options, hbm=plan_of(bundle, options).used_hbm - 1)
            with Engine(bundle, with_slots(bundle, options, random.randrange(40))) as engine:
                assert engine.plan.expert_slots is not None
                for _ in range(random.randint(1, 3)):
                    engine.model.kv.truncate(0)
                    noise = [random.randrange(300) for _ in range(random.randint(1, 16))]
                    engine.model.forward(np.array(noise, np.int32))
                assert same(decode(engine), expected[mix])


# -- what is read ----------------------------------------------------------------------------------


def test_a_token_reads_the_planes_that_its_experts_are_computed_with(bundle: Bundle) -> None:
    """With nothing of experts in memory: INT4 planes of 8, INT8 planes of 2."""
    options = options_for(QUARTER)
    held = plan_of(bundle, with_slots(bundle, options, 20))
    facts = held.footprint.experts
    assert facts is not None
    assert held.expert_slots is not None
    spare = held.expert_slots * facts.slot_nbytes + held.holds_embed * held.footprint.embed_nbytes
    with Engine(bundle, replace(options, dram=held.used_dram - spare)) as engine:
        assert (engine.plan.expert_slots, engine.plan.streamed) == (0, ())
        asked: list[tuple[int, Any, Any]] = []
        given = ExpertCache.rows

        def spied(cache: ExpertCache, layer: int, ids: Any, planes: Any) -> Iterator[Any]:
            asked.append((layer, ids, planes))
            return given(cache, layer, ids, planes)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ExpertCache, "rows", spied)
            engine.store.reset_stats()
            engine.model.forward(np.array([9], np.int32))
        stats = engine.store.stats
        assert engine.store._experts is not None
        whole = engine.store._experts.memory.whole
        assert engine.plan.expert_reads() == facts.layers * facts.used_nbytes
    assert set(stats.upgrades) == {"experts int4", "experts int8"}
    low, high = stats.upgrades["experts int4"], stats.upgrades["experts int8"]
    assert (low.dram, low.ssd) == (0, ACTIVE * LAYERS)
    assert (high.dram, high.ssd) == (0, 2 * LAYERS)
    nbytes = 0
    for layer, ids, planes in asked:
        assert sorted(planes.tolist()) == [1] * 6 + [2] * 2
        for part, block in enumerate(whole[layer]):
            nbytes += int(expert_nbytes(block, EXPERTS)[ids[planes > part]].sum())
    row = stats.ssd.nbytes - nbytes  # the token's row of the embedding, two planes
    assert 0 < row <= 4 * BLOCK
    # what INT8 of all of them would be
    alike = sum(
        int(expert_nbytes(block, EXPERTS)[ids].sum())
        for layer, ids, _ in asked
        for block in whole[layer]
    )
    assert nbytes < 0.75 * alike


def test_planes_that_most_tokens_use_come_first(bundle: Bundle) -> None:
    """INT4 of any expert before INT8 of one that is as popular, but not of one that nobody uses."""
    facts = plan_of(bundle, options_for(QUARTER)).footprint.experts
    assert facts is not None
    assert facts.uses == (ACTIVE, 2)
    place = {part: i for i, part in enumerate(facts.ranking)}
    shares = np.array(facts.popularity).ravel()
    assert len(place) == 2 * EXPERTS * LAYERS
    for expert in range(facts.of_a_part):
        assert place[expert] < place[expert + facts.of_a_part] or not shares[expert]
    hottest = facts.of_a_part + int(shares.argmax())
    for expert in np.flatnonzero(shares < shares.max() / 4 - 1e-6):
        assert place[hottest] < place[int(expert)]


def test_one_plane_of_an_expert_may_be_in_memory_while_another_is_read(bundle: Bundle) -> None:
    facts = plan_of(bundle, options_for(QUARTER)).footprint.experts
    assert facts is not None
    options = with_slots(bundle, options_for(QUARTER, policy="pinned"), facts.of_a_part)
    with Engine(bundle, options) as engine:
        engine.store.reset_stats()
        decode(engine)
        found = engine.store.stats.upgrades
    assert found["experts int4"].dram > found["experts int4"].ssd
    assert found["experts int8"].ssd > 0


def test_what_was_used_last_takes_the_place_of_what_was_not(bundle: Bundle) -> None:
    """The least popular expert in memory stays as long as it is used; others come and go."""
    every = [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
    one = np.ones(1, np.int32)
    for policy in ("lru", "pinned"):
        options = with_slots(bundle, options_for(QUARTER, policy=policy), 12)
        with Engine(bundle, options) as engine:
            cache = engine.store._experts
            assert cache is not None
            held = [place for place in every if place[1] in cache.held(place[0])]
            coldest = max(held, key=lambda place: cache._position[place[0] * EXPERTS + place[1]])
            hits = cache.stats["experts int4"]
            for place in every:
                if place in held:
                    continue
                for layer, expert in (coldest, place, place):
                    list(engine.store.experts(layer, np.array([expert], np.int32), one))
                assert coldest[1] in cache.held(coldest[0])
            others = len(every) - len(held)
            again = 1 if policy == "lru" else 0  # the second time it is there
            assert (hits.dram, hits.ssd) == ((1 + again) * others, (2 - again) * others)


def test_experts_are_held_of_all_layers_where_they_are_as_popular(bundle: Bundle) -> None:
    facts = plan_of(bundle, options_for(QUARTER)).footprint.experts
    assert facts is not None
    for shares in ((), ((ACTIVE / EXPERTS,) * EXPERTS,) * LAYERS):
        ranking = replace(facts, popularity=shares).ranking
        assert ranking[:4] == (0, EXPERTS, 1, EXPERTS + 1)


def test_the_link_is_measured_where_only_experts_cross_it(bundle: Bundle) -> None:
    options = options_for(QUARTER, hbm=GiB)
    options = replace(options, hbm=plan_of(bundle, options).used_hbm - 1)
    with Engine(bundle, with_slots(bundle, options, 20)) as engine:
        plan = engine.plan
        kinds = {plan.footprint.blocks[i].kind for i in (*plan.in_dram, *plan.streamed)}
        assert (kinds, plan.link_nbytes_per_token > 0) == (set(), True)
        assert engine.store.link_speed() > 0


def test_a_damaged_plane_ends_the_pass_and_nothing_of_it_is_kept(
    bundle: Bundle, expected: dict[Mix, Run], tmp_path: Path
) -> None:
    """The INT4 plane that had come with it is as good as before."""
    shutil.copytree(bundle.path, tmp_path / "copy.m2c")
    path = tmp_path / "copy.m2c/neurons/00001.int8"
    blocks = range(PAGE + 100, path.stat().st_size - PAGE, BLOCK)
    options = with_slots(bundle, options_for(QUARTER), 6)
    with Engine(open_bundle(tmp_path / "copy.m2c"), options) as engine:
        for at in blocks:
            flip(path, at)
        for _ in range(3):
            with pytest.raises(BadInput, match=r"neurons/00001\.int8: damaged at byte"):
                engine.model.forward(np.array(IDS[:16], np.int32))
        for at in blocks:
            flip(path, at)
        assert same(decode(engine), expected[QUARTER])
        cache = engine.store._experts
        assert cache is not None
        assert len(cache.memory.dram.spare) == cache._facts.window


def test_a_plane_whose_read_cannot_begin_takes_the_one_before_it_along(
    bundle: Bundle, expected: dict[Mix, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(bundle, with_slots(bundle, options_for(QUARTER), 6)) as engine:
        read = engine.store.reader.read

        def refuses(index: Any, *given: Any, **more: Any) -> Any:
            if index.header.plane == "int8":
                raise OSError("no such thing")
            return read(index, *given, **more)

        with monkeypatch.context() as patch:
            patch.setattr(engine.store.reader, "read", refuses)
            for _ in range(3):
                with pytest.raises(OSError, match="no such thing"):
                    engine.store.experts(1, np.arange(8, dtype=np.int32), np.full(8, 2, np.int32))
        assert same(decode(engine), expected[QUARTER])


# -- plans and predictions -------------------------------------------------------------------------


def test_a_plan_counts_what_a_token_reads_and_computes() -> None:
    """INT8 is 17 bits where INT4 is 9: 0/25/75 is between them, a quarter of the way."""
    config = ALIASES["qwen3-30b-a3b"].config()
    found = {}
    for mix in (Mix(0, 0, 100), QUARTER, Mix(0, 100, 0)):
        options = options_for(mix, dram=6 << 30, dense="int8")
        shape, plan = plan_without_weights(config, options)
        assert shape.mix == mix
        facts = plan.footprint.experts
        assert facts is not None
        blocks = facts.layers * facts.used_nbytes
        found[mix] = (
            blocks, plan.compute_nbytes_per_token, plan.expert_reads(4) / plan.expert_reads(1),
            1 / predicted_tps(plan, Speeds(2e9, 0, 20e9)),
        )  # fmt: skip
    low, mixed, high = found.values()
    for one, between, other in list(zip(low, mixed, high, strict=True))[:2]:
        assert 0.15 < (between - one) / (other - one) < 0.35
    assert low[3] < mixed[3] < high[3]
    assert 1 < mixed[2] < 4


def test_the_prediction_counts_the_decoding_of_experts_at_16_bits() -> None:
    """Not of those that lie in memory decoded."""
    config, plenty = ALIASES["mixtral-8x7b"].config(), 1 << 40
    found = {}
    for mix, dram in (
        ("50/0/50", plenty),
        ("100/0/0", 24 << 30),
        ("100/0/0", plenty),
        ("0/50/50", 1),
    ):
        shape, plan = plan_without_weights(
            config, options_for(Mix.parse(mix), dram=max(dram, 8 << 30))
        )
        assert (plan.expert_slots is None) == (dram == plenty)
        found[mix, dram] = expert_decode_s(config, shape, plan, "avx512")
    weights = 32 * 3 * 4096 * 14336
    assert found["50/0/50", plenty] == pytest.approx(weights / 0.75e9)
    assert found["100/0/0", 24 << 30] == pytest.approx(2 * weights / 0.75e9)
    assert found["100/0/0", plenty] == found["0/50/50", 1] == 0
    speeds = Speeds(0, 0, 20e9)
    slower = 1 / predicted_tps(plan, speeds, decode_s=2.0) - 1 / predicted_tps(plan, speeds)
    assert slower == pytest.approx(2.0)


def test_the_plan_is_told_in_words() -> None:
    given = ("--mode", "mixed", "--ssd-speed", "2GB", "--dram-speed", "20GB", "--dram")
    said = m2c("plan", "qwen3-30b-a3b", *given, "8GiB")
    assert said.code == 0, said.err
    assert "experts: 8 of 128 a layer and token (2 at INT8, 6 at INT4); " in said.out
    assert "of 12288 planes of experts cached in DRAM (LRU)" in " ".join(said.out.split())
    small = m2c("plan", "qwen3-30b-a3b", *given, "100MiB")
    assert small.code == 7
    named = small.reason.split("the smallest that works is --dram ")[1].split()[0]
    assert m2c("plan", "qwen3-30b-a3b", *given, named).code == 0
    top2 = m2c("plan", "mixtral-8x7b", *given, "8GiB", "--mix", "0/50/50")
    assert "experts: 2 of 8 a layer and token (1 at INT8, 1 at INT4); " in top2.out


# -- which mix -------------------------------------------------------------------------------------


def test_candidates_stay_within_the_bits() -> None:
    for active in range(1, 33):
        for bits in (4.0, 4.5, 5.5, 7.0, 9.0, 12.0):
            for mix in expert_candidates(bits, 3.1, active):
                levels = mix.by_rank(active)
                spent = sum({1: 4.5, 2: 8.5, 3: 11.6}[level] for level in levels) / active
                assert spent <= max(bits, 4.5) + 1e-6
    assert [str(mix) for mix in expert_candidates(5.5, 3.1, 8)] == ["0/25/75", "12/0/88"]
    assert [str(mix) for mix in expert_candidates(5.5, 3.1, 2)] == ["0/0/100"]


def test_the_error_of_a_mix_is_that_of_the_layers_that_it_gives(
    bundle: Bundle, known: Importance
) -> None:
    workers = Workers(1)
    mixes = [Mix(100, 0, 0), Mix(0, 100, 0), Mix(0, 50, 50), QUARTER, Mix(0, 0, 100)]
    errors = search_by_error(bundle, importance_of(bundle), mixes, workers)
    found = [error.relative_error for error in errors]
    assert found[0] == 0
    assert found == sorted(found)
    assert found[3] < 0.98 * found[4]
    assert errors[3].bits == pytest.approx(5.5)
    assert found[3] == pytest.approx(error_by_hand(bundle, known, QUARTER, workers), rel=1e-4)


def error_by_hand(bundle: Bundle, known: Importance, mix: Mix, workers: Workers) -> float:
    config, total = config_of(bundle), 0.0
    for layer in range(LAYERS):
        x = torch.from_numpy(known.layers[layer].sample)
        router = router_of(config, vectors_of(bundle, config), layer)
        chosen, weights, _ = route(matmul_rows(x, router.rows, workers), router)
        outputs = []
        for given in (mix, Mix(100, 0, 0)):
            with Engine(bundle, options_for(given, kernel="torch")) as engine:
                y = torch.zeros_like(x)
                for t in range(len(x)):
                    order = weights[t].argsort(descending=True, stable=True)
                    for level, place in zip(given.by_rank(ACTIVE), order.tolist(), strict=True):
                        ids = chosen[t, place : place + 1].numpy().astype(np.int32)
                        planes = np.array([level], np.int32)
                        (rows,) = engine.store.experts(layer, ids, planes)
                        part = torch.zeros(1, x.shape[1])
                        gather_ffn(x[t : t + 1], rows, "silu", workers, into=part)
                        y[t] += part[0] * weights[t, place]
                outputs.append(y)
        got, truth = outputs
        total += float((got - truth).square().sum() / truth.square().sum())
    return float((total / LAYERS) ** 0.5)


def test_commands_find_take_and_judge_a_mix(
    checkpoint: Path, known: Importance, tmp_path: Path
) -> None:
    write_importance(tmp_path / "known.safetensors", known)
    (tmp_path / "ssd").mkdir()
    packed = m2c("pack", checkpoint, "--ssd", tmp_path / "ssd", "--profile",
                 tmp_path / "known.safetensors")  # fmt: skip
    assert packed.code == 0, packed.err
    path = packed.out.strip()
    chosen = open_bundle(Path(path)).manifest.mix
    assert (chosen.percent, chosen.search, chosen.bits_per_weight) == ((0, 25, 75), "error", 5.5)
    assert f"mix 0/25/75: 5.50 bits, output error {chosen.relative_error:.4f}" in packed.err
    assert 0 < chosen.relative_error < 0.2
    run = ("run", path, "--prompt", "a", "--max-tokens", "4", "--threads", "1", "--mode", "mixed")
    plenty = m2c(*run)
    assert plenty.code == 0, plenty.err
    scarce = m2c(*run, "--dram", "32MiB", "--report", tmp_path / "report.html")
    assert scarce.code == 0, scarce.err
    assert scarce.out == plenty.out
    assert "experts int8 from" in scarce.err
    assert "Experts, INT8 plane" in (tmp_path / "report.html").read_text()
    traced = m2c(*run, "--trace", tmp_path / "trace")
    assert traced.code == 2
    assert "a mixture of experts chooses no neurons" in traced.reason
    assert "leave out --trace" in traced.reason
    text = tmp_path / "text.txt"
    text.write_text("It was a fine day and nobody spoke of the letter. " * 4)
    mixes = ("--mix", "0/100/0", "--mix", "0/25/75", "--mix", "0/0/100")
    judged = m2c("eval", path, "--text", text, "-w", 32, "-t", 1, "-q", "--json", *mixes)
    assert judged.code == 0, judged.err
    rows = [row for row in json.loads(judged.out) if not row["reference"]]
    assert [row["mix"] for row in rows] == ["0/100/0", "0/25/75", "0/0/100"]
    assert [row["ffn_bits_per_weight"] for row in rows] == pytest.approx([8.5, 5.5, 4.5])
    assert rows[0]["kl"] < rows[1]["kl"] < rows[2]["kl"]
    assert "default mix 0/25/75" in m2c("show", path).out


def test_parts_are_planes_or_all_of_them(bundle: Bundle) -> None:
    with Engine(bundle, with_slots(bundle, options_for(Mix(25, 25, 50)), 1)) as engine:
        cache = engine.store._experts
        assert cache is not None
        parts = cache.memory.whole[0]
        assert [len(part.shards) - part.held for part in parts] == [1, 1, 1]
        read = [one.shards[-1].header.plane for one in parts]
        assert read == ["int4", "int8", "fp16"]
        whole = replace(parts[-1], held=0)
        assert parts_of(whole, 1) == [whole]
        assert (
            expert_nbytes(whole, EXPERTS) == sum(expert_nbytes(p, EXPERTS) for p in parts)
        ).all()
