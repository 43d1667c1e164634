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

MAGIC = bytes([0x93]) + b"m2c" + bytes([0x0D, 0x0A, 0x1A, 0x0A])
PAGE, BLOCK, GROUP = 4096, 65536, 32

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
F64 = npt.NDArray[np.float64]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]


class FormatError(Exception):
    """The bytes are not those of a sound bundle of version 3."""


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
    require(manifest["format"] == "m2c-bundle" and manifest["version"] == 3, "not a version 3")
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
    require(magic == MAGIC and version == 3, "not a shard of version 3")
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
    """(sizes, escapes) of the frames of each exact section, and where they end."""
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
    codes = (16 * q + r).reshape(shape[0], -1)
    weights = _weights(exact, section, codes, scales.reshape(shape[0], -1), exact_type)
    return int4, int8, weights.reshape(shape)


def _codes(packed: U8) -> I32:
    """Bytes [groups, 16] to codes [groups, 32]: all low nibbles, then all high ones."""
    return np.hstack((packed & 15, packed >> 4)).astype(np.int32) - 8


def _trim(values: F32, shape: tuple[int, int, int]) -> F32:
    return np.ascontiguousarray(values.reshape(*shape[:2], -1)[..., : shape[2]])


def _weights(shard: Shard, section: str, codes: I32, scales: F32, exact_type: str) -> U16:
    """All frames, each read on its own: u16 [weights of the section]."""
    facts = shard.sections[section]
    sizes, escapes = shard.frame_nbytes[section], shard.escapes[section]
    require(int(sizes.sum()) == facts["nbytes"], "frames do not add up")
    magnitudes = np.arange(0x7F80 if exact_type == "bf16" else 0x7C00)
    if exact_type == "bf16":
        table = (magnitudes.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    else:
        table = magnitudes.astype(np.uint16).view(np.float16).astype(np.float64)
    parts, position = [], 0
    for frame, (nbytes, escaped) in enumerate(zip(sizes.tolist(), escapes.tolist(), strict=True)):
        rows = slice(frame * facts["frame_records"], (frame + 1) * facts["frame_records"])
        data = shard.data[section][position : position + nbytes]
        parts.append(_frame(data, escaped, codes[rows], scales[rows], facts, table))
        position += nbytes
    return np.concatenate(parts)


def _frame(
    data: bytes, escaped: int, codes: I32, scales: F32, facts: dict[str, Any], table: F64
) -> U16:
    """The weights of one frame; table: every magnitude there is, by its bits."""
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    length = facts["length"]
    groups = -(-length // GROUP)
    out, used = [], 0
    for record, record_scales in zip(codes, scales, strict=True):
        found = np.empty(len(record), np.int64)
        for start in range(0, len(record), 2 * GROUP):
            pair = slice(start, min(start + 2 * GROUP, len(record)))
            where = np.arange(pair.start, pair.stop)
            padding = where % (GROUP * groups) >= length
            found[pair], used = _pair(
                record[pair], record_scales[where // GROUP], padding, table, bits, used
            )
        out.append(found.reshape(facts["vectors"], -1)[:, :length].reshape(-1))
    weights = np.concatenate(out).astype(np.uint16)
    plane_nbytes = -(-used // 8)
    require(len(data) == plane_nbytes + 6 * escaped, "a frame has another size")
    before = -1
    for at in range(plane_nbytes, len(data), 6):
        place, weight = struct.unpack_from("<IH", data, at)
        require(before < place < len(weights), "escapes are out of order")
        weights[place] = weight
        before = place
    return weights


def _pair(
    n: I32, scales: F32, padding: npt.NDArray[np.bool_], table: F64, bits: U8, used: int
) -> tuple[I64, int]:
    """Weights of two groups (or one), with those of padding, and how many bits are used now."""
    m, unit = np.abs(n), np.abs(scales).astype(np.float64) / 32
    up, down = 5 * (n % 16 == 7), 3 * (n % 16 == 8)  # r = 7, r = -8
    from_ = np.where(n == 0, 0, 2 * m - 1 - np.where(n < 0, up, down))
    to = 2 * m + 1 + np.where(n < 0, down, up)
    first = np.searchsorted(table, unit * from_, side="left")  # beyond the largest: infinity
    final = np.searchsorted(table, unit * to, side="right") - 1
    last = np.where(n == 0, 2 * final + 1, np.maximum(final, first) - first)
    sizes = np.array([int(number).bit_length() for number in last])
    width = np.where(padding, 0, sizes)
    u = np.zeros(len(n), np.int64)
    for k in range(int(width.max(initial=0))):
        holders = np.flatnonzero(width > k)
        require(used + len(holders) <= len(bits), "a frame is too short")
        u[holders] += bits[used : used + len(holders)].astype(np.int64) << k
        used += len(holders)
    negative = (n < 0) != np.signbit(scales)
    weights = np.where(n == 0, u // 2 + 0x8000 * (u % 2), first + u + 0x8000 * negative)
    return weights, used


def shard_groups(manifest: dict[str, Any]) -> list[str]:
    """Names of the shards without their plane: dense/embed, dense/00000, neurons/00000, ..."""
    return sorted({re.sub(r"\.(int4|int8|fp16)$", "", name) for name in manifest["shards"]})
