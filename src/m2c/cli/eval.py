"""`m2c eval`: perplexity of a bundle, and how far its mixes are from the checkpoint's weights."""

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m2c.cli import options
from m2c.cli.console import print_markdown, progress, result, say
from m2c.errors import UsageError

if TYPE_CHECKING:
    from m2c.bundle.bundle import Bundle
    from m2c.engine import Engine, RunOptions
    from m2c.evaluate import Estimate, Ids, Quality

EXAMPLE = "Example: m2c eval --text prose.txt --mix 0/25/75 --mix 0/0/100"
_CHARACTERS = 16  # of a text, per token asked for: enough in any vocabulary, quick to encode


def command(
    bundle: options.BundleName = None,
    text: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text that the model was not profiled on. Must be given."),
    ] = None,
    mix: Annotated[
        list[str] | None,
        typer.Option(
            help="Percent of each layer's neurons (of a mixture: of a token's experts, rounded "
            "half up) at FP16/INT8/INT4, best first; give it again for more [default: found at "
            "pack time]."
        ),
    ] = None,
    drop: options.Drop = 0.0,
    dense: options.Dense = None,
    tokens: Annotated[
        int, typer.Option("--tokens", "-n", min=8, help="Most tokens of the text to use.")
    ] = 8192,
    window: Annotated[
        int,
        typer.Option("--window", "-w", min=4, help="Tokens that see each other; half are scored."),
    ] = 512,
    kv: options.Kv = "f16",
    dram: options.Dram = None,
    hbm: options.Hbm = None,
    device: options.Device = "cpu",
    ssd: options.Ssd = None,
    threads: options.Threads = None,
    kernel: options.Kernel = "auto",
    json_output: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure perplexity and the distance from the checkpoint's own weights.

    The text runs through the 16-bit weights once, then through each mix, in windows; the second
    half of a window is scored. KL is the mean divergence of the predicted distributions, in nats
    per token; KL 99 % the one that every hundredth token exceeds; top-1 how often the most
    probable token is the same; ln PPL the paired difference of log perplexity. ± is one standard
    error, from the spread between windows.
    """
    from m2c.bundle.bundle import open_bundle
    from m2c.cli.names import bundle_path, read_text
    from m2c.cli.runs import run_options
    from m2c.contents import config_of, tokenizer_of
    from m2c.engine import require_mix
    from m2c.evaluate import FULL, cut, options_within
    from m2c.model.mix import Mix

    if text is None:
        raise UsageError("no text to evaluate on", "give --text FILE, other than profile's text")
    chosen = run_options(
        mix=None, drop=drop, dense=dense, ctx_size=window, kv=kv, dram=dram, hbm=hbm,
        device=device, policy=None, depth=3, threads=threads, kernel=kernel,
    )  # fmt: skip
    mixes = [Mix.parse(one, drop) for one in mix or []]
    opened = open_bundle(bundle_path(bundle, ssd))
    config = config_of(opened)
    if window > (longest := config.max_position_embeddings):
        raise UsageError(f"--window {window} is beyond the {longest} tokens of this model")
    for one in mixes:
        require_mix(one, config)
    mixes = mixes or [Mix.of_percent(opened.manifest.mix.percent, drop)]
    tokenizer, content = tokenizer_of(opened), read_text(text)
    ids = tokenizer.encode(content[: tokens * _CHARACTERS])[:tokens]
    windows = cut(ids, window, bos=tokenizer.bos_id if tokenizer.add_bos else None)
    if not quiet:
        _say_plan(opened, content, windows, len(mixes))
    asked = [replace(options_within(chosen, config, window), mix=one) for one in mixes]
    full = replace(asked[0], mix=FULL, dense="fp16")
    _require_room(opened, [full, *asked])
    rows = list(_evaluate(opened, full, asked, windows, quiet))
    _print(rows, windows, as_json=json_output)


def _say_plan(bundle: "Bundle", content: str, windows: "Ids", mixes: int) -> None:
    import hashlib

    from m2c.contents import config_of, importance_of
    from m2c.evaluate import Reference, scored_tokens
    from m2c.units import format_size

    count, length = windows.shape
    kept = format_size(Reference.nbytes_for(config_of(bundle), windows))
    say(
        f"m2c: {count} windows of {length} tokens, {count * scored_tokens(length)} scored, "
        f"{mixes + 1} passes; a temporary file of {kept} beside the bundle"
    )
    profiled = importance_of(bundle).calibration.text_sha256
    if hashlib.sha256(content.encode()).hexdigest() == profiled:
        say("m2c: this very text chose the bundle's scales: the figures flatter it")


def _require_room(bundle: "Bundle", asked: list["RunOptions"]) -> None:
    """Before the first pass, for all of them. Raises the DoesNotFit that names the most."""
    from m2c.contents import config_of, importance_of
    from m2c.engine import plan_for, run_shape
    from m2c.errors import DoesNotFit

    config, importance = config_of(bundle), importance_of(bundle)
    refused: list[DoesNotFit] = []
    for one in asked:
        try:
            plan_for(bundle, config, run_shape(bundle, config, one), importance, one)
        except DoesNotFit as error:
            refused.append(error)
    if refused:
        raise max(refused, key=lambda error: error.smallest)


def _evaluate(
    bundle: "Bundle", full: "RunOptions", asked: list["RunOptions"], windows: "Ids", quiet: bool
) -> Iterator[dict[str, Any]]:
    """Facts of the checkpoint's own weights, then of each of `asked`."""
    from m2c.evaluate import Reference, compare

    total = windows.size
    with _open_engine(bundle, full, quiet) as engine:
        facts = _facts(engine)
        with progress(facts["mix"], total, unit="tok", quiet=quiet) as advance:
            reference = Reference(engine, windows, folder=bundle.path.parent, progress=advance)
    with reference:
        yield {**facts, "reference": True, **_figure("ppl", reference.predictions.perplexity)}
        for one in asked:
            del engine  # the memory of one before the other is planned
            gc.collect()
            with _open_engine(bundle, one, quiet) as engine:
                facts = _facts(engine)
                with progress(facts["mix"], total, unit="tok", quiet=quiet) as advance:
                    quality = compare(engine, reference, progress=advance)
            yield {**facts, "reference": False, **_quality_facts(quality)}


