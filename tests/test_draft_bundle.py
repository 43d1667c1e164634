"""Another model drafts: the text stays the exact model's, and both caches stay in step."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import m2c
from running import MIXES, PROMPT, options_for
from tiny_models import pack_folder, write_checkpoint

from m2c import modes, speculate
from m2c.bundle.bundle import Bundle
from m2c.drafting import OwnDraft
from m2c.engine import Engine, RunOptions
from m2c.errors import DoesNotFit, UsageError
from m2c.generate import generate_step, prefill
from m2c.modes import choose_draft, choose_mode, exact_options
from m2c.sampling import Sampler, SamplingParams
from m2c.speculate import Speculation, Speculator

LENGTH = 48
GREEDY = SamplingParams()
WARM = SamplingParams(temperature=1.0, seed=3)
IDS = PROMPT.tolist()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Other weights: its drafts are bad. Its context is shorter too."""
    folder = tmp_path_factory.mktemp("small")
    changes = {"max_position_embeddings": 40}
    return pack_folder(write_checkpoint(folder / "c", changes, seed=9), folder / "small.m2c")


@pytest.fixture
def six(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts of six tokens by the model, whatever was measured; none from the text so far."""
    monkeypatch.setattr(speculate.Depth, "again", lambda self, sure, following=None: len(sure) < 6)
    monkeypatch.setattr(speculate.Lookup, "propose", lambda self, count: [])


def options(draft: Bundle | None, precision: str = "fp16", **changes: Any) -> RunOptions:
    plain = options_for(MIXES["0/25/75"], ctx_size=96)
    return replace(exact_options(plain, precision), draft=draft, **changes)


def one_by_one(bundle: Bundle, precision: str, params: SamplingParams) -> list[int]:
    with Engine(bundle, options(None, precision, speculate=False)) as engine:
        steps = generate_step(engine.model, IDS, Sampler(params))
        return [next(steps) for _ in range(LENGTH)]


def speculated(
    engine: Engine, params: SamplingParams = GREEDY, limit: int = LENGTH
) -> tuple[list[int], Speculation]:
    engine.model.kv.truncate(0)
    speculator = Speculator(engine.model, engine.draft, Sampler(params))
    found = list(speculator.tokens(prefill(engine.model, IDS), IDS, limit))
    return found, speculator.figures


@pytest.mark.parametrize("params", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_the_tokens_are_those_of_one_by_one_decoding(
    deep_bundle: Bundle, small: Bundle, precision: str, params: SamplingParams, six: None
) -> None:
    expected = one_by_one(deep_bundle, precision, params)
    for draft in (small, deep_bundle):
        with Engine(deep_bundle, options(draft, precision)) as engine:
            assert engine.draft is not None
            assert engine.draft.model.kv is not engine.model.kv
            for _ in range(2):  # the second time the draft's cache holds the end of the first
                found, figures = speculated(engine, params)
                assert found == expected
                assert figures.drafted > 20
            if draft is small:
                assert figures.acceptance < 0.3
            elif precision == "int4":
                assert figures.accepted == figures.drafted


def test_measured_costs_decide_without_changing_the_text(
    deep_bundle: Bundle, small: Bundle
) -> None:
    expected = one_by_one(deep_bundle, "fp16", GREEDY)
    with Engine(deep_bundle, options(small)) as engine:
        assert speculated(engine)[0] == expected


def test_the_draft_knows_what_a_fresh_one_would(
    deep_bundle: Bundle, small: Bundle, six: None
) -> None:
    with Engine(deep_bundle, options(small)) as engine:
        own = engine.draft
        assert isinstance(own, OwnDraft)
        rng = np.random.default_rng(1)
        texts = [rng.integers(0, 300, n).tolist() for n in (9, 30, 12)]
        texts += [texts[0][:5] + texts[1][:9], texts[0][:5], [3], [3, 299, 7], [3, 299, 7]]
        for ids in texts:
            known = own.logits(ids)
            assert own.model.kv.length == len(ids)
            fresh = OwnDraft(own.model, "", 300)
            expected = fresh.logits(ids)
            assert known is not None
            assert expected is not None
            assert torch.equal(known, expected)
        assert own.logits([1] * 41) is None  # its context holds 40
        few = OwnDraft(own.model, "", 250).logits([1, 299])
        assert few is not None
        assert len(few) == 250
        # an id that only the exact model has an embedding for
        assert OwnDraft(own.model, "", 400).logits([1, 350, 2]) is not None


def broken_off(at: int) -> Callable[[Any], Any]:
    """A `forward` that is interrupted at its call number `at`, half of the times after its work."""
    calls = iter(range(1000))

    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*words: Any, **named: Any) -> Any:
            call = next(calls)
            if call == at and at % 2:
                raise KeyboardInterrupt
            result = forward(*words, **named)
            if call == at:
                raise KeyboardInterrupt
            return result

        return wrapped

    return wrap


@pytest.mark.parametrize("which", ["draft", "model"])
@pytest.mark.parametrize("at", [0, 1, 4, 7, 8])
def test_a_round_that_is_broken_off_leaves_the_caches_in_step(
    deep_bundle: Bundle, small: Bundle, six: None, which: str, at: int
) -> None:
    expected = one_by_one(deep_bundle, "fp16", GREEDY)
    with Engine(deep_bundle, options(small)) as engine:
        assert engine.draft is not None
        broken = engine.draft.model if which == "draft" else engine.model
        logits = prefill(engine.model, IDS)
        forward, broken.forward = broken.forward, broken_off(at)(broken.forward)  # type: ignore[method-assign]
        speculator = Speculator(engine.model, engine.draft, Sampler(GREEDY))
        found: list[int] = []
        with pytest.raises(KeyboardInterrupt):
            found.extend(iter_into(speculator.tokens(logits, IDS, LENGTH), found))
        broken.forward = forward  # type: ignore[method-assign]
        assert found == expected[: len(found)]
        assert engine.model.kv.length == len(IDS) + len(found) - 1
        # from here on: what is in the caches is the text
        ids = IDS + found
        logits = engine.model.forward(np.asarray(ids[-1:], np.int32))
        speculator = Speculator(engine.model, engine.draft, Sampler(GREEDY))
        more = list(speculator.tokens(logits, ids, LENGTH - len(found)))
        assert found + more == expected


def iter_into(tokens: Iterator[int], found: list[int]) -> Iterator[int]:
    """Nothing; appends to `found` as tokens come."""
    for token in tokens:
        found.append(token)
    return iter(())


def test_the_end_of_either_context_is_used(deep_bundle: Bundle, small: Bundle, six: None) -> None:
    with Engine(deep_bundle, options(small, ctx_size=60)) as engine:
        assert engine.draft is not None
        found, figures = speculated(engine, limit=1000)
        assert engine.model.kv.length == 60
        assert engine.draft.model.kv.ctx_size == 40
        assert len(found) == 60 - len(IDS) + 1
        assert figures.drafted


def test_its_memory_is_counted(deep_bundle: Bundle, small: Bundle) -> None:
    with pytest.raises(DoesNotFit) as caught:
        Engine(deep_bundle, options(small, dram=1))
    assert caught.value.hint is not None
    dram = int(caught.value.hint.split("--dram ")[1].split("MiB")[0]) << 20
    with Engine(deep_bundle, options(small, dram=dram)) as engine:
        fact = engine.plan.footprint.draft
        assert fact is not None
        assert engine.plan.streamed
        assert engine.plan.used_dram <= dram
        with Engine(deep_bundle, options(None, dram=dram)) as alone:
            assert engine.plan.working_nbytes == fact.nbytes + replace(
                alone.plan, footprint=replace(alone.plan.footprint, draft=None)
            ).working_nbytes  # fmt: skip
        with Engine(small, exact_options(options_for(MIXES["0/0/100"]), "int4")) as least:
            weights = sum(b.resident_nbytes for b in least.plan.footprint.blocks)
        assert weights < fact.nbytes
        assert fact.name == "small"
    with pytest.raises(DoesNotFit):
        Engine(deep_bundle, options(small, dram=dram - fact.nbytes))


@pytest.mark.parametrize(("tps", "drafts"), [(9.0, True), (7.0, False)])
def test_the_faster_source_of_drafts_is_taken(
    deep_bundle: Bundle, small: Bundle, monkeypatch: pytest.MonkeyPatch, tps: float, drafts: bool
) -> None:
    def predicted(plan: Any, *_: Any, **__: Any) -> float:
        return tps if plan.footprint.draft.name else 8.0

    monkeypatch.setattr(modes, "predicted_exact_tps", predicted)
    monkeypatch.setattr(modes, "predicted_tps", lambda *_, **__: 10.0)
    for choice in (
        choose_draft(deep_bundle, options(small)),
        choose_mode(deep_bundle, options_for(MIXES["0/25/75"], draft=small)),
    ):
        assert (choice.options.draft is not None, choice.mode) == (drafts, "exact")
        assert choice.drafts == {"INT4 planes": 8.0, "small": tps}
    slow = choose_mode(deep_bundle, options_for(MIXES["0/25/75"], draft=small, dram=1 << 30))
    assert slow.predicted["exact"] == max(8.0, tps)


def test_a_draft_that_does_not_fit_is_left_out(deep_bundle: Bundle, small: Bundle) -> None:
    with pytest.raises(DoesNotFit) as caught:
        Engine(deep_bundle, options(None, dram=1))
    assert caught.value.hint is not None
    dram = int(caught.value.hint.split("--dram ")[1].split("MiB")[0]) << 20
    choice = choose_draft(deep_bundle, options(small, dram=dram))
    assert choice.options.draft is None
    assert list(choice.drafts) == ["the text so far"]
    with pytest.raises(DoesNotFit):
        choose_draft(deep_bundle, options(small, dram=1))


def test_on_the_command_line(
    deep_bundle: Bundle, small: Bundle, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    words = (
        "run",
        deep_bundle.path,
        "--raw",
        "-p",
        "one two",
        "-n",
        12,
        "-c",
        64,
        "--dram",
        "1GiB",
    )
    plain = m2c(*words, "--exact")
    said = m2c(*words, "--exact", "--draft", small.path)
    assert (said.code, said.out) == (0, plain.out)
    promise = re.search(
        r", drafts from .+ \(promised ([\d.]+) against ([\d.]+) from .+\):", said.err
    )
    assert promise, said.err
    assert float(promise[1]) >= float(promise[2])
    refused = m2c(*words, "--mode", "mixed", "--draft", small.path)
    assert refused.code == 2
    assert "--draft is for exact mode" in refused.err
    other = pack_folder(write_checkpoint(tmp_path / "c", {"vocab_size": 310}), tmp_path / "o.m2c")
    refused = m2c(*words, "--exact", "--draft", other.path)
    assert refused.code == 2
    assert "not the vocabulary of" in refused.err
    assert m2c(*words, "--exact", "--draft", tmp_path / "none").code == 4
    with pytest.raises(UsageError):
        Engine(deep_bundle, options(small, hbm=1 << 30))


def test_where_memory_is_short_a_pass_takes_few_tokens(deep_bundle: Bundle) -> None:
    whole = options(None, "int4")
    with Engine(deep_bundle, whole) as engine:
        assert engine.shape.at_once == speculate.MOST_AT_ONCE
    with pytest.raises(DoesNotFit) as caught:
        Engine(deep_bundle, replace(whole, dram=1))
    assert caught.value.hint is not None
    dram = int(caught.value.hint.split("--dram ")[1].split("MiB")[0]) << 20
    expected = one_by_one(deep_bundle, "int4", GREEDY)
    with Engine(deep_bundle, replace(whole, dram=dram)) as engine:
        assert engine.plan.streamed
        assert engine.shape.at_once == speculate.FEW_AT_ONCE
        sizes = []
        forward = engine.model.forward
        engine.model.forward = lambda ids, **n: sizes.append(len(ids)) or forward(ids, **n)  # type: ignore[method-assign]
        speculator = Speculator(engine.model, None, Sampler(GREEDY), engine.shape.at_once)
        found = list(speculator.tokens(prefill(engine.model, IDS), IDS, LENGTH))
        assert found == expected
        assert max(sizes) <= speculate.FEW_AT_ONCE
