"""Which way of decoding a person asked for, or is given.

Knows nothing about how a mode decodes.
"""

from pathlib import Path

from m2c.bundle.bundle import Bundle, open_bundle
from m2c.cli.names import bundle_path
from m2c.cli.words import tps
from m2c.contents import tokenizer_of
from m2c.engine import RunOptions
from m2c.errors import UsageError
from m2c.model.mix import PRECISIONS
from m2c.modes import MODES, Choice, choose_draft, choose_mode, exact_options


def leaves_exact(options: RunOptions, drop: float) -> bool:
    """Whether nothing was asked for that only mixed mode has."""
    return options.mix is None and options.dense is None and options.policy is None and not drop


def asked_mode(mode: str | None, exact: bool, plain: bool, *, tiers: int = 2) -> str:
    """One of MODES. plain: as `leaves_exact`. tiers: with three, exact mode is not taken unasked:
    what it would give there is not predicted well enough."""
    if mode not in (None, *MODES):
        raise UsageError(f"--mode {mode}: choose one of {', '.join(MODES)}")
    if exact:
        if mode not in (None, "exact"):
            raise UsageError(f"--exact and --mode {mode} do not go together", "leave one out")
        mode = "exact"
    if mode == "exact" and not plain:
        raise UsageError(
            "exact mode computes the checkpoint's own weights",
            "leave out --mix, --drop, --dense, --policy and --trace",
        )
    if mode in (None, "auto") and tiers > 2:
        return "mixed"
    return mode or ("auto" if plain else "mixed")


def tiers_of(options: RunOptions) -> int:
    return 3 if options.hbm or options.device != "cpu" else 2


def with_mode(bundle: Bundle, options: RunOptions, mode: str, precision: str) -> Choice:
    """The options for the mode; auto is decided by the plan. Reads no weights."""
    require_precision(mode, precision)
    if mode == "exact":
        chosen = exact_options(options, precision)
        return Choice(chosen, {}) if options.draft is None else choose_draft(bundle, chosen)
    if mode == "mixed" and options.draft is not None:
        raise UsageError("--draft is for exact mode", "add --exact")
    if mode == "mixed":
        return Choice(options, {})
    return choose_mode(bundle, options)


def require_precision(mode: str, precision: str) -> None:
    """Raises UsageError when --exact-precision is none, or not for this mode."""
    if precision not in PRECISIONS:
        raise UsageError(f"--exact-precision {precision}: choose one of {', '.join(PRECISIONS)}")
    if mode != "exact" and precision != "fp16":
        raise UsageError(f"--exact-precision {precision} is for exact mode", "add --exact")


def alternatives(choice: Choice) -> str:
    """What the modes that were not taken would give; empty if there was no choice."""
    others = [f"{name} {tps(v)}" for name, v in choice.predicted.items() if name != choice.mode]
    return f" ({', '.join(others)}; --mode overrides)" if others else ""


def draft_words(choice: Choice) -> str:
    """Where drafts come from, and what else was weighed; empty if there was no choice.

    With the figure of the source taken, too: memory was measured again after loading, and what is
    expected now may be less than what the others promised before.
    """
    if len(choice.drafts) < 2:
        return ""
    best, *others = sorted(choice.drafts, key=lambda name: -choice.drafts[name])
    against = ", ".join(f"{tps(choice.drafts[name])} from {name}" for name in others)
    return f", drafts from {best} (promised {tps(choice.drafts[best])} against {against})"


def opened_draft(text: str, ssd: Path | None, bundle: Bundle) -> Bundle:
    """The bundle of --draft. Raises UsageError when its vocabulary is not that of `bundle`."""
    draft = open_bundle(bundle_path(text, ssd))
    if difference := tokenizer_of(draft).difference(tokenizer_of(bundle)):
        raise UsageError(
            f"--draft {text}: not the vocabulary of {bundle.path}: {difference}",
            "give a smaller model of the same family",
        )
    return draft
