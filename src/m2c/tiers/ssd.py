"""The SSD tier: direct reads of payload blocks, many in flight, each block verified on arrival.

Reads go past the page cache (O_DIRECT) straight into their destination. A file system that refuses
O_DIRECT is read through the page cache, which is then given back. Reads ahead wait in one line;
reads on demand do not join it. Knows nothing about layers, neurons or what the blocks hold.
"""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from m2c.bundle.files import MEND, disk_errors
from m2c.bundle.shard import BLOCK, PAGE, ShardIndex
from m2c.errors import StorageError

# where nothing was measured (disk.py): past the knee of every drive seen
REQUEST_BLOCKS: Final = 8
THREADS: Final = 8
_COURTESY_S: Final = 0.1

U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class _Request:
    index: ShardIndex
    descriptor: int
    direct: bool
    block: int  # the first of those that fill `view`
    view: memoryview


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
    """Opens shards once and reads their blocks, `threads` requests of `request_blocks` at a time.

    Reads on demand have threads of their own; while they run, reads ahead hold back.
    """

    def __init__(self, threads: int = THREADS, request_blocks: int = REQUEST_BLOCKS) -> None:
        self.stats = LinkStats()
        self._request_blocks = request_blocks
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="m2c-ssd")
        # scattered blocks are small requests: they need many in flight, whatever large ones need
        self._helpers = ThreadPoolExecutor(THREADS - 1, thread_name_prefix="m2c-ssd-now")
        self._descriptors: dict[Path, tuple[int, bool]] = {}
        self._lock = threading.Lock()
        self._turn = threading.Condition()
        self._on_demand = 0  # calls of read_now
        self._under_way = 0  # requests
        self._busy_since = 0.0

    def read(
        self, index: ShardIndex, runs: Sequence[tuple[int, int]], into: U8, *, now: bool = False
    ) -> Pending:
        """Start reading runs of blocks [first, stop) one after another into `into`.

        into: page-aligned u8 of at least the runs' bytes. now: before all that is waiting in line.
        Errors surface in `Pending.wait`.
        """
        requests = self._requests(index, runs, into)
        if now:
            return Pending([self._helpers.submit(self._read_first, one) for one in requests])
        return Pending([self._pool.submit(self._read_ahead, request) for request in requests])

    def read_now(self, index: ShardIndex, runs: Sequence[tuple[int, int]], into: U8) -> None:
        """As `read`, before all that is waiting in line; returns when done, raises what failed.

        The caller reads too: a single request needs no other thread. Nothing is under way any more
        when this returns or raises.
        """
        requests = self._requests(index, runs, into)
        left = iter(requests)

        def lane() -> None:
            for request in left:
                self._read(request)

        helpers: list[Future[None]] = []
        with self._priority():
            try:
                for _ in range(min(THREADS, len(requests)) - 1):
                    helpers.append(self._helpers.submit(lane))
                lane()
                for helper in helpers:
                    if not helper.cancel():  # one that has not started would find nothing left
                        helper.result()
            except BaseException:
                Pending(helpers).cancel()
                raise

    def read_all(self, index: ShardIndex, into: U8) -> Pending:
        """Start reading a shard's whole payload."""
        return self.read(index, [(0, len(index.block_hashes))], into)

    def reset_stats(self) -> None:
        with self._lock:
            self.stats = LinkStats()
            self._busy_since = time.perf_counter()

    def close(self) -> None:
        for pool in (self._pool, self._helpers):
            pool.shutdown(wait=True, cancel_futures=True)
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

    def _requests(
        self, index: ShardIndex, runs: Sequence[tuple[int, int]], into: U8
    ) -> list[_Request]:
        descriptor, direct = self._open(index.path)
        requests, position = [], 0
        for first, stop in runs:
            for start in range(first, stop, self._request_blocks):
                end = min(start + self._request_blocks, stop)
                nbytes = min(end * BLOCK, index.header.payload_nbytes) - start * BLOCK
                view = into.data[position : position + nbytes]
                requests.append(_Request(index, descriptor, direct, start, view))
                position += nbytes
        return requests

    @contextmanager
    def _priority(self) -> Iterator[None]:
        """While the block runs, reads ahead hold back.

        A disk's scheduler may let a long sequential read finish before a small one elsewhere: eight
        requests in flight have delayed a read of 64 KiB by 60 ms where alone it takes 0.2.
        """
        with self._turn:
            self._on_demand += 1
        try:
            yield
        finally:
            with self._turn:
                self._on_demand -= 1
                self._turn.notify_all()

    def _read_ahead(self, request: _Request) -> None:
        with self._turn:  # a courtesy that ends: an interrupted caller may never say it is done
            self._turn.wait_for(lambda: not self._on_demand, timeout=_COURTESY_S)
        self._read(request)

    def _read_first(self, request: _Request) -> None:
        with self._priority():
            self._read(request)

    def _read(self, request: _Request) -> None:
        index, view = request.index, request.view
        with self._lock:
            if not self._under_way:
                self._busy_since = time.perf_counter()
            self._under_way += 1
        try:
            _fill(request)
            for i in range(0, len(view), BLOCK):
                index.verify(request.block + i // BLOCK, view[i : i + BLOCK])
        finally:
            with self._lock:
                self._under_way -= 1
                self.stats.nbytes += len(view)
                if not self._under_way:
                    self.stats.busy_s += time.perf_counter() - self._busy_since


def _fill(request: _Request) -> None:
    view, begin, done = request.view, PAGE + request.block * BLOCK, 0
    while done < len(view):
        with disk_errors(f"{request.index.path} at byte {begin + done}"):
            got = os.preadv(request.descriptor, [view[done:]], begin + done)
        reached = done + got
        # a direct read must begin at a page: after a short one the rest of its page is read again
        whole = reached // PAGE * PAGE if request.direct and reached < len(view) else reached
        if whole == done:
            raise StorageError(
                f"{request.index.path}: ended at byte {begin + reached}, too early",
                f"check the disk, then {MEND}",
            )
        done = whole
    if not request.direct:
        os.posix_fadvise(request.descriptor, begin, len(view), os.POSIX_FADV_DONTNEED)
