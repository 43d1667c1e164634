"""The SSD tier: direct reads of payload blocks, many in flight, each block verified on arrival.

Reads go past the page cache (O_DIRECT) straight into their destination. A file system that refuses
O_DIRECT is read through the page cache, which is then given back. Knows nothing about layers,
neurons or what the blocks hold.
"""

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from m2c.bundle.files import disk_errors
from m2c.bundle.shard import BLOCK, PAGE, ShardIndex
from m2c.errors import StorageError

REQUEST_BLOCKS = 8  # 512 KiB a read: past the knee of every drive measured, and 8 in flight suffice

U8 = npt.NDArray[np.uint8]


@dataclass
class LinkStats:
    """Bytes over one link and the seconds during which at least one transfer was under way."""

    nbytes: int = 0
    busy_s: float = 0.0


class Pending:
    """Reads under way. `wait` returns once all have arrived verified, or raises what failed."""

    def __init__(self, futures: list[Future[None]]) -> None:
        self._futures = futures

    @classmethod
    def all_of(cls, parts: "Sequence[Pending]") -> "Pending":
        return cls([future for part in parts for future in part._futures])

    def wait(self) -> None:
        try:
            for future in self._futures:
                future.result()
        except BaseException:
            self.cancel()  # whoever gets this may reuse the buffer at once
            raise

    def cancel(self) -> None:
        """Drop what has not started and wait for the rest, whatever its outcome."""
        for future in self._futures:
            if not future.cancel():
                future.exception()


class SsdReader:
    """Opens shards once and reads their blocks with `threads` reads in flight."""

    def __init__(self, threads: int = 8) -> None:
        self.stats = LinkStats()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="m2c-ssd")
        self._descriptors: dict[Path, tuple[int, bool]] = {}
        self._lock = threading.Lock()
        self._under_way = 0
        self._busy_since = 0.0

    def read(self, index: ShardIndex, runs: Sequence[tuple[int, int]], into: U8) -> Pending:
        """Start reading runs of blocks [first, stop) one after another into `into`.

        into: page-aligned u8 of at least the runs' bytes. Errors surface in `Pending.wait`.
        """
        descriptor, direct = self._open(index.path)
        futures, position = [], 0
        for first, stop in runs:
            for start in range(first, stop, REQUEST_BLOCKS):
                end = min(start + REQUEST_BLOCKS, stop)
                nbytes = min(end * BLOCK, index.header.payload_nbytes) - start * BLOCK
                view = into.data[position : position + nbytes]
                futures.append(
                    self._pool.submit(self._read, index, descriptor, direct, start, view)
                )
                position += nbytes
        return Pending(futures)

    def read_all(self, index: ShardIndex, into: U8) -> Pending:
        """Start reading a shard's whole payload."""
        return self.read(index, [(0, len(index.block_hashes))], into)

    def reset_stats(self) -> None:
        with self._lock:
            self.stats = LinkStats()
            self._busy_since = time.perf_counter()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        for descriptor, _ in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _open(self, path: Path) -> tuple[int, bool]:
        if path not in self._descriptors:
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
            with disk_errors(path):
                try:
                    self._descriptors[path] = os.open(path, flags | os.O_DIRECT), True
                except OSError:
                    self._descriptors[path] = os.open(path, flags), False
        return self._descriptors[path]

    def _read(
        self, index: ShardIndex, descriptor: int, direct: bool, block: int, view: memoryview
    ) -> None:
        with self._lock:
            if not self._under_way:
                self._busy_since = time.perf_counter()
            self._under_way += 1
        try:
            self._fill(index, descriptor, block, view)
            if not direct:
                offset = PAGE + block * BLOCK
                os.posix_fadvise(descriptor, offset, len(view), os.POSIX_FADV_DONTNEED)
            for i in range(0, len(view), BLOCK):
                index.verify(block + i // BLOCK, view[i : i + BLOCK])
        finally:
            with self._lock:
                self._under_way -= 1
                self.stats.nbytes += len(view)
                if not self._under_way:
                    self.stats.busy_s += time.perf_counter() - self._busy_since

    def _fill(self, index: ShardIndex, descriptor: int, block: int, view: memoryview) -> None:
        offset, done = PAGE + block * BLOCK, 0
        while done < len(view):
            with disk_errors(f"{index.path} at byte {offset + done}"):
                got = os.preadv(descriptor, [view[done:]], offset + done)
            if not got:
                raise StorageError(
                    f"{index.path}: ended at byte {offset + done}, too early",
                    "check the disk, then pack the model again",
                )
            done += got
