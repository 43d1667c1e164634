"""The GGUF header reader against honest headers, cut ones and lying ones."""

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_builders import info, pair, raw, text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m2c.errors import BadInput, M2CError, UnsupportedModel
from m2c.model.gguf_header import GGML_TYPES, read_header
from m2c.model.ranged_file import RangedFile

PAIRS = [
    pair("general.architecture", 8, text("llama")),
    pair("flag", 7, b"\1"),
    pair("numbers", 9, struct.pack("<IQ3i", 5, 3, -1, 0, 7)),
    pair("texts", 9, struct.pack("<IQ", 8, 2) + text("é") + text("")),
    pair("big", 10, struct.pack("<Q", 2**64 - 1)),
    pair("real", 12, struct.pack("<d", 0.5)),
]
INFOS = [info("a", (2, 4)), info("b", (3,), 1, 32)]


def header(path: Path, content: bytes) -> Any:
    path.write_bytes(content)
    return read_header(RangedFile(path))


def refused(path: Path, content: bytes, error: type[M2CError] = BadInput) -> None:
    with pytest.raises(error) as caught:
        header(path, content)
    assert str(path) in caught.value.message


def test_block_sizes_are_those_of_ggml() -> None:
    sizes = {kind: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] for kind in known()}
    assert {name: (block, nbytes) for name, block, nbytes in GGML_TYPES.values()} == sizes
    for number, (name, _, _) in GGML_TYPES.items():
        assert gguf.GGMLQuantizationType(number).name == name


def known() -> list[str]:
    return [name for name, _, _ in GGML_TYPES.values()]


@pytest.mark.parametrize("version", [2, 3])
def test_header_by_hand(tmp_path: Path, version: int) -> None:
    got = header(tmp_path / "x.gguf", raw(PAIRS, INFOS, 38, version=version))
    assert got.metadata == {
        "general.architecture": "llama",
        "flag": True,
        "numbers": [-1, 0, 7],
        "texts": ["é", ""],
        "big": 2**64 - 1,
        "real": 0.5,
    }
    assert got.metadata["flag"] is True
    assert got.tensors["a"].shape == (2, 4)
    assert got.tensors["b"].offset - got.tensors["a"].offset == 32
    assert got.tensors["b"].nbytes == 6


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = raw(PAIRS, INFOS, 38)
    for length in range(len(whole)):
        refused(tmp_path / "x.gguf", whole[:length])


@pytest.mark.parametrize(
    "content",
    [
        raw(PAIRS, INFOS, 38, magic=b"GGML"),
        raw(PAIRS, INFOS, 38, counts=(2**63, 0)),
        raw(PAIRS, INFOS, 38, counts=(0, 2**64 - 1)),
        raw([PAIRS[0], PAIRS[0]], INFOS, 38),
        raw(PAIRS, [INFOS[0], INFOS[0]], 38),
        raw(PAIRS, [INFOS[0], info("b", (3,), 1, 0)], 38),
        raw(PAIRS, [INFOS[0], info("b", (3,), 1, 64)], 38),
        raw(PAIRS, [INFOS[0], info("b", (3,), 1, 16)], 38),
        raw(PAIRS, [info("a", (2**62, 2, 4))], 38),
        raw(PAIRS, [info("a", (2, 4), 0, 2**64 - 32)], 38),
        raw(PAIRS, [info("a", (0, 4))], 38),
        raw(PAIRS, [info("a", ())], 38),
        raw(PAIRS, [info("a", (1, 1, 1, 1, 1))], 38),
        raw(PAIRS, [info("a", (2, 48), 8)], 200),
        raw([pair("flag", 7, b"\2")], INFOS, 38),
        raw([pair("odd", 13, b"\0")], INFOS, 38),
        raw([pair("nested", 9, struct.pack("<IQIQ", 9, 1, 0, 0))], INFOS, 38),
        raw([pair("long", 9, struct.pack("<IQ", 5, 2**61))], INFOS, 38),
        raw([pair("long", 9, struct.pack("<IQ", 8, 2**23))], INFOS, 38),
        raw([pair("many", 9, struct.pack("<IQ", 0, 2**24 + 1))], INFOS, 38),
        raw([pair("bytes", 8, text(b"\xff\xfe"))], INFOS, 38),
        raw([pair("end", 8, struct.pack("<Q", 2**64 - 8))], INFOS, 38),
        raw([pair("general.alignment", 4, struct.pack("<I", 24))], INFOS, 38),
        raw([pair("general.alignment", 4, struct.pack("<I", 0))], INFOS, 38),
        raw([pair("general.alignment", 4, struct.pack("<I", 2**31))], INFOS, 38),
        raw([pair("general.alignment", 8, text("32"))], INFOS, 38),
        raw([pair("general.alignment", 7, b"\1")], INFOS, 38),
    ],
)
def test_lying_header(tmp_path: Path, content: bytes) -> None:
    refused(tmp_path / "x.gguf", content)


@pytest.mark.parametrize(
    "content",
    [
        raw(PAIRS, INFOS, 38, version=1),
        raw(PAIRS, INFOS, 38, version=4),
        raw(PAIRS, INFOS, 38, version=3 << 24),
        raw(PAIRS, [info("a", (2, 256), 16)], 1000),
    ],
)
def test_foreign_header(tmp_path: Path, content: bytes) -> None:
    refused(tmp_path / "x.gguf", content, UnsupportedModel)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32 - 1))
def test_flipped_bytes_are_refused_or_stay_within_the_file(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    content = bytearray(raw(PAIRS, INFOS, 38))
    for at in rng.integers(0, len(content), 3):
        content[at] = rng.integers(0, 256)
    try:
        got = header(tmp_path / "x.gguf", bytes(content))
    except (BadInput, UnsupportedModel):
        return
    assert all(t.offset + t.nbytes <= len(content) for t in got.tensors.values())
