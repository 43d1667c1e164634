"""Blocks: weights that every token uses, from shard payloads to kernel operands.

A block is one layer's attention, one layer's FFN floor, or the head, at one precision. It knows
which shards it needs and how their payloads become rows; not where the payloads lie.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from m2c.bundle.bundle import Bundle
from m2c.bundle.shard import PLANES, ShardIndex
from m2c.errors import BadInput
from m2c.kernels.rows import ExactFrames, PackedRows
from m2c.tiers.ssd import Pending, SsdReader

U8 = npt.NDArray[np.uint8]


def planes_of(precision: str) -> tuple[str, ...]:
    """The planes that together give `precision`: they are nested."""
    return PLANES[: PLANES.index(precision) + 1]


@dataclass(frozen=True)
class Block:
    shards: tuple[ShardIndex, ...]  # one per plane, lowest first
    exact_type: str

    @property
    def is_exact(self) -> bool:
        return len(self.shards) == len(PLANES)

    @property
    def streamed_nbytes(self) -> int:
        return sum(index.header.payload_nbytes for index in self.shards)

    @property
    def resident_nbytes(self) -> int:
        """Exact blocks are kept decoded, at 16 bits; others as they are stored."""
        if not self.is_exact:
            return self.streamed_nbytes
        sections = self.shards[0].header.sections
        return sum(2 * s.records * s.vectors * s.length for s in sections)

    @property
    def sections(self) -> tuple[str, ...]:
        return tuple(section.name for section in self.shards[0].header.sections)

    def read(self, reader: SsdReader, into: U8) -> Pending:
        """Start reading all planes, one after another, into page-aligned `into`."""
        parts, position = [], 0
        for index in self.shards:
            parts.append(reader.read_all(index, into[position:]))
            position += index.header.payload_nbytes
        return Pending.all_of(parts)

    def rows(self, payload: U8 | torch.Tensor) -> dict[str, PackedRows]:
        """Section name to operand, viewing `payload`: u8 [streamed_nbytes], no copy."""
        flat = torch.from_numpy(payload) if isinstance(payload, np.ndarray) else payload
        return {name: self._section_rows(name, flat) for name in self.sections}

    def _section_rows(self, name: str, flat: torch.Tensor) -> PackedRows:
        views: list[torch.Tensor] = []
        position = 0
        for index in self.shards:
            section = index.header.section(name)
            start = position + section.offset
            views.append(flat[start : start + section.nbytes])
            position += index.header.payload_nbytes
        section = self.shards[0].header.section(name)
        count = section.records
        frames = None
        if self.is_exact:
            exact = self.shards[2]
            frames = ExactFrames(
                views[2].numpy(), exact.frame_nbytes[name], exact.frame_escapes[name],
                exact.header.section(name).frame_records, self.exact_type,
            )  # fmt: skip
        int8 = views[1].view(count, -1) if len(views) > 1 else None
        return PackedRows(section.layout, views[0].view(count, -1), int8, frames)


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
