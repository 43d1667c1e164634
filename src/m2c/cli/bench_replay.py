"""`m2c bench --replay FILE`: hit rates of cache policies over a recorded trace."""

from dataclasses import asdict
from pathlib import Path

from m2c.cli.console import result, tables


def print_replay(path: Path, *, plane: str, shares: list[int], as_json: bool) -> None:
    """shares: cache sizes in percent of the neurons."""
    from m2c.bundle.strict import dump_json
    from m2c.replay import REPLAY_NAMES
    from m2c.replay import replay as replay_trace
    from m2c.tiers.trace import read_trace

    trace = read_trace(path)
    found = {}
    for percent in shares:
        slots = trace.num_neurons * percent // 100 * trace.num_layers
        found[percent] = replay_trace(trace, plane=plane, capacity_nbytes=slots, record_nbytes=1)
    if as_json:
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
