"""Shard headers and tables that lie, with checksums that are right: an attacker can make them."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from shards import RECIPE, lie, page_of, write_exact, write_int4

from m2c.bundle.exact import encode_frames, round_to
from m2c.bundle.planes import RecordLayout, quantize
from m2c.bundle.shard import PAGE, read_index, shard_writer
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
    with pytest.raises(BadInput, match="shard format 2, this m2c reads 3"):
        read_index(copy)


def test_bytes_hidden_in_the_header_page(shard: Path, tmp_path: Path) -> None:
    facts = asdict(read_index(shard).header)
    copy = tmp_path / "copy"
    copy.write_bytes(page_of(facts, pad=b" ") + shard.read_bytes()[PAGE:])
    with pytest.raises(BadInput, match="malformed header"):
        read_index(copy)


def set_tables(path: Path, nbytes: list[int], escapes: list[int]) -> None:
    """Other frame tables in the shard of `write_exact`, with a checksum that is right."""
    index = read_index(path)
    data = bytearray(path.read_bytes())
    end = PAGE + index.header.payload_nbytes
    at = end + 8 * len(index.block_hashes)
    data[at:-8] = np.array(nbytes + escapes, "<u4").tobytes()
    data[-8:] = xxhash.xxh3_64_intdigest(bytes(data[end:-8])).to_bytes(8, "little")
    path.write_bytes(data)


@pytest.mark.parametrize("change", [(0, 1), (3, -1), (2, 1 << 31)])
def test_frame_sizes_that_do_not_add_up(tmp_path: Path, change: tuple[int, int]) -> None:
    _, nbytes, escapes = write_exact(tmp_path / "a")
    sizes = nbytes.tolist()
    sizes[change[0]] += change[1]
    set_tables(tmp_path / "a", sizes, escapes.tolist())
    with pytest.raises(BadInput, match="add up"):
        read_index(tmp_path / "a")


@pytest.mark.parametrize("kind", ["more than weights", "more than bytes", "bytes for none"])
def test_frames_that_cannot_be(tmp_path: Path, kind: str) -> None:
    """Each frame has 2 records of 60 weights, so at most 240 bytes beside its escapes."""
    _, sizes, listed = write_exact(tmp_path / "a")
    nbytes, escapes = sizes.tolist(), listed.tolist()
    if kind == "more than weights":
        escapes[1] = 1 << 31
    elif kind == "more than bytes":
        escapes[2] = nbytes[2] // 6 + 1
    else:
        nbytes, escapes = [sum(nbytes), 0, 0, 0], [0, 0, 0, 0]
        assert nbytes[0] > 240
    set_tables(tmp_path / "a", nbytes, escapes)
    with pytest.raises(BadInput, match="impossible frame"):
        read_index(tmp_path / "a")


def test_frames_that_are_too_large(tmp_path: Path) -> None:
    """Readers set memory aside for a frame; one record may be of any size."""
    layout, records = RecordLayout(1, 1 << 15), 3
    path, rng = tmp_path / "a", np.random.default_rng(0)
    values = rng.standard_normal((records, 1, layout.length)).astype(np.float32)
    int4, int8, _ = quantize(values)
    true = round_to(values, "bf16").reshape(records, -1)
    for per_frame in (1, 2, 3):
        frames = encode_frames(true, int4, int8, layout, exact_type="bf16", frame_records=per_frame)
        with shard_writer(path, "fp16", RECIPE) as writer:
            writer.write_frames(frames)
            writer.end_section("m", layout, records, per_frame)
        if per_frame < 3:
            assert read_index(path).header.sections[0].frame_records == per_frame
    with pytest.raises(BadInput, match="'m' has frames that are too large"):
        read_index(path)
