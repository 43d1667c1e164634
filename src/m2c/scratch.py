"""How fast a disk is where no bundle lies yet: a file of random bytes is written, read and gone.

The file has no name, so nothing is left behind whatever happens. Just written, it may still lie in
a cache of the disk or of the host: a bundle's own probe is nearer the truth (`disk.py`). Knows
nothing about printing.
"""

import fcntl
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Final

import numpy as np

from m2c.bundle.shard import BLOCK, PAGE
from m2c.disk import DEPTHS, REQUESTS, SAMPLE_NBYTES, DiskProfile, Places, device_of, measure_all
from m2c.errors import M2CError
from m2c.tiers.memory import aligned_buffer
from m2c.units import MiB

SCRATCH_NBYTES: Final = 512 * MiB
# the smallest request is what a missing neuron costs
SETTINGS: Final = tuple(DiskProfile(n, depth) for n in (BLOCK, *REQUESTS) for depth in DEPTHS)
STEPS: Final = SCRATCH_NBYTES // (16 * MiB) + len(SETTINGS)  # what `progress` adds up to
_PIECE_NBYTES: Final = 16 * MiB
_ROOM: Final = 4  # a disk must have this many times the file free


@dataclass(frozen=True)
class DiskFacts:
    """What a disk is like. `why`: the reason that nothing was measured."""

    path: Path  # the folder, or the nearest one above it that exists
    device: str
    free_nbytes: int
    total_nbytes: int
    writable: bool
    direct: bool | None = None  # None: not tried
    settings: tuple[DiskProfile, ...] = ()  # by request size, then by depth
    why: str = ""


def existing_folder(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    path = path.absolute()
    for place in (path, *path.parents):
        if os.path.isdir(place):  # False where a folder above is closed to us
            return place
    return Path("/")


def read_disk(
    path: Path, *, probe: bool, progress: Callable[[int], None] = lambda steps: None
) -> DiskFacts:
    """Facts about the disk under `path`; with `probe` its speed, in a few seconds.

    Raises nothing for a disk that is full or read-only: `why` says so.
    """
    place = existing_folder(path)
    room = os.statvfs(place)
    free, total = room.f_bavail * room.f_frsize, room.f_blocks * room.f_frsize
    writable = os.access(place, os.W_OK | os.X_OK)
    facts = DiskFacts(place, device_of(place), free, total, writable)
    if not probe:
        return replace(facts, why="not asked for")
    if not writable:
        return replace(facts, why=f"{place} is not writable")
    nbytes = min(SCRATCH_NBYTES, free // _ROOM // _PIECE_NBYTES * _PIECE_NBYTES)
    if nbytes < 2 * SAMPLE_NBYTES:
        return replace(facts, why="too little free space for a file to read")
    try:
        return _measured(facts, nbytes, progress)
    except (M2CError, OSError) as error:
        return replace(facts, why=str(error))


def _measured(facts: DiskFacts, nbytes: int, progress: Callable[[int], None]) -> DiskFacts:
    with tempfile.TemporaryFile(dir=facts.path, buffering=0) as file:
        _fill(file, nbytes, progress)
        descriptor = file.fileno()
        if not _goes_direct(descriptor):
            return replace(facts, direct=False, why="reads past the page cache are refused here")
        places = Places([(descriptor, nbytes)])
        found = measure_all(places, list(SETTINGS), progress=progress)
    found.sort(key=lambda setting: (setting.request_nbytes, setting.depth))
    return replace(facts, direct=True, settings=tuple(found))


def _fill(file: IO[bytes], nbytes: int, progress: Callable[[int], None]) -> None:
    """A page and `nbytes` that no disk can shorten, down on the disk and out of the cache."""
    random = np.random.default_rng()
    os.write(file.fileno(), bytes(PAGE))
    for _ in range(nbytes // _PIECE_NBYTES):
        piece = memoryview(random.bytes(_PIECE_NBYTES))
        while piece:
            piece = piece[os.write(file.fileno(), piece) :]
        progress(1)
    os.fsync(file.fileno())
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _goes_direct(descriptor: int) -> bool:
    """Whether reads now go past the page cache: asked for, and one tried."""
    try:
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        return os.preadv(descriptor, [aligned_buffer(PAGE).data], PAGE) == PAGE
    except OSError:
        return False
