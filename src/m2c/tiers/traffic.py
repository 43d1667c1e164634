"""What moved between the tiers while somebody counted. Knows nothing about what moves it."""

from dataclasses import dataclass, field

from m2c.tiers.ssd import LinkStats
from m2c.tiers.upgrades import HitStats


@dataclass
class StoreStats:
    """A snapshot of the traffic since the last reset. `upgrades`: plane to who served it."""

    ssd: LinkStats
    link: LinkStats  # DRAM to HBM
    upgrades: dict[str, HitStats] = field(default_factory=dict)

    def add(self, other: "StoreStats") -> None:
        """Count the other's traffic too."""
        for mine, its in ((self.ssd, other.ssd), (self.link, other.link)):
            mine.nbytes += its.nbytes
            mine.busy_s += its.busy_s
        for plane, hits in other.upgrades.items():
            self.upgrades.setdefault(plane, HitStats()).add(hits)
