"""What run and chat share on the way from checked options to a loaded engine.

Knows nothing about prompts.
"""

from dataclasses import replace
from pathlib import Path

from m2c.bundle.bundle import Bundle
from m2c.cli.console import progress, say
from m2c.cli.modes import alternatives, draft_words, opened_draft
from m2c.cli.runs import tracing_engine, where_weights_lie
from m2c.cli.words import tps
from m2c.engine import Engine, RunOptions
from m2c.model.mix import Mix
from m2c.modes import Choice
from m2c.predict import expected_tps
from m2c.tokenizer import Tokenizer


def completed(
    bundle: Bundle, chosen: RunOptions, *, drop: float, draft: str | None, ssd: Path | None
) -> RunOptions:
    """The options with what only the bundle can say: the mix that --drop drops from, and whether
    --draft speaks its vocabulary. Raises UsageError when it does not."""
    if drop and chosen.mix is None:
        chosen = replace(chosen, mix=Mix.of_percent(bundle.manifest.mix.percent, drop=drop))
    if draft is not None:
        chosen = replace(chosen, draft=opened_draft(draft, ssd, bundle))
    return chosen


def say_price(bundle: Bundle, drop: float, quiet: bool) -> None:
    if not drop or quiet:
        return
    known = bundle.manifest.quality
    mix = "/".join(str(part) for part in bundle.manifest.mix.percent)
    measured = [d for d in range(10, 80, 10) if d >= drop and f"ffn_error_drop_{d}" in known]
    if measured and "ffn_error_drop_0" in known:
        before, after = known["ffn_error_drop_0"], known[f"ffn_error_drop_{measured[0]}"]
        say(
            f"m2c: dropping up to {measured[0]} % raises the FFN output error from {before:.3f} to "
            f"{after:.3f} (measured when packing, with mix {mix})"
        )
    else:
        say(f"m2c: what dropping {drop:g} % costs was never measured: expect bad text")


def open_engine(
    bundle: Bundle, tokenizer: Tokenizer, chosen: RunOptions, trace: Path | None, quiet: bool
) -> Engine:
    total = sum(index.header.payload_nbytes for index in bundle.shards.values())
    with progress("load", total, unit="B", quiet=quiet) as advance:
        if trace is None:
            return Engine(bundle, chosen, progress=advance, tokenizer=tokenizer)
        return tracing_engine(bundle, chosen, trace, advance, tokenizer)


def expected_speed(engine: Engine, choice: Choice, quiet: bool) -> float:
    """Tokens per second that the plan promises on this machine as it is now, said unless quiet."""
    expected = expected_tps(engine)
    if not quiet:
        words = f"{choice.mode} mode, expecting {tps(expected)} tok/s{alternatives(choice)}"
        words += draft_words(choice)
        say(f"m2c: {words}: {where_weights_lie(engine.plan)}")
    return expected
