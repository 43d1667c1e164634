"""`m2c run --prompt "..."`: decode a bundle through the three-level cache."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m2c.cli import options
from m2c.cli.console import progress, say, write
from m2c.errors import M2CError, UsageError

if TYPE_CHECKING:
    from m2c.bundle.bundle import Bundle
    from m2c.cli.report import Watch
    from m2c.engine import Engine, RunOptions
    from m2c.generate import GenerationStats
    from m2c.modes import Choice
    from m2c.sampling import Sampler
    from m2c.tokenizer import Tokenizer

_GIVE_ONE = 'give one with --prompt "..." or on stdin'
EXAMPLE = 'Example: m2c run --prompt "Why is the sky blue?"'
_MAX_PROMPT_NBYTES = 16 << 20


def command(
    bundle: Annotated[
        str | None,
        typer.Argument(help="What m2c pack printed, or its name [default: the one packed last]."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The prompt; - or nothing reads stdin.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="System message.")] = None,
    raw: Annotated[bool, typer.Option(help="Continue the text as it is: no chat format.")] = False,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", min=1, help="Most tokens to generate.")
    ] = 256,
    temperature: Annotated[
        float, typer.Option("--temp", "--temperature", min=0, help="0 is greedy.")
    ] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Keep the k best tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep this much probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Keep tokens above this share of the best.")] = 0.0,
    repeat_penalty: Annotated[float, typer.Option(help="1 is none.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text.")] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Same as --mode exact: the checkpoint's own output.")
    ] = False,
    mode: Annotated[
        str | None,
        typer.Option(
            help="exact, mixed or auto [default: auto; mixed if a mix, a policy, a trace or a GPU "
            "is asked for]."
        ),
    ] = None,
    exact_precision: Annotated[
        str, typer.Option(help="Precision that exact mode verifies at: fp16, int8 or int4.")
    ] = "fp16",
    mix: options.Mix = None,
    drop: options.Drop = 0.0,
    dense: options.Dense = None,
    ctx_size: options.CtxSize = None,
    kv: options.Kv = "f16",
    dram: options.Dram = None,
    hbm: options.Hbm = None,
    device: options.Device = "cpu",
    policy: options.Policy = None,
    depth: Annotated[int, typer.Option(min=1, max=64, help="Blocks read ahead.")] = 3,
    ssd: options.Ssd = None,
    threads: options.Threads = None,
    kernel: options.Kernel = "auto",
    plan: Annotated[
        bool, typer.Option("--plan", "--dry-run", help="Print the plan and stop.")
    ] = False,
    stats: Annotated[Path | None, typer.Option(help="Write figures as JSON here.")] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Write what the run did, token by token, with prompt and answer, here: a page "
            "(.html) or for programs (.json)."
        ),
    ] = None,
    energy: options.Energy = False,
    grid_intensity: options.GridIntensity = None,
    trace: Annotated[Path | None, typer.Option(help="Record active neurons here.")] = None,
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Print the text at once.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Generate text from a bundle.

    Only the text goes to stdout; the last line on stderr says what it took. Weights stay where
    the plan puts them: in the top tier, in DRAM, or on the SSD they are read from.

    Mixed mode computes the best neurons of each token at higher precision. Exact mode drafts tokens
    with the INT4 planes and verifies several in one pass with the checkpoint's own weights: the
    text is theirs, token for token. Auto takes exact where it is predicted to reach half the speed.

    --energy reads the counters of processor, DRAM and GPU, where the system shows them, and adds an
    estimate for the SSD; each is marked measured, estimated or absent. It takes a second more, for
    the idle level.
    """
    from m2c.bundle.bundle import open_bundle
    from m2c.cli.modes import asked_mode, with_mode
    from m2c.cli.names import bundle_path, require_writable
    from m2c.cli.report import Story, Watch, Wishes, leave, metering
    from m2c.cli.runs import run_options
    from m2c.contents import tokenizer_of
    from m2c.sampling import Sampler, SamplingParams

    chosen = run_options(
        mix=mix, drop=drop, dense=dense, ctx_size=ctx_size, kv=kv, dram=dram, hbm=hbm,
        device=device, policy=policy, depth=depth, threads=threads, kernel=kernel,
    )  # fmt: skip
    plain = mix is None and dense is None and policy is None and trace is None and not drop
    mode = asked_mode(mode, exact, plain and device == "cpu" and not chosen.hbm)
    sampler = Sampler(
        SamplingParams(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            repeat_penalty=repeat_penalty, seed=seed,
        )
    )  # fmt: skip
    _require_unicode(prompt, system, *(stop or []))
    wishes = Wishes(stats, report, energy, grid_intensity, quiet)
    wishes.check()
    if trace is not None:
        require_writable(trace, "--trace")
    opened = open_bundle(bundle_path(bundle, ssd))
    chosen = _with_drop(opened, chosen, drop)
    if plan:
        _print_plan(opened, with_mode(opened, chosen, mode, exact_precision).options)
        return
    tokenizer = tokenizer_of(opened)
    text = _read_prompt(prompt)
    ids = _prompt_ids(opened, tokenizer, chosen, text, system, raw)
    choice = with_mode(opened, chosen, mode, exact_precision)
    _say_price(opened, drop, quiet)
    with (
        metering(wishes) as (meter, idle),
        _open_engine(opened, tokenizer, choice.options, trace, quiet) as engine,
    ):
        expected = _expected(engine, choice, quiet) if wishes.any else 0.0
        if temperature > 0 and seed is None and not quiet:
            say(f"m2c: seed {sampler.seed}")
        watch = Watch(engine, wishes, meter, idle)
        figures, answer = _generate(engine, ids, sampler, max_tokens, stop or [], no_stream, watch)
        asked = _asked(sampler, max_tokens, stop or [])
        leave(engine, figures, expected, watch, wishes, Story(text, system, answer, asked))


