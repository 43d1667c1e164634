"""`m2c run --prompt "..."`: decode a bundle through the three-level cache."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m2c.cli import options
from m2c.cli.console import say, write
from m2c.errors import M2CError, UsageError

if TYPE_CHECKING:
    from m2c.bundle.bundle import Bundle
    from m2c.cli.report import Watch
    from m2c.engine import Engine, RunOptions
    from m2c.generate import GenerationStats
    from m2c.sampling import Sampler
    from m2c.tokenizer import Tokenizer

_GIVE_ONE = 'give one with --prompt "..." or on stdin'
EXAMPLE = 'Example: m2c run --prompt "Why is the sky blue?"'
_MAX_PROMPT_NBYTES = 16 << 20


def command(
    bundle: options.BundleName = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The prompt; - or nothing reads stdin.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="System message.")] = None,
    raw: Annotated[bool, typer.Option(help="Continue the text as it is: no chat format.")] = False,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", min=1, help="Most tokens to generate.")
    ] = 256,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repeat_penalty: options.RepeatPenalty = 1.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    exact: options.Exact = False,
    mode: options.Mode = None,
    exact_precision: options.ExactPrecision = "fp16",
    draft: options.Draft = None,
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
    and verifies several in one pass with the checkpoint's own weights: the text is theirs, token
    for token. Drafts come from the INT4 planes if these fit, from --draft if that promises more,
    and from the text so far. Auto takes exact where it is predicted to reach half the speed.

    --energy reads the counters of processor, DRAM and GPU, where the system shows them, and adds an
    estimate for the SSD; each is marked measured, estimated or absent. It takes a second more, for
    the idle level.
    """
    from m2c.bundle.bundle import open_bundle
    from m2c.cli.loading import completed, expected_speed, open_engine, say_price
    from m2c.cli.modes import asked_mode, leaves_exact, tiers_of, with_mode
    from m2c.cli.names import bundle_path, require_unicode, require_writable
    from m2c.cli.report import Story, Watch, Wishes, leave, metering
    from m2c.cli.runs import run_options
    from m2c.contents import tokenizer_of
    from m2c.sampling import Sampler, SamplingParams

    chosen = run_options(
        mix=mix, drop=drop, dense=dense, ctx_size=ctx_size, kv=kv, dram=dram, hbm=hbm,
        device=device, policy=policy, depth=depth, threads=threads, kernel=kernel,
    )  # fmt: skip
    mode = asked_mode(
        mode, exact, leaves_exact(chosen, drop) and trace is None, tiers=tiers_of(chosen)
    )
    sampler = Sampler(
        SamplingParams(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            repeat_penalty=repeat_penalty, seed=seed,
        )
    )  # fmt: skip
    require_unicode(prompt, system, *(stop or []))
    wishes = Wishes(stats, report, energy, grid_intensity, quiet)
    wishes.check()
    if trace is not None:
        require_writable(trace, "--trace")
    opened = open_bundle(bundle_path(bundle, ssd))
    chosen = completed(opened, chosen, drop=drop, draft=draft, ssd=ssd)
    if plan:
        _print_plan(opened, with_mode(opened, chosen, mode, exact_precision).options)
        return
    tokenizer = tokenizer_of(opened)
    text = _read_prompt(prompt)
    ids = _prompt_ids(opened, tokenizer, chosen, text, system, raw)
    choice = with_mode(opened, chosen, mode, exact_precision)
    say_price(opened, drop, quiet)
    with (
        metering(wishes) as (meter, idle),
        open_engine(opened, tokenizer, choice.options, trace, quiet) as engine,
    ):
        expected = expected_speed(engine, choice, quiet) if wishes.any else 0.0
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
