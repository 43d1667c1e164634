"""`m2c bench`: tokens per second as llama-bench reports them, the disk's speed, cache policies."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m2c.cli import options
from m2c.cli.console import print_markdown, progress, result, say
from m2c.errors import BadInput, UsageError

if TYPE_CHECKING:
    from m2c.bundle.bundle import Bundle
    from m2c.engine import Engine, RunOptions
    from m2c.speed import Speed, SpeedJob

EXAMPLE = "Example: m2c bench -p 128 -n 32 --dram 1GiB"
_FORMATS = ("md", "json")


def command(
    bundle: options.BundleName = None,
    n_prompt: Annotated[
        int, typer.Option("--n-prompt", "-p", min=0, help="Tokens of the prompt; 0: no such test.")
    ] = 512,
    n_gen: Annotated[
        int, typer.Option("--n-gen", "-n", min=0, help="Tokens to decode; 0: no such test.")
    ] = 128,
    n_depth: Annotated[
        int, typer.Option("--n-depth", "-d", min=0, help="Tokens in the context before a test.")
    ] = 0,
    repetitions: Annotated[
        int, typer.Option("--repetitions", "-r", min=1, max=1000, help="Runs of each test.")
    ] = 5,
    mix: options.Mix = None,
    dense: options.Dense = None,
    dram: options.Dram = None,
    hbm: options.Hbm = None,
    device: options.Device = "cpu",
    ssd: options.Ssd = None,
    threads: options.Threads = None,
    kernel: options.Kernel = "auto",
    probe: Annotated[
        bool, typer.Option("--probe", help="Measure the bundle's disk again instead.")
    ] = False,
    replay: Annotated[
        Path | None,
        typer.Option(help="Compare cache policies on a trace that m2c run --trace recorded."),
    ] = None,
    plane: Annotated[
        str, typer.Option(help="With --replay: which plane's active sets: int8 or fp16.")
    ] = "int8",
    share: Annotated[
        list[int] | None,
        typer.Option(
            min=1, max=100,
            help="With --replay: cache sizes in percent of the neurons [default: 10 25 50].",
        ),
    ] = None,
    energy: Annotated[
        bool,
        typer.Option(
            "--energy",
            help="Compare the energy of mixed mode, exact mode and streaming instead, on text.",
        ),
    ] = False,
    grid_intensity: options.GridIntensity = None,
    output: Annotated[str, typer.Option("--output", "-o", help="md or json.")] = "md",
    json_output: options.Json = False,
    quiet: options.Quiet = False,
) -> None:  # fmt: skip
    """Measure speed, with llama-bench's tests.

    pp is a prompt computed in batches, tg decodes one token at a time; mean and standard deviation
    over the repetitions, after a run that does not count. Token ids are random. The predicted
    speed is what the plan's bytes allow at the speeds of disk and memory. --probe measures request
    sizes and depths on the disk and remembers the best. --replay compares cache policies at equal
    bytes; Belady knows the future: the bound. --energy decodes the same text in three ways, one
    after the other: streaming reads the checkpoint's own weights for every token and pins none.
    """
    from m2c.bundle.bundle import open_bundle
    from m2c.cli.bench_energy import print_energy
    from m2c.cli.bench_replay import print_replay
    from m2c.cli.names import bundle_path
    from m2c.cli.runs import run_options
    from m2c.speed import SpeedJob

    if output not in _FORMATS:
        raise UsageError(f"--output {output}: choose one of {', '.join(_FORMATS)}")
    as_json = json_output or output == "json"
    instead = {"--replay": replay is not None, "--probe": probe, "--energy": energy}
    if len(asked := [name for name, wanted in instead.items() if wanted]) > 1:
        raise UsageError(f"{' and '.join(asked)} do not go together", "leave one out")
    if replay is not None:
        print_replay(replay, plane=plane, shares=share or [10, 25, 50], as_json=as_json)
        return
    if grid_intensity is not None and not energy:
        raise UsageError("--grid-intensity is for carbon figures", "add --energy")
    if energy and (n_prompt < 1 or n_gen < 2 or n_depth):
        raise UsageError("--energy decodes text after a prompt", "give -p 1, -n 2 or more, no -d")
    if not (n_prompt or n_gen):
        raise UsageError("-p 0 -n 0 leaves nothing to measure", "give at least one of them tokens")
    job = SpeedJob(n_prompt, n_gen, n_depth, repetitions)
    ctx_size = n_prompt + n_gen if energy else job.ctx_size
    chosen = run_options(
        mix=mix, drop=0.0, dense=dense, ctx_size=ctx_size, kv="f16", dram=dram, hbm=hbm,
        device=device, policy=None, depth=3, threads=threads, kernel=kernel,
    )  # fmt: skip
    opened = open_bundle(bundle_path(bundle, ssd))
    if probe:
        _print_probe(opened, as_json)
        return
    if energy:
        print_energy(opened, chosen, job, grid=grid_intensity, as_json=as_json, quiet=quiet)
        return
    _print_speed(opened, chosen, job, as_json=as_json, quiet=quiet)


def _print_speed(
    bundle: "Bundle", chosen: "RunOptions", job: "SpeedJob", *, as_json: bool, quiet: bool
) -> None:
    from m2c.bundle.strict import dump_json
    from m2c.contents import config_of
    from m2c.engine import Engine
    from m2c.speed import measure_speed

    longest = config_of(bundle).max_position_embeddings
    if job.ctx_size > longest:
        raise UsageError(
            f"{job.ctx_size} tokens are beyond the {longest} of this model",
            "lower -d and the larger of -p and -n",
        )
    total = sum(index.header.payload_nbytes for index in bundle.shards.values())
    with progress("load", total, unit="B", quiet=quiet) as advance:
        engine = Engine(bundle, chosen, progress=advance)
    with engine, progress("bench", job.total, unit="tok", quiet=quiet) as advance:
        speeds = list(measure_speed(engine, job, progress=advance))
    facts = _engine_facts(engine)
    if as_json:
        result(dump_json([{**facts, **_speed_facts(speed)} for speed in speeds]).decode())
        return
    setup = _setup_cells(facts, chosen)
    header = [*setup, "test", "t/s", "SSD MB/token", "GB/s", "predicted t/s"]
    rows = [[*setup.values(), *_speed_cells(speed)] for speed in speeds]
    print_markdown(header, rows, words=len(setup) + 1)


def _engine_facts(engine: "Engine") -> dict[str, Any]:
    from m2c.cli.runs import plan_facts
    from m2c.model.tensors import parameter_count

    return {
        "model": engine.bundle.path.stem, "mix": str(engine.shape.mix),
        "dense": engine.shape.dense, "params": parameter_count(engine.config),
        "size_nbytes": engine.plan.compute_nbytes_per_token, "kernel": engine.workers.kernel,
        "device": engine.store.device.type, "threads": engine.shape.threads,
        "disk_bytes_per_second": engine.disk.bytes_per_s, "plan": plan_facts(engine.plan),
    }  # fmt: skip


def _speed_facts(speed: "Speed") -> dict[str, Any]:
    return {
        "test": speed.test, "tokens": speed.tokens, "tps_mean": speed.mean,
        "tps_deviation": speed.deviation, "seconds": list(speed.seconds),
        "ssd_nbytes_per_token": speed.ssd_nbytes_per_token,
        "ssd_bytes_per_second": speed.ssd_bytes_per_s, "predicted_tps": speed.predicted_tps,
    }  # fmt: skip


def _setup_cells(facts: dict[str, Any], chosen: "RunOptions") -> dict[str, str]:
    """Column to cell, the same for all tests. Of the budgets those that were asked for."""
    from m2c.units import format_size

    billions = facts["params"] / 1e9
    on_cpu = f", {facts['threads']} threads" if facts["device"] == "cpu" else ""
    cells = {
        "model": f"{facts['model']} {facts['mix']}, dense {facts['dense']}",
        "size": format_size(facts["size_nbytes"]),
        "params": f"{billions:.2f} B" if billions >= 1 else f"{billions * 1e3:.2f} M",
        "backend": f"{facts['device']} {facts['kernel']}{on_cpu}",
    }
    if chosen.dram is not None:
        cells["dram"] = format_size(facts["plan"]["dram_budget"])
    if facts["plan"]["hbm_budget"]:
        cells["hbm"] = format_size(facts["plan"]["hbm_budget"])
    return cells


def _speed_cells(speed: "Speed") -> list[str]:
    return [
        speed.test,
        f"{speed.mean:.2f} ± {speed.deviation:.2f}",
        f"{speed.ssd_nbytes_per_token / 1e6:.1f}",
        f"{speed.ssd_bytes_per_s / 1e9:.2f}" if speed.ssd_bytes_per_s else "-",
        f"{speed.predicted_tps:.2f}" if speed.predicted_tps else "-",
    ]


def _print_probe(bundle: "Bundle", as_json: bool) -> None:
    from dataclasses import asdict

    from m2c.bundle.strict import dump_json
    from m2c.disk import choose, device_of, measure_settings, remember

    device = device_of(bundle.path)
    measured = measure_settings(bundle)
    best = choose(measured)
    if as_json:
        settings = [{**asdict(setting), "chosen": setting == best} for setting in measured]
        result(dump_json({"device": device, "settings": settings}).decode())
    elif measured:
        measured.sort(key=lambda setting: (setting.request_nbytes, setting.depth))
        rows = [
            [
                f"{setting.request_nbytes >> 10} KiB", str(setting.depth),
                f"{setting.bytes_per_s / 1e9:.2f}", "chosen" if setting == best else "",
            ]
            for setting in measured
        ]  # fmt: skip
        print_markdown(["request", "in flight", "GB/s", ""], rows, words=0)
    if remember(device, best):
        say(f"m2c: remembered for the disk {device}")
    elif measured:
        say("m2c: not remembered: M2C_HOME cannot be written")
    else:
        raise BadInput(
            f"{bundle.path}: too small to measure the disk {device}, or it has no direct reads",
            "give a bundle of a larger model",
        )
