"""How a disk is best read: request size and requests in flight, measured once and remembered.

The bundle's own blocks are read past the page cache at random places and hashed, as when a model
decodes. What was found is kept for the device in M2C_HOME. Knows nothing about models.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from math import log2
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from m2c.bundle.bundle import Bundle
from m2c.bundle.files import disk_errors, read_small, write_atomic
from m2c.bundle.shard import BLOCK, PAGE
from m2c.bundle.strict import decode, dump_json, load_json
from m2c.errors import BadInput, M2CError
from m2c.home import home, make_folder
from m2c.tiers.memory import aligned_buffer
from m2c.tiers.ssd import REQUEST_BLOCKS, THREADS
from m2c.units import KiB, MiB

REQUESTS: Final = (256 * KiB, 512 * KiB, 1 * MiB, 2 * MiB)
DEPTHS: Final = (1, 2, 4, 8, 16)
SAMPLE_NBYTES: Final = 64 * MiB  # read at each setting, or less where the time is up first
_SAMPLE_S: Final = 0.06
_AS_GOOD: Final = 0.97  # of the best: the rest is noise
_SHARDS: Final = 64  # the largest hold places enough, and descriptors are few
_MAX_FILE_NBYTES: Final = 64 * KiB
_MAX_SPEED: Final = 1e13
# reasons not to remember; RuntimeError is that of a user without a home folder
_CLOSED: Final = (M2CError, OSError, RuntimeError)

Place = tuple[int, int]  # descriptor, byte offset


@dataclass(frozen=True)
class DiskProfile:
    """One setting: bytes of a request, requests in flight, and the speed that was measured."""

    request_nbytes: int
    depth: int
    bytes_per_s: float = 0.0  # 0: not measured


DEFAULT: Final = DiskProfile(REQUEST_BLOCKS * BLOCK, THREADS)


def disk_profile(bundle: Bundle) -> DiskProfile:
    """What is remembered for the disk that the bundle lies on, else what a probe finds.

    Raises nothing: a disk that cannot be probed is read with the defaults, and says why then.
    """
    try:
        device = device_of(bundle.path)
        if known := remembered(device):
            return known
        found = probe_disk(bundle)
    except M2CError:
        return DEFAULT
    remember(device, found)
    return found


def probe_disk(bundle: Bundle) -> DiskProfile:
    """The best setting; DEFAULT if nothing can be measured. Takes up to 1.5 seconds.

    Raises BadInput or StorageError when a shard cannot be read.
    """
    return choose(measure_settings(bundle))


def choose(measured: Sequence[DiskProfile]) -> DiskProfile:
    """Of the settings within 3 % of the fastest, the one next to DEFAULT.

    Not the smallest: while a model decodes, those who read also verify and wait for a processor.
    """
    best = max(map(_speed, measured), default=0.0)
    if not best:
        return DEFAULT
    good = [profile for profile in measured if profile.bytes_per_s >= best * _AS_GOOD]
    return min(good, key=_steps_from_default)


def measure_settings(bundle: Bundle) -> list[DiskProfile]:
    """What the disk reaches at each setting, slowest first; the two fastest are measured again.

    Reads at most twice the bundle's bytes, so a small bundle gets the settings next to DEFAULT.
    Empty where direct reads are refused or there is too little to read.
    """
    total = sum(index.header.payload_nbytes for index in bundle.shards.values())
    with disk_errors(bundle.path), _open_places(bundle) as places:
        return measure_all(places, affordable(total, places))


def measure_all(
    places: "Places", settings: list[DiskProfile], *,
    progress: Callable[[int], None] = lambda done: None,
) -> list[DiskProfile]:  # fmt: skip
    """The settings, likeliest first, with their speeds, slowest first; `progress`: one by one."""
    if not settings:
        return []
    buffer = aligned_buffer(max(s.request_nbytes * s.depth for s in settings))
    buffer[::PAGE] = 0  # the first to touch a page pays for it
    measured = []
    with ThreadPoolExecutor(max(DEPTHS)) as pool:
        # the first reads after a pause are slow: let that befall the least likely setting
        for setting in reversed(settings):
            measured.append(_measure(pool, places, setting, buffer))
            progress(1)
        measured.sort(key=_speed)
        for i in range(max(0, len(measured) - 2), len(measured)):
            # the fastest of many was also the luckiest: the mean of two is nearer the truth
            again = _measure(pool, places, measured[i], buffer)
            mean = (measured[i].bytes_per_s + again.bytes_per_s) / 2
            measured[i] = replace(measured[i], bytes_per_s=mean)
    return sorted(measured, key=_speed)


class Places:
    """Where requests may go. payloads: [(descriptor, payload bytes)]."""

    def __init__(self, payloads: Sequence[tuple[int, int]]) -> None:
        self._descriptors = [descriptor for descriptor, _ in payloads]
        self._nbytes = np.array([nbytes for _, nbytes in payloads], np.int64)
        self._random = np.random.default_rng()

    def room(self, request_nbytes: int) -> int:
        """Bytes that requests of this size can read without meeting."""
        return int((self._nbytes // request_nbytes).sum()) * request_nbytes

    def some(self, request_nbytes: int) -> list[Place]:
        """SAMPLE_NBYTES in requests that do not meet, in random order."""
        ends = np.cumsum(self._nbytes // request_nbytes)
        picks = self._random.choice(ends[-1], SAMPLE_NBYTES // request_nbytes, replace=False)
        shards = np.searchsorted(ends, picks, side="right")
        offsets = PAGE + (picks - ends[shards]) * request_nbytes
        offsets += self._nbytes[shards] // request_nbytes * request_nbytes
        return [(self._descriptors[i], int(at)) for i, at in zip(shards, offsets, strict=True)]


def affordable(total_nbytes: int, places: Places) -> list[DiskProfile]:
    """The settings to measure on a bundle of that size, those nearest to DEFAULT first."""
    count = 0
    if total_nbytes >= SAMPLE_NBYTES:
        count = max(1, 2 * total_nbytes // SAMPLE_NBYTES - 2)
    fitting = [n for n in REQUESTS if places.room(n) >= SAMPLE_NBYTES]
    settings = [DiskProfile(nbytes, depth) for nbytes in fitting for depth in DEPTHS]
    return sorted(settings, key=_steps_from_default)[:count]


def _speed(profile: DiskProfile) -> float:
    return profile.bytes_per_s


def _steps_from_default(setting: DiskProfile) -> float:
    size = log2(setting.request_nbytes / DEFAULT.request_nbytes)
    return abs(size) + abs(log2(setting.depth / DEFAULT.depth))


@contextmanager
def _open_places(bundle: Bundle) -> Iterator[Places]:
    """No places at all on a file system that refuses direct reads: they would measure memory."""
    shards = sorted(bundle.shards.values(), key=lambda index: -index.header.payload_nbytes)
    payloads: list[tuple[int, int]] = []
    with ExitStack() as opened:
        for index in shards[:_SHARDS]:
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
            try:
                descriptor = os.open(index.path, flags | os.O_DIRECT)
            except FileNotFoundError:
                raise
            except OSError:
                payloads.clear()
                break
            opened.callback(os.close, descriptor)
            payloads.append((descriptor, index.header.payload_nbytes))
        yield Places(payloads)


def _measure(
    pool: ThreadPoolExecutor, places: Places, setting: DiskProfile, buffer: npt.NDArray[np.uint8]
) -> DiskProfile:
    """`setting` with its speed. buffer: page-aligned u8 of at least the requests in flight."""
    nbytes = setting.request_nbytes
    left = iter(places.some(nbytes))
    begin = time.perf_counter()

    def lane(i: int) -> int:
        view = buffer.data[i * nbytes : (i + 1) * nbytes]
        done = 0
        for descriptor, offset in left:
            done += os.preadv(descriptor, [view], offset)
            for block in range(0, nbytes, BLOCK):
                xxh3_64_intdigest(view[block : block + BLOCK])
            if time.perf_counter() - begin > _SAMPLE_S:
                break
        return done

    total = sum(pool.map(lane, range(setting.depth)))
    return replace(setting, bytes_per_s=total / (time.perf_counter() - begin))


# -- remembered ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Known:
    date: str
    request_nbytes: int
    depth: int
    bytes_per_s: float


@dataclass(frozen=True)
class _File:
    disks: dict[str, _Known]  # by `device_of`


def device_of(path: Path) -> str:
    """Numbers and file system of the device that `path` is on, for example `254:0 ext4`.

    File systems without a device of their own get their numbers anew at every mount. Raises
    BadInput or StorageError when there is no such path.
    """
    with disk_errors(path):
        number = os.stat(path).st_dev
    numbers = f"{os.major(number)}:{os.minor(number)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        mounts = []
    for line in mounts:
        mount, _, filesystem = line.partition(" - ")
        if mount.split()[2:3] == [numbers]:
            return f"{numbers} {filesystem.split(maxsplit=1)[0]}"
    return numbers


def remembered(device: str) -> DiskProfile | None:
    """What an earlier probe found for a device of that `device_of`."""
    known = _known_disks().get(device)
    if known is None:
        return None
    return DiskProfile(known.request_nbytes, known.depth, known.bytes_per_s)


def remember(device: str, profile: DiskProfile) -> bool:
    """Whether the profile is now remembered: not if it was never measured or home is closed."""
    if not profile.bytes_per_s:
        return False
    entry = _Known(date.today().isoformat(), **asdict(profile))
    file = _File({**_known_disks(), device: entry})
    try:
        write_atomic(make_folder(home()) / "disks.json", dump_json(asdict(file)) + b"\n")
    except _CLOSED:
        return False
    return True


def _known_disks() -> dict[str, _Known]:
    """By device; nothing at all if the file is missing or any of it is not as we write it."""
    try:
        path = home() / "disks.json"
        data = load_json(read_small(path, limit=_MAX_FILE_NBYTES), file=path)
        known = decode(_File, data, file=path).disks
        for entry in known.values():
            _check(entry, path)
    except _CLOSED:
        return {}
    return known


def _check(entry: _Known, path: Path) -> None:
    """Raises BadInput for what no probe can have found."""
    try:
        date.fromisoformat(entry.date)
    except ValueError:
        raise BadInput(f"{path}: {entry.date!r} is not a date") from None
    on_grid = entry.request_nbytes in REQUESTS and entry.depth in DEPTHS
    if not on_grid or not 0 < entry.bytes_per_s < _MAX_SPEED:
        raise BadInput(f"{path}: no disk is read like that")
