"""GPUs: NVML's energy counter, or its power where a card has no counter.

Knows nothing about tokens or runs.
"""

import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from m2c.energy.sources import Absent, Found, Lost

NVIDIA: Final = Path("/proc/driver/nvidia")


class GpuCounter:
    """Volta and newer: millijoules since the driver was loaded."""

    period_s = 60.0

    def __init__(self, nvml: Any, cards: dict[str, Any]) -> None:
        self.component = "gpu"
        self.how = f"NVML's energy counter: {', '.join(cards)}"
        self._nvml, self._cards = nvml, cards
        self._first = self._last = self._read()

    def joules(self) -> float:
        now = self._read()
        if any(now[name] < self._last[name] for name in now):
            raise Lost("NVML's energy counter went back: the driver was loaded anew")
        self._last = now
        return sum(now[name] - self._first[name] for name in now) / 1e3

    def counters(self) -> dict[str, int]:
        return {f"{name} mJ": value for name, value in self._last.items()}

    def _read(self) -> dict[str, int]:
        read = self._nvml.nvmlDeviceGetTotalEnergyConsumption
        return _ask(self._nvml, lambda: {n: int(read(card)) for n, card in self._cards.items()})


class GpuPower:
    """Cards without a counter: samples of their power, joined by straight lines."""

    period_s = 0.1

    def __init__(
        self, nvml: Any, cards: dict[str, Any], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.component = "gpu"
        self.how = f"NVML's power, sampled ten times a second: {', '.join(cards)}"
        self._nvml, self._cards, self._clock = nvml, cards, clock
        self._total = 0.0
        self._at, self._milliwatts = clock(), self._read()

    def joules(self) -> float:
        now, found = self._clock(), self._read()
        mean_w = (sum(found.values()) + sum(self._milliwatts.values())) / 2e3
        self._total += mean_w * (now - self._at)
        self._at, self._milliwatts = now, found
        return self._total

    def counters(self) -> dict[str, int]:
        return {f"{name} mW": value for name, value in self._milliwatts.items()}

    def _read(self) -> dict[str, int]:
        read = self._nvml.nvmlDeviceGetPowerUsage
        return _ask(self._nvml, lambda: {n: int(read(card)) for n, card in self._cards.items()})


def gpu_source(nvml: Any = None, driver: Path = NVIDIA) -> Found:
    """All cards that NVML sees. nvml: the module, for tests."""
    if nvml is None:
        if not driver.exists():
            return Absent("gpu", "no NVIDIA driver on this system")
        try:
            nvml = import_module("pynvml")
        except ImportError:
            hint = "install it: pip install 'm2cache[energy]'"
            return Absent("gpu", "the package nvidia-ml-py is not installed", hint)
    try:
        _ask(nvml, nvml.nvmlInit)
        cards = _ask(nvml, lambda: _cards(nvml))
    except Lost as error:
        return Absent("gpu", str(error))
    if not cards:
        return Absent("gpu", "NVML sees no GPU")
    try:
        return GpuCounter(nvml, cards)
    except Lost:  # Maxwell and Pascal have no counter
        try:
            return GpuPower(nvml, cards)
        except Lost as error:
            return Absent("gpu", f"neither energy nor power can be read: {error}")


def _cards(nvml: Any) -> dict[str, Any]:
    found = {}
    for i in range(nvml.nvmlDeviceGetCount()):
        card = nvml.nvmlDeviceGetHandleByIndex(i)
        name = nvml.nvmlDeviceGetName(card)
        found[f"GPU {i} {name.decode() if isinstance(name, bytes) else name}"] = card
    return found


def _ask(nvml: Any, question: Callable[[], Any]) -> Any:
    try:
        return question()
    except nvml.NVMLError as error:
        raise Lost(f"NVML: {error}") from None
