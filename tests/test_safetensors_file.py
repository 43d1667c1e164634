"""The strict safetensors reader against the `safetensors` package and against liars."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from m2c.errors import BadInput, UnsupportedModel
from m2c.model.safetensors_file import SafetensorsFile

ENTRY = {"dtype": "F16", "shape": [2, 2], "data_offsets": [0, 8]}


def raw(header: Any, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def refused(path: Path, content: bytes, match: str | None = None) -> None:
    path.write_bytes(content)
    with pytest.raises(BadInput, match=match) as caught:
        SafetensorsFile(path)
    assert str(path) in caught.value.message


def test_reads_what_the_package_writes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(5, 3, generator=generator),
        "b": torch.randn(7, 2, 3, generator=generator).half(),
        "c": torch.randn(9, generator=generator).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "ints": torch.arange(3),
    }
    path = tmp_path / "m.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    file = SafetensorsFile(path)
    assert file.entries.keys() == tensors.keys()
    for name, expected in load_file(path).items():
        if name == "ints":
            continue
        got = file.read(name)
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
        if expected.dim() and len(expected) > 3:
            assert torch.equal(file.read(name, 1, 3), expected[1:3])
            assert file.read(name, 2, 2).shape == (0, *expected.shape[1:])
    with pytest.raises(UnsupportedModel, match="I64"):
        file.read("ints")


def test_rows_outside_are_an_index_error(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw({"a": ENTRY}, bytes(8)))
    file = SafetensorsFile(path)
    for start, stop in ((-1, 1), (0, 3), (2, 1)):
        with pytest.raises(IndexError):
            file.read("a", start, stop)
    with pytest.raises(KeyError):
        file.read("b")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    second = {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}
    whole = raw({"a": ENTRY, "b": second}, bytes(12))
    path.write_bytes(whole)
    assert SafetensorsFile(path).entries["b"].nbytes == 4
    for length in range(len(whole)):
        refused(path, whole[:length])
    refused(path, whole + b"\0", "its header describes")


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1, 100_000_001])
def test_lying_header_length(tmp_path: Path, length: int) -> None:
    refused(tmp_path / "m.safetensors", raw({"a": ENTRY}, bytes(8), length))


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "F17"},
        {"dtype": None},
        {"dtype": ["F16"]},
        {"shape": [2, 3]},
        {"shape": [2, True]},
        {"shape": [2, 2.0]},
        {"shape": [-2, -2]},
        {"shape": [2**63, 0]},
        {"shape": [2**62, 2**62]},
        {"shape": "22"},
        {"shape": [1] * 9},
        {"data_offsets": [0, 9]},
        {"data_offsets": [8, 0]},
        {"data_offsets": [-8, 0]},
        {"data_offsets": [8, 16]},
        {"data_offsets": [False, 8]},
        {"data_offsets": [0, 8, 8]},
        {"data_offsets": None},
        {"extra": 1},
    ],
)
def test_lying_entry(tmp_path: Path, change: dict[str, Any]) -> None:
    refused(tmp_path / "m.safetensors", raw({"a": ENTRY | change}, bytes(8)))


@pytest.mark.parametrize(
    ("header", "nbytes"),
    [
        ({"a": ENTRY, "b": ENTRY}, 8),
        ({"a": ENTRY, "b": ENTRY | {"data_offsets": [4, 12]}}, 12),
        ({"a": ENTRY, "b": ENTRY | {"data_offsets": [12, 20]}}, 20),
        ({"a": ENTRY}, 16),
        ({"a": {"dtype": "F16", "shape": [2, 2]}}, 8),
        ({"a": []}, 0),
        ({"a": ENTRY, "__metadata__": {"x": 1}}, 8),
        ({"a": ENTRY, "__metadata__": None}, 8),
        (b'{"a": {"dtype":"F16","shape":[0],"data_offsets":[0,0]}, "a": 1}', 0),
        (b" {}", 0),
        (b"[]", 0),
        (b"{}}", 0),
        (b'{"\xff": 1}', 0),
    ],
)
def test_lying_header(tmp_path: Path, header: Any, nbytes: int) -> None:
    refused(tmp_path / "m.safetensors", raw(header, bytes(nbytes)))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32 - 1))
def test_flipped_bytes_are_refused_or_read_within_the_file(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    second = {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}
    content = bytearray(raw({"a": ENTRY, "b": second}, bytes(12)))
    for at in rng.integers(0, len(content), 3):
        content[at] = rng.integers(0, 256)
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    try:
        file = SafetensorsFile(path)
        for name in file.entries:
            file.read(name)
    except (BadInput, UnsupportedModel):
        pass


def test_file_cut_after_opening(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw({"a": ENTRY}, bytes(8)))
    file = SafetensorsFile(path)
    os.truncate(path, path.stat().st_size - 3)
    assert file.read("a", 0, 1).shape == (1, 2)
    with pytest.raises(BadInput, match=r"m\.safetensors: ends at byte"):
        file.read("a")


def test_things_that_are_not_files(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (tmp_path / "absent", tmp_path, fifo):
        with pytest.raises(BadInput, match=str(path)):
            SafetensorsFile(path)
