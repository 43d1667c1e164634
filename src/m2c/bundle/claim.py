"""Claiming a folder to pack into: ours alone, never over somebody's files, resumable.

An unfinished bundle carries a marker file with its recipe. Correct even where locks do nothing:
temporary names are private to a process and finished files appear by rename.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from m2c.bundle.files import (
    TEMPORARY_PREFIX,
    disk_errors,
    read_small,
    sync_directory,
    write_atomic,
)
from m2c.bundle.manifest import MANIFEST, read_manifest
from m2c.errors import BadInput, Busy, UsageError

MARKER: Final = ".m2c-unfinished"
FOLDERS: Final = ("dense", "neurons", "model")


@contextmanager
def claim_folder(path: Path, recipe: str, *, reclaim: bool = False) -> Iterator[bool]:
    """Hold `path` for packing `recipe`; yields True when the bundle is already complete there.

    reclaim: the caller knows that the folder is a bundle of `recipe` without a usable manifest.
    Raises UsageError when the folder holds anything else, Busy when another process packs there.
    """
    if not reclaim:
        _refuse_foreign(path, recipe)
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        sync_directory(path.parent)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _lock(descriptor, path)
        # another process may have changed the folder before we had the lock
        if reclaim:
            _reclaim(path, recipe)
        else:
            _refuse_foreign(path, recipe)
        _remove_temporaries(path)
        if not (path / MANIFEST).exists() and not (path / MARKER).exists():
            write_atomic(path / MARKER, recipe.encode() + b"\n")
        _make_durable(path)
        yield (path / MANIFEST).exists()
        (path / MARKER).unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _make_durable(path: Path) -> None:
    """The folders, and the names in them: a killed pack may have left some that were never synced,
    and what we build on must not vanish under a manifest."""
    with disk_errors(path):
        sync_directory(path)
        for folder in FOLDERS:
            (path / folder).mkdir(exist_ok=True)
            sync_directory(path / folder)


def _reclaim(path: Path, recipe: str) -> None:
    """Turn a bundle whose manifest is damaged or gone into an unfinished one of `recipe`."""
    write_atomic(path / MARKER, recipe.encode() + b"\n")
    with disk_errors(path / MANIFEST):
        (path / MANIFEST).unlink(missing_ok=True)
        sync_directory(path)


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Busy(f"{path}: another m2c pack is writing this bundle", "wait for it") from None
    except OSError:
        pass  # a file system without locks: renames alone keep the bundle sound


def _refuse_foreign(path: Path, recipe: str) -> None:
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UsageError(f"{path} is not a folder", "choose another --name or --ssd")
    # a pack killed while it wrote its marker leaves nothing but the marker's temporary file
    if not path.is_dir() or all(p.name.startswith(TEMPORARY_PREFIX) for p in path.iterdir()):
        return
    if (path / MANIFEST).exists():
        try:
            packed = read_manifest(path).recipe
        except BadInput as error:
            raise UsageError(
                f"{path} holds a bundle that cannot be read ({error.message})",
                "choose another --name, or remove that folder yourself",
            ) from None
    elif (path / MARKER).exists():
        packed = read_small(path / MARKER, limit=256).decode("ascii", "replace").strip()
    else:
        raise UsageError(
            f"{path} is not empty and holds no bundle of ours", "choose another --name or --ssd"
        )
    if packed != recipe:
        raise UsageError(
            f"{path} holds a bundle made from other weights, another profile or other options",
            "choose another --name, or remove that folder yourself",
        )


def _remove_temporaries(path: Path) -> None:
    """Left by a pack that was killed; nobody else uses these names while we hold the lock."""
    for folder in (path, *(path / name for name in FOLDERS)):
        for leftover in folder.glob(f"{TEMPORARY_PREFIX}*"):
            leftover.unlink(missing_ok=True)
