"""Blocks: weights that every token uses, from shard payloads to kernel operands.

A block is one layer's attention, some neurons of one layer's FFN floor, or rows of the head, at one
precision. It knows which bytes of which shards it needs and how they become rows; not where in
memory they lie.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from m2c.bundle.bundle import Bundle
from m2c.bundle.shard import BLOCK, PLANES, Section, ShardIndex
from m2c.errors import BadInput
from m2c.kernels.rows import ExactFrames, PackedRows, Rows
from m2c.tiers.ssd import Pending, SsdReader

U8 = npt.NDArray[np.uint8]


def planes_of(precision: str) -> tuple[str, ...]:
    """The planes that together give `precision`: they are nested."""
    return PLANES[: PLANES.index(precision) + 1]


@dataclass(frozen=True)
class Precisions:
    """What the plan was made for: of the matrices outside the FFN, and of the FFN's floor, or of
    experts the highest that any of them may need."""

    dense: str
    floor: str
    drafts: bool = False  # the INT4 planes lie in memory, to draft with
    stored: bool = False  # exact blocks stay as stored


@dataclass(frozen=True)
class _Span:
    """What a block reads of one shard: whole checksum blocks [first, stop)."""

    first: int
    stop: int
    nbytes: int
    shift: int  # bytes before the first record


@dataclass(frozen=True)
class Block:
    """All records of its shards, or records [start, end) of one section."""

    shards: tuple[ShardIndex, ...]  # one per plane, lowest first
    exact_type: str
    start: int = 0
    end: int | None = None
    only: str | None = None  # which section; None: all, or the only one
    held: int = 0  # lowest planes that lie in memory anyway, for drafting: not read
    stored: bool = False  # kept as stored even if exact: decoded where it is used

    @property
    def is_exact(self) -> bool:
        return len(self.shards) == len(PLANES)

    @cached_property
    def streamed_nbytes(self) -> int:
        return sum(span.nbytes for span in self._spans)

    @property
    def resident_nbytes(self) -> int:
        """Exact blocks are kept decoded, at 16 bits, unless `stored`; others as they are stored."""
        if not self.is_exact or self.stored:
            return self.streamed_nbytes
        sections = [self.shards[0].header.section(name) for name in self.sections]
        return sum(2 * self.count(s) * s.vectors * s.length for s in sections)

    def count(self, section: Section) -> int:
        """Records of a section that belong to the block."""
        return (section.records if self.end is None else self.end) - self.start

    @cached_property
    def _spans(self) -> tuple[_Span, ...]:
        return tuple(self._span(index) for index in self.shards[self.held :])

    def _span(self, index: ShardIndex) -> _Span:
        whole = index.header.payload_nbytes
        if self.end is None:
            return _Span(0, len(index.block_hashes), whole, 0)
        (name,) = self.sections
        section = index.header.section(name)
        begin, end = (
            section.offset + record_offset(index, section, i) for i in (self.start, self.end)
        )
        first, stop = begin // BLOCK, -(-end // BLOCK)
        return _Span(first, stop, min(stop * BLOCK, whole) - first * BLOCK, begin - first * BLOCK)

    @property
    def sections(self) -> tuple[str, ...]:
        if self.only is not None:
            return (self.only,)
        return tuple(section.name for section in self.shards[0].header.sections)

    def read(self, reader: SsdReader, into: U8, *, now: bool = False) -> Pending:
        """Start reading all planes that are not held, one by one, into page-aligned `into`. now:
        somebody waits for it."""
        parts, position = [], 0
        for index, span in zip(self.shards[self.held :], self._spans, strict=True):
            runs = [(span.first, span.stop)]
            parts.append(reader.read(index, runs, into[position:], now=now))
            position += span.nbytes
        return Pending.all_of(parts)

    def rows(
        self, payload: U8 | torch.Tensor, below: Mapping[str, PackedRows] | None = None
    ) -> dict[str, PackedRows]:
        """Section name to operand, viewing `payload`: u8 [streamed_nbytes], no copy.

        below: each section in the planes that are held: all of its records, or the block's own.
        """
        flat = torch.from_numpy(payload) if isinstance(payload, np.ndarray) else payload
        return {
            name: self._section_rows(name, flat, below[name] if below else None)
            for name in self.sections
        }

    def _section_rows(self, name: str, flat: torch.Tensor, below: PackedRows | None) -> PackedRows:
        section = self.shards[0].header.section(name)
        count = self.count(section)
        views = self._held(below, count) if below is not None else []
        position = 0
        for index, span in zip(self.shards[self.held :], self._spans, strict=True):
            section = index.header.section(name)
            begin, end = (record_offset(index, section, i) for i in self._range(section))
            start = position + span.shift + (0 if self.end is not None else section.offset)
            views.append(flat[start : start + end - begin])
            position += span.nbytes
        frames = self._frames(name, views[2]) if self.is_exact else None
        int8 = views[1].view(count, -1) if len(views) > 1 else None
        return PackedRows(section.layout, views[0].view(count, -1), int8, frames)

    def _held(self, below: PackedRows, count: int) -> list[torch.Tensor]:
        own = slice(None) if len(below) == count else slice(self.start, self.end)
        planes = (below.int4, below.int8)[: self.held]
        return [plane[own] for plane in planes if plane is not None]

    def _range(self, section: Section) -> tuple[int, int]:
        return self.start, self.start + self.count(section)

    def _frames(self, name: str, data: torch.Tensor) -> ExactFrames:
        exact = self.shards[2]
        section = exact.header.section(name)
        per = section.frame_records
        start, stop = self._range(section)
        some = slice(start // per, -(-stop // per))
        nbytes, escapes = exact.frame_nbytes[name][some], exact.frame_escapes[name][some]
        return ExactFrames(data, nbytes, escapes, per, self.exact_type)


@dataclass
class BlockUse:
    """A block, and where it is when it is used: ready, in DRAM as stored, or in the ring."""

    block: Block
    below: Mapping[str, PackedRows] | None = None  # planes that are held to draft with
    rows: dict[str, Rows] | None = None
    raw: U8 | None = None
    ring: int = 0
    following: "BlockUse | None" = None  # that waits in DRAM too, if no other is moved before it
    # operands by where the payload lay: which slot in HBM, or the address
    made: dict[int, dict[str, Rows]] = field(default_factory=dict)


def record_offset(index: ShardIndex, section: Section, record: int) -> int:
    """Bytes from a section's start to a record; in the exact plane it must begin a frame."""
    if not section.frames:
        return record * section.layout.nbytes(index.header.plane)
    frames = -(-record // section.frame_records)
    return int(index.frame_nbytes[section.name][:frames].sum(dtype=np.int64))


def block_of(bundle: Bundle, kind: str, name: int | str, precision: str) -> Block:
    """Raises BadInput when the planes of a bundle do not describe the same matrices."""
    shards = tuple(bundle.shard(kind, name, plane) for plane in planes_of(precision))
    shapes = [
        [(s.name, s.records, s.vectors, s.length) for s in shard.header.sections]
        for shard in shards
    ]
    if any(shape != shapes[0] for shape in shapes):
        raise BadInput(f"{bundle.path}: the planes of {kind} {name} do not match each other")
    return Block(shards, bundle.manifest.exact_type)


def head_name(bundle: Bundle) -> str:
    """The shard that the output projection is in: the embedding's own when they are tied."""
    return "embed" if bundle.manifest.architecture.get("tie_word_embeddings") else "head"
