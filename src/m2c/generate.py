"""From a prompt to text: three nested generators, ids inside, text and timing outside.

`generate_step` yields token ids and knows nothing about text; `stream_generate` yields text that is
safe to print and, at the end, what it took. Nothing here prints.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from m2c.engine import Engine
from m2c.errors import UsageError
from m2c.hardware import peak_memory
from m2c.model.footprint import batch_tokens
from m2c.model.transformer import Stopped, Transformer
from m2c.sampling import Sampler
from m2c.speculate import Speculation, Speculator
from m2c.tiers.ssd import LinkStats
from m2c.tiers.traffic import StoreStats
from m2c.tokenizer import StreamDecoder

_Steps = tuple[Iterator[int], "Speculation | None"]


@dataclass
class GenerationStats:
    """Figures of a generation, or of several. Decode figures leave out prompt and first token."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt: they were in the KV cache already
    generated_tokens: int = 0
    ttft_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    finish_reason: str = ""  # "stop", "length", "context" or "interrupted"
    prefill: StoreStats | None = None
    decode: StoreStats | None = None
    speculation: Speculation | None = None
    peak_memory_nbytes: int = 0
    decode_steps: int = 0  # tokens after the first one

    @property
    def prefill_tps(self) -> float:
        computed = self.prompt_tokens - self.cached_tokens
        return computed / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tps(self) -> float:
        return self.decode_steps / self.decode_s if self.decode_s else 0.0


def together(figures: Sequence[GenerationStats]) -> GenerationStats:
    """Sums over generations; TTFT is their mean."""
    prefill, decode = (StoreStats(LinkStats(), LinkStats()) for _ in range(2))
    total = GenerationStats(prefill=prefill, decode=decode)
    for one in figures:
        total.prompt_tokens += one.prompt_tokens
        total.cached_tokens += one.cached_tokens
        total.generated_tokens += one.generated_tokens
        total.decode_steps += one.decode_steps
        total.ttft_s += one.ttft_s / len(figures)
        total.prefill_s += one.prefill_s
        total.decode_s += one.decode_s
        total.peak_memory_nbytes = max(total.peak_memory_nbytes, one.peak_memory_nbytes)
        for mine, its in ((prefill, one.prefill), (decode, one.decode)):
            if its is not None:
                mine.add(its)
        if one.speculation is not None:
            total.speculation = total.speculation or Speculation()
            total.speculation.add(one.speculation)
    return total


@dataclass
class Piece:
    """Text to print and the ids it came from; the last piece carries the stats."""

    text: str
    ids: list[int] = field(default_factory=list)
    stats: GenerationStats | None = None


def prefill(model: Transformer, ids: Sequence[int]) -> Any:
    """Run the prompt, a batch of tokens at a time; logits of its last token [vocab] f32."""
    step = batch_tokens(model.config)
    logits = None
    for start in range(0, len(ids), step):
        logits = model.forward(np.asarray(ids[start : start + step], np.int32))
    return logits


def generate_step(
    model: Transformer, ids: Sequence[int], sampler: Sampler, *, cached: int = 0
) -> Iterator[int]:
    """Yield token ids after the prompt `ids`, until the context is full or nobody asks.

    cached: how many of `ids` are in the KV cache, the last one not among them.
    """
    logits = prefill(model, ids[cached:])
    history = list(ids)
    while True:
        token = sampler(logits, history)
        history.append(token)
        yield token
        if model.kv.length >= model.kv.ctx_size:
            return
        logits = model.forward(np.asarray([token], np.int32))


def token_steps(
    engine: Engine, ids: Sequence[int], sampler: Sampler, limit: int, cached: int = 0
) -> _Steps:
    """How the engine's mode makes tokens, and the figures that this adds to."""
    if not engine.speculates:
        return generate_step(engine.model, ids, sampler, cached=cached), None
    speculator = Speculator(engine.model, engine.draft, sampler, engine.shape.at_once)

    def tokens() -> Iterator[int]:
        yield from speculator.tokens(prefill(engine.model, ids[cached:]), ids, limit)

    return tokens(), speculator.figures


