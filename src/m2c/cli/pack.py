"""`m2c pack --ssd DIR`: write a profiled checkpoint as a bundle."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m2c.cli import complete, options
from m2c.cli.console import progress, result, say
from m2c.errors import BadInput, UsageError

if TYPE_CHECKING:
    from m2c.pack import Figures, PackJob

EXAMPLE = "Example: m2c pack --ssd /mnt/nvme"


def command(
    model: Annotated[
        str | None,
        typer.Argument(
            help="As for m2c profile; - reads a profile's path from stdin.",
            autocompletion=complete.models,
        ),
    ] = None,
    ssd: options.Ssd = None,
    profile: Annotated[
        Path | None, typer.Option(help="What m2c profile wrote [default: found in M2C_HOME].")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the bundle [default: the model's].")
    ] = None,
    exact_type: Annotated[
        str, typer.Option(help="16-bit type of the exact plane: bf16, f16 or auto.")
    ] = "auto",
    mix: Annotated[
        str, typer.Option(help="Default mix: FP16/INT8/INT4 in percent, or error or entropy.")
    ] = "error",
    bits: Annotated[
        float, typer.Option(min=4.5, max=16, help="Bits per FFN weight that the search may spend.")
    ] = 5.5,
    plan: Annotated[
        bool, typer.Option("--plan", "--dry-run", help="Say what it would take; write nothing.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Rewrite what is damaged in a bundle, nothing else.")
    ] = False,
    threads: options.Threads = None,
    quiet: options.Quiet = False,
) -> None:
    """Write a checkpoint as a bundle on an SSD.

    Every neuron is quantized into nested FP16/INT8/INT4 planes. Stopped at any moment, it is
    finished by running it again. Prints the path of the bundle.
    """
    from m2c.cli.names import checkpoint_name, remember
    from m2c.hardware import auto_threads
    from m2c.hub import resolve_model
    from m2c.kernels.workers import Workers
    from m2c.pack import pack

    if plan and repair:
        raise UsageError("--plan and --repair do not go together", "m2c check names the damage")
    if ssd is None:
        raise UsageError("where to? no --ssd given and M2C_SSD is not set", "use --ssd DIR")
    if not ssd.is_dir():
        if ssd.exists():
            raise BadInput(f"{ssd}: is not a folder", "give the folder for bundles as --ssd")
        raise BadInput(f"{ssd}: no such folder", f"create it: mkdir -p {ssd}")
    if model == "-":
        profile, model = _profile_from_stdin(), None
    given = checkpoint_name(model)
    found = resolve_model(given, ssd)
    job = _job(given, found.path, profile, exact_type, mix, bits)
    path = ssd / f"{_safe(name or found.name)}.m2c"
    workers = Workers(threads or auto_threads())
    if plan:
        _say_plan(job, path, workers)
        return
    if repair:
        _repair(job, path, workers, quiet)
        return
    with progress(f"pack {path.name}", job.weights, unit="w", quiet=quiet) as advance:
        fresh = pack(
            job, path, workers=workers, progress=advance,
            choose_mix=lambda bundle: _choose(bundle, job, workers, quiet),
            report=lambda figures: None if quiet else _say_figures(figures, workers.threads),
        )  # fmt: skip
    remember(bundle=path)
    if not fresh and not quiet:
        say(f"m2c: {path} was complete already")
    result(str(path))


def _job(
    given: str, source: Path, profile: Path | None, exact_type: str, mix: str, bits: float
) -> "PackJob":
    from m2c import home
    from m2c.bundle.importance import read_importance
    from m2c.engine import require_mix
    from m2c.model.checkpoint import open_checkpoint
    from m2c.model.mix import Mix
    from m2c.pack import PackJob, choose_exact_type
    from m2c.source import model_files

    if mix not in ("error", "entropy"):
        given_mix = Mix.parse(mix)
        if any(part % 1 for part in (given_mix.fp16, given_mix.int8, given_mix.int4)):
            raise UsageError(f"--mix {mix}: a bundle records whole percents", "round the shares")
        mix = str(given_mix)
    if exact_type not in ("auto", "bf16", "f16"):
        raise UsageError(f"--exact-type {exact_type}: choose bf16, f16 or auto")
    checkpoint = open_checkpoint(source)
    if mix not in ("error", "entropy"):
        require_mix(Mix.parse(mix), checkpoint.config)
    path = profile or home.profile_path(checkpoint.name, checkpoint.fingerprint())
    if not path.exists():
        missing = "no such profile" if profile else f"{given} has no profile yet"
        raise BadInput(f"{path}: {missing}", f"type: m2c profile {given}")
    importance, _ = read_importance(path)
    chosen = choose_exact_type(checkpoint) if exact_type == "auto" else exact_type
    return PackJob(checkpoint, importance, model_files(checkpoint), chosen, mix, bits)


def _repair(job: "PackJob", path: Path, workers, quiet: bool) -> None:  # type: ignore[no-untyped-def]
    from m2c.repair import repair

    # as much as there is: what the manifest says cannot be known where it is damaged
    total = sum(file.stat().st_size for file in path.glob("*/*.*")) if path.is_dir() else 0
    with progress(f"check {path.name}", total, unit="B", quiet=quiet) as advance:
        mended = repair(
            job, path, workers=workers, progress=advance,
            choose_mix=lambda bundle: _choose(bundle, job, workers, quiet),
        )  # fmt: skip
    if not quiet:
        for name in mended or ["nothing"]:
            say(f"m2c: {path}: {name} was {'rewritten' if mended else 'damaged'}")
    result(str(path))


def _profile_from_stdin() -> Path:
    import sys

    line = sys.stdin.readline().strip()
    if not line:
        raise UsageError("no path on stdin", "type: m2c profile MODEL | m2c pack - --ssd DIR")
    return Path(line)


def _choose(bundle, job: "PackJob", workers, quiet: bool):  # type: ignore[no-untyped-def]
    from m2c.mixsearch import choose_mix

    choice, quality, lines = choose_mix(
        bundle, job.importance, job.mix_request, job.budget_bits, workers
    )
    if not quiet:
        for line in lines:
            say(f"m2c: {line}")
    return choice, quality


def _say_plan(job: "PackJob", path: Path, workers) -> None:  # type: ignore[no-untyped-def]
    from m2c.pack import estimate_seconds, require_space
    from m2c.units import format_size

    needed, free = require_space(job, path)
    seconds = estimate_seconds(job, workers)
    say(f"m2c: {path}: needs {format_size(needed)}, {format_size(free)} are free")
    say(f"m2c: exact plane in {job.exact_type}; about {max(1, round(seconds))} s on this machine")


def _say_figures(figures: "Figures", threads: int) -> None:
    """Nothing when an earlier attempt had left only the mix to be found."""
    if not figures.weights:
        return
    spent, seconds = figures.spent, figures.seconds
    read, written, weights = (
        n / seconds / 1e6 for n in (figures.source_nbytes, figures.written_nbytes, figures.weights)
    )
    say(
        f"m2c: packed in {seconds:.1f} s: {read:.0f} MB/s in, {written:.0f} MB/s out, "
        f"{weights:.1f} M weights/s; side by side: read {spent.read:.1f} s, "
        f"encode {spent.encode / threads:.1f} s on {threads} threads, write {spent.write:.1f} s; "
        f"then mix {figures.mix_seconds:.1f} s"
    )


def _safe(name: str) -> str:
    import re

    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name.removesuffix(".m2c")).strip(".-")
    if not safe:
        raise UsageError(f"{name!r} is no name for a bundle", "use letters and digits")
    return safe[:100]
