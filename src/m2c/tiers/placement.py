"""Which blocks stay in a tier, and the ring that the others pass through.

Knows only sizes.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from m2c.errors import DoesNotFit
from m2c.tiers.facts import Footprint
from m2c.units import format_size


@dataclass(frozen=True)
class Tier:
    capacity: int
    fixed: int  # bytes already spoken for
    flag: str
    raw: bool  # blocks lie here as stored, not as the kernels want them


@dataclass(frozen=True)
class Placement:
    resident: tuple[int, ...]
    streamed: tuple[int, ...]
    ring_nbytes: int
    nbytes: int  # resident blocks and ring


def place(f: Footprint, tier: Tier, depth: int, order: list[int]) -> Placement:
    """The most blocks, in `order`, that can be resident beside the ring the others need.

    The ring shrinks as blocks become resident, so every number of resident blocks is tried.
    Raises DoesNotFit naming the smallest capacity that works.
    """
    sizes = np.array([block.streamed_nbytes for block in f.blocks], np.int64)
    kept = [f.blocks[i].streamed_nbytes if tier.raw else f.blocks[i].resident_nbytes for i in order]
    used = np.concatenate(([0], np.cumsum(np.array(kept, np.int64))))
    positions = np.array(order, np.int64)

    def ring_nbytes(count: int) -> int:
        streams = np.zeros(len(sizes), np.bool_)
        streams[positions[count:]] = True
        return _ring_nbytes(sizes[streams], depth)

    for count in np.flatnonzero(tier.fixed + used <= tier.capacity)[::-1].tolist():
        ring = ring_nbytes(count)
        nbytes = int(used[count]) + ring
        if tier.fixed + nbytes <= tier.capacity:
            resident, streamed = sorted(order[:count]), sorted(order[count:])
            return Placement(tuple(resident), tuple(streamed), ring, nbytes)
    smallest = ring_nbytes(0)
    # with more in memory than that, no ring is small enough
    for count in np.flatnonzero(used < smallest).tolist():
        smallest = min(smallest, int(used[count]) + ring_nbytes(count))
    raise too_small(tier.flag, tier.capacity, tier.fixed + smallest)


def _ring_nbytes(sizes: npt.NDArray[np.int64], depth: int) -> int:
    """Room for any block and the `depth` blocks after it, over and over; at most for all."""
    total = int(sizes.sum())
    if len(sizes) <= depth + 1:
        return total
    around = np.concatenate(([0], np.cumsum(np.concatenate((sizes, sizes[:depth])))))
    return min(total, int((around[depth + 1 :] - around[: -depth - 1]).max()))


def too_small(flag: str, given: int, smallest: int) -> DoesNotFit:
    # rounded up to what can be typed; the printed figure must work
    shown = -(-smallest // (1 << 20))
    return DoesNotFit(
        f"{flag} {format_size(given)} is too small for this model",
        f"the smallest that works is {flag} {shown}MiB (a shorter --ctx-size needs less)",
        smallest,
    )