def stream_generate(
    engine: Engine, ids: Sequence[int], sampler: Sampler, *, max_tokens: int,
    stop: Sequence[str] = (), cached: int = 0,
    observe: Callable[[float], None] = lambda seconds: None,
) -> Iterator[Piece]:  # fmt: skip
    """Yield pieces of text; the last one has the stats. Stop strings are not part of the text.

    cached: how many of `ids` are in the KV cache, the last one not among them. Whoever breaks it
    off, or has it stopped by `Engine.stop_when`, may rely on the keys and values of `ids` and of
    all yielded ids but the last one, as far as the cache goes, and on no others.
    observe: told the seconds that each token took, when it is there; the first took the prompt.

    Raises UsageError when the prompt is empty or does not fit the context.
    """
    require_prompt(ids, engine.shape.ctx_size, engine.config.vocab_size)
    stats = GenerationStats(prompt_tokens=len(ids), cached_tokens=cached)
    decoder = StreamDecoder(engine.tokenizer, context=ids[-8:])
    watch = StopWatch(stop)
    ends = set(engine.config.eos_token_ids)
    if engine.tokenizer.eos_id is not None:
        ends.add(engine.tokenizer.eos_id)
    begin = mark = time.perf_counter()
    engine.store.reset_stats()
    stats.finish_reason = "context"
    steps, stats.speculation = token_steps(engine, ids, sampler, max_tokens, cached)
    for token in _until_stopped(steps, stats):
        now = time.perf_counter()
        if not stats.generated_tokens:
            stats.ttft_s = stats.prefill_s = now - begin
            stats.prefill = engine.store.stats
            engine.store.reset_stats()
        else:
            stats.decode_s += now - mark
            stats.decode_steps += 1
        observe(now - mark)
        mark = now
        stats.generated_tokens += 1
        if token in ends:
            stats.finish_reason = "stop"
            break
        text = watch.push(decoder.push(token))
        yield Piece(text, [token])
        if watch.stopped or stats.generated_tokens >= max_tokens:
            stats.finish_reason = "stop" if watch.stopped else "length"
            break
        mark = time.perf_counter()  # the reader's time is not ours
    stats.decode = engine.store.stats
    stats.peak_memory_nbytes = peak_memory()
    yield Piece(watch.push(decoder.flush()) + watch.flush(), [], stats)


def _until_stopped(steps: Iterator[int], stats: GenerationStats) -> Iterator[int]:
    try:
        yield from steps
    except Stopped:
        stats.finish_reason = "interrupted"


class StopWatch:
    """Holds text back while it could still become a stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = [text for text in stop if text]
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What may be printed now."""
        if self.stopped:
            return ""
        self._held += text
        found = [(at + len(s), at) for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            self.stopped = True
            # the one complete first, as if the text had come letter by letter
            out, self._held = self._held[: min(found)[1]], ""
            return out
        keep = max((self._overlap(s) for s in self._stop), default=0)
        out = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return out

    def flush(self) -> str:
        out, self._held = self._held, ""
        return "" if self.stopped else out

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


def require_prompt(ids: Sequence[int], ctx_size: int, vocab_size: int) -> None:
    """Raises UsageError for a prompt the model cannot answer. Needs no weights."""
    if not ids:
        raise UsageError("the prompt is empty", 'give one with --prompt "..." or on stdin')
    if len(ids) >= ctx_size:
        raise UsageError(
            f"the prompt has {len(ids)} tokens, the context holds {ctx_size}",
            "use a larger --ctx-size or a shorter prompt",
        )
    if max(ids) >= vocab_size:
        raise UsageError(f"the tokenizer gives id {max(ids)}, the model has {vocab_size} tokens")
