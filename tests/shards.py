"""Small shards to damage, and header pages that lie with a correct checksum."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from m2c.bundle.exact import encode_frames, round_to
from m2c.bundle.planes import GROUP, RecordLayout, quantize
from m2c.bundle.shard import BLOCK, MAGIC, PAGE, VERSION, read_index, shard_writer
from m2c.bundle.strict import dump_json

RECIPE = "r" * 64


def write_int4(path: Path, records: int = 300) -> list[np.ndarray]:
    """Two sections, the second of `records` records; returns their records."""
    rng = np.random.default_rng(0)
    written = []
    with shard_writer(path, "int4", RECIPE) as writer:
        for name, layout, count in (
            ("first", RecordLayout(1, 40), 5), ("second", RecordLayout(3, 100), records),
        ):  # fmt: skip
            data = rng.integers(0, 256, (count, layout.nbytes("int4"))).astype(np.uint8)
            writer.write(data[:2])
            writer.write(data[2:])
            writer.end_section(name, layout, count)
            written.append(data)
    return written


def write_exact(path: Path) -> tuple[bytes, np.ndarray, np.ndarray]:
    """One section of 7 records in frames of 2, some weights escaped; returns bytes and tables."""
    rng = np.random.default_rng(1)
    values, layout = rng.standard_normal((7, 3, 20)).astype(np.float32), RecordLayout(3, 20)
    int4, int8, _ = quantize(values)
    values[rng.random(values.shape) < 0.1] = 0
    true = round_to(values, "bf16").reshape(7, -1)
    frames = encode_frames(true, int4, int8, layout, exact_type="bf16", frame_records=2)
    with shard_writer(path, "fp16", RECIPE) as writer:
        writer.write_frames(frames)
        writer.end_section("ffn", layout, 7, 2)
    return frames.data, frames.nbytes, frames.escapes


def page_of(facts: dict[str, Any], *, version: int = VERSION, pad: bytes = b"\0") -> bytes:
    """A header page for any facts, its own checksum correct."""
    body = dump_json({"group_size": GROUP, "block_nbytes": BLOCK, **facts})
    page = MAGIC + version.to_bytes(4, "little") + len(body).to_bytes(4, "little") + body
    page = page.ljust(PAGE - 8, pad)
    return page + xxhash.xxh3_64_intdigest(page).to_bytes(8, "little")


def lie(shard: Path, copy: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """`shard` with other facts in its header; the payload and the index stay."""
    facts = asdict(read_index(shard).header)
    facts["sections"] = list(facts["sections"])
    change(facts)
    copy.write_bytes(page_of(facts) + shard.read_bytes()[PAGE:])
    return copy
