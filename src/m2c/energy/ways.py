"""The same text by the same box in three ways: mixed mode, exact mode, and streaming.

Streaming is what a box does that knows no better: the checkpoint's own weights are read for every
token, and none of them stays in memory. Prints nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final

import numpy as np

from m2c.bundle.bundle import Bundle
from m2c.contents import config_of
from m2c.energy.account import Phase
from m2c.energy.meter import Lap, Meter
from m2c.engine import Engine, RunOptions, run_shape
from m2c.errors import DoesNotFit
from m2c.generate import token_steps
from m2c.model.footprint import footprint_of_bundle
from m2c.model.mix import Mix
from m2c.modes import exact_options
from m2c.sampling import Sampler, SamplingParams
from m2c.tiers.facts import Budget, Footprint
from m2c.tiers.plan import make_plan
from m2c.tiers.ssd import LinkStats
from m2c.tiers.traffic import StoreStats

WAYS: Final = ("mixed", "exact", "streaming")
_WARM_TOKENS: Final = 8


@dataclass(frozen=True)
class TextJob:
    """Decode `generate` tokens after the prompt, `repetitions` times."""

    prompt: Sequence[int]
    generate: int
    repetitions: int

    @property
    def total(self) -> int:
        """Tokens computed in all: what `progress` adds up to."""
        warm = min(_WARM_TOKENS, self.generate)
        return self.repetitions * (len(self.prompt) + self.generate) + len(self.prompt) + warm


def options_for(bundle: Bundle, way: str, options: RunOptions) -> RunOptions:
    """The options with the way made. Exact mode and streaming compute on the CPU."""
    if way == "mixed":
        return options
    on_cpu = replace(options, device="cpu", hbm=None, policy=None)
    if way == "exact":
        return exact_options(on_cpu)
    whole = replace(on_cpu, mix=Mix(100, 0, 0), dense="fp16")
    config = config_of(bundle)
    footprint = footprint_of_bundle(bundle, config, run_shape(bundle, config, whole), np.zeros(101))
    return replace(whole, dram=smallest_dram(footprint, options.depth))


def smallest_dram(footprint: Footprint, depth: int) -> int:
    """The fewest bytes for which there is a plan: what is streamed needs no more than its ring."""
    try:
        make_plan(footprint, Budget(0), policy="pinned", depth=depth)
    except DoesNotFit as error:
        return error.smallest
    return 0


def measure_way(
    engine: Engine, job: TextJob, meter: Meter,
    progress: Callable[[int], None] = lambda tokens: None,
) -> list[Phase]:  # fmt: skip
    """The prompts' phase and that of decoding, over all repetitions, after a short run that does
    not count."""
    _once(engine, job, min(_WARM_TOKENS, job.generate), meter, progress)
    found = [_once(engine, job, job.generate, meter, progress) for _ in range(job.repetitions)]
    return [_added(phases) for phases in zip(*found, strict=True)]


def _once(
    engine: Engine, job: TextJob, count: int, meter: Meter, progress: Callable[[int], None]
) -> tuple[Phase, Phase]:
    """The end of a text is no end here: every way decodes `count` tokens."""
    engine.model.kv.truncate(0)
    engine.store.reset_stats()
    meter.lap("")
    steps, _ = token_steps(engine, job.prompt, Sampler(SamplingParams()), count)
    decoded = -1
    for _ in islice(steps, count):
        decoded += 1
        if not decoded:
            prompt = _phase(meter.lap("prefill"), len(job.prompt), engine.store.stats)
            engine.store.reset_stats()
            progress(len(job.prompt))
        progress(1)
    return prompt, _phase(meter.lap("decode"), decoded, engine.store.stats)


def _phase(lap: Lap, tokens: int, stats: StoreStats) -> Phase:
    return Phase(lap, tokens, stats.ssd)


def _added(phases: Sequence[Phase]) -> Phase:
    """One phase of several; a component counts if every lap has it."""
    laps = [phase.lap for phase in phases]
    known = set.intersection(*(set(lap.joules) for lap in laps))
    lap = Lap(
        laps[0].name, sum(lap.seconds for lap in laps),
        {name: sum(lap.joules[name] for lap in laps) for name in sorted(known)},
        laps[0].start, laps[-1].end,
    )  # fmt: skip
    ssd = LinkStats(sum(p.ssd.nbytes for p in phases), sum(p.ssd.busy_s for p in phases))
    return Phase(lap, sum(phase.tokens for phase in phases), ssd)
