"""Shards: round trips, every single-bit damage, and truncation."""

import os
import random
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shards import RECIPE, page_of, write_exact, write_int4

from m2c.bundle.bundle import verify_blocks
from m2c.bundle.planes import RecordLayout
from m2c.bundle.shard import (
    BLOCK,
    PAGE,
    Section,
    ShardHeader,
    ShardIndex,
    read_index,
    shard_writer,
)
from m2c.errors import BadInput, StorageError


def payload_of(index: ShardIndex) -> bytes:
    data = index.path.read_bytes()
    return data[PAGE : PAGE + index.header.payload_nbytes]


# -- round trips -----------------------------------------------------------------------------------


def test_records_come_back(tmp_path: Path) -> None:
    path = tmp_path / "a.int4"
    written = write_int4(path, 600)
    index = read_index(path)
    assert (index.header.plane, index.header.recipe) == ("int4", RECIPE)
    payload = payload_of(index)
    for data, section in zip(written, index.header.sections, strict=True):
        assert section.offset % PAGE == 0
        assert payload[section.offset : section.offset + section.nbytes] == data.tobytes()
    assert [s.name for s in index.header.sections] == ["first", "second"]
    assert index.header.section("second").layout == RecordLayout(3, 100)
    assert len(payload) % PAGE == 0
    assert len(index.block_hashes) == -(-len(payload) // BLOCK) > 1
    assert list(verify_blocks(index))[-1] == len(payload)


def test_frames_and_their_tables_come_back(tmp_path: Path) -> None:
    data, nbytes, escapes = write_exact(tmp_path / "a.fp16")
    index = read_index(tmp_path / "a.fp16")
    section = index.header.section("ffn")
    assert (section.frames, section.frame_records) == (4, 2)
    assert payload_of(index)[: section.nbytes] == data
    assert np.array_equal(index.frame_nbytes["ffn"], nbytes)
    assert np.array_equal(index.frame_escapes["ffn"], escapes)
    assert escapes.sum() > 0


@given(sizes=st.lists(st.integers(1, 400), min_size=1, max_size=4), cut=st.integers(1, 50))
def test_any_sections_in_any_pieces(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], cut: int
) -> None:
    path = tmp_path_factory.mktemp("shard") / "a.int8"
    layout = RecordLayout(2, 320)
    rng = np.random.default_rng(cut)
    data = [rng.integers(0, 256, (n, layout.nbytes("int8"))).astype(np.uint8) for n in sizes]
    with shard_writer(path, "int8", RECIPE) as writer:
        for i, records in enumerate(data):
            for start in range(0, len(records), cut):
                writer.write(records[start : start + cut])
            writer.end_section(str(i), layout, len(records))
    index = read_index(path)
    payload = payload_of(index)
    for i, records in enumerate(data):
        section = index.header.section(str(i))
        assert payload[section.offset : section.offset + section.nbytes] == records.tobytes()
    assert list(verify_blocks(index))[-1] == len(payload)


def test_a_failed_writer_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.int4"
    path.write_bytes(b"old")

    def write_and_fail() -> None:
        with shard_writer(path, "int4", RECIPE) as writer:
            writer.write(np.zeros((1, 8), np.uint8))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_too_many_sections_are_a_bug_of_ours(tmp_path: Path) -> None:
    def write_many() -> None:
        with shard_writer(tmp_path / "a", "int4", RECIPE) as writer:
            for i in range(60):
                writer.write(np.zeros((1, 18), np.uint8))
                writer.end_section(f"{i:040}", RecordLayout(1, 4), 1)

    with pytest.raises(ValueError, match="sections"):
        write_many()
    assert not list(tmp_path.iterdir())


def test_headers_are_facts() -> None:
    section = Section("a", 3, 1, 10, 0, 20, 2)
    header = ShardHeader("fp16", RECIPE, 4096, (section,))
    assert section.frames == 2
    with pytest.raises(AttributeError):
        header.plane = "int4"  # type: ignore[misc]


# -- damage ----------------------------------------------------------------------------------------


