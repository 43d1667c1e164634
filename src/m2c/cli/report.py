"""What a run leaves behind besides its text: the summary line, --stats, --report, --energy.

Knows nothing about argument parsing or generating.
"""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from m2c import __version__
from m2c.bundle.files import write_atomic
from m2c.bundle.strict import dump_json
from m2c.cli.console import say
from m2c.cli.energy import energy_facts, grid_of
from m2c.cli.names import require_writable
from m2c.cli.pages import require_page
from m2c.cli.runs import describe_plan, stats_facts, summary_line
from m2c.energy.account import energy_line
from m2c.energy.meter import IDLE_S, Lap, Meter
from m2c.engine import Engine
from m2c.errors import UsageError
from m2c.generate import GenerationStats
from m2c.hardware import read_cpu, total_memory
from m2c.pages.html import MARK
from m2c.pages.run_page import run_page
from m2c.tiers.parts import tier_parts
from m2c.tokenlog import TokenLog
from m2c.units import format_size


@dataclass(frozen=True)
class Wishes:
    """What a person wants to know about the run."""

    stats: Path | None = None
    report: Path | None = None
    energy: bool = False
    grid: float | None = None  # gCO2e/kWh
    quiet: bool = False

    def check(self) -> None:
        """Raises UsageError, BadInput or StorageError before any work."""
        if self.stats is not None:
            require_writable(self.stats, "--stats")
        if self.report is not None:
            require_page(self.report, "--report", (".html", ".json"))
        if self.grid is not None and not self.energy:
            raise UsageError("--grid-intensity is for carbon figures", "add --energy")

    @property
    def any(self) -> bool:
        """Whether figures are wanted at all."""
        return not self.quiet or self.energy or bool(self.stats or self.report)


@dataclass(frozen=True)
class Story:
    """What went in, what came out, and what was asked for, in words."""

    prompt: str
    system: str | None
    answer: str
    settings: dict[str, str]


class Watch:
    """Told of each token. Measures nothing that was not asked for: then it costs a call."""

    def __init__(
        self, engine: Engine, wishes: Wishes, meter: Meter | None, idle: Lap | None
    ) -> None:
        self.log = TokenLog(engine.store) if wishes.report else None
        self.meter, self.idle = meter, idle
        self.laps: list[Lap] = []
        if meter is not None:
            meter.lap("")  # what was before is not the prompt's

    def __call__(self, seconds: float) -> None:
        if self.log is not None:
            self.log(seconds)
        if self.meter is not None and not self.laps:
            self.laps.append(self.meter.lap("prefill"))

    def end(self) -> None:
        if self.meter is not None:
            self.laps.append(self.meter.lap("decode"))


@contextmanager
def metering(wishes: Wishes) -> Iterator[tuple[Meter | None, Lap | None]]:
    """The meter that --energy asks for and the idle level now; nothing without it."""
    if not wishes.energy:
        yield None, None
        return
    with Meter() as meter:
        idle = meter.idle(IDLE_S) if meter.measures else None
        yield meter, idle


def leave(
    engine: Engine, figures: GenerationStats, expected: float, watch: Watch, wishes: Wishes,
    story: Story,
) -> None:  # fmt: skip
    """Write and say what was wished for."""
    if not wishes.any:
        return
    run = stats_facts(engine, figures, expected)
    energy = None
    if watch.meter is not None:
        grid = grid_of(wishes.grid)
        energy = energy_facts(engine, watch.meter, watch.idle, watch.laps, figures, grid)
    if wishes.stats is not None:
        write_atomic(wishes.stats, dump_json(run | ({"energy": energy} if energy else {})) + b"\n")
    if wishes.report is not None:
        report = _report(engine, figures, run, energy, watch, story)
        data = run_page(report) if wishes.report.suffix == ".html" else dump_json(report) + b"\n"
        write_atomic(wishes.report, data)
    if not wishes.quiet:
        say(summary_line(run))
    if energy:
        say(f"m2c: {energy_line(energy)}")
    if wishes.report is not None and not wishes.quiet:
        say(f"m2c: wrote {wishes.report}")


def _report(
    engine: Engine, figures: GenerationStats, run: dict[str, Any], energy: dict[str, Any] | None,
    watch: Watch, story: Story,
) -> dict[str, Any]:  # fmt: skip
    assert watch.log is not None
    passes = figures.speculation.history if figures.speculation else []
    words = describe_plan(engine.plan, engine.shape)
    return {
        "written_by": f"{MARK}, version {__version__}",
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "bundle": {
            "name": engine.bundle.manifest.name, "path": str(engine.bundle.path),
        },
        "prompt": story.prompt, "system": story.system or "", "answer": story.answer,
        "run": run, "plan": {"tiers": tier_parts(engine.plan), "words": words},
        "tokens": watch.log.facts(), "passes": [asdict(found) for found in passes],
        "settings": _settings(engine) | story.settings, "machine": _machine(engine),
        "energy": energy,
    }  # fmt: skip


def _settings(engine: Engine) -> dict[str, str]:
    """As the run had them, whether they were given or chosen."""
    shape, budget = engine.shape, engine.plan.budget
    return {
        "mode": "exact" if engine.speculates else "mixed", "mix": str(shape.mix),
        "attention and head": shape.dense,
        "context": f"{shape.ctx_size} tokens, KV cache {shape.kv_type}",
        "DRAM budget": format_size(budget.dram),
        "HBM budget": format_size(budget.hbm) if budget.hbm else "none",
        "neuron cache": engine.plan.policy, "threads": str(shape.threads),
        "kernels": engine.workers.kernel, "device": str(engine.store.device),
        "SSD requests": f"{format_size(engine.disk.request_nbytes)}, {engine.disk.depth} in flight",
    }  # fmt: skip


def _machine(engine: Engine) -> dict[str, str]:
    found = {
        "processor": f"{read_cpu().model}, {os.cpu_count()} threads",
        "memory": format_size(total_memory()),
    }
    if engine.store.device.type == "cuda":
        found["GPU"] = torch.cuda.get_device_name(engine.store.device)
    return found | {
        "system": f"{platform.system()} {platform.release()}", "m2c": __version__,
        "bundle packed by": engine.bundle.manifest.created_by,
        "Python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip
