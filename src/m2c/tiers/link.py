"""The link: copies of streamed weights from DRAM into HBM, under way while a GPU computes.

Two slots take turns: kernels read one while the next copy fills the other. Without a GPU the slots
are host memory and a copy is over when `move` returns. Knows nothing about what is copied.
"""

import time
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


class Link:
    """nbytes: of both slots together."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self._device = device
        self._slots = [torch.empty(nbytes // 2, dtype=torch.uint8, device=device) for _ in range(2)]
        self._turn = 0
        self._pinned: list[int] = []
        self._stats = LinkStats()
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

    def pin(self, buffer: U8) -> None:
        """Tell the driver that `buffer` stays where it is: copies from it need no help of a CPU.

        Where it cannot be, copies are slower and still right.
        """
        if self._on_gpu and cuda_driver.pin(buffer.ctypes.data, buffer.nbytes):
            self._pinned.append(buffer.ctypes.data)

    def move(self, *payloads: U8) -> Tensor:
        """The payloads u8 [n] one after the other in a slot, for kernels that are asked for from
        now on; valid until the next but one is moved. What was moved before may be used by kernels
        asked for before this.
        """
        sizes = [len(payload) for payload in payloads]
        slot = self._slots[self._turn][: sum(sizes)]
        pairs = list(zip(slot.split(sizes), map(torch.from_numpy, payloads), strict=True))
        if not self._on_gpu:
            begin = time.perf_counter()
            for part, source in pairs:
                part.copy_(source)
            self._stats.busy_s += time.perf_counter() - begin
        else:
            computes = torch.cuda.current_stream(self._device)
            self._used[1 - self._turn].record(computes)
            begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.stream(self._copies):
                self._copies.wait_event(self._used[self._turn])
                begin_event.record(self._copies)
                for part, source in pairs:
                    part.copy_(source, non_blocking=True)
                end_event.record(self._copies)
            computes.wait_event(end_event)
            self._timed.append((begin_event, end_event))
            if len(self._timed) >= _TIMED:
                self._add_up(self._timed[: _TIMED // 2])
        self._stats.nbytes += len(slot)
        self._turn = 1 - self._turn
        return slot

    def arrived(self) -> None:
        """Wait until what was moved last has left its place in DRAM."""
        if self._on_gpu and self._timed:
            self._timed[-1][1].synchronize()

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
            torch.cuda.synchronize(self._device)
        for address in self._pinned:
            cuda_driver.unpin(address)
        self._pinned.clear()

    def _add_up(self, first: "list[tuple[torch.cuda.Event, torch.cuda.Event]]") -> None:
        """Count the times of the first copies, which have ended or soon will have."""
        for begin, end in first:
            end.synchronize()
            self._stats.busy_s += begin.elapsed_time(end) / 1000
        del self._timed[: len(first)]
