"""Whole models on the GPU that is there; skipped where there is none.

What the emulation leaves out is here: copies that are under way while kernels run, launches that a
card replays, memory that is pinned. The same bits wherever weights lie; near what the CPU gives.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from running import GiB, Run, decode, options_for, same, smallest_dram
from test_families import IDS, MODELS, Made
from test_gpu import smallest_hbm, speculated
from tiny_models import pack_folder, write_checkpoint

from m2c.bundle.bundle import Bundle
from m2c.device import workers_of
from m2c.energy.nvml import gpu_source
from m2c.energy.sources import Absent
from m2c.engine import Engine, RunOptions
from m2c.evaluate import perplexity
from m2c.generate import generate_step, prefill
from m2c.kernels.workers import Workers
from m2c.model.mix import Mix
from m2c.predict import expected_tps
from m2c.sampling import Sampler, SamplingParams
from m2c.speculate import Speculator

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

# large enough that a copy takes longer than asking for the kernels that need it
BIG = {
    "num_hidden_layers": 6, "hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 2000,
    "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 2048,
}  # fmt: skip
EXPERTS = {
    **BIG, "model_type": "qwen2_moe", "num_experts": 16, "num_experts_per_tok": 4,
    "moe_intermediate_size": 1024, "shared_expert_intermediate_size": 512,
}  # fmt: skip
TOKENS = 48
MIXES = ("0/0/100", "0/25/75", "10/20/70", "0/100/0", "100/0/0")


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Kernels compiled once for all tests of this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("M2C_HOME", str(tmp_path_factory.mktemp("home")))
        made = workers_of("cuda", "auto", 2)
        yield made
        made.close()


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("big")
    return pack_folder(write_checkpoint(folder / "checkpoint", BIG), folder / "b.m2c")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("mixture")
    return pack_folder(write_checkpoint(folder / "checkpoint", EXPERTS), folder / "b.m2c")


def on_card(mix: str, **changes: Any) -> RunOptions:
    return options_for(Mix.parse(mix), hbm=8 * GiB, dram=4 * GiB, device="cuda", **changes)


def generated(engine: Engine) -> Run:
    """Greedy tokens after a prompt of 40, and the logits they were chosen by."""
    engine.model.kv.truncate(0)
    prompt = (np.arange(40, dtype=np.int32) * 37) % engine.config.vocab_size
    logits = [engine.model.forward(prompt)]
    ids = []
    for _ in range(TOKENS):
        ids.append(int(logits[-1].argmax()))
        logits.append(engine.model.forward(np.array(ids[-1:], np.int32)))
    return ids, torch.stack(logits).cpu()


def far(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).norm() / two.norm())


def between(bundle: Bundle, options: RunOptions, share: float) -> RunOptions:
    """HBM between the least that works and all that is used."""
    least = smallest_hbm(bundle, options).hbm
    with Engine(bundle, options) as engine:
        most = engine.plan.used_hbm
    assert least is not None
    return replace(options, hbm=int(least + (most - least) * share))


@pytest.mark.parametrize("mix", MIXES)
def test_the_same_bits_wherever_weights_lie(big: Bundle, workers: Workers, mix: str) -> None:
    options = on_card(mix, ctx_size=128)
    with Engine(big, options, workers=workers) as engine:
        expected = generated(engine)
        assert same(generated(engine), expected)  # of recordings
    with Engine(big, replace(options, device="cpu", hbm=None)) as engine:
        logits = engine.model.forward((np.arange(40, dtype=np.int32) * 37) % 2000)
    if Mix.parse(mix).is_uniform:
        assert far(expected[1][0], logits) < 0.03  # activations are int8
    for share in (0.0, 0.4, 0.8):
        some = between(big, options, share)
        with Engine(big, some, workers=workers) as engine:
            assert engine.plan.link_nbytes_per_token
            assert torch.cuda.memory_allocated() < 2 * some.hbm + (64 << 20)
            assert same(generated(engine), expected), share
    least = smallest_hbm(big, options)
    from_ssd = replace(least, dram=smallest_dram(big, least))
    with Engine(big, from_ssd, workers=workers) as engine:
        assert engine.plan.ssd_nbytes_per_token
        assert same(generated(engine), expected)


@pytest.mark.parametrize("hbm", ["all", "some", "least"])
@pytest.mark.parametrize("precision", ["100/0/0", "0/100/0", "0/0/100"])
def test_exact_mode(big: Bundle, workers: Workers, precision: str, hbm: str) -> None:
    options = on_card(precision, ctx_size=128)
    prompt = [(i * 37) % 2000 for i in range(40)]
    with Engine(big, options, workers=workers) as engine:
        ids, _ = generated(engine)
    options = replace(options, speculate=True)
    if hbm != "all":
        options = between(big, options, 0.5) if hbm == "some" else smallest_hbm(big, options)
    with Engine(big, options, workers=workers) as engine:
        for _ in range(2):
            engine.model.kv.truncate(0)
            speculator = Speculator(engine.model, engine.draft, Sampler(SamplingParams()))
            found = speculator.tokens(prefill(engine.model, prompt), prompt, TOKENS)
            assert list(islice(found, TOKENS)) == ids


@pytest.mark.parametrize("mix", ["0/0/100", "100/0/0", "0/50/50", "50/50/0"])
def test_experts(mixture: Bundle, workers: Workers, mix: str) -> None:
    options = on_card(mix, ctx_size=128)
    with Engine(mixture, options, workers=workers) as engine:
        assert engine.plan.expert_slots is None
        expected = generated(engine)
    for share in (0.0, 0.3, 0.7):
        some = between(mixture, options, share)
        for dram in (4 * GiB, smallest_dram(mixture, some)):
            with Engine(mixture, replace(some, dram=dram), workers=workers) as engine:
                assert engine.plan.expert_slots is not None
                assert same(generated(engine), expected), (share, dram)


@pytest.mark.parametrize("policy", ["lru", "lfu", "pinned"])
@pytest.mark.parametrize("mix", ["0/100/0", "50/0/50"])
def test_experts_go_to_hbm_and_back(
    mixture: Bundle, workers: Workers, mix: str, policy: str
) -> None:
    """Some in each tier, or none in DRAM, or there as many as it has room for."""
    options = on_card(mix, ctx_size=128, policy=policy)
    with Engine(mixture, options, workers=workers) as engine:
        expected = generated(engine)
    some = between(mixture, options, 0.6)
    for slots in (0, 24, 96):
        facts = engine.plan.footprint.experts
        assert facts is not None
        dram = smallest_dram(mixture, some) + slots * facts.slot_nbytes
        with Engine(mixture, replace(some, dram=dram), workers=workers) as cached:
            assert cached.plan.hbm_expert_slots > 24  # more than a token uses
            for _ in range(3):
                assert same(generated(cached), expected), slots
            hits = cached.store.stats.upgrades.values()
            assert sum(hit.compute for hit in hits) > 0
            assert sum(hit.dram + hit.ssd for hit in hits) > 0


@pytest.mark.parametrize("hbm", ["all", "some", "least"])
def test_exact_mode_of_experts(mixture: Bundle, workers: Workers, hbm: str) -> None:
    options = on_card("100/0/0", ctx_size=64)
    with Engine(mixture, options, workers=workers) as engine:
        ids, _ = decode(engine)
    options = replace(options, speculate=True)
    if hbm != "all":
        options = (
            between(mixture, options, 0.5) if hbm == "some" else smallest_hbm(mixture, options)
        )
    with Engine(mixture, options, workers=workers) as engine:
        assert speculated(engine, len(ids)) == ids


@pytest.fixture(scope="module", params=sorted(MODELS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(request.param, tmp_path_factory.mktemp(request.param))


def test_every_family_gives_the_logits_of_transformers(made: Made, workers: Workers) -> None:
    options = on_card("100/0/0", ctx_size=32)
    for some in (options, smallest_hbm(made.bundle, options)):
        with Engine(made.bundle, some, workers=workers) as engine:
            logits = engine.model.forward(IDS, all_logits=True)
            # keys and values are kept with 16 bits here
            assert far(logits.cpu(), made.logits) < 1e-3
            engine.model.kv.truncate(0)
            one_by_one = [engine.model.forward(IDS[i : i + 1]) for i in range(len(IDS))]
            assert torch.equal(torch.stack(one_by_one), logits)


def test_perplexity_and_energy(big: Bundle, workers: Workers) -> None:
    options = on_card("0/0/100", ctx_size=256)
    ids = [(i * i * 31 + 7 * i) % 2000 for i in range(1024)]
    with Engine(big, replace(options, device="cpu", hbm=None)) as engine:
        expected = perplexity(engine, ids, window=128).value
    source = gpu_source()
    assert not isinstance(source, Absent), source
    with Engine(big, options, workers=workers) as engine:
        assert perplexity(engine, ids, window=128).value == pytest.approx(expected, rel=0.01)
        prefill(engine.model, ids[:40])
        steps = generate_step(engine.model, ids[:40], Sampler(SamplingParams()), cached=39)
        assert len(list(islice(steps, 64))) == 64
    torch.cuda.synchronize()
    assert source.joules() > 0


def test_a_small_model_is_promised_a_speed(big: Bundle, workers: Workers) -> None:
    """Its weights are too few to tell how fast they are read."""
    for mix in ("0/0/100", "0/25/75"):
        with Engine(big, on_card(mix, ctx_size=64), workers=workers) as engine:
            assert 10 < expected_tps(engine) < 10_000
