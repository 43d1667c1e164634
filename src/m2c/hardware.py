"""What this machine has: memory that may be used, threads, bandwidth. Linux.

Container limits count: a cgroup's memory limit is the memory there is. Knows nothing about models.
"""

import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np

from m2c.units import GiB, MiB

# Python, torch and its thread stacks: resident before any weight is (BENCHMARKS.md, "Memory")
OVERHEAD_NBYTES: Final = 400 * MiB
_PROBE_NBYTES: Final = 64 * MiB
_UNLIMITED: Final = 1 << 60


def available_memory() -> int:
    """Bytes this process may still take: the least of the system's and the cgroups' limits."""
    return max(0, min(_system_available(), _cgroup_available()))


def auto_dram() -> int:
    """The default --dram: four fifths of what is available, less what m2c itself takes."""
    return max(0, available_memory() * 4 // 5 - OVERHEAD_NBYTES)


def auto_threads() -> int:
    return len(os.sched_getaffinity(0))


def peak_memory() -> int:
    """Largest resident set of this process so far, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return 0


def total_memory() -> int:
    """Bytes of memory that the system has, whatever this process may take."""
    return _meminfo("MemTotal:") or 0


def cpu_name() -> str:
    """As the processor calls itself."""
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def probe_dram(threads: int) -> float:
    """Bytes per second that `threads` threads read from memory; the best of three quick passes."""
    data = np.ones((threads, _PROBE_NBYTES // 8), np.int64)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(3):
            begin = time.perf_counter()
            list(pool.map(np.sum, data))
            best = max(best, data.nbytes / (time.perf_counter() - begin))
    return best


def _system_available() -> int:
    known = _meminfo("MemAvailable:")
    return 4 * GiB if known is None else known


def _meminfo(key: str) -> int | None:
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) << 10
    return None


def _cgroup_available() -> int:
    return min((limit - used for limit, used in _cgroups()), default=_UNLIMITED)


def _cgroups() -> list[tuple[int, int]]:
    """(limit, used) of every memory cgroup this process is in, version 1 and 2."""
    found = []
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            names, root = ("memory.max", "memory.current"), Path("/sys/fs/cgroup")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            root = Path("/sys/fs/cgroup/memory")
        else:
            continue
        folder = root / path.lstrip("/")
        # a limit anywhere above binds too; inside a container the path may not exist: try the root
        for place in (folder, *folder.parents):
            if root in (place, *place.parents):
                limit, used = (_read(place / name).strip() for name in names)
                if limit.isdigit() and int(limit) < _UNLIMITED:
                    found.append((int(limit), int(used) if used.isdigit() else 0))
    return found


def _read(path: Path | str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
