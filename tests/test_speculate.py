"""Exact mode: the tokens of one-by-one decoding, whatever is drafted and wherever weights lie."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import MIXES, PROMPT, budgets, options_for
from tiny_models import pack_folder, write_checkpoint

from m2c import speculate
from m2c.bundle.bundle import Bundle
from m2c.engine import Engine, RunOptions
from m2c.errors import DoesNotFit, UsageError
from m2c.generate import generate_step, prefill
from m2c.modes import exact_options
from m2c.sampling import Sampler, SamplingParams
from m2c.speculate import MOST_AT_ONCE, Speculator

LENGTH = 64
PRECISIONS = ("fp16", "int8", "int4")
GREEDY = SamplingParams()
WARM = SamplingParams(temperature=1.0, seed=3)


def options(precision: str = "fp16", **changes: Any) -> RunOptions:
    plain = options_for(MIXES["0/25/75"], ctx_size=96)
    return replace(exact_options(plain, precision), **changes)


def one_by_one(bundle: Bundle, precision: str, params: SamplingParams) -> list[int]:
    with Engine(bundle, options(precision, speculate=False)) as engine:
        steps = generate_step(engine.model, PROMPT.tolist(), Sampler(params))
        return [next(steps) for _ in range(LENGTH)]


def speculated(engine: Engine, params: SamplingParams, draft: Any = None) -> list[int]:
    engine.model.kv.truncate(0)
    speculator = Speculator(engine.model, draft or engine.draft, Sampler(params))
    ids = PROMPT.tolist()
    found = list(speculator.tokens(prefill(engine.model, ids), ids, LENGTH))
    figures = speculator.figures
    assert len(found) == LENGTH == 1 + figures.passes + figures.accepted
    return found


@pytest.fixture(scope="module", params=PRECISIONS)
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def expected(deep_bundle: Bundle, precision: str) -> list[int]:
    return one_by_one(deep_bundle, precision, GREEDY)


def test_every_budget_gives_the_tokens_of_one_by_one_decoding(
    deep_bundle: Bundle, precision: str, expected: list[int]
) -> None:
    ways = set()
    room = options_for(MIXES["100/0/0"], ctx_size=96)
    sizes = [*budgets(deep_bundle, room), smallest_speculative(deep_bundle, precision), 1 << 30]
    for dram in sizes:
        try:
            engine = Engine(deep_bundle, options(precision, dram=dram))
        except DoesNotFit:
            continue
        with engine:
            ways.add((engine.shape.drafts, engine.shape.stored, bool(engine.plan.streamed)))
            assert speculated(engine, GREEDY) == expected
            assert speculated(engine, GREEDY) == expected  # warm, with the ring somewhere
    assert len(ways) >= {"fp16": 3, "int8": 2, "int4": 2}[precision]


def smallest_speculative(bundle: Bundle, precision: str) -> int:
    with pytest.raises(DoesNotFit) as caught:
        Engine(bundle, options(precision, dram=1))
    assert caught.value.hint is not None
    return int(caught.value.hint.split("--dram ")[1].split("MiB")[0]) << 20


@pytest.mark.parametrize("params", [WARM, SamplingParams(temperature=0.7, top_k=20, seed=1)])
def test_sampling_gives_the_very_tokens_too(deep_bundle: Bundle, params: SamplingParams) -> None:
    expected = one_by_one(deep_bundle, "fp16", params)
    with Engine(deep_bundle, options()) as engine:
        assert speculated(engine, params) == expected
        assert speculated(engine, replace(params, seed=8)) != expected


def five(_: Any, sure: Sequence[float], following: float | None = None) -> bool:
    """In place of `Depth.again`: drafts of five tokens."""
    return len(sure) < 5


class Stubborn:
    """A draft that always says the same, or what it is told, and leaves it in the KV cache."""

    name = "stubborn"

    def __init__(self, kv: Any, vocab: int, script: Sequence[int]) -> None:
        self.kv, self._vocab, self._script = kv, vocab, list(script)

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        self.kv.advance(1)
        logits = torch.zeros(self._vocab)
        logits[self._script[self.kv.length % len(self._script)]] = 50.0
        return logits


def test_bad_drafts_only_cost_time(deep_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = one_by_one(deep_bundle, "fp16", GREEDY)
    monkeypatch.setattr(speculate.Depth, "again", five)
    with Engine(deep_bundle, options()) as engine:
        draft = Stubborn(engine.model.kv, engine.config.vocab_size, [7])
        assert speculated(engine, GREEDY, draft) == expected
        draft = Stubborn(engine.model.kv, engine.config.vocab_size, expected)
        assert speculated(engine, GREEDY, draft) == expected


def test_accepting_what_the_exact_model_would_not_say_is_noticed(
    deep_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """These comparisons can fail: with a wrong rule they do."""
    expected = one_by_one(deep_bundle, "fp16", WARM)
    monkeypatch.setattr(speculate.Depth, "again", five)
    with Engine(deep_bundle, options()) as engine:
        draft = Stubborn(engine.model.kv, engine.config.vocab_size, [7])
        assert speculated(engine, WARM, draft) == expected
        wrong = lambda drafts, answer: [*drafts, answer(drafts)]  # noqa: E731
        monkeypatch.setattr(speculate, "verified", wrong)
        assert speculated(engine, WARM, draft) != expected
        assert speculated(engine, WARM) != expected  # the INT4 planes are no exact model


def test_logits_of_a_pass_are_those_of_its_tokens_alone(deep_bundle: Bundle) -> None:
    """Bit for bit, for every number of tokens that a pass may have."""
    text = np.random.default_rng(5).integers(0, 200, MOST_AT_ONCE + 4, dtype=np.int32)
    with Engine(deep_bundle, options()) as engine:
        model = engine.model
        alone = torch.stack([model.forward(text[i : i + 1]) for i in range(len(text))])
        for count in range(1, MOST_AT_ONCE + 1):
            model.kv.truncate(4)
            assert torch.equal(
                model.forward(text[4 : 4 + count], all_logits=True), alone[4 : 4 + count]
            )


def test_the_end_of_the_context_is_used(deep_bundle: Bundle) -> None:
    ids = PROMPT.tolist()
    with Engine(deep_bundle, options(ctx_size=24)) as engine:
        speculator = Speculator(engine.model, engine.draft, Sampler(GREEDY))
        found = list(speculator.tokens(prefill(engine.model, ids), ids, 1000))
        assert engine.model.kv.length == 24
    assert len(found) == 24 - len(ids) + 1


def test_text_that_repeats_needs_no_draft_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lookups alone bring more than a token a pass once the text goes round."""
    passed = speculate.Depth.passed
    monkeypatch.setattr(  # whatever was measured, a token adds little to a pass
        speculate.Depth, "passed", lambda depth, tokens, _: passed(depth, tokens, 1 + tokens / 100)
    )
    bundle = pack_folder(write_checkpoint(tmp_path / "c"), tmp_path / "b.m2c")
    with Engine(bundle, options("int4", ctx_size=256)) as engine:
        assert engine.draft is None
        speculator = Speculator(engine.model, None, Sampler(GREEDY))
        ids = PROMPT.tolist()
        list(speculator.tokens(prefill(engine.model, ids), ids, 200))
        assert speculator.figures.tokens_per_pass > 1.2


@pytest.mark.parametrize("changes", [{"mix": MIXES["0/25/75"]}, {"dense": "int8"}], ids=str)
def test_what_exact_mode_does_not_go_with(deep_bundle: Bundle, changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="exact mode"):
        Engine(deep_bundle, options(**changes))


def test_what_is_allocated_is_within_the_plan(deep_bundle: Bundle) -> None:
    dram = smallest_speculative(deep_bundle, "fp16")
    for size in (dram, dram + (1 << 20), 1 << 30):
        with Engine(deep_bundle, options(dram=size)) as engine:
            assert engine.plan.used_dram <= size
            if engine.store.draft is not None:
                assert held(engine) <= engine.plan.footprint.draft_nbytes


def held(engine: Engine) -> int:
    def planes() -> Iterator[int]:
        assert engine.store.draft is not None
        for layer in range(engine.config.num_hidden_layers):
            for kind in ("dense", "neurons"):
                for rows in engine.store.draft.operands(kind, layer).values():
                    yield rows.int4.nbytes

    return sum(planes())
