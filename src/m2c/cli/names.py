"""From what a person typed to a checkpoint or a bundle, and the defaults recorded before.

Says on stderr which default was taken and why.
"""

import os
from pathlib import Path

from m2c.cli.console import say
from m2c.errors import BadInput, UsageError


def checkpoint_name(text: str | None) -> str:
    """The MODEL given, else $M2C_MODEL, else the one profiled last."""
    from m2c.home import read_state

    if text:
        return text
    if given := os.environ.get("M2C_MODEL"):
        say(f"m2c: using {given} (M2C_MODEL)")
        return given
    if last := read_state().model:
        say(f"m2c: using {last} (the model profiled last)")
        return last
    raise UsageError("no model given and none profiled before", "type: m2c profile MODEL")


def bundle_path(text: str | None, ssd: Path | None) -> Path:
    """The bundle given as a path or as a name under `ssd`, else the one packed last."""
    from m2c.home import read_state

    if text is None:
        text = os.environ.get("M2C_MODEL")
        if text:
            say(f"m2c: using {text} (M2C_MODEL)")
        elif last := read_state().bundle:
            say(f"m2c: using {last} (the bundle packed last)")
            text = last
        else:
            raise UsageError(
                "no bundle given and none packed before",
                "type: m2c profile MODEL, then m2c pack --ssd DIR",
            )
    if found := find_bundle(text, ssd):
        return found
    where = f" here or under {ssd}" if ssd else ""
    raise BadInput(
        f"{text}: no such bundle{where}", "give the path that m2c pack printed, or --ssd DIR"
    )


def find_bundle(text: str, ssd: Path | None) -> Path | None:
    """The folder of a bundle, complete or not, that `text` names."""
    from m2c.bundle.bundle import SUFFIX

    places = [Path(text)]
    if ssd is not None:
        places += [ssd / text, ssd / f"{text}{SUFFIX}"]
    for place in places:
        if place.is_dir() and (place.suffix == SUFFIX or (place / "manifest.json").exists()):
            return place
    return None


def parse_budget(text: str | None) -> int | None:
    """Bytes of --dram or --hbm; None for auto."""
    from m2c.units import parse_size

    return None if text is None or text == "auto" else parse_size(text)
