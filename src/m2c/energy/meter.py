"""The meter: what the machine's counters say over the phases of a run.

A thread reads the counters often enough that none wraps unseen. It is the energy of the whole
machine, whoever used it: nothing is subtracted, and no share of a process is claimed. Knows nothing
about text or carbon.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from m2c.energy.nvml import gpu_source
from m2c.energy.rapl import rapl_sources
from m2c.energy.sources import Absent, Found, Lost, Source

COMPONENTS: Final = ("cpu", "dram", "gpu", "ssd")
IDLE_S: Final = 1.0
# Samsung's specification of the 970 EVO Plus (1 TB); other NVMe drives: 3 to 9 W
SSD_W: Final = 5.5
SSD_HOW: Final = (
    f"{SSD_W} W while at least one read is under way (specification of a Samsung 970 EVO Plus "
    "1 TB; other NVMe drives: 3 to 9 W)"
)


@dataclass(frozen=True)
class Lap:
    """A stretch of time. joules: of the components that were read at both of its ends."""

    name: str
    seconds: float
    joules: dict[str, float]
    start: dict[str, int]  # raw counters, by name
    end: dict[str, int]


class Meter:
    """Use as a context manager; the first lap begins when it is entered."""

    def __init__(self, found: Sequence[Found] | None = None) -> None:
        """found: what there is to read, for tests."""
        known = [*rapl_sources(), gpu_source()] if found is None else found
        self.absent = {part.component: part for part in known if isinstance(part, Absent)}
        self._sources = {s.component: s for s in known if not isinstance(s, Absent)}
        self._how = {name: source.how for name, source in self._sources.items()}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="m2c-energy", daemon=True)
        self._begin = time.perf_counter()
        self._totals: dict[str, float] = {}
        self._counters: dict[str, int] = {}

    def __enter__(self) -> "Meter":
        self.lap("")
        if self._sources:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def measures(self) -> bool:
        """Whether there is anything to read."""
        return bool(self._sources)

    def how(self, component: str) -> str:
        """How a component is, or was, measured."""
        return self._how[component]

    def lap(self, name: str) -> Lap:
        """End the lap, and begin the next."""
        with self._lock:
            before, counters, begin = self._totals, self._counters, self._begin
            self._totals = self._read()
            self._begin = time.perf_counter()
            self._counters = {
                key: value
                for source in self._sources.values() for key, value in source.counters().items()
            }  # fmt: skip
            gone = {
                part: now - before[part] for part, now in self._totals.items() if part in before
            }
            return Lap(name, self._begin - begin, gone, counters, self._counters)

    def idle(self, seconds: float) -> Lap:
        """Wait, and say what the machine took meanwhile."""
        self.lap("")
        self._closed.wait(seconds)
        return self.lap("idle")

    def _read(self) -> dict[str, float]:
        """Joules of every source; one that is lost stays lost, and its component is absent."""
        totals = {}
        for name, source in list(self._sources.items()):
            try:
                totals[name] = source.joules()
            except Lost as error:
                del self._sources[name]
                self.absent[name] = Absent(name, str(error))
        return totals

    def _watch(self) -> None:
        while sources := self._alive():
            if self._closed.wait(min(source.period_s for source in sources)):
                return
            with self._lock:
                self._read()

    def _alive(self) -> list[Source]:
        with self._lock:
            return list(self._sources.values())


def ssd_joules(busy_s: float) -> float:
    """An estimate: SSD_HOW."""
    return SSD_W * busy_s
