"""A second reader of bundles, written from docs/FORMAT.md alone: nothing of m2c is imported.

Reads whole sections and checks every hash on the way; knows nothing about models or speed.
Wrong bytes raise FormatError.
"""

import hashlib
import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
import zstandard

MAGIC = bytes([0x93]) + b"m2c" + bytes([0x0D, 0x0A, 0x1A, 0x0A])
PAGE, BLOCK, GROUP = 4096, 65536, 32

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
I64 = npt.NDArray[np.int64]


class FormatError(Exception):
    """The bytes are not those of a sound bundle of version 1."""


def require(condition: bool, reason: str) -> None:
    if not condition:
        raise FormatError(reason)


@dataclass(frozen=True)
class Shard:
    """One shard, verified: its sections by name and each section's bytes."""

    plane: str
    sections: dict[str, dict[str, Any]]
    data: dict[str, bytes]
    frame_nbytes: dict[str, I64]
    escapes: dict[str, I64]
    digest: str


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest; its checksum is computed on the file's bytes, its other files are hashed."""
    text = (folder / "manifest.json").read_bytes()
    manifest: dict[str, Any] = json.loads(text)
    require(manifest["format"] == "m2c-bundle" and manifest["version"] == 1, "not a version 1")
    member = b'"checksum":"%s",' % manifest["checksum"].encode()
    require(text.endswith(b"}\n") and text.count(member) == 1, "not a canonical manifest")
    rest = text[:-1].replace(member, b"")
    require(hashlib.sha256(rest).hexdigest() == manifest["checksum"], "damaged manifest")
    for name, fact in (manifest["files"] | manifest["shards"]).items():
        data = (folder / name).read_bytes()
        require(len(data) == fact["nbytes"], f"{name}: wrong length")
        require(hashlib.sha256(data).hexdigest() == fact["sha256"], f"{name}: damaged")
    return manifest


def read_shard(path: Path) -> Shard:
    data = path.read_bytes()
    page = data[:PAGE]
    magic, version, length = struct.unpack_from("<8sII", page)
    require(magic == MAGIC and version == 1, "not a shard of version 1")
    require(page[-8:] == xxhash.xxh3_64(page[:-8]).intdigest().to_bytes(8, "little"), "header")
    header = json.loads(page[16 : 16 + length])
    require(not any(page[16 + length : -8]), "reserved bytes of the header are not zero")
    require(header["group_size"] == GROUP and header["block_nbytes"] == BLOCK, "constants")
    payload = data[PAGE : PAGE + header["payload_nbytes"]]
    index, trailer = data[PAGE + len(payload) : -8], data[-8:]
    require(trailer == xxhash.xxh3_64(index).intdigest().to_bytes(8, "little"), "index")
    blocks = [payload[i : i + BLOCK] for i in range(0, len(payload), BLOCK)]
    hashes = struct.unpack_from(f"<{len(blocks)}Q", index)
    for number, block in enumerate(blocks):
        require(xxhash.xxh3_64(block).intdigest() == hashes[number], f"block {number}")
    sections = {section["name"]: section for section in header["sections"]}
    tables, end = _tables(sections, index, 8 * len(blocks))
    require(end == len(index), "the index is longer than its tables")
    return Shard(
        header["plane"],
        sections,
        {n: payload[s["offset"] : s["offset"] + s["nbytes"]] for n, s in sections.items()},
        {name: table[0] for name, table in tables.items()},
        {name: table[1] for name, table in tables.items()},
        xxhash.xxh3_128(page + index).hexdigest(),
    )


