"""`m2c plan MODEL`: what would lie where, and how fast it could be. Needs no weights."""

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m2c.cli import complete, options
from m2c.cli.console import page_width, result, result_page, tables

if TYPE_CHECKING:
    from m2c.bundle.bundle import Bundle
    from m2c.cli.figures import Figures
    from m2c.engine import RunOptions
    from m2c.model.mix import Mix
    from m2c.modes import Outlook, Planner

EXAMPLE = "Example: m2c plan llama2-70b --hbm 24GiB --dram 64GiB"


def command(
    model: Annotated[
        str | None,
        typer.Argument(
            help="An alias such as llama2-70b, a checkpoint, org/name[@revision] of the Hugging "
            "Face hub, or a bundle [default: the one packed last].",
            autocompletion=complete.models_and_bundles,
        ),
    ] = None,
    exact: options.Exact = False,
    mode: options.Mode = None,
    exact_precision: options.ExactPrecision = "fp16",
    mix: options.Mix = None,
    drop: options.Drop = 0.0,
    dense: options.Dense = None,
    ctx_size: options.CtxSize = None,
    kv: options.Kv = "f16",
    dram: options.Dram = None,
    hbm: options.Hbm = None,
    device: options.Device = "cpu",
    policy: options.Policy = None,
    depth: options.Depth = 3,
    ssd: options.Ssd = None,
    ssd_speed: Annotated[
        str | None,
        typer.Option(help="What the SSD reads per second [default: what was measured, else 2GB]."),
    ] = None,
    link_speed: Annotated[
        str | None, typer.Option(help="Likewise from DRAM to HBM [default: 12GB].")
    ] = None,
    dram_speed: Annotated[
        str | None, typer.Option(help="Likewise from DRAM to the processor [default: measured].")
    ] = None,
    hbm_speed: Annotated[
        str | None, typer.Option(help="Likewise of the GPU's memory [default: 300GB].")
    ] = None,
    threads: options.Threads = None,
    kernel: options.Kernel = "auto",
    offline: options.Offline = False,
    json_output: options.Json = False,
) -> None:
    """Say what would lie in which tier, and how fast that could be.

    Prints bytes per tier, drawn on a terminal, bytes per token on each link, the bound on tok/s
    that follows, and what each mode is predicted to reach on this machine. The mode is the one
    that m2c run would take. A GPU need not be there if --hbm says how much memory it has. Of
    a model that is not on this machine only config.json is fetched, into the Hugging Face cache.
    """
    from m2c.bundle.strict import dump_json
    from m2c.cli.figures import Figures
    from m2c.cli.modes import asked_mode, leaves_exact, require_precision, tiers_of
    from m2c.cli.runs import describe_plan, plan_facts, run_options

    chosen = run_options(
        mix=mix, drop=drop, dense=dense, ctx_size=ctx_size, kv=kv, dram=dram, hbm=hbm,
        device=device, policy=policy, depth=depth, threads=threads, kernel=kernel,
    )  # fmt: skip
    plain = leaves_exact(chosen, drop)
    asked = asked_mode(mode, exact, plain, tiers=tiers_of(chosen))
    require_precision(asked, exact_precision)
    given = {"ssd": ssd_speed, "link": link_speed, "dram": dram_speed, "hbm": hbm_speed}
    subject = _subject(model, ssd, offline)
    if drop and mix is None:
        chosen = replace(chosen, mix=replace(subject.mix, drop=drop))
    figures = Figures(given, subject.bundle, ssd)
    found = _outlooks(subject.planner, chosen, plain, exact_precision, figures)
    taken = _taken(found, asked, subject.planner, chosen, exact_precision)
    if json_output:
        facts = _facts(taken, found, subject.nbytes, figures)
        result(dump_json({**plan_facts(taken.plan), **facts}).decode())
        return
    lines = describe_plan(taken.plan, taken.shape, figures.speeds(taken.plan))
    result_page([subject.title, *lines, *_predicted(found, figures)])
    _draw(taken, subject.nbytes)


@dataclass(frozen=True)
class _Subject:
    """What is planned. nbytes: of the bundle; an estimate where there is none. mix: unless another
    is given."""

    title: str
    planner: "Planner"
    nbytes: int
    mix: "Mix"
    bundle: "Bundle | None" = None


