"""A shard: the records of one layer (or one large matrix) in one plane, with block checksums.

    header   4096 bytes: magic, JSON, XXH3-64
    payload  sections of packed records, each section from a 4096-byte boundary
    index    XXH3-64 of every 64 KiB block of the payload; frame sizes of the exact plane;
             XXH3-64 of the index itself

docs/FORMAT.md, section "Shards". Knows nothing about models, tiers or how blocks are fetched.
"""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
import numpy.typing as npt
import xxhash

from m2c.bundle.exact import ESCAPE_NBYTES, Frames
from m2c.bundle.files import MEND, atomic_file, disk_errors, open_regular, read_at
from m2c.bundle.planes import GROUP, RecordLayout
from m2c.bundle.strict import decode, dump_json, load_json
from m2c.errors import BadInput

PLANES: Final = ("int4", "int8", "fp16")
MAGIC: Final = b"\x93m2c\r\n\x1a\n"
VERSION: Final = 3
PAGE: Final = 4096
BLOCK: Final = 64 << 10
FRAME_WEIGHTS: Final = 1 << 16  # most in a frame of several records: what readers set aside
_PREFIX = struct.Struct("<8sII")  # magic, version, bytes of JSON
_HASH = struct.Struct("<Q")

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Section:
    """One matrix, or the neurons of a layer: `records` records at payload byte `offset`."""

    name: str
    records: int
    vectors: int
    length: int
    offset: int
    nbytes: int
    frame_records: int = 0  # records per frame; exact plane only, else 0

    @property
    def layout(self) -> RecordLayout:
        return RecordLayout(self.vectors, self.length)

    @property
    def frames(self) -> int:
        return -(-self.records // self.frame_records) if self.frame_records else 0


@dataclass(frozen=True)
class ShardHeader:
    plane: str
    recipe: str  # what the shard was made from and how; a resumed pack reuses only its own
    payload_nbytes: int
    sections: tuple[Section, ...]

    def section(self, name: str) -> Section:
        return next(section for section in self.sections if section.name == name)


@dataclass(frozen=True)
class ShardIndex:
    """Everything about a shard but its payload. Arrays are read-only facts."""

    path: Path
    header: ShardHeader
    block_hashes: npt.NDArray[np.uint64]  # [blocks]
    frame_nbytes: dict[str, npt.NDArray[np.uint32]]  # section -> [frames]
    frame_escapes: dict[str, npt.NDArray[np.uint32]]  # section -> [frames]
    digest: str  # XXH3-128 of header and index: the manifest vouches for it

    def verify(self, block: int, data: memoryview) -> None:
        """Raise BadInput unless `data` is the content of payload block number `block`."""
        if xxhash.xxh3_64_intdigest(data) != self.block_hashes[block]:
            raise BadInput(
                f"{self.path}: damaged at byte {PAGE + block * BLOCK} (block {block})", MEND
            )


def blocks_of(nbytes: int) -> int:
    return -(-nbytes // BLOCK)


def align(nbytes: int, to: int = PAGE) -> int:
    return -(-nbytes // to) * to


class ShardWriter:
    """Streams sections into a shard; made by `shard_writer`."""

    def __init__(self, file: BinaryIO, plane: str, recipe: str) -> None:
        self._file = file
        self._plane = plane
        self._recipe = recipe
        self._sections: list[Section] = []
        self._tables: list[npt.NDArray[np.uint32]] = []
        self._frames: list[Frames] = []
        self._hashes: list[int] = []
        self._pending = bytearray()
        self._position = self._start = 0
        file.write(bytes(PAGE))

    def write(self, records: U8) -> None:
        """Append records [n, nbytes] u8 to the current INT4 or INT8 section."""
        self._append(records.tobytes())

    def write_frames(self, frames: Frames) -> None:
        """Append frames to the current exact section."""
        self._append(frames.data)
        self._frames.append(frames)

    def end_section(
        self, name: str, layout: RecordLayout, records: int, frame_records: int = 0
    ) -> None:
        """Close the section made of what was written since the last one."""
        nbytes = self._position - self._start
        self._sections.append(
            Section(
                name, records, layout.vectors, layout.length, self._start, nbytes, frame_records
            )
        )
        if frame_records:
            self._tables.append(np.concatenate([frames.nbytes for frames in self._frames]))
            self._tables.append(np.concatenate([frames.escapes for frames in self._frames]))
            self._frames.clear()
        self._append(bytes(align(self._position) - self._position))
        self._start = self._position

    def finish(self) -> None:
        if self._pending:
            self._hashes.append(xxhash.xxh3_64_intdigest(bytes(self._pending)))
            self._file.write(self._pending)
        header = ShardHeader(self._plane, self._recipe, self._position, tuple(self._sections))
        index = np.array(self._hashes, "<u8").tobytes()
        index += b"".join(table.astype("<u4").tobytes() for table in self._tables)
        self._file.write(index + _HASH.pack(xxhash.xxh3_64_intdigest(index)))
        self._file.seek(0)
        self._file.write(_header_page(header))

    def _append(self, data: bytes) -> None:
        self._position += len(data)
        self._pending += data
        whole = len(self._pending) // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            block = bytes(self._pending[start : start + BLOCK])
            self._hashes.append(xxhash.xxh3_64_intdigest(block))
            self._file.write(block)
        del self._pending[:whole]


@contextmanager
def shard_writer(path: Path, plane: str, recipe: str) -> Iterator[ShardWriter]:
    """Write the shard `path` atomically: it appears, complete, when the block ends well."""
    with atomic_file(path) as file:
        writer = ShardWriter(file, plane, recipe)
        yield writer
        writer.finish()


def read_index(path: Path) -> ShardIndex:
    """Header and index of a shard, every number checked before it is used.

    Raises BadInput naming the file when anything is inconsistent.
    """
    with disk_errors(path):
        descriptor = open_regular(path)
        try:
            page = read_at(descriptor, PAGE, 0, path)
            header = _parse_header(page, path)
            start = PAGE + header.payload_nbytes
            nbytes = os.fstat(descriptor).st_size - start
            expected = _index_nbytes(header)
            if nbytes != expected:
                raise BadInput(f"{path}: wrong length", MEND)
            index = read_at(descriptor, nbytes, start, path)
        finally:
            os.close(descriptor)
    if len(index) != expected or _HASH.unpack(index[-8:])[0] != xxhash.xxh3_64_intdigest(
        index[:-8]
    ):
        raise BadInput(f"{path}: damaged index, from byte {start}", MEND)
    return _split_index(path, header, page, index[:-8])


def _split_index(path: Path, header: ShardHeader, page: bytes, index: bytes) -> ShardIndex:
    blocks = blocks_of(header.payload_nbytes)
    hashes = np.frombuffer(index, "<u8", blocks)
    nbytes: dict[str, npt.NDArray[np.uint32]] = {}
    escapes: dict[str, npt.NDArray[np.uint32]] = {}
    position = blocks * 8
    for section in header.sections:
        if not section.frames:
            continue
        for table in (nbytes, escapes):
            table[section.name] = np.frombuffer(index, "<u4", section.frames, position)
            position += section.frames * 4
        _check_frames(section, nbytes[section.name], escapes[section.name], path)
    digest = xxhash.xxh3_128_hexdigest(page + index)
    return ShardIndex(path, header, hashes, nbytes, escapes, digest)


def _check_frames(section: Section, nbytes: U32, escapes: U32, path: Path) -> None:
    if int(nbytes.sum(dtype=np.uint64)) != section.nbytes:
        raise BadInput(f"{path}: frame sizes do not add up", MEND)
    weights = section.frame_records * section.vectors * section.length
    listed = escapes.astype(np.uint64) * np.uint64(ESCAPE_NBYTES)
    # offsets take at most 16 bits a weight; what they take exactly, only their codes can tell
    if ((escapes > weights) | (listed > nbytes) | (nbytes - listed > 2 * weights)).any():
        raise BadInput(f"{path}: impossible frame", MEND)


def _index_nbytes(header: ShardHeader) -> int:
    frames = sum(section.frames for section in header.sections)
    return blocks_of(header.payload_nbytes) * 8 + frames * 8 + 8


def _header_page(header: ShardHeader) -> bytes:
    body = dump_json({**asdict(header), "group_size": GROUP, "block_nbytes": BLOCK})
    page = _PREFIX.pack(MAGIC, VERSION, len(body)) + body
    if len(page) > PAGE - 8:
        raise ValueError("too many sections for one header page")
    page = page.ljust(PAGE - 8, b"\0")
    return page + _HASH.pack(xxhash.xxh3_64_intdigest(page))


def _parse_header(page: bytes, path: Path) -> ShardHeader:
    if len(page) != PAGE or page[:8] != MAGIC:
        raise BadInput(f"{path}: not an m2c shard: its first {len(MAGIC)} bytes are others", MEND)
    _, version, length = _PREFIX.unpack(page[: _PREFIX.size])
    if version != VERSION:
        raise BadInput(
            f"{path}: shard format {version}, this m2c reads {VERSION}", "pack the model again"
        )
    if _HASH.unpack(page[-8:])[0] != xxhash.xxh3_64_intdigest(page[:-8]):
        raise BadInput(f"{path}: damaged header, bytes 0 to {PAGE - 1}", MEND)
    if length > PAGE - 8 - _PREFIX.size or any(page[_PREFIX.size + length : -8]):
        raise BadInput(f"{path}: malformed header")
    facts = load_json(page[_PREFIX.size : _PREFIX.size + length], file=path)
    constants = {"group_size": GROUP, "block_nbytes": BLOCK}
    for key, value in constants.items():
        if not isinstance(facts, dict) or facts.pop(key, None) != value:
            raise BadInput(f"{path}: {key} must be {value}")
    header = decode(ShardHeader, facts, file=path)
    _check_sections(header, path)
    return header


def _check_sections(header: ShardHeader, path: Path) -> None:
    """Sections must tile the payload, each padded to a page, with sizes that follow."""
    if header.plane not in PLANES:
        raise BadInput(f"{path}: unknown plane {header.plane!r}")
    if len({s.name for s in header.sections}) != len(header.sections):
        raise BadInput(f"{path}: two sections have one name")
    position = 0
    for s in header.sections:
        small = 0 < s.vectors <= 8 and 0 < s.length < 1 << 24 and 0 < s.records < 1 << 28
        if not small or s.frame_records > s.records or s.offset != position:
            raise BadInput(f"{path}: malformed section {s.name!r}")
        if s.frame_records > 1 and s.frame_records * s.vectors * s.length > FRAME_WEIGHTS:
            raise BadInput(f"{path}: section {s.name!r} has frames that are too large")
        exact = header.plane == "fp16"
        if exact != bool(s.frame_records) or (
            not exact and s.nbytes != s.records * s.layout.nbytes(header.plane)
        ):
            raise BadInput(f"{path}: section {s.name!r} has a wrong size")
        if exact and s.nbytes > (2 + ESCAPE_NBYTES) * s.records * s.vectors * s.length:
            raise BadInput(f"{path}: section {s.name!r} has a wrong size")
        position = align(s.offset + s.nbytes)
    if position != header.payload_nbytes or position >= 1 << 48:
        raise BadInput(f"{path}: sections do not fill the payload")
