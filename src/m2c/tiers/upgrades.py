"""Upgrade planes: a layer's neurons above the floor, fetched for the tokens that need them.

One `UpgradePlane` serves one plane of one layer: from its slab in the compute tier, else from the
DRAM prefix, else from the SSD. Which slot holds which neuron is the NeuronCache's business; which
neurons are wanted is the model's.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from m2c.kernels.rows import EXACT_DTYPES, PackedRows
from m2c.tiers.cache import ABSENT, NeuronCache
from m2c.tiers.fetch import Decode, PlaneSource, decode_rows, rows_at_once
from m2c.tiers.seen import SeenRecords

_PIECE_NBYTES: Final = 8 << 20  # loaded at a time

Ids = npt.NDArray[np.int32]


@dataclass
class HitStats:
    """Neurons served by each tier."""

    compute: int = 0
    dram: int = 0
    ssd: int = 0

    @property
    def total(self) -> int:
        return self.compute + self.dram + self.ssd

    def add(self, other: "HitStats") -> None:
        self.compute += other.compute
        self.dram += other.dram
        self.ssd += other.ssd


class UpgradePlane:
    """slab: [slots, record] on the compute device, or None when the plane has no slots there.

    below: sources of the planes under this one that the floor does not hold. `copied` is told the
    bytes that cross into the compute tier. decode: from rows with frames to 16-bit weights. seen:
    what of the INT8 plane lies in DRAM, where kernels can take it themselves.
    """

    def __init__(
        self, source: PlaneSource, below: PlaneSource | None, *, exact_type: str | None,
        slab: Tensor | None, neurons: int, policy: str, device: torch.device,
        copied: Callable[[int, float], None], decode: Decode, seen: SeenRecords | None = None,
    ) -> None:  # fmt: skip
        self.source = source
        self._seen = seen
        self.stats = HitStats()
        self._below = below
        self._exact_type = exact_type
        self._slab = slab
        self._device = device
        self._copied = copied
        self._decode = decode
        self._whole: Tensor | None = None
        self.last_served = 0
        self.cache: NeuronCache | None = None
        if slab is not None:
            self.cache = NeuronCache(neurons, slab.shape[0], policy=policy)
        self._static = policy == "pinned"

    @property
    def whole(self) -> Tensor | None:
        """The INT8 plane of all neurons, [neurons, record] u8, if it lies where kernels compute."""
        if self._whole is not None or self._exact_type is not None or self.cache is not None:
            return self._whole
        return self.source.whole if self._device.type == "cpu" else None

    def load_whole(self) -> int:
        """Fill a slab that has a slot for every neuron of the INT8 plane, so that nothing has to be
        looked up; the bytes loaded."""
        assert self._slab is not None
        assert self._exact_type is None
        step = max(1, _PIECE_NBYTES // self._slab.shape[1])
        for start in range(0, len(self._slab), step):
            ids = np.arange(start, min(start + step, len(self._slab)), dtype=np.int32)
            self._slab[start : start + step] = torch.from_numpy(self.source.records(ids)[0])
        self._whole, self.cache = self._slab, None
        return self._slab.nbytes

    def served(self, count: int) -> None:
        """Count neurons that were taken from `whole`."""
        self.last_served = count
        if self._whole is not None:
            self.stats.compute += count
        else:
            self.stats.dram += count

    def records(self, ids: Ids, floor: PackedRows, *, step: bool) -> Tensor:
        """Records of `ids` (ascending) on the compute device: [len(ids), record].

        step: these are one token's active set, so the cache may replace what it holds. Otherwise
        (a batch of tokens, whose sets together are nearly everything) the cache is only read.
        """
        if self.cache is None or self._slab is None:
            return self._load(ids, floor)
        try:
            slots = self._slots(self.cache, ids, floor, step)
        except BaseException:
            self.cache.clear()  # a slot may not hold what the cache says it does
            raise
        absent = np.flatnonzero(slots == ABSENT)
        if not len(absent):
            return self._slab[self._index(slots)]
        held = np.flatnonzero(slots != ABSENT)
        shape = (len(ids), self._slab.shape[1])
        out = torch.empty(shape, dtype=self._slab.dtype, device=self._device)
        out[self._index(held)] = self._slab[self._index(slots[held])]
        out[self._index(absent)] = self._load(ids[absent], floor)
        return out

    def _slots(self, cache: NeuronCache, ids: Ids, floor: PackedRows, step: bool) -> Ids:
        """The slot of each id, ABSENT where it has none; the slots are filled."""
        if self._static and not cache.size:
            hottest = cache.pin(np.arange(cache.capacity, dtype=np.int32))
            self._fill(hottest.load_ids, hottest.load_slots, floor)
        if not step:
            slots = cache.lookup(ids)
            self.stats.compute += int((slots != ABSENT).sum())
            return slots
        move = cache.step(ids)
        self.stats.compute += int(move.hit_mask.sum())
        self._fill(move.load_ids, move.load_slots, floor)
        return move.slots

    def _fill(self, ids: Ids, slots: Ids, floor: PackedRows) -> None:
        """Load `ids` into their slots, a piece at a time: at first use that is the whole slab."""
        assert self._slab is not None
        if (cut := self._seen_of(ids)) and self._seen is not None:
            self._seen.take(ids[:cut], self._slab, slots[:cut])
            self.stats.dram += cut
            ids, slots = ids[cut:], slots[cut:]
        step = rows_at_once(floor.layout)
        for start in range(0, len(ids), step):
            part = slice(start, start + step)
            self._slab[self._index(slots[part])] = self._load_piece(ids[part], floor)

    def _load(self, ids: Ids, floor: PackedRows) -> Tensor:
        """Records from DRAM or SSD, decoded to 16 bits if this is the exact plane."""
        if (cut := self._seen_of(ids)) and self._seen is not None:
            shape = (len(ids), floor.layout.nbytes("int8"))
            out = torch.empty(shape, dtype=torch.uint8, device=self._device)
            self._seen.take(ids[:cut], out)
            self.stats.dram += cut
            if cut < len(ids):
                out[cut:] = self._load_piece(ids[cut:], floor)
            return out
        step = rows_at_once(floor.layout)
        if len(ids) <= step or self._exact_type is None:
            return self._load_piece(ids, floor)
        width = floor.layout.vectors * floor.layout.length
        dtype = EXACT_DTYPES[self._exact_type]
        out = torch.empty((len(ids), width), dtype=dtype, device=self._device)
        for start in range(0, len(ids), step):
            out[start : start + step] = self._load_piece(ids[start : start + step], floor)
        return out

    def _seen_of(self, ids: Ids) -> int:
        """How many of `ids`, the first, kernels can take themselves."""
        return 0 if self._seen is None else int(np.searchsorted(ids, self.source.prefix_records))

    def _load_piece(self, ids: Ids, floor: PackedRows) -> Tensor:
        if self._exact_type is None:
            raw, from_dram = self.source.records(ids)
            records, served = torch.from_numpy(raw), len(ids)
        else:
            frames, members, wanted = self.source.frames_of(ids)
            data, from_dram = self.source.exact_frames(frames, self._exact_type)
            served = len(frames)
            int4, int8 = self._lower(members, floor)
            records = decode_rows(floor.layout, int4, int8, data, wanted, self._decode)
        self.stats.dram += from_dram
        self.stats.ssd += served - from_dram
        begin = time.perf_counter()
        moved = records.to(self._device)
        self._copied(records.numel() * records.element_size(), time.perf_counter() - begin)
        return moved

    def _lower(
        self, ids: Ids, floor: PackedRows
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        index = torch.from_numpy(ids.astype(np.int64)).to(floor.int4.device)
        int4 = floor.int4[index].cpu().numpy()
        if floor.int8 is not None:
            return int4, floor.int8[index].cpu().numpy()
        assert self._below is not None
        return int4, self._below.records(ids)[0]

    def _index(self, values: npt.NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self._device)
