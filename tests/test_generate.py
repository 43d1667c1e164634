"""generate.py with a model that says what it is told: text, ends and counts. No weights."""

import itertools
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONFIG
from vocabularies import small_tokenizer

from m2c.errors import BadInput, UsageError
from m2c.generate import GenerationStats, StopWatch, stream_generate
from m2c.model.config import ModelConfig
from m2c.sampling import Sampler, SamplingParams
from m2c.tiers.ssd import LinkStats
from m2c.tiers.traffic import StoreStats
from m2c.tokenizer import Tokenizer

END = 1
VOCAB = 300


class Parrot:
    """Has the interface of Transformer that generating needs; predicts `script`, id by id."""

    def __init__(self, script: Iterable[int], ctx_size: int) -> None:
        self.config = ModelConfig.from_hf({**CONFIG, "vocab_size": VOCAB})
        self.kv = SimpleNamespace(length=0, ctx_size=ctx_size)
        self.batches: list[int] = []
        self._script = iter(script)
        self._prompt_left = 0

    def expect(self, prompt: int) -> None:
        self._prompt_left = prompt

    def forward(self, ids: np.ndarray) -> torch.Tensor:
        self.batches.append(len(ids))
        self.kv.length += len(ids)
        assert self.kv.length <= self.kv.ctx_size
        self._prompt_left -= len(ids)
        logits = torch.zeros(VOCAB)
        if self._prompt_left <= 0:
            logits[next(self._script)] = 1.0
        return logits


def engine_for(
    script: Iterable[int], *, ctx_size: int = 64, tokenizer: Tokenizer | None = None
) -> Any:
    model = Parrot(script, ctx_size)
    stats = StoreStats(LinkStats(), LinkStats())
    return SimpleNamespace(
        model=model, tokenizer=tokenizer or small_tokenizer(), config=model.config,
        shape=SimpleNamespace(ctx_size=ctx_size), speculates=False,
        store=SimpleNamespace(stats=stats, reset_stats=lambda: None),
    )  # fmt: skip


def generate(
    script: Iterable[int], *, prompt: Sequence[int] = (5, 6), max_tokens: int = 50,
    ctx_size: int = 64, stop: Sequence[str] = (),
) -> tuple[list[str], GenerationStats, Parrot]:  # fmt: skip
    engine = engine_for(script, ctx_size=ctx_size)
    engine.model.expect(len(prompt))
    sampler = Sampler(SamplingParams())
    pieces = list(stream_generate(engine, prompt, sampler, max_tokens=max_tokens, stop=stop))
    assert all(piece.stats is None for piece in pieces[:-1])
    stats = pieces[-1].stats
    assert stats is not None
    return [piece.text for piece in pieces], stats, engine.model


def script_of(text: str) -> list[int]:
    return [*small_tokenizer().encode(text), END]


def test_no_piece_ends_inside_a_character() -> None:
    text = "he 👩‍👩‍👧‍👦 日本 e\u0301"
    pieces, stats, _ = generate(script_of(text), max_tokens=99, ctx_size=99)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert stats.finish_reason == "stop"


def test_the_end_token_counts_and_is_not_text() -> None:
    pieces, stats, model = generate(script_of("hehe"))
    assert "".join(pieces) == "hehe"
    assert (stats.prompt_tokens, stats.generated_tokens, stats.decode_steps) == (2, 3, 2)
    # nothing is computed after the end
    assert model.batches == [2, 1, 1]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_max_tokens(count: int) -> None:
    pieces, stats, model = generate(itertools.repeat(258), max_tokens=count)
    assert "".join(pieces) == "he" * count
    assert (stats.generated_tokens, stats.finish_reason) == (count, "length")
    assert len(model.batches) == count


def test_the_context_is_filled_to_its_last_place() -> None:
    _, stats, model = generate(itertools.repeat(258), prompt=[5] * 10, ctx_size=16)
    assert stats.finish_reason == "context"
    assert model.kv.length == 16
    assert stats.generated_tokens == 16 - 10 + 1


def test_a_long_prompt_comes_in_batches() -> None:
    _, stats, model = generate(script_of("he"), prompt=[5] * 1300, ctx_size=2000)
    assert sum(model.batches[:-1]) == 1300
    assert max(model.batches) <= 512
    assert stats.prompt_tokens == 1300


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ([], "the prompt is empty"),
        ([5] * 64, "the prompt has 64 tokens, the context holds 64"),
        ([VOCAB], "the tokenizer gives id 300, the model has 300 tokens"),
    ],
)
def test_prompts_that_are_refused(prompt: list[int], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        generate(script_of("he"), prompt=prompt)


def test_logits_that_are_not_numbers_end_it() -> None:
    engine = engine_for([5])
    engine.model.forward = lambda ids: torch.full((VOCAB,), torch.nan)
    with pytest.raises(BadInput, match="not finite"):
        list(stream_generate(engine, [5], Sampler(SamplingParams()), max_tokens=3))


@pytest.mark.parametrize(
    ("stop", "expected", "reason"),
    [
        (["lo w"], "hel", "stop"),
        (["never", "he"], "", "stop"),
        (["world", "wo", "o"], "hell", "stop"),
        (["d!"], "hello world", "stop"),
        ([""], "hello world", "stop"),
        (["world.", "low"], "hello world", "stop"),
    ],
)
def test_stop_strings(stop: list[str], expected: str, reason: str) -> None:
    pieces, stats, _ = generate(script_of("hello world"), stop=stop)
    assert ("".join(pieces), stats.finish_reason) == (expected, reason)


@given(
    text=st.text("ab", max_size=40),
    stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 40), max_size=10),
)
@settings(max_examples=300, deadline=None)
def test_where_the_pieces_are_cut_makes_no_difference(
    text: str, stop: list[str], cuts: list[int]
) -> None:
    watch = StopWatch(stop)
    edges = [0, *sorted(cuts), len(text)]
    out = ""
    for start, end in itertools.pairwise(edges):
        out += watch.push(text[start:end])
    out += watch.flush()
    # the stop string that is complete first wins
    ends = [(at + len(s), at) for s in stop if (at := text.find(s)) >= 0]
    assert watch.stopped == bool(ends)
    assert out == (text[: min(ends)[1]] if ends else text)