def _asked(sampler: "Sampler", max_tokens: int, stop: list[str]) -> dict[str, str]:
    """The settings that the engine does not know, for a report."""
    params = sampler.params
    sampling = "greedy" if params.temperature == 0 else (
        f"temperature {params.temperature:g}, top-k {params.top_k}, top-p {params.top_p:g}, "
        f"min-p {params.min_p:g}, seed {sampler.seed}"
    )  # fmt: skip
    found = {"sampling": f"{sampling}, repeat penalty {params.repeat_penalty:g}"}
    found["most tokens"] = str(max_tokens)
    return found | ({"stop": ", ".join(map(repr, stop))} if stop else {})


def _read_prompt(prompt: str | None) -> str:
    if prompt is None and sys.stdin.isatty():
        raise UsageError("no prompt", _GIVE_ONE)
    if prompt in (None, "-"):
        prompt = _read_stdin()
    if not prompt:
        raise UsageError("the prompt is empty", _GIVE_ONE)
    return prompt


def _read_stdin() -> str:
    from m2c.bundle.files import disk_errors
    from m2c.cli.console import read_stdin

    with disk_errors("standard input"):
        data = read_stdin(_MAX_PROMPT_NBYTES + 1)
    if len(data) > _MAX_PROMPT_NBYTES:
        raise UsageError(f"the prompt on stdin is larger than {_MAX_PROMPT_NBYTES >> 20} MiB")
    try:
        return data.decode("utf-8").rstrip("\n")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"stdin is not UTF-8 text (byte {error.start})", "convert it, e.g. with iconv"
        ) from None


def _require_unicode(*texts: str | None) -> None:
    """Python carries bytes of the command line that are not UTF-8 as lone surrogates."""
    for text in texts:
        if text and any("\ud800" <= character <= "\udfff" for character in text):
            raise UsageError(f"{ascii(text)[:60]} is not UTF-8 text", "convert it, e.g. with iconv")


def _with_drop(bundle: "Bundle", chosen: "RunOptions", drop: float) -> "RunOptions":
    """--drop without --mix drops from the bundle's own mix."""
    from dataclasses import replace

    from m2c.model.mix import Mix

    if not drop or chosen.mix is not None:
        return chosen
    return replace(chosen, mix=Mix.of_percent(bundle.manifest.mix.percent, drop=drop))


