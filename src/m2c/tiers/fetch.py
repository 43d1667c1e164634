"""Records and frames of one upgrade plane of one layer, from a DRAM prefix or from the SSD.

Neurons are stored in importance order, so the hottest ones are a prefix of the shard and pinning
them is one sequential read. Others are read on demand: whole checksum blocks, neighbours merged.
Knows nothing about which neurons a token wants, nor what the records mean.
"""

from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from m2c.bundle.planes import RecordLayout
from m2c.bundle.shard import BLOCK, PLANES, Section, ShardIndex, align
from m2c.kernels.dispatch import exact_weights
from m2c.kernels.rows import ExactFrames, ExactRows, PackedRows, Rows
from m2c.tiers.memory import aligned_buffer
from m2c.tiers.ssd import SsdReader

GAP_BLOCKS: Final = 1  # reading over a gap this small costs less than a second request

DECODE_WEIGHTS: Final = 1 << 19

# from rows with frames to their 16-bit weights [rows, vectors * length]
Decode = Callable[[PackedRows], torch.Tensor]
U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]


class PlaneSource:
    """Serves byte ranges of a section: from its pinned prefix, else by block reads.

    staging: page-aligned u8 shared by all sources of a store; it bounds the bytes of one fetch.
    """

    def __init__(self, reader: SsdReader, index: ShardIndex, section: Section, staging: U8) -> None:
        self._reader = reader
        self._index = index
        self._section = section
        self._staging = staging
        self._prefix: U8 = np.empty(0, np.uint8)
        self._offsets = _range_offsets(index, section)

    @property
    def frame_records(self) -> int:
        return self._section.frame_records

    @property
    def prefix_records(self) -> int:
        """Ranges that lie in DRAM whole."""
        return int(np.searchsorted(self._offsets[1:], len(self._prefix), side="right"))

    @property
    def whole(self) -> torch.Tensor | None:
        """All fixed-size records [records, nbytes] u8, if the prefix holds them all."""
        if self.prefix_records < self._section.records:
            return None
        return torch.from_numpy(self._prefix).view(self._section.records, -1)

    @property
    def prefix_nbytes(self) -> int:
        return len(self._prefix)

    @property
    def prefix(self) -> U8:
        """The ranges that lie in DRAM, one after the other."""
        return self._prefix

    def pin_prefix(self, records: int) -> None:
        """Read the first `records` ranges into DRAM, verified."""
        if not records:
            return
        nbytes = int(self._offsets[min(records, len(self._offsets) - 1)])
        blocks = -(-(self._section.offset + nbytes) // BLOCK)
        buffer = aligned_buffer(blocks * BLOCK)
        self._reader.read(self._index, [(0, blocks)], buffer).wait()
        self._prefix = buffer[self._section.offset : self._section.offset + nbytes]

    def records(self, ids: npt.NDArray[np.int32]) -> tuple[U8, int]:
        """Fixed-size records `ids` (ascending) as [n, nbytes] u8, and how many came from DRAM."""
        nbytes = int(self._offsets[1])
        cut = int(np.searchsorted(ids, self.prefix_records))
        out = np.empty((len(ids), nbytes), np.uint8)
        if cut:
            np.take(self._prefix.reshape(-1, nbytes), ids[:cut], axis=0, out=out[:cut])
        for part, positions in self._read_ranges(ids[cut:]):
            windows = np.lib.stride_tricks.sliding_window_view(self._staging, nbytes)
            out[cut + part.start : cut + part.stop] = windows[positions]
        return out, cut

    def frames_of(
        self, ids: npt.NDArray[np.int32]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], I64]:
        """The frames that hold records `ids`, all records in them, and where `ids` are in those."""
        per = self._section.frame_records
        frames = np.unique(ids // np.int32(per))
        every = frames[:, None] * np.int32(per) + np.arange(per, dtype=np.int32)
        members = every[every < self._section.records].astype(np.int32)
        return frames, members, np.searchsorted(members, ids).astype(np.int64)

    def exact_frames(self, ids: npt.NDArray[np.int32], exact_type: str) -> tuple[ExactFrames, int]:
        """Frames `ids` (ascending) ready to decode, and how many came from DRAM."""
        data, from_dram = self._frame_bytes(ids)
        name = self._section.name
        nbytes, escapes = self._index.frame_nbytes[name][ids], self._index.frame_escapes[name][ids]
        per = self._section.frame_records
        return ExactFrames(torch.from_numpy(data), nbytes, escapes, per, exact_type), from_dram

    def _frame_bytes(self, ids: npt.NDArray[np.int32]) -> tuple[U8, int]:
        sizes = np.diff(self._offsets)[ids]
        cut = int(np.searchsorted(ids, self.prefix_records))
        parts = [_gather(self._prefix, self._offsets[ids[:cut]], sizes[:cut])]
        for part, positions in self._read_ranges(ids[cut:]):
            parts.append(_gather(self._staging, positions, sizes[cut:][part]))
        return np.concatenate(parts), cut

    def _read_ranges(self, ids: npt.NDArray[np.int32]) -> Iterator[tuple[slice, I64]]:
        """Yield (slice of ids, byte position of each in staging), as much as staging holds."""
        start = 0
        while start < len(ids):
            begin = self._section.offset + self._offsets[ids[start:]]
            end = self._section.offset + self._offsets[ids[start:] + 1]
            runs, positions, taken = plan_runs(begin, end, len(self._staging))
            self._reader.read_now(self._index, runs, self._staging)
            yield slice(start, start + taken), positions
            start += taken


def plan_runs(begin: I64, end: I64, capacity: int) -> tuple[list[tuple[int, int]], I64, int]:
    """Cover ascending byte ranges [begin, end) with runs of blocks of at most `capacity` bytes.

    Returns the runs [(first block, stop block)], the position of each covered range in the runs
    laid end to end, and how many ranges are covered (at least one, whatever the capacity).
    """
    first, stop = begin // BLOCK, -(-end // BLOCK)
    opens = np.ones(len(begin), np.bool_)
    opens[1:] = first[1:] > stop[:-1] + GAP_BLOCKS
    # a range may start inside the run before it: its own first block is then already covered
    heads = np.flatnonzero(opens)
    run_of = np.cumsum(opens) - 1
    run_start = first[heads]
    # blocks laid down before each run, and up to the end of each range
    tails = np.append(heads[1:], len(begin)) - 1
    lengths = stop[tails] - run_start
    laid = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    used = (laid[run_of] + stop - run_start[run_of]) * BLOCK
    taken = max(1, int(np.searchsorted(used, capacity, side="right")))
    positions = (laid[run_of[:taken]] - run_start[run_of[:taken]]) * BLOCK + begin[:taken]
    last = int(run_of[taken - 1])
    runs = [(int(a), int(a + n)) for a, n in zip(run_start[:last], lengths[:last], strict=True)]
    runs.append((int(run_start[last]), int(stop[taken - 1])))
    return runs, positions, taken


def staging_nbytes(largest_range: int) -> int:
    """Bytes a staging buffer must have so that any single range fits, whatever its alignment."""
    return align(largest_range, BLOCK) + BLOCK


def _range_offsets(index: ShardIndex, section: Section) -> I64:
    """Byte offsets [ranges + 1] of a section's records, or of its frames in the exact plane."""
    if section.frames:
        sizes = index.frame_nbytes[section.name].astype(np.int64)
        return np.concatenate((np.zeros(1, np.int64), np.cumsum(sizes)))
    nbytes = section.layout.nbytes(index.header.plane)
    return np.arange(section.records + 1, dtype=np.int64) * nbytes


def _gather(source: U8, positions: I64, sizes: I64) -> U8:
    """Ranges of `source` joined: one vectorised gather, no loop over ranges."""
    if not len(positions):
        return np.empty(0, np.uint8)
    starts = np.cumsum(sizes) - sizes
    where = np.arange(int(sizes.sum())) + np.repeat(positions - starts, sizes)
    return source[where]


class RowSource:
    """Rows of one section at any precision, fetched on demand: one PlaneSource per plane."""

    def __init__(
        self, planes: list[PlaneSource], section: Section, exact_type: str,
        decode: Decode = exact_weights,
    ) -> None:  # fmt: skip
        self._planes = planes
        self._section = section
        self._exact_type = exact_type
        self._decode = decode

    def rows(self, ids: npt.NDArray[np.int32]) -> Rows:
        """Rows `ids` (ascending), on the host; 16-bit rows when the exact plane is among them."""
        if len(self._planes) == len(PLANES):
            return ExactRows(self._section.layout, self._exact(ids))
        int4, *int8 = [torch.from_numpy(plane.records(ids)[0]) for plane in self._planes]
        return PackedRows(self._section.layout, int4, int8[0] if int8 else None)

    def _exact(self, ids: npt.NDArray[np.int32]) -> torch.Tensor:
        int4, int8, exact = self._planes
        frames, members, wanted = exact.frames_of(ids)
        return decode_rows(
            self._section.layout, int4.records(members)[0], int8.records(members)[0],
            exact.exact_frames(frames, self._exact_type)[0], wanted, self._decode,
        )  # fmt: skip


def rows_at_once(
    layout: RecordLayout, frame_records: int = 1, weights: int = DECODE_WEIGHTS
) -> int:
    """Rows, whole frames of them, that have about so many weights. What is decoded at a time is
    bounded by DECODE_WEIGHTS: the temporary values take about 40 B a weight."""
    per_frame = frame_records * layout.vectors * layout.length
    return max(1, weights // per_frame) * frame_records


def decode_rows(
    layout: RecordLayout, int4: U8, int8: U8, frames: ExactFrames, wanted: I64,
    decode: Decode = exact_weights,
) -> torch.Tensor:  # fmt: skip
    """The rows at positions `wanted` of the frames' members: [wanted, vectors * length] 16-bit."""
    packed = PackedRows(layout, torch.from_numpy(int4), torch.from_numpy(int8), frames)
    return decode(packed)[torch.from_numpy(wanted)]
