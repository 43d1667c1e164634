"""Records in DRAM that kernels of a GPU take themselves.

Nobody puts together first what a token chose. Knows nothing about which records there are, or what
they mean.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from m2c.tiers.link import Link

Ids = npt.NDArray[np.int32]
U8 = npt.NDArray[np.uint8]
# `GpuKernels.gather`: from an address, which records, into which rows of a tensor, or in order
Gather = Callable[[int, Tensor, Tensor, Tensor | None], None]


def seen_records(link: Link, gather: Gather | None, records: U8) -> "SeenRecords | None":
    """records: [n * record] u8, which stay where they are. None where kernels do not see them."""
    if gather is None or not records.size:
        return None
    at = link.pin(records)
    return None if at is None else SeenRecords(link, gather, at)


class SeenRecords:
    """at: where kernels find the first."""

    def __init__(self, link: Link, gather: Gather, at: int) -> None:
        self._link, self._gather, self._at = link, gather, at

    def take(self, ids: Ids, into: Tensor, slots: Ids | None = None) -> None:
        """Records `ids` into the rows `slots` of `into` [any, record] u8 in HBM, or in order."""
        there = torch.from_numpy(ids).to(into.device)
        rows = None if slots is None else torch.from_numpy(slots).to(into.device)
        with self._link.crossed(len(ids) * into.shape[1]):
            self._gather(self._at, there, into, rows)
