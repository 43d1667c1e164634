"""Runs one command under a memory limit that counts the page cache, and samples what it reads.

The limit is a memory cgroup of its own, version 1 or 2, which needs root; without a limit nothing
does. Evicting files and probing a disk are here too, because a timing of reads means little
without both. Linux. Knows nothing about the programs it runs.
"""

import contextlib
import mmap
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Final

INTERVAL_S: Final = 0.02  # between samples: 40 MB at the speed of a common NVMe disk
REQUEST: Final = 512 << 10  # bytes per read of the probe
IN_FLIGHT: Final = 8
_V1: Final = Path("/sys/fs/cgroup/memory")
_V2: Final = Path("/sys/fs/cgroup")
# enters the group before the command exists, so that its first page counts
_ENTER: Final = 'echo $$ > "$1/cgroup.procs" && shift && exec "$@"'


@dataclass(frozen=True)
class Outcome:
    """What became of a command. status: "", or why there is no result."""

    status: str  # "", "out of memory", "timeout" or "exit N"
    seconds: float  # from start to exit
    output: str
    errors: str
    peak_nbytes: int  # largest resident set, files it maps included
    reads: tuple[tuple[float, int], ...]  # (seconds since the start, bytes read from disk so far)
    charged_nbytes: int = 0  # most that the limit counted, page cache included; 0: not known

    def read_in_last(self, seconds: float) -> int:
        """Bytes read from disk in the last `seconds` before the exit."""
        if not self.reads:
            return 0
        begin = self.reads[-1][0] - seconds
        before = [nbytes for moment, nbytes in self.reads if moment <= begin]
        return self.reads[-1][1] - (before[-1] if before else 0)


class MemoryGroup:
    """A memory cgroup with a limit; `close` removes it, once its processes have ended."""

    def __init__(self, limit_nbytes: int) -> None:
        """Raises OSError where `can_limit` says no."""
        self._v1 = (_V1 / "memory.limit_in_bytes").exists()
        self.path = (_V1 if self._v1 else _V2) / f"m2c-bench-{os.getpid()}"
        self.path.mkdir()
        try:
            if self._v1:
                self._write("memory.swappiness", 0)
                self._write("memory.limit_in_bytes", limit_nbytes)
            else:
                self._write("memory.max", limit_nbytes)
                if (self.path / "memory.swap.max").exists():
                    self._write("memory.swap.max", 0)
        except OSError:
            self.close()
            raise

    def killed(self) -> bool:
        """Whether the kernel ended a process of the group because of the limit."""
        text = (self.path / ("memory.oom_control" if self._v1 else "memory.events")).read_text()
        counts = dict(line.split(maxsplit=1) for line in text.splitlines())
        return int(counts.get("oom_kill", 0)) > 0

    def peak(self) -> int:
        """Most bytes that were charged at a time; 0 where the kernel does not say (before 5.19)."""
        file = self.path / ("memory.max_usage_in_bytes" if self._v1 else "memory.peak")
        try:
            return int(file.read_text())
        except OSError:
            return 0

    def close(self) -> None:
        if self._v1:
            with contextlib.suppress(OSError):
                self._write("memory.force_empty", 0)  # pages of files stay charged otherwise
        for _ in range(50):
            try:
                return self.path.rmdir()
            except OSError:  # the last process is still being taken apart
                time.sleep(0.1)

    def _write(self, name: str, value: int) -> None:
        (self.path / name).write_text(str(value))


def can_limit() -> bool:
    """Whether this process may make memory groups here."""
    if os.geteuid() != 0:
        return False
    if (_V1 / "memory.limit_in_bytes").exists():
        return os.access(_V1, os.W_OK)
    try:
        enabled = (_V2 / "cgroup.subtree_control").read_text().split()
    except OSError:
        return False
    return "memory" in enabled and os.access(_V2, os.W_OK)


