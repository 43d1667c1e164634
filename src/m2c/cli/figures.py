"""The speeds that predictions count with: given, remembered, measured now, or assumed.

Each is found when it is first needed, and says where it is from.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Final

from m2c.bundle.bundle import Bundle
from m2c.disk import device_of, disk_profile, remembered
from m2c.errors import M2CError, UsageError
from m2c.hardware import ASSUMED_SSD, Figure, auto_threads, probe_dram
from m2c.home import home
from m2c.predict import Speeds
from m2c.tiers.plan import Plan
from m2c.units import parse_size

_ASSUMED: Final = {"ssd": ASSUMED_SSD, "link": 12e9, "dram": 20e9, "hbm": 300e9}
_WORDS: Final = {"ssd": "SSD", "link": "DRAM to HBM", "dram": "DRAM", "hbm": "HBM"}


class Figures:
    """Speeds by the keys of _ASSUMED; `used`: those that were asked for so far."""

    def __init__(
        self, given: dict[str, str | None], bundle: Bundle | None, ssd: Path | None
    ) -> None:
        """bundle: on the disk that counts, else the folder `ssd`. Raises UsageError for what is
        no speed."""
        self._given = {key: parse_size(text) for key, text in given.items() if text is not None}
        if 0 in self._given.values():
            raise UsageError("a speed of 0 bounds nothing", "write it like 2GB")
        self._bundle, self._ssd = bundle, ssd
        self.used: dict[str, Figure] = {}

    def speeds(self, plan: Plan) -> Speeds:
        """What a plan needs of them; 0 for what it does not."""
        ssd = self._get("ssd", self._find_ssd) if plan.ssd_nbytes_per_token else 0.0
        if not plan.budget.hbm:
            return Speeds(ssd, 0.0, self._get("dram", _find_dram))
        return Speeds(ssd, self._get("link"), self._get("hbm"))

    def words(self) -> str:
        """`SSD 1.9 GB/s remembered, DRAM 14 GB/s measured`."""
        return ", ".join(
            f"{_WORDS[key]} {figure.bytes_per_s / 1e9:.3g} GB/s {figure.source}"
            for key, figure in self.used.items()
        )

    def _get(self, key: str, find: Callable[[], Figure | None] = lambda: None) -> float:
        if key not in self.used:
            given = Figure(self._given[key], "given") if key in self._given else find()
            self.used[key] = given or Figure(_ASSUMED[key], "assumed")
        return self.used[key].bytes_per_s

    def _find_ssd(self) -> Figure | None:
        try:
            place = self._bundle.path if self._bundle else self._ssd or home()
            known = remembered(device_of(place))
        except (M2CError, RuntimeError):  # no such folder yet, or nobody's home
            return None
        if known is not None:
            return Figure(known.bytes_per_s, "remembered")
        found = disk_profile(self._bundle).bytes_per_s if self._bundle else 0.0
        return Figure(found, "measured") if found else None


def _find_dram() -> Figure:
    return Figure(probe_dram(auto_threads()), "measured")
