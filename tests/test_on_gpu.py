"""Whole models on a GPU that is strict about where tensors lie (strict_gpu.py).

What they give must be, to the bit, what the same kernels give without one.
"""

from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from running import PROMPT, decode, options_for, plan_of, same, smallest_dram
from strict_gpu import CUDA, StrictGpu, install, on_gpu
from test_experts import SHARED
from test_gpu import smallest_hbm, speculated
from tiny_models import pack_folder, write_checkpoint

from m2c import engine as engines
from m2c.bundle.bundle import Bundle
from m2c.cli.app import _explain
from m2c.contents import config_of, importance_of
from m2c.engine import Engine, RunOptions
from m2c.errors import DoesNotFit, UsageError
from m2c.evaluate import perplexity
from m2c.kernels import gpu_products
from m2c.kernels.gpu import GpuKernels
from m2c.kernels.workers import Workers
from m2c.model.mix import Mix
from m2c.model.transformer import Stopped
from m2c.modes import kernel_name
from m2c.predict import expected_tps
from m2c.speed import SpeedJob, measure_speed
from m2c.tiers.link import Link

HBM = 1 << 30


def without(bundle: Bundle, options: RunOptions, kernels: GpuKernels) -> tuple[object, ...]:
    """Tokens and logits of the kernels alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "workers_of", lambda *_: Workers(1, gpu=kernels))
        with Engine(bundle, replace(options, device="cpu")) as engine:
            return decode(engine)


MIXES = ("0/0/100", "0/25/75", "10/20/70", "0/100/0", "100/0/0")


@pytest.mark.parametrize("hbm", ["all", "least"])
@pytest.mark.parametrize("mix", MIXES)
def test_tokens_are_those_of_the_kernels(
    tiny_bundle: Bundle, emulated: GpuKernels, gpu: StrictGpu, mix: str, hbm: str
) -> None:
    options = options_for(Mix.parse(mix), hbm=HBM, device="cuda")
    with torch._C.DisableTorchFunction():
        expected = without(tiny_bundle, options, emulated)
    if hbm == "least":
        options = smallest_hbm(tiny_bundle, options)
    with Engine(tiny_bundle, options) as engine:
        assert engine.store.device == CUDA
        assert engine.workers.kernel == "cuda"
        ids, logits = decode(engine)
        assert on_gpu(logits)
        again = decode(engine)
        steady = engine.model._steady(1)
        if hbm == "least":  # what the next pass begins with is on its way already
            assert engine.store._moved._ahead is not None
    assert same((ids, logits.cpu()), expected)
    assert same((again[0], again[1].cpu()), expected)
    if hbm == "all":
        assert steady == (mix in ("0/0/100", "0/25/75", "0/100/0", "100/0/0"))


@pytest.mark.parametrize("policy", ["atu", "pinned"])
@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("in_dram", ["all", "some", "none"])
def test_kernels_take_chosen_records_from_dram_themselves(
    tiny_bundle: Bundle, emulated: GpuKernels, gpu: StrictGpu, in_dram: str, share: float,
    policy: str,
) -> None:  # fmt: skip
    launched = emulated._launch.__self__.launched  # type: ignore[attr-defined]
    options = options_for(Mix.parse("0/40/60"), hbm=HBM, device="cuda", policy=policy)
    with torch._C.DisableTorchFunction():
        expected = without(tiny_bundle, options, emulated)
        everything = plan_of(tiny_bundle, options).used_hbm
        options = smallest_hbm(tiny_bundle, options)
        assert options.hbm is not None
        options = replace(options, hbm=int(options.hbm + (everything - options.hbm) * share))
        if in_dram != "all":
            dram = smallest_dram(tiny_bundle, options)
            options = replace(options, dram=dram + (3000 if in_dram == "some" else 0))
        prefix = plan_of(tiny_bundle, options).prefix["int8"]
        neurons = config_of(tiny_bundle).intermediate_size
        assert (prefix == neurons, prefix > 0) == (in_dram == "all", in_dram != "none")
    launched.clear()
    with Engine(tiny_bundle, options) as engine:
        ids, logits = decode(engine)
        stats = engine.store.stats
    assert same((ids, logits.cpu()), expected)
    assert ("m2c_gather" in launched) == (prefix > 0)
    assert (stats.upgrades["int8"].ssd > 0) == (prefix < neurons)


@pytest.mark.parametrize("hbm", ["all", "least"])
@pytest.mark.parametrize("precision", ["100/0/0", "0/100/0", "0/0/100"])
def test_exact_mode(
    tiny_bundle: Bundle, emulated: GpuKernels, gpu: StrictGpu, precision: str, hbm: str
) -> None:
    options = options_for(Mix.parse(precision), hbm=HBM, device="cuda")
    with torch._C.DisableTorchFunction():
        ids, _ = without(tiny_bundle, options, emulated)
    options = replace(options, speculate=True)
    if hbm == "least":
        options = smallest_hbm(tiny_bundle, options)
    with Engine(tiny_bundle, options) as engine:
        assert speculated(engine, len(ids)) == ids


def test_passes_are_recorded_once_and_replayed(tiny_bundle: Bundle, gpu: StrictGpu) -> None:
    with Engine(tiny_bundle, options_for(Mix.parse("0/25/75"), hbm=HBM, device="cuda")) as engine:
        decode(engine)
        kept = dict(engine.model._replays)
        assert any(replay is not None for replay in kept.values())
        engine.store.reset_stats()
        ids, _ = decode(engine)
        counts = Mix.parse("0/25/75").counts(engine.config.intermediate_size)
        hits = engine.store.stats.upgrades["int8"]
        assert hits.compute >= len(ids) * engine.config.num_hidden_layers * counts["int8"]
        assert {key: engine.model._replays[key] for key in kept if kept[key]} == {
            key: replay for key, replay in kept.items() if replay
        }


def test_passes_of_few_sizes_are_recorded(tiny_bundle: Bundle, gpu: StrictGpu) -> None:
    """Those of other sizes have tokens behind that leave nothing, where the context has room."""
    options = options_for(Mix(100, 0, 0), hbm=HBM, device="cuda", ctx_size=16)
    with Engine(tiny_bundle, options) as engine:
        model, found = engine.model, []
        for _ in range(3):
            model.kv.truncate(0)
            parts = [PROMPT[:3], PROMPT[3:6], PROMPT[:7], PROMPT[:3]]  # 16 tokens, the last 3 in 3
            found.append([model.forward(part, all_logits=True).cpu() for part in parts])
            assert model.kv.length == 16
            assert [len(logits) for logits in found[-1]] == [3, 3, 7, 3]
        assert {tokens for tokens, _ in model._replays} == {3, 4, 8}
        model.kv.truncate(0)
        alone = [model.forward(PROMPT[i : i + 1]).cpu() for i in range(6)]
    assert torch.equal(torch.cat(found[0]), torch.cat(found[2]))
    assert torch.equal(torch.cat(found[0][:2]), torch.stack(alone))


def test_speeds_and_quality(tiny_bundle: Bundle, gpu: StrictGpu) -> None:
    options = smallest_hbm(
        tiny_bundle, options_for(Mix.parse("0/25/75"), hbm=HBM, device="cuda", ctx_size=64)
    )
    with Engine(tiny_bundle, options) as engine:
        assert engine.plan.link_nbytes_per_token
        assert expected_tps(engine) > 0
    with Engine(tiny_bundle, replace(options, hbm=HBM)) as engine:
        assert expected_tps(engine) > 0  # of weights too few to tell
    with Engine(tiny_bundle, options) as engine:
        figures = list(measure_speed(engine, SpeedJob(prompt=8, generate=4, repetitions=1)))
        assert [figure.tokens for figure in figures] == [8, 4]
        stats = engine.store.stats
        assert stats.link.nbytes > 0
        assert stats.link.busy_s > 0
        ids = (PROMPT.tolist() * 40)[:96]
        assert perplexity(engine, ids, window=32).value > 1


def test_measuring_the_link_between_passes_leaves_the_next_one_right(
    tiny_bundle: Bundle, gpu: StrictGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was copied ahead lay in the slots that are measured with."""
    plain = Link.speed  # of zeros: the largest block of this model is the one that is ahead
    monkeypatch.setattr(Link, "speed", lambda link, some: plain(link, np.zeros_like(some)))
    options = smallest_hbm(tiny_bundle, options_for(Mix.parse("0/100/0"), hbm=HBM, device="cuda"))
    with Engine(tiny_bundle, options) as engine:
        ids, logits = decode(engine)
        assert engine.store._moved._ahead is not None
        assert engine.store.link_speed() > 0
        again = decode(engine)
    assert same((again[0], again[1].cpu()), (ids, logits.cpu()))