def run(command: Sequence[str], *, limit: int | None = None, timeout_s: float = 900) -> Outcome:
    """Run `command` to its end, with at most `limit` bytes of memory, page cache included.

    Raises OSError when the command or the limit cannot be set up.
    """
    with contextlib.ExitStack() as cleanup:
        output = cleanup.enter_context(tempfile.TemporaryFile())
        errors = cleanup.enter_context(tempfile.TemporaryFile())
        group = None
        words = list(command)
        if limit is not None:
            group = MemoryGroup(limit)
            cleanup.callback(group.close)
            words = ["/bin/sh", "-c", _ENTER, "sh", str(group.path), *words]
        begin = time.monotonic()
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True
        )
        cleanup.callback(_end, process)
        reads, peak, timed_out = _watch(process, begin, timeout_s)
        seconds = time.monotonic() - begin
        status = f"exit {process.returncode}" if process.returncode else ""
        if timed_out:
            status = "timeout"
        elif group is not None and group.killed():
            status = "out of memory"
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        charged = 0 if group is None else group.peak()
        return Outcome(status, seconds, texts[0], texts[1], peak, tuple(reads), charged)


def _watch(
    process: subprocess.Popen[bytes], begin: float, timeout_s: float
) -> tuple[list[tuple[float, int]], int, bool]:
    """Samples (seconds, bytes read), the largest resident set, and whether time ran out."""
    reads: list[tuple[float, int]] = []
    peak, timed_out = 0, False
    folder = Path(f"/proc/{process.pid}")
    while process.poll() is None:
        elapsed = time.monotonic() - begin
        with contextlib.suppress(OSError):  # it may have ended since
            reads.append((elapsed, _number(folder / "io", "read_bytes:")))
            peak = max(peak, _number(folder / "status", "VmHWM:") << 10)
        if elapsed > timeout_s and not timed_out:
            timed_out = True
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(INTERVAL_S)
    return reads, peak, timed_out


def _end(process: subprocess.Popen[bytes]) -> None:
    """Leave nothing running, whatever interrupted us."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _number(path: Path, key: str) -> int:
    """The number after `key` in a file of /proc; 0 if there is no such line."""
    for line in path.read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    return 0


def files_below(path: Path) -> list[Path]:
    """The files of a folder, or the file itself."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file())


def evict(files: Iterable[Path]) -> None:
    """Drop files from the page cache. Cached pages of another group would be free memory."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # dirty pages cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def disk_bandwidth(files: Iterable[Path], *, nbytes: int = 512 << 20, seed: int = 0) -> float:
    """Bytes per second of direct reads at random places of `files`, eight in flight.

    Files smaller than a request are left out; 0.0 if that leaves none. A file system that refuses
    direct reads is read through its cache: evict the files first.
    """
    sizes = {file: file.stat().st_size // REQUEST for file in files}
    places = [(file, k * REQUEST) for file, count in sizes.items() for k in range(count)]
    random.Random(seed).shuffle(places)
    places = places[: max(1, nbytes // REQUEST)]
    if not places:
        return 0.0
    buffers: SimpleQueue[mmap.mmap] = SimpleQueue()
    for _ in range(IN_FLIGHT):
        buffers.put(mmap.mmap(-1, REQUEST))  # page-aligned, as direct reads want it
    with _opened({file for file, _ in places}) as opened, ThreadPoolExecutor(IN_FLIGHT) as pool:

        def read(place: tuple[Path, int]) -> int:
            buffer = buffers.get()
            try:
                return os.preadv(opened[place[0]], [buffer], place[1])
            finally:
                buffers.put(buffer)

        begin = time.monotonic()
        total = sum(pool.map(read, places))
        return total / (time.monotonic() - begin)


@contextlib.contextmanager
def _opened(files: Iterable[Path]) -> Iterator[dict[Path, int]]:
    found: dict[Path, int] = {}
    try:
        for file in files:
            try:
                found[file] = os.open(file, os.O_RDONLY | os.O_DIRECT)
            except OSError:
                found[file] = os.open(file, os.O_RDONLY)
        yield found
    finally:
        for descriptor in found.values():
            os.close(descriptor)
