"""`m2c bench --replay FILE`: hit rates of cache policies over a recorded trace."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from m2c.cli import options
from m2c.cli.console import result, tables
from m2c.errors import UsageError

EXAMPLE = "Example: m2c run -p hello --trace t.m2ct && m2c bench --replay t.m2ct"


def command(
    replay: Annotated[
        Path | None, typer.Option(help="A trace that m2c run --trace recorded.")
    ] = None,
    plane: Annotated[str, typer.Option(help="Which plane's active sets: int8 or fp16.")] = "int8",
    share: Annotated[
        list[int] | None,
        typer.Option(
            min=1, max=100, help="Cache sizes in percent of the neurons [default: 10 25 50]."
        ),
    ] = None,
    json_output: options.Json = False,
) -> None:
    """Compare cache policies on a trace.

    Hit rates of pinned, LRU, LFU, adjacent-token update, moving average and Belady at equal bytes.
    Every policy starts with the hottest neurons in its slots. Belady knows the future: the bound.
    """
    from m2c.bundle.strict import dump_json
    from m2c.replay import REPLAY_NAMES
    from m2c.replay import replay as replay_trace
    from m2c.tiers.trace import read_trace

    if replay is None:
        raise UsageError("nothing to replay", "type: m2c bench --replay FILE")
    trace = read_trace(replay)
    shares = share or [10, 25, 50]
    found = {}
    for percent in shares:
        slots = trace.num_neurons * percent // 100 * trace.num_layers
        found[percent] = replay_trace(trace, plane=plane, capacity_nbytes=slots, record_nbytes=1)
    if json_output:
        result(dump_json({str(k): asdict(table) for k, table in found.items()}).decode())
        return
    from rich.table import Table

    first = found[shares[0]]
    table = Table(
        title=f"{trace.num_tokens} tokens, {trace.num_layers} layers, {first.active_share:.0%} of "
        f"{trace.num_neurons} neurons active, adjacent tokens share {first.overlap:.0%}"
    )
    table.add_column("policy")
    for percent in shares:
        table.add_column(f"hit rate at {percent} %", justify="right")
    for i, name in enumerate(REPLAY_NAMES):
        rates = [f"{found[percent].rows[i].hit_rate:.1%}" for percent in shares]
        table.add_row(name, *rates)
    tables().print(table)
