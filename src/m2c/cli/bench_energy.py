"""`m2c bench --energy`: mixed mode, exact mode and streaming on one box, side by side."""

from typing import Any

from m2c.bundle.bundle import Bundle
from m2c.bundle.strict import dump_json
from m2c.cli.console import print_markdown, progress, result, say
from m2c.cli.energy import grid_of, machine_parts
from m2c.cli.runs import plan_facts
from m2c.contents import config_of, tokenizer_of
from m2c.data import calibration_text
from m2c.energy.account import account, is_measured, states_of
from m2c.energy.meter import IDLE_S, Lap, Meter
from m2c.energy.ways import WAYS, TextJob, measure_way, options_for
from m2c.engine import Engine, RunOptions
from m2c.errors import DoesNotFit, UsageError
from m2c.prompt import raw_ids
from m2c.speed import SpeedJob
from m2c.units import format_size

_PER_TOKEN = 8  # characters of the text that are surely enough for a token


def print_energy(
    bundle: Bundle, options: RunOptions, job: SpeedJob, *, grid: float | None, as_json: bool,
    quiet: bool,
) -> None:  # fmt: skip
    """Decode after the opening of the calibration text. A way that does not fit says so."""
    longest = config_of(bundle).max_position_embeddings
    if job.prompt + job.generate > longest:
        raise UsageError(
            f"{job.prompt + job.generate} tokens are beyond the {longest} of this model",
            "lower -p and -n",
        )
    tokenizer = tokenizer_of(bundle)
    text = calibration_text()[: _PER_TOKEN * job.prompt]
    work = TextJob(raw_ids(tokenizer, text)[: job.prompt], job.generate, job.repetitions)
    found: dict[str, dict[str, Any]] = {}
    with Meter() as meter:
        idle = meter.idle(IDLE_S) if meter.measures else None
        for way in WAYS:
            try:
                chosen = options_for(bundle, way, options)
                found[way] = _measured(bundle, way, chosen, work, meter, idle, grid, quiet)
            except DoesNotFit as error:
                say(f"m2c: {way}: {error}")
    if as_json:
        result(dump_json(found).decode())
    elif found:
        _print_table(found)
    if found:  # quiet or not: a figure is worth nothing without what it covers
        _say_what_it_covers(next(iter(found.values()))["energy"])


def _measured(
    bundle: Bundle, way: str, options: RunOptions, job: TextJob, meter: Meter, idle: Lap | None,
    grid: float | None, quiet: bool,
) -> dict[str, Any]:  # fmt: skip
    total = sum(index.header.payload_nbytes for index in bundle.shards.values())
    with progress(f"load {way}", total, unit="B", quiet=quiet) as advance:
        engine = Engine(bundle, options, progress=advance)
    with engine, progress(way, job.total, unit="tok", quiet=quiet) as advance:
        phases = measure_way(engine, job, meter, advance)
        shape = engine.shape
        parts = machine_parts(bundle.path, phases[-1].lap)
        return {
            "mix": str(shape.mix), "dense": shape.dense, "threads": shape.threads,
            "kernel": engine.workers.kernel, "device": engine.store.device.type,
            "repetitions": job.repetitions, "plan": plan_facts(engine.plan),
            "energy": account(meter, idle, phases, grid_of(grid), parts),
        }  # fmt: skip


def _print_table(found: dict[str, dict[str, Any]]) -> None:
    header = [
        "way", "weights", "memory", "prompt t/s", "decode t/s", "SSD MB/token", "prompt J/token",
        "decode J/token", "Wh/1k", "gCO2e/1k", "embodied/1k",
    ]  # fmt: skip
    rows = []
    for way, facts in found.items():
        prefill, decode = (facts["energy"]["phases"][name] for name in ("prefill", "decode"))
        weights = f"{facts['mix']}, dense {facts['dense']}"
        used = facts["plan"]["dram_used"] + facts["plan"]["hbm_used"]
        rows.append([
            way, weights, format_size(used), f"{prefill['tokens'] / prefill['seconds']:.2f}",
            f"{decode['tokens'] / decode['seconds']:.2f}",
            f"{decode['ssd_nbytes'] / 1e6 / decode['tokens']:.1f}",
            _cell(prefill["j_per_token"]), _cell(decode["j_per_token"]),
            _cell(decode["wh_per_1k"]), _cell(decode["operational_g_per_1k"]),
            _cell(decode["embodied_g_per_1k"]),
        ])  # fmt: skip
    print_markdown(header, rows, words=2)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _say_what_it_covers(facts: dict[str, Any]) -> None:
    grid = facts["grid"]
    parts = [states_of(facts)]
    if is_measured(facts):
        parts.append(f"at {grid['g_per_kwh']:g} g/kWh ({grid['source']})")
        if facts["idle"]:
            parts.append(f"idle before {facts['idle']['total_watts']:.3g} W, not subtracted")
    say(f"m2c: energy: {'; '.join(parts)}")