def flips(size: int, first: int, last: int) -> list[tuple[int, int]]:
    """(byte, bit) of the region: all of the first 512 and last 64 bytes, a sample between."""
    rng = random.Random(size)
    ends = [*range(first, min(first + 512, last)), *range(max(first, last - 64), last)]
    middle = rng.sample(range(first, last), min(60, last - first))
    return [(at, bit) for at in sorted({*ends, *middle}) for bit in range(8)]


def test_every_flip_of_header_and_index_is_refused(shard: Path, tmp_path: Path) -> None:
    whole = shard.read_bytes()
    end = PAGE + read_index(shard).header.payload_nbytes
    copy = tmp_path / "copy"
    copy.write_bytes(whole)
    with open(copy, "r+b", buffering=0) as file:
        for at, bit in flips(len(whole), 0, PAGE) + flips(len(whole), end, len(whole)):
            os.pwrite(file.fileno(), bytes([whole[at] ^ 1 << bit]), at)
            with pytest.raises(BadInput, match="copy"):
                read_index(copy)
            os.pwrite(file.fileno(), whole[at : at + 1], at)
    assert read_index(copy).header == read_index(shard).header


def test_every_flip_of_the_payload_is_found(shard: Path) -> None:
    index = read_index(shard)
    payload = bytearray(payload_of(index))
    for at, bit in flips(len(payload), 0, len(payload)):
        payload[at] ^= 1 << bit
        block = at // BLOCK
        with pytest.raises(BadInput, match=f"damaged at byte {PAGE + block * BLOCK} "):
            index.verify(block, memoryview(payload)[block * BLOCK : (block + 1) * BLOCK])
        payload[at] ^= 1 << bit


def test_verify_blocks_names_file_and_block(tmp_path: Path) -> None:
    path = tmp_path / "a.int4"
    write_int4(path, 900)
    data = bytearray(path.read_bytes())
    data[PAGE + BLOCK + 77] ^= 4
    path.write_bytes(data)
    blocks = verify_blocks(read_index(path))
    assert next(blocks) == BLOCK
    with pytest.raises(BadInput, match=rf"a\.int4: damaged at byte {PAGE + BLOCK} \(block 1\)"):
        next(blocks)


@pytest.mark.parametrize("change", [-1, 1, PAGE, -PAGE])
def test_wrong_lengths(shard: Path, tmp_path: Path, change: int) -> None:
    data = shard.read_bytes()
    copy = tmp_path / "copy"
    copy.write_bytes(data[:change] if change < 0 else data + bytes(change))
    with pytest.raises(BadInput, match="copy"):
        read_index(copy)


def test_truncation_at_every_page(shard: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    data = shard.read_bytes()
    for length in [*range(0, len(data), PAGE), 1, PAGE - 1, PAGE + 1, len(data) - 8]:
        copy.write_bytes(data[:length])
        with pytest.raises(BadInput, match="copy"):
            read_index(copy)


def test_swapped_blocks_are_found(tmp_path: Path) -> None:
    path = tmp_path / "a.int4"
    write_int4(path, 900)
    data = bytearray(path.read_bytes())
    first, second = slice(PAGE, PAGE + BLOCK), slice(PAGE + BLOCK, PAGE + 2 * BLOCK)
    data[first], data[second] = data[second], data[first]
    path.write_bytes(data)
    with pytest.raises(BadInput, match="block 0"):
        list(verify_blocks(read_index(path)))


def test_the_digest_covers_the_header(tmp_path: Path) -> None:
    """A header of the same shape may stand before another index: the manifest must tell them."""
    write_int4(tmp_path / "a", 12)
    data = bytearray((tmp_path / "a").read_bytes())
    header = read_index(tmp_path / "a").header
    data[:PAGE] = page_of(asdict(replace(header, recipe="t" * 64)))
    (tmp_path / "b").write_bytes(data)
    assert read_index(tmp_path / "b").digest != read_index(tmp_path / "a").digest


def test_what_is_no_shard(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="missing"):
        read_index(tmp_path / "missing")
    with pytest.raises((BadInput, StorageError), match=str(tmp_path)):
        read_index(tmp_path)
    write_int4(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises((BadInput, StorageError), match="link"):
        read_index(tmp_path / "link")
