"""`m2c profile MODEL`: rank the neurons of a checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from m2c.cli import complete, options
from m2c.cli.console import progress, result, say
from m2c.errors import UsageError

EXAMPLE = "Example: m2c profile smollm2-135m"


def command(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A folder with safetensors, a GGUF file, an alias such as smollm2-135m, or "
            "org/name[@revision] of the Hugging Face hub [default: the one profiled last].",
            autocompletion=complete.models,
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Calibration text, UTF-8 [default: prose in the package].")
    ] = None,
    tokens: Annotated[int, typer.Option(min=16, help="Calibration tokens.")] = 4096,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write [default: in M2C_HOME].")
    ] = None,
    ssd: options.Ssd = None,
    offline: options.Offline = False,
    threads: options.Threads = None,
    quiet: options.Quiet = False,
) -> None:
    """Rank the neurons of a checkpoint.

    Runs calibration text through it layer by layer, so memory holds one layer at a time. A model
    that is not on this machine is fetched into the Hugging Face cache first (HF_HUB_CACHE), by a
    token in HF_TOKEN where it is gated; stopped, it goes on later. Prints the path of the result.
    """
    from m2c import home
    from m2c.bundle.importance import write_importance
    from m2c.cli.fetch import model_here
    from m2c.cli.names import checkpoint_name, remember, require_writable
    from m2c.hardware import auto_threads
    from m2c.kernels.workers import Workers
    from m2c.model.checkpoint import open_checkpoint
    from m2c.profile import profile
    from m2c.source import model_files, tokenizer_of_files

    name = checkpoint_name(model)
    found = model_here(name, ssd, offline=offline, quiet=quiet)
    checkpoint = open_checkpoint(found.path)
    tokenizer = tokenizer_of_files(model_files(checkpoint), found.path)
    content, source = _read_text(text)
    ids = tokenizer.encode(content[: tokens * 16])[:tokens]
    if len(ids) < 16:
        raise UsageError(f"the calibration text has {len(ids)} tokens", "give a longer --text")
    path = output or home.profile_path(checkpoint.name, checkpoint.fingerprint())
    if output is None:
        home.make_folder(path.parent)
    require_writable(path, "--output" if output else "M2C_HOME")
    if not quiet:
        say(f"m2c: profiling {checkpoint.name} on {len(ids)} tokens of {source} ({found.how})")
    layers = checkpoint.config.num_hidden_layers
    with progress("profile", layers, unit="layer", quiet=quiet) as advance:
        importance = profile(
            checkpoint, ids, text=content, text_source=source,
            workers=Workers(threads or auto_threads()), progress=advance,
        )  # fmt: skip
    write_importance(path, importance)
    remember(model=str(Path(name).resolve()) if Path(name).exists() else name)
    if not quiet:
        _summarise(importance, "experts" if checkpoint.config.num_experts else "them")
    result(str(path))


def _read_text(path: Path | None) -> tuple[str, str]:
    from m2c.cli.names import read_text
    from m2c.data import calibration_text

    if path is None:
        return calibration_text(), "prose in the package"
    return read_text(path), path.name


def _summarise(importance, shared: str) -> None:  # type: ignore[no-untyped-def]
    """shared: what of adjacent tokens is compared."""
    import numpy as np

    own = np.mean([layer.coverage_own for layer in importance.layers], axis=0)
    static = np.mean([layer.coverage_static for layer in importance.layers], axis=0)
    overlap = np.mean([layer.overlap for layer in importance.layers], axis=0)
    say(
        f"m2c: the top 30 % of neurons hold {own[30]:.0%} of the output energy when chosen per "
        f"token, {static[30]:.0%} when fixed; adjacent tokens share {overlap[1]:.0%} of {shared} "
        "beyond chance"
    )
