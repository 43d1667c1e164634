"""From what a person typed to a checkpoint, a bundle or a file, and the defaults recorded before.

Says on stderr which default was taken and why.
"""

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Final

from m2c.cli.console import say
from m2c.errors import BadInput, M2CError, StorageError, UsageError

MAX_TEXT_NBYTES: Final = 256 << 20


def checkpoint_name(text: str | None) -> str:
    """The MODEL given, else $M2C_MODEL, else the one profiled last."""
    from m2c.home import read_state

    if text is not None:
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
    if not text:
        raise UsageError("the bundle's name is empty", "give the path that m2c pack printed")
    if found := find_bundle(text, ssd):
        return found
    where = f" here or under {ssd}" if ssd else ""
    raise BadInput(f"{text}: no such bundle{where}", _what_instead(text, ssd))


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


def read_text(path: Path) -> str:
    """The first MAX_TEXT_NBYTES of a file of text. Raises BadInput when it is not UTF-8."""
    from m2c.bundle.files import disk_errors

    with disk_errors(path), path.open("rb") as file:
        data = file.read(MAX_TEXT_NBYTES)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text (byte {error.start})", "convert it") from None


def parse_budget(text: str | None) -> int | None:
    """Bytes of --dram or --hbm; None for auto."""
    from m2c.units import parse_size

    return None if text is None or text == "auto" else parse_size(text)


def require_writable(path: Path, flag: str) -> None:
    """Raises BadInput or StorageError now rather than after the work whose result goes there."""
    # it will be put in place by a rename, which would turn a device or a link into a file
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
        raise BadInput(f"{flag} {path}: is not a regular file", "give the name of a file")
    if not path.parent.is_dir():
        raise BadInput(f"{flag} {path}: no such folder", f"create it: mkdir -p {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise StorageError(f"{flag} {path}: the folder is not writable", "give another place")


def remember(*, model: str | None = None, bundle: Path | None = None) -> None:
    """Record a default for later commands; the work that was done counts without it."""
    from m2c import home

    try:
        home.record(model=model, bundle=bundle)
    except M2CError as error:
        say(f"m2c: not recorded as the default of later commands ({error})")


def _what_instead(text: str, ssd: Path | None) -> str:
    from m2c.bundle.bundle import SUFFIX
    from m2c.hub import alias_config

    known = [path.stem for path in ssd.glob(f"*{SUFFIX}")] if ssd else []
    if near := get_close_matches(text, known, n=1):
        return f"did you mean {near[0]}?"
    path = Path(text)
    if alias_config(text) or path.suffix == ".gguf" or (path / "config.json").is_file():
        return f"pack that model (m2c profile {text} | m2c pack - --ssd DIR), or give --ssd DIR"
    return "give the path that m2c pack printed, or --ssd DIR"


def require_unicode(*texts: str | None) -> None:
    """Python carries bytes of the command line that are not UTF-8 as lone surrogates."""
    for text in texts:
        if text and any("\ud800" <= character <= "\udfff" for character in text):
            raise UsageError(f"{ascii(text)[:60]} is not UTF-8 text", "convert it, e.g. with iconv")