def _say_price(bundle: "Bundle", drop: float, quiet: bool) -> None:
    if not drop or quiet:
        return
    known = bundle.manifest.quality
    mix = "/".join(str(part) for part in bundle.manifest.mix.percent)
    measured = [d for d in range(10, 80, 10) if d >= drop and f"ffn_error_drop_{d}" in known]
    if measured:
        before, after = known["ffn_error_drop_0"], known[f"ffn_error_drop_{measured[0]}"]
        say(
            f"m2c: dropping up to {measured[0]} % raises the FFN output error from {before:.3f} to "
            f"{after:.3f} (measured when packing, with mix {mix})"
        )
    else:
        say(f"m2c: what dropping {drop:g} % costs was never measured: expect bad text")


def _open_engine(
    bundle: "Bundle", tokenizer: "Tokenizer", chosen: "RunOptions", trace: Path | None, quiet: bool
) -> "Engine":
    from m2c.cli.runs import tracing_engine
    from m2c.engine import Engine

    total = sum(index.header.payload_nbytes for index in bundle.shards.values())
    with progress("load", total, unit="B", quiet=quiet) as advance:
        if trace is None:
            return Engine(bundle, chosen, progress=advance, tokenizer=tokenizer)
        return tracing_engine(bundle, chosen, trace, advance, tokenizer)


def _expected(engine: "Engine", choice: "Choice", quiet: bool) -> float:
    """Tokens per second that the plan promises on this machine as it is now, said unless quiet."""
    from m2c.cli.modes import alternatives
    from m2c.cli.runs import tps, where_weights_lie
    from m2c.predict import expected_tps

    expected = expected_tps(engine)
    if not quiet:
        words = f"{choice.mode} mode, expecting {tps(expected)} tok/s{alternatives(choice)}"
        say(f"m2c: {words}: {where_weights_lie(engine.plan)}")
    return expected


def _prompt_ids(
    bundle: "Bundle", tokenizer: "Tokenizer", chosen: "RunOptions", text: str,
    system: str | None, raw: bool,
) -> list[int]:  # fmt: skip
    """Known to fit before a byte of weights is read: loading can take minutes."""
    from m2c.chat import chat_template_of
    from m2c.contents import config_of, sidecars_of
    from m2c.engine import run_shape
    from m2c.generate import require_prompt
    from m2c.prompt import chat_ids, raw_ids

    template = None if raw else chat_template_of(sidecars_of(bundle))
    if template is not None:
        ids = chat_ids(tokenizer, template, text, system=system)
    elif system is None:
        ids = raw_ids(tokenizer, text)
    else:
        raise UsageError("--system needs a chat format, and there is none", "drop --system")
    config = config_of(bundle)
    require_prompt(ids, run_shape(bundle, config, chosen).ctx_size, config.vocab_size)
    return ids


def _generate(
    engine: "Engine", ids: list[int], sampler: "Sampler", max_tokens: int, stop: list[str],
    no_stream: bool, watch: "Watch",
) -> "tuple[GenerationStats, str]":  # fmt: skip
    """Print the text as it comes; the figures and the text."""
    from m2c.generate import GenerationStats, stream_generate

    figures = GenerationStats()
    text = ""
    pieces = stream_generate(
        engine, ids, sampler, max_tokens=max_tokens, stop=stop, observe=watch
    )  # fmt: skip
    try:
        for piece in pieces:
            text += piece.text
            if piece.stats is not None:
                watch.end()
                figures = piece.stats
            if not no_stream:
                write(piece.text)
    except (KeyboardInterrupt, M2CError):
        # what there is belongs to the person, and the reason starts a line of its own
        if text:
            write(text + "\n" if no_stream else "\n")
        raise
    write(text + "\n" if no_stream else "\n")
    return figures, text


def _print_plan(bundle: "Bundle", chosen: "RunOptions") -> None:
    from m2c.cli.console import result
    from m2c.cli.runs import describe_plan
    from m2c.contents import config_of, importance_of
    from m2c.engine import plan_for, run_shape

    config = config_of(bundle)
    shape = run_shape(bundle, config, chosen)
    shape, plan = plan_for(bundle, config, shape, importance_of(bundle), chosen)
    for line in describe_plan(plan, shape):
        result(line)