@pytest.mark.parametrize("dram", ["all", "least"])
@pytest.mark.parametrize("mix", ["0/100/0", "0/40/60", "100/0/0"])
def test_a_pass_that_was_broken_off_leaves_the_next_one_right(
    tiny_bundle: Bundle, gpu: StrictGpu, mix: str, dram: str
) -> None:
    """Whatever was copied by then, and is still being copied."""
    options = smallest_hbm(tiny_bundle, options_for(Mix.parse(mix), hbm=HBM, device="cuda"))
    if dram == "least":
        with torch._C.DisableTorchFunction():
            options = replace(options, dram=smallest_dram(tiny_bundle, options))
    with Engine(tiny_bundle, options) as engine:
        ids, logits = decode(engine)
        for after in range(engine.config.num_hidden_layers):
            asked = iter([False] * (after + 2) + [True])
            engine.stop_when(partial(next, asked, True))
            length = engine.model.kv.length
            with pytest.raises(Stopped):
                engine.model.forward(PROMPT[:1])
            assert engine.model.kv.length == length
            engine.stop_when(lambda: False)
            again = decode(engine)
            assert same((again[0], again[1].cpu()), (ids, logits.cpu()))


@pytest.mark.parametrize("refuses", [False, True])
@pytest.mark.parametrize("hbm", ["all", "least"])
def test_what_is_pinned_is_given_back(
    tiny_bundle: Bundle, emulated: GpuKernels, monkeypatch: pytest.MonkeyPatch, hbm: str,
    refuses: bool,
) -> None:  # fmt: skip
    launcher = emulated._launch.__self__  # type: ignore[attr-defined]
    strict, pinned = install(monkeypatch, launcher)
    pinned.refuses = refuses
    options = options_for(Mix.parse("0/0/100"), hbm=HBM, device="cuda")
    with strict:
        if hbm == "least":
            options = smallest_hbm(tiny_bundle, options)
        with Engine(tiny_bundle, options) as engine:
            assert bool(pinned) == (hbm == "least" and not refuses)
            assert decode(engine)[0]
    assert not pinned