def _tables(
    sections: dict[str, dict[str, Any]], index: bytes, position: int
) -> tuple[dict[str, tuple[I64, I64]], int]:
    """(compressed sizes, escapes) of the frames of each exact section, and where they end."""
    tables = {}
    for name, section in sections.items():
        per_frame = section.get("frame_records", 0)
        if per_frame:
            frames = -(-section["records"] // per_frame)
            both = np.frombuffer(index, "<u4", 2 * frames, position).astype(np.int64)
            tables[name] = (both[:frames], both[frames:])
            position += 8 * frames
    return tables, position


def read_section(folder: Path, shard: str, section: str, exact_type: str) -> tuple[F32, F32, U16]:
    """INT4 values, INT8 values [records, vectors, length] f32, and weights as u16 bits."""
    low, middle, exact = (read_shard(folder / f"{shard}.{p}") for p in ("int4", "int8", "fp16"))
    require([low.plane, middle.plane, exact.plane] == ["int4", "int8", "fp16"], "planes")
    facts = low.sections[section]
    shape = (facts["records"], facts["vectors"], facts["length"])
    groups = -(-shape[2] // GROUP)
    codes_nbytes = shape[1] * groups * 16
    record4 = np.frombuffer(low.data[section], np.uint8).reshape(shape[0], -1)
    q = _codes(record4[:, :codes_nbytes].reshape(-1, 16))
    r = _codes(np.frombuffer(middle.data[section], np.uint8).reshape(-1, 16))
    scales = record4[:, codes_nbytes:].copy().view("<f2").astype(np.float32).reshape(-1, 1)
    int4 = _trim(q.astype(np.float32) * scales, shape)
    # 16 q + r is an integer, its 16th part exact: zero is +0 before the scale's sign is applied
    int8 = _trim((16 * q + r).astype(np.float32) / np.float32(16) * scales, shape)
    bits = _ordered(_round(int8, exact_type)).reshape(-1)
    steps = _distances(exact, section)
    return int4, int8, _unordered((bits + steps) % 65536).reshape(shape)


def _codes(packed: U8) -> npt.NDArray[np.int32]:
    """Bytes [groups, 16] to codes [groups, 32]: all low nibbles, then all high ones."""
    return np.hstack((packed & 15, packed >> 4)).astype(np.int32) - 8


def _trim(values: F32, shape: tuple[int, int, int]) -> F32:
    return np.ascontiguousarray(values.reshape(*shape[:2], -1)[..., : shape[2]])


def _round(values: F32, exact_type: str) -> U16:
    if exact_type == "f16":
        with np.errstate(over="ignore"):
            return values.astype("<f2").view(np.uint16)
    bits = values.view(np.uint32).astype(np.uint64)
    half, odd = np.uint64(0x7FFF), (bits >> np.uint64(16)) & np.uint64(1)
    return ((bits + half + odd) >> np.uint64(16)).astype(np.uint16)


def _ordered(bits: U16) -> I64:
    wide = bits.astype(np.int64)
    return np.where(wide >= 0x8000, 0xFFFF - wide, wide + 0x8000)


def _unordered(keys: I64) -> U16:
    return np.where(keys >= 0x8000, keys - 0x8000, 0xFFFF - keys).astype(np.uint16)


def _distances(shard: Shard, section: str) -> I64:
    """All frames, each decompressed on its own."""
    facts = shard.sections[section]
    sizes, escapes = shard.frame_nbytes[section], shard.escapes[section]
    require(int(sizes.sum()) == facts["nbytes"], "frames do not add up")
    data, parts, position = shard.data[section], [], 0
    for frame, (nbytes, escaped) in enumerate(zip(sizes.tolist(), escapes.tolist(), strict=True)):
        first = frame * facts["frame_records"]
        records = min(facts["frame_records"], facts["records"] - first)
        weights = records * facts["vectors"] * facts["length"]
        content_nbytes = weights + 2 * escaped
        packed = data[position : position + nbytes]
        require(zstandard.frame_content_size(packed) == content_nbytes, "content size")
        content = zstandard.ZstdDecompressor().decompress(packed)
        steps = np.frombuffer(content, "<i1", weights).astype(np.int64)
        wide = np.frombuffer(content, "<i2", offset=weights)
        require(np.count_nonzero(steps == -128) == len(wide), "escapes")
        steps[steps == -128] = wide
        parts.append(steps)
        position += nbytes
    return np.concatenate(parts)


def shard_groups(manifest: dict[str, Any]) -> list[str]:
    """Names of the shards without their plane: dense/embed, dense/00000, neurons/00000, ..."""
    return sorted({re.sub(r"\.(int4|int8|fp16)$", "", name) for name in manifest["shards"]})
