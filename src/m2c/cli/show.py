"""`m2c show`: what a profile or a bundle says."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m2c.cli import complete, options
from m2c.cli.console import plain, result, say, tables

if TYPE_CHECKING:
    from m2c.bundle.bundle import Bundle
    from m2c.bundle.importance import Importance

EXAMPLE = "Example: m2c show"
_BARS = " ▁▂▃▄▅▆▇█"


def command(
    path: Annotated[
        str | None,
        typer.Argument(
            help="A bundle or a profile [default: the bundle packed last].",
            autocompletion=complete.bundles,
        ),
    ] = None,
    ssd: options.Ssd = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Write a page with curves, sizes and this machine's plan here (.html)."),
    ] = None,
    json_output: options.Json = False,
) -> None:
    """Show a bundle or a profile.

    Sizes of the planes, the default mix, the importance and coverage curves. The page of --html is
    one file that loads nothing from elsewhere.
    """
    from m2c.bundle.bundle import open_bundle
    from m2c.bundle.importance import read_importance
    from m2c.bundle.strict import dump_json
    from m2c.cli.names import bundle_path
    from m2c.cli.pages import require_page
    from m2c.contents import importance_of

    if html is not None:
        require_page(html, "--html", (".html",))
    bundle = None
    if path is not None and Path(path).is_file():
        importance, _ = read_importance(Path(path))
        facts: dict[str, Any] = {}
    else:
        bundle = open_bundle(bundle_path(path, ssd))
        importance = importance_of(bundle)
        facts = _bundle_facts(bundle)
    facts |= _importance_facts(importance)
    if html is not None:
        _write_page(html, facts, importance, bundle)
    if json_output:
        result(dump_json(facts).decode())
        return
    if "planes" in facts:
        _print_bundle(facts)
    _print_importance(facts)


def _write_page(
    path: Path, facts: dict[str, Any], importance: "Importance", bundle: "Bundle | None"
) -> None:
    from datetime import date

    from m2c.bundle.files import write_atomic
    from m2c.cli.pages import default_plans
    from m2c.pages.show_page import show_page

    plans = default_plans(bundle, importance) if bundle is not None else []
    write_atomic(path, show_page(facts, importance, plans, created=date.today().isoformat()))
    say(f"m2c: wrote {path}")


def _bundle_facts(bundle: "Bundle") -> dict[str, Any]:
    from m2c.bundle.shard import PLANES

    manifest = bundle.manifest
    kinds = ("dense", "neurons")
    weights = {
        kind: sum(
            s.records * s.vectors * s.length
            for name, index in bundle.shards.items()
            if name.startswith(kind) and index.header.plane == "int4"
            for s in index.header.sections
        )
        for kind in kinds
    }
    planes = {
        plane: {
            kind: sum(
                fact.nbytes for name, fact in manifest.shards.items()
                if name.startswith(kind) and name.endswith(plane)
            )
            for kind in kinds
        }
        for plane in PLANES
    }  # fmt: skip
    return {
        "path": str(bundle.path), "name": manifest.name, "created_by": manifest.created_by,
        "exact_type": manifest.exact_type, "mix": list(manifest.mix.percent),
        "mix_search": manifest.mix.search, "mix_bits": manifest.mix.bits_per_weight,
        "mix_error": manifest.mix.relative_error, "quality": manifest.quality,
        "architecture": manifest.architecture, "planes": planes, "weights": weights,
    }  # fmt: skip


def _importance_facts(importance: "Importance") -> dict[str, Any]:
    from dataclasses import asdict

    at = (10, 20, 30, 50, 70)
    return {
        "calibration": asdict(importance.calibration),
        "layers": [
            {
                "coverage_own": {str(k): float(layer.coverage_own[k]) for k in at},
                "coverage_fixed": {str(k): float(layer.coverage_static[k]) for k in at},
                "overlap_minus_chance": {
                    "10": float(layer.overlap[0]), "30": float(layer.overlap[1]),
                },
                "curve": [float(v) for v in layer.coverage_own[::10]],
            }
            for layer in importance.layers
        ],
    }  # fmt: skip


def _print_bundle(facts: dict[str, Any]) -> None:
    from rich.table import Table

    from m2c.units import format_size

    mix = "/".join(str(part) for part in facts["mix"])
    table = Table(
        title=f"{_letters(facts['name'])}, exact plane {facts['exact_type']}, default mix {mix}"
    )
    dense = "attention, embeddings"
    if "shared_expert_intermediate_size" in facts["architecture"]:
        dense += ", shared experts"
    for column in ("plane", dense, "neurons", "both", "bits per weight"):
        table.add_column(column, justify="left" if column == "plane" else "right")
    count = sum(facts["weights"].values())
    total = 0
    for plane, sizes in facts["planes"].items():
        both = sizes["dense"] + sizes["neurons"]
        total += both
        cells = [format_size(n) for n in (sizes["dense"], sizes["neurons"], both)]
        table.add_row(plane.upper(), *cells, f"{8 * both / count:.2f}")
    table.add_row("all", "", "", format_size(total), f"{8 * total / count:.2f}")
    tables().print(table)


def _print_importance(facts: dict[str, Any]) -> None:
    from rich.table import Table

    known = facts["calibration"]
    table = Table(
        title=f"{_letters(known['model'])}: output energy held by the top neurons, "
        f"{known['tokens']} tokens of {_letters(known['text_source'])}"
    )
    headers = ("layer", "own 10 %", "own 30 %", "own 50 %", "fixed 30 %", "overlap 30 %", "curve")
    for header in headers:
        table.add_column(header, justify="right" if header != "curve" else "left")
    for i, layer in enumerate(facts["layers"]):
        own, fixed = layer["coverage_own"], layer["coverage_fixed"]
        curve = "".join(_BARS[min(8, int(v * 8.99))] for v in layer["curve"])
        table.add_row(
            str(i), f"{own['10']:.0%}", f"{own['30']:.0%}", f"{own['50']:.0%}",
            f"{fixed['30']:.0%}", f"{layer['overlap_minus_chance']['30']:+.0%}", curve,
        )  # fmt: skip
    tables().print(table)


def _letters(text: str) -> str:
    """What a file says, neither as a command to the terminal nor as rich's markup."""
    from rich.markup import escape

    return escape(plain(text)[:200])