def test_weights_as_stored_are_decoded_some_at_a_time(
    tmp_path: Path, emulated: GpuKernels, gpu: StrictGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All in HBM with their frames; passes are recorded all the same."""
    monkeypatch.setattr(gpu_products, "_DECODED_NBYTES", 1)
    with torch._C.DisableTorchFunction():
        checkpoint = write_checkpoint(tmp_path / "checkpoint", {"intermediate_size": 700})
        bundle = pack_folder(checkpoint, tmp_path / "bundle.m2c")
        options = options_for(Mix.parse("100/0/0"), hbm=HBM, device="cuda")
        ids, _ = without(bundle, options, emulated)
        options = stored_in_hbm(bundle, replace(options, speculate=True))
    with Engine(bundle, options) as engine:
        assert engine.shape.stored
        assert not engine.plan.link_nbytes_per_token
        assert speculated(engine, len(ids)) == ids
        assert speculated(engine, len(ids)) == ids
        assert any(engine.model._replays.values())


@pytest.mark.parametrize("ctx_size", [16, 17])
def test_heads_that_turn_in_part_with_longrope(
    tmp_path: Path, emulated: GpuKernels, gpu: StrictGpu, ctx_size: int
) -> None:
    pairs = [1.0 + pair for pair in range(6)]
    shape = {
        "model_type": "phi3", "original_max_position_embeddings": 16, "sliding_window": None,
        "partial_rotary_factor": 0.75, "rope_scaling": {
            "type": "longrope", "short_factor": pairs, "long_factor": pairs[::-1]},
    }  # fmt: skip
    with torch._C.DisableTorchFunction():
        bundle = pack_folder(write_checkpoint(tmp_path / "checkpoint", shape), tmp_path / "b.m2c")
        options = options_for(Mix.parse("0/0/100"), hbm=HBM, device="cuda", ctx_size=ctx_size)
        expected = without(bundle, options, emulated)
        with Engine(bundle, replace(options, device="cpu", kernel="torch")) as engine:
            known = decode(engine)
    with Engine(bundle, options) as engine:
        ids, logits = decode(engine)
    assert same((ids, logits.cpu()), expected)
    assert (logits[0].cpu() - known[1][0]).norm() < 0.05 * known[1][0].norm()


def stored_in_hbm(bundle: Bundle, options: RunOptions) -> RunOptions:
    """The least HBM that holds everything as it is stored."""
    config = config_of(bundle)
    for hbm in range(1 << 22, HBM, 1 << 18):
        trial = replace(options, hbm=hbm)
        with suppress(DoesNotFit):
            shape = engines.run_shape(bundle, config, trial)
            shape, plan = engines.plan_for(bundle, config, shape, importance_of(bundle), trial)
            if shape.stored and shape.drafts and len(plan.in_hbm) == len(plan.footprint.blocks):
                return trial
    raise AssertionError("weights are never kept as stored")


@pytest.mark.parametrize(
    ("precision", "hbm"),
    [("0/0/100", "least"), ("0/0/100", "all"), ("50/0/50", "least"), ("0/50/50", "all")],
)
def test_experts(
    tmp_path: Path, emulated: GpuKernels, gpu: StrictGpu, precision: str, hbm: str
) -> None:
    """With a shared one."""
    options = options_for(Mix.parse(precision), hbm=HBM, device="cuda")
    with torch._C.DisableTorchFunction():
        bundle = pack_folder(write_checkpoint(tmp_path / "checkpoint", SHARED), tmp_path / "b.m2c")
        expected = without(bundle, options, emulated)
    if hbm == "least":
        options = smallest_hbm(bundle, options)
    with Engine(bundle, options) as engine:
        ids, logits = decode(engine)
    assert same((ids, logits.cpu()), expected)


def test_exact_mode_needs_sums_that_do_not_depend_on_the_pass(
    tiny_bundle: Bundle, gpu: StrictGpu
) -> None:
    options = options_for(Mix.parse("100/0/0"), hbm=HBM, device="cuda", kernel="torch")
    with pytest.raises(UsageError, match="needs the CUDA kernels"):
        Engine(tiny_bundle, replace(options, speculate=True))
    assert kernel_name(options) == "torch"
    assert kernel_name(replace(options, kernel="auto")) == "cuda"


def test_a_gpu_without_memory_is_told_as_such() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    code, said = _explain(error)
    assert code == DoesNotFit.exit_code
    assert "--hbm" in said
