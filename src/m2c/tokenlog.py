"""What each token of a generation took: seconds, bytes over the links, hits by tier.

Told by `stream_generate`; one snapshot of the store's counters a token. Knows nothing about text.
"""

from itertools import pairwise
from typing import Any

from m2c.tiers.store import NeuronStore
from m2c.tiers.traffic import StoreStats


class TokenLog:
    """Call it with the seconds of each token as it comes; the first took the prompt."""

    def __init__(self, store: NeuronStore) -> None:
        self._store = store
        self._seconds: list[float] = []
        self._stats: list[StoreStats] = []

    def __call__(self, seconds: float) -> None:
        self._seconds.append(seconds)
        self._stats.append(self._store.stats)

    def facts(self) -> dict[str, Any]:
        """Lists with an entry per decoded token. The prompt's token is where counting began."""
        planes = self._stats[0].upgrades if self._stats else {}
        return {
            "seconds": self._seconds[1:],
            "ssd_nbytes": _steps([stats.ssd.nbytes for stats in self._stats]),
            "link_nbytes": _steps([stats.link.nbytes for stats in self._stats]),
            "upgrades": {
                plane: {
                    "hbm_or_cache": _steps([s.upgrades[plane].compute for s in self._stats]),
                    "dram": _steps([s.upgrades[plane].dram for s in self._stats]),
                    "ssd": _steps([s.upgrades[plane].ssd for s in self._stats]),
                }
                for plane in planes
            },
        }  # fmt: skip


def _steps(totals: list[int]) -> list[int]:
    return [after - before for before, after in pairwise(totals)]
