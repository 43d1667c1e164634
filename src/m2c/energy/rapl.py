"""CPU packages and DRAM: RAPL's counters in sysfs.

They wrap, most systems show them to root only, and zones lie within zones. Knows nothing about
tokens or runs.
"""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from m2c.energy.sources import Absent, Found, Lost

POWERCAP: Final = Path("/sys/class/powercap")
_ZONE: Final = re.compile(r"intel-rapl[a-z-]*(:\d+)+")
_PACKAGE: Final = re.compile(r"package-\d+(-die-\d+)?")
# no package draws this much: a counter that says so was reset, e.g. by a suspend
_MOST_W: Final = 5000.0
_LEAST_S: Final = 1.0  # a counter may be updated late: no jump is judged over less than this


class Rapl:
    """Zones of one component, each a counter of microjoules that wraps."""

    period_s = 5.0  # wraps take a minute even at a kilowatt

    def __init__(
        self, component: str, zones: dict[str, Path], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """zones: name to the folder in sysfs. Raises OSError or ValueError when one cannot be
        read."""
        self.component = component
        self.how = f"RAPL counters: {', '.join(zones)}"
        self._clock = clock
        self._at = clock()
        self._zones = zones
        self._ranges = {name: _range_uj(zone) for name, zone in zones.items()}
        self._last = {name: _number(zone / "energy_uj") for name, zone in zones.items()}
        self._total_uj = 0

    def joules(self) -> float:
        now = self._clock()
        most_uj = 1e6 * _MOST_W * max(_LEAST_S, now - self._at)
        for name, zone in self._zones.items():
            try:
                value = _number(zone / "energy_uj")
            except (OSError, ValueError) as error:
                raise Lost(f"{zone}/energy_uj stopped answering ({_reason(error)})") from None
            gone = value - self._last[name]
            if gone < 0:
                gone += self._ranges[name]
            if not 0 <= gone <= most_uj:
                raise Lost(f"{zone}/energy_uj jumped: it was reset")
            self._last[name] = value
            self._total_uj += gone
        self._at = now
        return self._total_uj / 1e6

    def counters(self) -> dict[str, int]:
        return {f"{name} uJ": value for name, value in self._last.items()}


def rapl_sources(root: Path = POWERCAP) -> list[Found]:
    """CPU packages, and the DRAM beside them: what the packages' counters leave out.

    Zones within a package (core, uncore) are part of it, and `psys` holds packages: neither is
    added. A package that two drivers show counts once.
    """
    zones: dict[str, dict[str, Path]] = {"cpu": {}, "dram": {}}
    for zone in sorted(_zones(root), key=lambda path: ("mmio" in path.name, path.name)):
        name = _name(zone)
        parent = _name(root / zone.name.rpartition(":")[0])
        if _PACKAGE.fullmatch(name):
            zones["cpu"].setdefault(name, zone)
        elif name == "dram" and _PACKAGE.fullmatch(parent):
            zones["dram"].setdefault(f"{parent} dram", zone)
    return [_rapl(component, found, root) for component, found in zones.items()]


def _rapl(component: str, zones: dict[str, Path], root: Path) -> Found:
    if not zones:
        what = "package" if component == "cpu" else "DRAM"
        if not root.is_dir():
            return Absent(component, f"this system has no {root} (RAPL): a virtual machine?")
        return Absent(component, f"no RAPL counter of the {what} under {root}")
    try:
        return Rapl(component, zones)
    except PermissionError:
        return Absent(
            component, f"{next(iter(zones.values()))}/energy_uj may be read by root only",
            f"allow it until the next boot: sudo chmod a+r {root}/intel-rapl*/energy_uj",
        )  # fmt: skip
    except (OSError, ValueError) as error:
        return Absent(component, f"RAPL cannot be read ({_reason(error)})")


def _zones(root: Path) -> list[Path]:
    try:
        return [path for path in root.iterdir() if _ZONE.fullmatch(path.name)]
    except OSError:
        return []


def _name(zone: Path) -> str:
    try:
        return (zone / "name").read_text(errors="replace").strip()
    except OSError:
        return ""


def _range_uj(zone: Path) -> int:
    value = _number(zone / "max_energy_range_uj")
    if value <= 0:
        raise ValueError(f"{zone}/max_energy_range_uj says {value}")
    return value


def _number(path: Path) -> int:
    return int(path.read_text())


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
