"""`m2c plan MODEL`: what would lie where, and how fast it could be. Needs no weights."""

from typing import TYPE_CHECKING, Annotated

import typer

from m2c.cli import options
from m2c.cli.console import result
from m2c.errors import UsageError

if TYPE_CHECKING:
    from m2c.engine import RunOptions
    from m2c.model.footprint import RunShape
    from m2c.tiers.plan import Plan

EXAMPLE = "Example: m2c plan llama2-70b --hbm 24GiB --dram 64GiB"


def command(
    model: Annotated[
        str | None,
        typer.Argument(
            help="An alias such as llama2-70b, a checkpoint, or a bundle [default: the one packed "
            "last]."
        ),
    ] = None,
    mix: options.Mix = None,
    drop: options.Drop = 0.0,
    dense: options.Dense = None,
    ctx_size: options.CtxSize = None,
    kv: options.Kv = "f16",
    dram: options.Dram = None,
    hbm: options.Hbm = None,
    policy: options.Policy = None,
    ssd: options.Ssd = None,
    ssd_speed: Annotated[
        str, typer.Option(help="What the SSD reads per second, for the bound.")
    ] = "2GB",
    link_speed: Annotated[str, typer.Option(help="Likewise from DRAM to HBM.")] = "12GB",
    dram_speed: Annotated[str, typer.Option(help="Likewise from DRAM to the processor.")] = "20GB",
    hbm_speed: Annotated[str, typer.Option(help="Likewise of the GPU's memory.")] = "300GB",
    threads: options.Threads = None,
    json_output: options.Json = False,
) -> None:
    """Say what would lie in which tier.

    Prints bytes per tier, bytes per token on each link and the bound on tok/s that follows.
    """
    from m2c.bundle.strict import dump_json
    from m2c.cli.runs import Speeds, describe_plan, plan_facts, run_options
    from m2c.units import parse_size

    chosen = run_options(
        mix=mix, drop=drop, dense=dense, ctx_size=ctx_size, kv=kv, dram=dram, hbm=hbm,
        device="cpu", policy=policy, depth=3, threads=threads,
    )  # fmt: skip
    given = [parse_size(speed) for speed in (ssd_speed, link_speed, dram_speed, hbm_speed)]
    if 0 in given:
        raise UsageError("a speed of 0 bounds nothing", "write it like 2GB")
    speeds = Speeds(*given)
    plan, shape, title = _plan(model, chosen, ssd)
    if json_output:
        result(dump_json(plan_facts(plan)).decode())
        return
    for line in [title, *describe_plan(plan, shape, speeds)]:
        result(line)


def _plan(model, chosen: "RunOptions", ssd) -> tuple["Plan", "RunShape", str]:  # type: ignore[no-untyped-def]
    from m2c.bundle.bundle import open_bundle
    from m2c.cli.names import bundle_path, find_bundle
    from m2c.contents import config_of, importance_of
    from m2c.engine import plan_for, plan_without_weights, run_shape
    from m2c.hub import alias_config, resolve_model
    from m2c.model.checkpoint import open_checkpoint
    from m2c.model.config import parameter_count
    from m2c.units import format_size

    if model is None or find_bundle(model, ssd):
        bundle = open_bundle(bundle_path(model, ssd))
        config = config_of(bundle)
        shape, plan = plan_for(
            bundle, config, run_shape(bundle, config, chosen), importance_of(bundle), chosen
        )
        return plan, shape, f"{bundle.path}"
    alias = alias_config(model)
    config = alias or open_checkpoint(resolve_model(model, ssd).path).config
    plan, shape, nbytes = plan_without_weights(config, chosen)
    count = parameter_count(config)
    title = f"{model}: {count / 1e9:.2f} G weights, about {format_size(nbytes)} of SSD (estimate)"
    return plan, shape, title
