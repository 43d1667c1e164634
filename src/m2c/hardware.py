"""What this machine has: memory that may be used, threads, bandwidth. Linux.

Container limits count: what a cgroup allows is what there is. `root` is where /proc and /sys lie.
Knows nothing about models.
"""

import ctypes
import os
import platform
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from m2c.units import GiB, MiB

# Python, torch and its thread stacks: resident before any weight is (BENCHMARKS.md, "Memory")
OVERHEAD_NBYTES: Final = 400 * MiB
_PROBE_NBYTES: Final = 64 * MiB  # of each thread
_PROBE_THREADS: Final = 8  # more find no more bandwidth, and hold more memory
ASSUMED_SSD: Final = 2e9  # bytes per second, where nothing is known of a disk
_UNLIMITED: Final = 1 << 60
_ROOT: Final = Path("/")


@dataclass(frozen=True)
class MemoryLimit:
    """What one cgroup allows. Bytes."""

    file: Path
    nbytes: int
    used: int  # not counting files in the page cache that nobody needs

    @property
    def left(self) -> int:
        return self.nbytes - self.used


@dataclass(frozen=True)
class Quota:
    """Processor time that one cgroup allows, in cores."""

    file: Path
    cores: float


@dataclass(frozen=True)
class Figure:
    """A speed and where it is from."""

    bytes_per_s: float
    source: str  # "given", "measured", "remembered" (of a bundle's reads) or "assumed"


@dataclass(frozen=True)
class Cpu:
    model: str
    cores: int  # of the machine
    allowed: int  # that this process may be scheduled on
    quota: Quota | None
    flags: frozenset[str]  # instruction sets as the kernel names them


def available_memory(root: Path = _ROOT) -> int:
    """Bytes this process may still take: the least of the system's and the cgroups' limits."""
    limit = memory_limit(root)
    left = _UNLIMITED if limit is None else limit.left
    return max(0, min(_meminfo("MemAvailable", root), left))


def total_memory(root: Path = _ROOT) -> int:
    """Bytes of memory of the machine, whatever this process may use of them."""
    return _meminfo("MemTotal", root)


def auto_dram() -> int:
    """The default --dram: four fifths of what is available, less what m2c itself takes."""
    return max(0, available_memory() * 4 // 5 - OVERHEAD_NBYTES)


def auto_threads(root: Path = _ROOT) -> int:
    """One per core that may be used; a quota on processor time would stop more of them in turns."""
    allowed = len(os.sched_getaffinity(0))
    quota = cpu_quota(root)
    return allowed if quota is None else max(1, min(allowed, round(quota.cores)))


def peak_memory() -> int:
    """Largest resident set of this process so far, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return 0


def give_back_freed() -> None:
    """Have the C library give freed memory back to the system, where it knows how.

    It keeps what lies below anything still in use: a small result after each large step keeps them
    all.
    """
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def probe_dram(threads: int) -> float:
    """Bytes per second that up to `threads` threads read from memory; best of three quick passes.

    Fewer where there is not the memory to find out.
    """
    room = available_memory() // (2 * _PROBE_NBYTES)
    threads = max(1, min(threads, _PROBE_THREADS, room))
    data = np.ones((threads, _PROBE_NBYTES // 8), np.int64)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(3):
            begin = time.perf_counter()
            list(pool.map(np.sum, data))
            best = max(best, data.nbytes / (time.perf_counter() - begin))
    return best


def read_cpu(root: Path = _ROOT) -> Cpu:
    """The processor, by /proc/cpuinfo of its first core."""
    first = _read(root / "proc/cpuinfo").split("\n\n")[0]
    pairs = [line.partition(":") for line in first.splitlines()]
    facts = {name.strip(): value.strip() for name, _, value in pairs}
    flags = facts.get("flags") or facts.get("Features") or ""  # of x86; of Arm
    return Cpu(
        model=facts.get("model name") or platform.machine(),
        cores=os.cpu_count() or 1,
        allowed=len(os.sched_getaffinity(0)),
        quota=cpu_quota(root),
        flags=frozenset(flags.split()),
    )


def memory_limit(root: Path = _ROOT) -> MemoryLimit | None:
    """The cgroup limit, version 1 or 2, that leaves least; None where nothing limits memory."""
    found = []
    for version, folder in _cgroups("memory", root):
        names = ("memory.max", "memory.current", "inactive_file")
        if version == 1:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        limit, used = (_read(folder / name).strip() for name in names[:2])
        if limit.isdigit() and int(limit) < _UNLIMITED:
            held = int(used) if used.isdigit() else 0
            # what was read from files lies there until the memory is wanted
            held -= _statistic(folder / "memory.stat", names[2])
            found.append(MemoryLimit(folder / names[0], int(limit), max(0, held)))
    return min(found, key=lambda limit: limit.left, default=None)


def cpu_quota(root: Path = _ROOT) -> Quota | None:
    """The least processor time that a cgroup, version 1 or 2, allows; None for no quota."""
    found = []
    for version, folder in _cgroups("cpu", root):
        file = folder / ("cpu.max" if version == 2 else "cpu.cfs_quota_us")
        words = _read(file).split()
        if version == 1:
            words += _read(folder / "cpu.cfs_period_us").split()
        if len(words) == 2 and all(word.isdigit() and int(word) for word in words):
            found.append(Quota(file, int(words[0]) / int(words[1])))
    return min(found, key=lambda quota: quota.cores, default=None)


def _cgroups(controller: str, root: Path) -> Iterator[tuple[int, Path]]:
    """(version, folder) of every cgroup with this controller that this process is in."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            version, top = 2, root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            version, top = 1, root / "sys/fs/cgroup" / controller
        else:
            continue
        folder = top / path.lstrip("/")
        # a limit anywhere above binds too; inside a container the path may not exist: try the top
        for place in (folder, *folder.parents):
            if top in (place, *place.parents):
                yield version, place


def _meminfo(name: str, root: Path) -> int:
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    return 4 * GiB


def _statistic(file: Path, name: str) -> int:
    for line in _read(file).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdigit():
            return int(value)
    return 0


def _read(path: Path | str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