def _open_engine(bundle: "Bundle", chosen: "RunOptions", quiet: bool) -> "Engine":
    from m2c.engine import Engine

    total = sum(index.header.payload_nbytes for index in bundle.shards.values())
    with progress("load", total, unit="B", quiet=quiet) as advance:
        return Engine(bundle, chosen, progress=advance)


def _facts(engine: "Engine") -> dict[str, Any]:
    from m2c.mixsearch import exact_bits
    from m2c.model.mix import bits_per_weight

    shape = engine.shape
    return {
        "mix": str(shape.mix), "dense": shape.dense, "kernel": engine.workers.kernel,
        "kv": shape.kv_type,
        "ffn_bits_per_weight": bits_per_weight(shape.mix, exact_bits(engine.bundle)),
    }  # fmt: skip


def _quality_facts(quality: "Quality") -> dict[str, Any]:
    return {
        **_figure("ppl", quality.perplexity),
        **_figure("log_ppl_difference", quality.log_ratio),
        **_figure("kl", quality.divergence),
        "kl_p99": quality.divergence_p99,
        **_figure("top1", quality.agreement),
    }


def _figure(name: str, found: "Estimate") -> dict[str, float]:
    return {name: found.value, f"{name}_standard_error": found.standard_error}


def _print(rows: list[dict[str, Any]], windows: "Ids", *, as_json: bool) -> None:
    from m2c.bundle.strict import dump_json
    from m2c.evaluate import scored_tokens

    if as_json:
        count, length = windows.shape
        sizes = {"windows": count, "window": length, "scored": count * scored_tokens(length)}
        result(dump_json([{**row, **sizes} for row in rows]).decode())
        return
    header = ["mix", "attention", "bits", "PPL", "ln PPL", "KL", "KL 99 %", "top-1"]
    print_markdown(header, [_cells(row) for row in rows], words=2)


def _cells(row: dict[str, Any]) -> list[str]:
    def cell(name: str, form: str) -> str:
        return f"{row[name]:{form}} ± {row[f'{name}_standard_error']:{form.lstrip('+')}}"

    cells = [row["mix"], row["dense"], f"{row['ffn_bits_per_weight']:.2f}", cell("ppl", ".3f")]
    if row["reference"]:
        return [*cells, *["-"] * 4]
    return [
        *cells, cell("log_ppl_difference", "+.5f"), cell("kl", ".5f"), f"{row['kl_p99']:.4f}",
        cell("top1", ".4f"),
    ]  # fmt: skip
