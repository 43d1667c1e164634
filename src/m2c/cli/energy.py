"""The energy account of a run on this machine, from an engine, laps and figures.

Knows nothing about argument parsing.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m2c.energy.account import Grid, Phase, account
from m2c.energy.carbon import Part, parts_of
from m2c.energy.meter import Lap, Meter
from m2c.engine import Engine
from m2c.generate import GenerationStats
from m2c.hardware import total_memory


def grid_of(given: float | None) -> Grid:
    return Grid() if given is None else Grid(given, "as given")


def energy_facts(
    engine: Engine, meter: Meter, idle: Lap | None, laps: Sequence[Lap], figures: GenerationStats,
    grid: Grid,
) -> dict[str, Any]:  # fmt: skip
    """laps: of the prompt and of decoding."""
    phases = []
    tokens = (figures.prompt_tokens, figures.decode_steps)
    for lap, count, stats in zip(laps, tokens, (figures.prefill, figures.decode), strict=True):
        assert stats is not None
        phases.append(Phase(lap, count, stats.ssd))
    return account(meter, idle, phases, grid, machine_parts(engine.bundle.path, laps[-1]))


def machine_parts(bundle: Path, lap: Lap) -> list[Part]:
    """Memory of the machine, the file system that the bundle lies on, cards that NVML saw."""
    disk = os.statvfs(bundle)
    gpus = sum(name.startswith("GPU ") for name in lap.end)
    return parts_of(total_memory(), disk.f_blocks * disk.f_frsize, gpus)
