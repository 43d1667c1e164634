"""Getting a model, or what it is, by its name: found on this machine, else fetched, with a bar on
stderr.

Knows nothing about how files are fetched or verified (`m2c.download`).
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from m2c.cli.console import progress, say

if TYPE_CHECKING:
    from m2c.download import Download
    from m2c.hub import Absent, Resolved
    from m2c.model.config import ModelConfig
    from m2c.remote import HubFile


def model_here(text: str, ssd: Path | None, *, offline: bool, quiet: bool) -> "Resolved":
    """The files of the model `text`, fetched when the hub has them and this machine has not."""
    from m2c.hub import Absent, Resolved, find_model

    found = find_model(text, ssd)
    if not isinstance(found, Absent):
        return found
    _require_online(found, offline)
    try:
        path = _fetch(found, quiet)
    except BaseException as error:
        if not isinstance(error, Exception) and not quiet:  # Ctrl-C, SIGTERM
            say("m2c: what came is kept; the same command goes on from there")
        raise
    return Resolved("hf", path, found.name, f"fetched from {found.repo}")


def config_here(text: str, ssd: Path | None, *, offline: bool) -> "ModelConfig":
    """What the model `text` is, whose weights need not be here: config.json is fetched alone."""
    from m2c.download import Download
    from m2c.hub import Absent, find_model, find_snapshot
    from m2c.model.checkpoint import open_checkpoint
    from m2c.model.hf_folder import CONFIG, HfFolder

    found = find_model(text, ssd)
    if not isinstance(found, Absent):
        return open_checkpoint(found.path).config
    snapshot = find_snapshot(found.repo, found.revision)
    if snapshot is None or not (snapshot / CONFIG).is_file():
        _require_online(found, offline)
        say(f"m2c: {found.text}: {found.why}; asking the hub for its {CONFIG}")
        download = Download(found.repo, found.revision)
        download.config()
        snapshot = download.finish()
    return HfFolder(snapshot, weights=False).config


def _require_online(absent: "Absent", offline: bool) -> None:
    if offline:
        raise absent.error(
            "offline, so nothing is fetched: run it once without --offline, HF_HUB_OFFLINE unset"
        )


def _fetch(absent: "Absent", quiet: bool) -> Path:
    from m2c.download import Download
    from m2c.source import require_usable

    if not quiet:
        say(f"m2c: {absent.text}: {absent.why}; asking the hub")
    download = Download(absent.repo, absent.revision)
    small = download.small()
    # before hours of fetching, not after
    require_usable(small, Path(absent.repo))
    files = download.weights(small)
    here = download.here_nbytes(files)
    with progress("verify", here, unit="B", quiet=quiet or not here) as advance:
        missing = download.survey(files, advance)
    if missing:
        _fetch_weights(download, missing, quiet)
    path = download.finish()
    if not quiet:
        say("m2c: the model is here; every file has the hash that the hub promises")
    return path


def _fetch_weights(download: "Download", missing: "list[HubFile]", quiet: bool) -> None:
    from m2c.units import format_size

    nbytes = download.left_nbytes(missing)
    free = download.require_space(nbytes)
    if not quiet:
        count = f"{len(missing)} file{'s' if len(missing) > 1 else ''}"
        say(
            f"m2c: fetching {format_size(nbytes)} in {count} into {download.folder} "
            f"({format_size(free)} free); stopped with Ctrl-C, the same command goes on"
        )
    with progress("fetch", nbytes, unit="B", quiet=quiet) as advance:
        for number, file in enumerate(missing, 1):
            download.fetch(file, advance)
            if not quiet and not sys.stderr.isatty():  # a log has no bar to show that it lives
                say(f"m2c: fetched {file.name} ({number} of {len(missing)})")
