"""Speed of a bundle within given budgets: prefill and decode, with llama-bench's tests.

`pp512` is a prompt of 512 tokens, `tg128` 128 tokens one by one. Token ids are random, as there,
so runs differ only in what is compared; on text, hot neurons serve more of the uses. Knows nothing
about text, prints nothing.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Final

import numpy as np
import numpy.typing as npt

from m2c.engine import Engine
from m2c.generate import prefill
from m2c.predict import measured_speeds, predicted_mixed_tps
from m2c.tiers.traffic import StoreStats

_WARM_TOKENS: Final = 16  # decoded before the clock starts: caches fill, threads and disk wake up
_SEED: Final = 1

Ids = npt.NDArray[np.int32]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class SpeedJob:
    """What to measure. Tokens; a test of no tokens is left out."""

    prompt: int = 512
    generate: int = 128
    depth: int = 0  # tokens in the context before the test begins
    repetitions: int = 5

    @property
    def ctx_size(self) -> int:
        return self.depth + max(self.prompt, self.generate)

    @property
    def total(self) -> int:
        """Tokens computed in all, warm-up included: what `progress` adds up to."""
        runs = self.repetitions + 1
        tests = self.prompt * runs + self.generate * (runs - 1)
        return self.depth + tests + min(self.generate, _WARM_TOKENS)


@dataclass(frozen=True)
class Speed:
    """Figures of one test, over all repetitions."""

    test: str
    tokens: int  # of one repetition
    seconds: tuple[float, ...]  # [repetitions]
    ssd_nbytes_per_token: float
    ssd_bytes_per_s: float  # while at least one read was under way; 0: nothing was read
    predicted_tps: float | None = None  # by the plan; none for prompts

    @property
    def tps(self) -> tuple[float, ...]:
        """Tokens per second of each repetition."""
        return tuple(self.tokens / seconds for seconds in self.seconds)

    @property
    def mean(self) -> float:
        return fmean(self.tps)

    @property
    def deviation(self) -> float:
        """Standard deviation of a sample; 0 for a single one."""
        return stdev(self.tps) if len(self.seconds) > 1 else 0.0


def measure_speed(
    engine: Engine, job: SpeedJob, *, progress: Progress = lambda tokens: None
) -> Iterator[Speed]:
    """Yield the prompt's figures, then those of decoding; each test is warmed up first.

    The engine's context must hold `job.ctx_size` tokens; what was in it is lost.
    """
    random = np.random.default_rng(_SEED)

    def ids(*counts: int) -> list[Ids]:
        return [random.integers(0, engine.config.vocab_size, n, dtype=np.int32) for n in counts]

    engine.model.kv.truncate(0)
    for context in ids(job.depth):
        _prompt(engine, context, progress)
    after = f" @ d{job.depth}" if job.depth else ""
    if n := job.prompt:
        runs = ids(n, *[n] * job.repetitions)
        yield _timed(engine, job.depth, f"pp{n}{after}", runs, _prompt, progress)[0]
    if n := job.generate:
        runs = ids(min(n, _WARM_TOKENS), *[n] * job.repetitions)
        speed, stats = _timed(engine, job.depth, f"tg{n}{after}", runs, _decode, progress)
        predicted = predicted_mixed_tps(engine, measured_speeds(engine, stats))
        yield replace(speed, predicted_tps=predicted or None)


def _prompt(engine: Engine, ids: Ids, progress: Progress) -> None:
    prefill(engine.model, ids.tolist())
    progress(len(ids))


def _decode(engine: Engine, ids: Ids, progress: Progress) -> None:
    for i in range(len(ids)):
        engine.model.forward(ids[i : i + 1])
        progress(1)


def _timed(
    engine: Engine, depth: int, test: str, runs: list[Ids],
    run: Callable[[Engine, Ids, Progress], None], progress: Progress,
) -> tuple[Speed, StoreStats]:  # fmt: skip
    """Figures and traffic of every run but the first, which warms up."""
    seconds: list[float] = []
    for ids in runs:
        engine.model.kv.truncate(depth)
        if len(seconds) == 1:
            engine.store.reset_stats()
        begin = time.perf_counter()
        run(engine, ids, progress)
        seconds.append(time.perf_counter() - begin)
    stats, tokens = engine.store.stats, len(runs[-1])
    reached = stats.ssd.nbytes / stats.ssd.busy_s if stats.ssd.busy_s else 0.0
    moved = stats.ssd.nbytes / (tokens * len(seconds[1:]))
    return Speed(test, tokens, tuple(seconds[1:]), moved, reached), stats
