"""Shard headers and tables that lie, with checksums that are right: an attacker can make them."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import xxhash
from shards import lie, page_of, write_exact, write_int4

from m2c.bundle.shard import PAGE, read_index
from m2c.errors import BadInput

HUGE = (1 << 62) - 1


@pytest.mark.parametrize("value", [0, 1, 2, 1 << 20, 1 << 40, HUGE, HUGE + 1, -1, 1.5, True, "1"])
@pytest.mark.parametrize("key", ["offset", "nbytes", "records", "vectors", "length"])
def test_sections_that_lie(shard: Path, tmp_path: Path, key: str, value: Any) -> None:
    truth = read_index(shard).header.sections[-1]
    if type(value) is int and getattr(truth, key) == value:
        return  # for once no lie
    copy = lie(shard, tmp_path / "copy", lambda facts: facts["sections"][-1].update({key: value}))
    try:
        index = read_index(copy)
    except BadInput as error:
        assert str(copy) in error.message  # noqa: PT017
        return
    # an exact section's shape does not follow from its size: only the planes below can tell
    assert index.header.plane == "fp16"
    assert key in ("vectors", "length", "records")
    assert len(index.frame_nbytes["ffn"]) == truth.frames


@pytest.mark.parametrize("value", [0, 1, 3, 7, 8, 1 << 40, -2, None, "2"])
def test_frame_records_that_lie(tmp_path: Path, value: Any) -> None:
    write_exact(tmp_path / "a")

    def change(facts: dict[str, Any]) -> None:
        facts["sections"][0]["frame_records"] = value

    with pytest.raises(BadInput, match="copy"):
        read_index(lie(tmp_path / "a", tmp_path / "copy", change))


def test_frames_in_a_plane_that_has_none(tmp_path: Path) -> None:
    write_int4(tmp_path / "a", 12)

    def change(facts: dict[str, Any]) -> None:
        facts["sections"][0]["frame_records"] = 1

    with pytest.raises(BadInput, match="copy"):
        read_index(lie(tmp_path / "a", tmp_path / "copy", change))


@pytest.mark.parametrize(
    "facts",
    [
        {"plane": "int2"},
        {"plane": "int8"},
        {"plane": 4},
        {"recipe": None},
        {"payload_nbytes": 0},
        {"payload_nbytes": HUGE},
        {"payload_nbytes": 1 << 48},
        {"payload_nbytes": -4096},
        {"sections": []},
        {"sections": None},
        {"sections": [None]},
        {"group_size": 64},
        {"group_size": None},
        {"block_nbytes": 4096},
        {"surprise": 1},
    ],
)
def test_headers_that_lie(shard: Path, tmp_path: Path, facts: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="copy"):
        read_index(lie(shard, tmp_path / "copy", lambda known: known.update(facts)))


def test_two_sections_of_one_name_are_refused(tmp_path: Path) -> None:
    """Else the frame table of the second would be used for the records of the first."""
    write_int4(tmp_path / "a", 12)

    def change(facts: dict[str, Any]) -> None:
        facts["sections"][1]["name"] = facts["sections"][0]["name"]

    with pytest.raises(BadInput, match="copy"):
        read_index(lie(tmp_path / "a", tmp_path / "copy", change))


def test_sections_in_another_order(tmp_path: Path) -> None:
    write_int4(tmp_path / "a", 12)
    with pytest.raises(BadInput, match="copy"):
        read_index(lie(tmp_path / "a", tmp_path / "copy", lambda f: f["sections"].reverse()))


def test_another_version_says_which(shard: Path, tmp_path: Path) -> None:
    facts = asdict(read_index(shard).header)
    copy = tmp_path / "copy"
    copy.write_bytes(page_of(facts, version=2) + shard.read_bytes()[PAGE:])
    with pytest.raises(BadInput, match="shard format 2, this m2c reads 1"):
        read_index(copy)


def test_bytes_hidden_in_the_header_page(shard: Path, tmp_path: Path) -> None:
    facts = asdict(read_index(shard).header)
    copy = tmp_path / "copy"
    copy.write_bytes(page_of(facts, pad=b" ") + shard.read_bytes()[PAGE:])
    with pytest.raises(BadInput, match="malformed header"):
        read_index(copy)


@pytest.mark.parametrize("table", [0, 1])
def test_frame_tables_that_lie(tmp_path: Path, table: int) -> None:
    """Sizes that do not add up, and more escapes than a frame has weights."""
    path = tmp_path / "a"
    write_exact(path)
    index = read_index(path)
    data = bytearray(path.read_bytes())
    end = PAGE + index.header.payload_nbytes
    at = end + 8 * len(index.block_hashes) + table * 4 * 4
    data[at : at + 4] = (1 << 31).to_bytes(4, "little")
    data[-8:] = xxhash.xxh3_64_intdigest(bytes(data[end:-8])).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(BadInput, match=("add up", "impossible frame")[table]):
        read_index(path)
