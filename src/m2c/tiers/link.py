"""The link: copies of weights between DRAM and HBM, under way while a GPU computes.

Two slots take turns for what streams: kernels read one while the next copy fills the other. Other
copies go to places in HBM that are the caller's, or come from there. All happen one after the other
in the order they were asked for. Without a GPU the slots are host memory and a copy is over when
the call returns. Knows nothing about what is copied.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from m2c.kernels import cuda_driver
from m2c.tiers.ssd import LinkStats

U8 = npt.NDArray[np.uint8]
_TIMED: Final = 256  # copies whose times are kept, at most
_PROBES: Final = 3

# a copy that was asked for; None: it is over
Copied = torch.cuda.Event | None


def finished(copied: Copied) -> None:
    """Wait until a copy is over, so that what it took from DRAM may be overwritten."""
    if copied is not None:
        copied.synchronize()


class Link:
    """nbytes: of both slots together."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self.device = device
        self._slots = [torch.empty(nbytes // 2, dtype=torch.uint8, device=device) for _ in range(2)]
        self._turn = 0
        self._pinned: list[int] = []
        self._stats = LinkStats()
        self._last: Copied = None
        self._ahead = False  # whether what was moved last was yet to be used when it was asked for
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            self._copies = torch.cuda.Stream(device)
            # the slots' memory may have been somebody's whose kernels still run
            self._copies.wait_stream(torch.cuda.current_stream(device))
            self._used = [torch.cuda.Event() for _ in range(2)]  # kernels of a slot's last content
            self._timed: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @property
    def turn(self) -> int:
        """The slot that the next copy goes to."""
        return self._turn

    def pin(self, buffer: U8) -> int | None:
        """Tell the driver that `buffer` stays where it is: copies from it need no help of a CPU.
        Where kernels find it, if they do.

        Where it cannot be, copies are slower and still right.
        """
        if not self._on_gpu or not cuda_driver.pin(buffer.ctypes.data, buffer.nbytes):
            return None
        self._pinned.append(buffer.ctypes.data)
        return cuda_driver.seen_at(buffer.ctypes.data)

    def move(self, *payloads: U8) -> Tensor:
        """The payloads u8 [n] one after the other in a slot, for kernels that are asked for from
        now on; valid until the next but one is moved. What was moved before may be used by kernels
        asked for before this.
        """
        slot, copied = self.start(*payloads)
        self.await_copy(copied)
        return slot

    def start(self, *payloads: U8, ahead: bool = False) -> tuple[Tensor, Copied]:
        """As `move`, for kernels that are asked for after `await_copy`.

        ahead: what was moved before is yet to be used, by kernels that are asked for later; what
        lay in this slot is not.
        """
        sizes = [len(payload) for payload in payloads]
        slot = self._slots[self._turn][: sum(sizes)]
        pairs = list(zip(slot.split(sizes), map(torch.from_numpy, payloads), strict=True))
        used = None
        if self._on_gpu:
            slots = [self._turn if ahead else 1 - self._turn]
            if self._ahead and not ahead:
                slots = [0, 1]  # what was moved ahead has been used by now, or will not be
            for i in slots:
                self._used[i].record(torch.cuda.current_stream(self.device))
            used = self._used[self._turn]
        self._ahead = ahead
        copied = self._copy(pairs, after=used)
        self._turn = 1 - self._turn
        return slot, copied

    def put(self, payload: U8, into: Tensor) -> Copied:
        """payload u8 [n] to `into` in HBM, once the kernels that were asked for before have ended.
        Those that read it are asked for after `await_copy`."""
        asked = None
        if self._on_gpu:
            asked = torch.cuda.Event()
            asked.record(torch.cuda.current_stream(self.device))
        return self._copy([(into, torch.from_numpy(payload))], after=asked)

    def fetch(self, source: Tensor, into: U8) -> Copied:
        """What `put` brought, back to DRAM: u8 [n]. It may be overwritten by later copies only."""
        return self._copy([(torch.from_numpy(into), source)])

    def await_copy(self, copied: Copied) -> None:
        """Kernels asked for from now on find what was copied."""
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)

    @property
    def last(self) -> Copied:
        """The copy that was asked for last."""
        return self._last

    def arrived(self) -> None:
        """Wait until what was moved last has left its place in DRAM."""
        finished(self._last)

    def _copy(
        self, pairs: Sequence[tuple[Tensor, Tensor]], *, after: "torch.cuda.Event | None" = None
    ) -> Copied:
        """Each second to its first, when what is `after` has come."""
        self._stats.nbytes += sum(len(target) for target, _ in pairs)
        if not self._on_gpu:
            begin = time.perf_counter()
            for target, source in pairs:
                target.copy_(source)
            self._stats.busy_s += time.perf_counter() - begin
            return None
        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self._copies):
            if after is not None:
                self._copies.wait_event(after)
            begin_event.record(self._copies)
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            end_event.record(self._copies)
        self._timed_too(begin_event, end_event)
        self._last = end_event
        return end_event

    @contextmanager
    def crossed(self, nbytes: int) -> Iterator[None]:
        """Around asking for kernels that take so many bytes from DRAM themselves."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record(torch.cuda.current_stream(self.device))
        yield
        events[1].record(torch.cuda.current_stream(self.device))
        self._timed_too(events[0], events[1])
        self._stats.nbytes += nbytes

    def count(self, nbytes: int, seconds: float) -> None:
        """Bytes that crossed the link in another way."""
        self._stats.nbytes += nbytes
        self._stats.busy_s += seconds

    def speed(self, payload: U8) -> float:
        """Bytes per second of copying some of `payload`; what is in the slots is lost."""
        payload, before = payload[: len(self._slots[0])], self.stats
        for _ in range(_PROBES):
            self.move(payload)
        seconds = self.stats.busy_s - before.busy_s
        return _PROBES * len(payload) / seconds if seconds else 0.0

    @property
    def stats(self) -> LinkStats:
        if self._on_gpu:
            self._add_up(self._timed)
        return LinkStats(self._stats.nbytes, self._stats.busy_s)

    def reset_stats(self) -> None:
        if self._on_gpu:
            self._add_up(self._timed)
        self._stats = LinkStats()

    def close(self) -> None:
        """Before the buffers that were pinned are given back."""
        if self._on_gpu:
            torch.cuda.synchronize(self.device)
        for address in self._pinned:
            cuda_driver.unpin(address)
        self._pinned.clear()

    def _timed_too(self, begin: "torch.cuda.Event", end: "torch.cuda.Event") -> None:
        self._timed.append((begin, end))
        if len(self._timed) >= _TIMED:
            self._add_up(self._timed[: _TIMED // 2])

    def _add_up(self, first: "list[tuple[torch.cuda.Event, torch.cuda.Event]]") -> None:
        """Count the times of the first copies, which have ended or soon will have."""
        for begin, end in first:
            end.synchronize()
            self._stats.busy_s += begin.elapsed_time(end) / 1000
        del self._timed[: len(first)]
