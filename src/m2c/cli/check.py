"""`m2c check`: verify a bundle, and optionally that it is the checkpoint, bit for bit."""

from pathlib import Path
from typing import Annotated

import typer

from m2c.cli import complete, options
from m2c.cli.console import progress, result, say
from m2c.errors import BadInput

_SHOWN = 20
EXAMPLE = "Example: m2c check --source smollm2-135m"


def command(
    bundle: Annotated[
        str | None,
        typer.Argument(
            help="A bundle [default: the one packed last].", autocompletion=complete.bundles
        ),
    ] = None,
    fast: Annotated[bool, typer.Option(help="Only headers, indexes and small files.")] = False,
    source: Annotated[
        str | None,
        typer.Option(help="Also compare the exact plane with this checkpoint, bit for bit."),
    ] = None,
    ssd: options.Ssd = None,
    quiet: options.Quiet = False,
) -> None:
    """Verify every byte of a bundle.

    Names each damage; exits with 4 if there is any.
    """
    from m2c.bundle.bundle import open_bundle
    from m2c.bundle.manifest import read_manifest
    from m2c.check import check_bundle, compare_with_source
    from m2c.cli.names import bundle_path
    from m2c.hub import resolve_model
    from m2c.model.checkpoint import open_checkpoint
    from m2c.model.tensors import parameter_count

    path = bundle_path(bundle, ssd)
    total = sum(fact.nbytes for fact in read_manifest(path).shards.values())
    found = 0
    with progress("check", total, unit="B", quiet=quiet) as advance:
        for damage in check_bundle(path, read_data=not fast, progress=advance):
            found += 1
            _say_some(damage, found)
    if source is not None and not found:
        checkpoint = open_checkpoint(resolve_model(source).path)
        weights = parameter_count(checkpoint.config)
        with progress("compare", weights, unit="w", quiet=quiet) as advance:
            for damage in compare_with_source(open_bundle(path), checkpoint, advance):
                found += 1
                _say_some(damage, found)
    if found:
        raise BadInput(f"{path}: {found} problem{'s' if found > 1 else ''}", _mend(path))
    depth = "headers and indexes" if fast else "every byte"
    same = f", bit-exact copy of {source}" if source else ""
    result(f"{path}: ok ({depth}{same})")


def _mend(path: Path) -> str:
    """What to type, with what is known of it here: not the model's name at that time."""
    return f"type: m2c pack MODEL --ssd {path.parent} --name {path.stem} --repair"


def _say_some(damage: str, number: int) -> None:
    if number <= _SHOWN:
        say(f"m2c: {' '.join(damage.split())}")
    elif number == _SHOWN + 1:
        say("m2c: ... and more")