def _subject(model: str | None, ssd: Path | None, offline: bool) -> _Subject:
    from m2c.bundle.bundle import open_bundle
    from m2c.cli.fetch import config_here
    from m2c.cli.names import bundle_path, find_bundle
    from m2c.engine import ASSUMED_EXACT_TYPE
    from m2c.hub import alias_config
    from m2c.model.footprint import bundle_nbytes
    from m2c.model.mix import Mix, assumed_mix
    from m2c.model.tensors import parameter_count
    from m2c.modes import planner_of_bundle, planner_of_config
    from m2c.units import format_size

    if model is None or find_bundle(model, ssd):
        bundle = open_bundle(bundle_path(model, ssd))
        nbytes = sum(index.header.payload_nbytes for index in bundle.shards.values())
        own = Mix.of_percent(bundle.manifest.mix.percent)
        return _Subject(f"{bundle.path}", planner_of_bundle(bundle), nbytes, own, bundle)
    config = alias_config(model) or config_here(model, ssd, offline=offline)
    nbytes = bundle_nbytes(config, ASSUMED_EXACT_TYPE)
    count = parameter_count(config)
    title = f"{model}: {count / 1e9:.2f} G weights, about {format_size(nbytes)} of SSD (estimate)"
    own = assumed_mix(config.num_experts_per_tok)
    return _Subject(title, planner_of_config(config), nbytes, own)


def _outlooks(
    planner: "Planner", chosen: "RunOptions", plain: bool, precision: str, figures: "Figures"
) -> "dict[str, Outlook]":
    """Every mode that these options leave possible and that fits."""
    from m2c.modes import exact_options, outlooks

    modes = {"mixed": chosen}
    if plain:
        modes["exact"] = exact_options(chosen, precision)
    return outlooks(planner, modes, lambda _, plan: figures.speeds(plan))


def _taken(
    found: "dict[str, Outlook]", asked: str, planner: "Planner", chosen: "RunOptions",
    precision: str,
) -> "Outlook":  # fmt: skip
    """The mode asked for, or the one that m2c run would take. Raises DoesNotFit."""
    from m2c.modes import exact_options, preferred

    mode = preferred(found) if asked == "auto" else asked
    if mode not in found:
        planner.plan(exact_options(chosen, precision) if mode == "exact" else chosen)
    return found[mode]


def _predicted(found: "dict[str, Outlook]", figures: "Figures") -> list[str]:
    """What the modes would reach. Nothing of a GPU: its predictions were never held to runs."""
    from m2c.cli.words import tps
    from m2c.predict import assumed_acceptance

    parts = []
    for mode, outlook in found.items():
        if outlook.plan.budget.hbm:
            return []
        guess = ""
        if outlook.shape.speculates:
            guess = f" if {100 * assumed_acceptance(outlook.plan):.0f} % of the drafts are right"
        parts.append(f"{mode} {tps(outlook.tps)} tok/s{guess}")
    return [f"predicted: {', '.join(parts)}; {figures.words()}"]


def _facts(
    taken: "Outlook", found: "dict[str, Outlook]", nbytes: int, figures: "Figures"
) -> dict[str, Any]:
    from m2c.tiers.parts import dram_parts, hbm_parts

    figures.speeds(taken.plan)
    on_cpu = {mode: each.tps for mode, each in found.items() if not each.plan.budget.hbm}
    return {
        "mode": "exact" if taken.shape.speculates else "mixed",
        "bundle_nbytes": nbytes,
        "dram_parts": dram_parts(taken.plan),
        "hbm_parts": hbm_parts(taken.plan),
        "predicted_tps": on_cpu,
        "speeds": {key: asdict(figure) for key, figure in figures.used.items()},
    }


def _draw(taken: "Outlook", nbytes: int) -> None:
    """A bar per tier, on a terminal."""
    from m2c.cli.bars import Tier, coloured, lines_of
    from m2c.tiers.parts import tier_parts

    if not sys.stdout.isatty():
        return
    plan = taken.plan
    tiers = [Tier(t["name"], t["parts"], t["budget"], "free") for t in tier_parts(plan)]
    use = "pass" if taken.shape.speculates else "token"
    read = {f"read for every {use}": n} if (n := min(plan.ssd_nbytes_per_token, nbytes)) else {}
    tiers.append(Tier("SSD", read, nbytes, "not read while decoding"))
    console = tables()
    for tier in tiers:
        result("")
        head, bar, *legend = lines_of(tier, page_width())
        result(head)
        console.print(coloured(bar), soft_wrap=True)
        for line in legend:
            result(line)
