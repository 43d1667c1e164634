"""`m2c chat`: a conversation in the terminal, or one message a line from a pipe."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m2c.cli import options
from m2c.cli.console import say
from m2c.errors import M2CError, UsageError

if TYPE_CHECKING:
    from m2c.bundle.bundle import Bundle
    from m2c.cli.chat_session import Session
    from m2c.engine import Engine
    from m2c.generate import GenerationStats
    from m2c.tokenizer import Tokenizer

EXAMPLE = 'Example: m2c chat --system "Answer in one sentence." --temp 0.7'


def command(
    bundle: options.BundleName = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="System message.")] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", min=1, help="Most tokens of an answer.")
    ] = 1024,
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
    no_history: Annotated[
        bool, typer.Option("--no-history", help="Neither recall nor record what is typed.")
    ] = False,
    quiet: options.Quiet = False,
) -> None:
    """Talk with a model: it is loaded once and remembers the conversation.

    /help lists what else can be typed. Ctrl-C stops an answer, Ctrl-D leaves. When the context is
    full the oldest exchanges are dropped from it.

    From a pipe every line is a message, word for word (no /commands); answers go to stdout. The
    model must have a chat format: one that only continues text is for m2c run.
    """
    from m2c.bundle.bundle import open_bundle
    from m2c.cli.chat_session import Session
    from m2c.cli.loading import completed, expected_speed, open_engine, say_price
    from m2c.cli.modes import asked_mode, leaves_exact, tiers_of, with_mode
    from m2c.cli.names import bundle_path, require_unicode
    from m2c.cli.runs import run_options
    from m2c.contents import tokenizer_of
    from m2c.conversation import Dialogue
    from m2c.sampling import SamplingParams

    chosen = run_options(
        mix=mix, drop=drop, dense=dense, ctx_size=ctx_size, kv=kv, dram=dram, hbm=hbm,
        device=device, policy=policy, depth=depth, threads=threads, kernel=kernel,
    )  # fmt: skip
    mode = asked_mode(mode, exact, leaves_exact(chosen, drop), tiers=tiers_of(chosen))
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repeat_penalty=repeat_penalty, seed=seed,
    )  # fmt: skip
    require_unicode(system, *(stop or []))
    opened = open_bundle(bundle_path(bundle, ssd))
    tokenizer = tokenizer_of(opened)
    template = _template(opened, tokenizer, system)
    chosen = completed(opened, chosen, drop=drop, draft=draft, ssd=ssd)
    choice = with_mode(opened, chosen, mode, exact_precision)
    say_price(opened, drop, quiet)
    with open_engine(opened, tokenizer, choice.options, None, quiet) as engine:
        expected = 0.0 if quiet else expected_speed(engine, choice, quiet)
        dialogue = Dialogue(
            engine, template, params, max_tokens=max_tokens, stop=stop or [], system=system
        )
        if temperature > 0 and seed is None and not quiet:
            say(f"m2c: seed {dialogue.sampler.seed}")
        session = Session(engine, dialogue, _facts(engine, expected))
        if sys.stdin.isatty():
            _at_terminal(session, no_history, quiet)
        else:
            session.read_from_pipe()
        if not quiet:
            _say_figures(session)


def _template(bundle: "Bundle", tokenizer: "Tokenizer", system: str | None) -> str:
    """Known to take such messages before a byte of weights is read."""
    from m2c.chat import chat_template_of
    from m2c.contents import sidecars_of
    from m2c.prompt import chat_ids

    template = chat_template_of(sidecars_of(bundle))
    if template is None:
        # in a made-up format it would answer badly, go on as the other side, and never end
        raise UsageError(
            f"{bundle.path} has no chat format: the model only continues text",
            "use m2c run, or pack its -Instruct or -Chat version",
        )
    chat_ids(tokenizer, template, "", system=system)
    return template


def _facts(engine: "Engine", expected: float) -> "Callable[[GenerationStats], dict[str, Any]]":
    from m2c.cli.runs import stats_facts

    return lambda figures: stats_facts(engine, figures, expected)


def _at_terminal(session: "Session", no_history: bool, quiet: bool) -> None:
    from m2c.cli.chat_input import Terminal

    terminal = Terminal(None if no_history else _history())
    if not quiet:
        say("m2c: /help lists what can be typed; Ctrl-C stops an answer, Ctrl-D leaves")
    session.talk(terminal)


def _history() -> Path | None:
    from m2c.home import home, make_folder

    try:
        return make_folder(home()) / "chat_history"
    except M2CError as error:
        say(f"m2c: no history ({error})")
        return None


def _say_figures(session: "Session") -> None:
    from m2c.cli.runs import summary_line
    from m2c.generate import together

    if figures := session.dialogue.figures:
        say(summary_line(session.facts(together(figures))))
