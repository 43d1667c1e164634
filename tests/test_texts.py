"""The shipped texts, and the reader of R data that scripts/make_texts.py gets them with."""

import importlib.util
import struct
from pathlib import Path
from types import ModuleType

import pytest

from m2c.data import calibration_text

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_texts", ROOT / "scripts/make_texts.py")
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_texts_are_plain_prose_and_share_no_paragraph() -> None:
    evaluation = (ROOT / "tests/data/austen_eval.txt").read_text(encoding="utf-8")
    for text, nbytes in ((calibration_text(), 300_000), (evaluation, 80_000)):
        assert nbytes * 0.95 < len(text.encode()) <= nbytes
        assert not set(text) & set("\r\t\ufeff\ufffd_")
        assert text.endswith("\n")
        paragraphs = text.strip().split("\n\n")
        assert not any("\n\n" in paragraph or not paragraph.strip() for paragraph in paragraphs)
    shared = set(calibration_text().split("\n")) & set(evaluation.split("\n"))
    assert not [line for line in shared if len(line) > 40]


def serialised(body: bytes) -> bytes:
    """R's XDR format, version 3, written by R 4.2.1."""
    return b"X\n" + struct.pack(">iiii", 3, 0x040201, 0x030500, 5) + b"UTF-8" + body


def strings(*values: str) -> bytes:
    parts = (struct.pack(">ii", 0x40009, len(v.encode())) + v.encode() for v in values)
    return struct.pack(">ii", 0x10, len(values)) + b"".join(parts)


def test_r_strings_and_named_lists(script: ModuleType) -> None:
    assert script.Serialised(serialised(strings("a", "", "é"))).value() == ["a", "", "é"]
    names_symbol = struct.pack(">iii", 1, 0x40009, 5) + b"names"
    named_list = (
        struct.pack(">ii", 0x213, 2)
        + strings("x")
        + struct.pack(">iiii", 0x0D, 2, -7, 9)
        + struct.pack(">i", 0x402)
        + names_symbol
        + strings("first", "second")
        + struct.pack(">i", 0xFE)
    )
    value = script.Serialised(serialised(named_list)).value()
    assert value == {"first": ["x"], "second": [-7, 9]}


@pytest.mark.parametrize("body", [b"", struct.pack(">ii", 0x10, 9), struct.pack(">ii", 0x18, 1)])
def test_r_data_that_is_cut_or_unknown_ends_the_script(script: ModuleType, body: bytes) -> None:
    with pytest.raises(SystemExit):
        script.Serialised(serialised(body)).value()


def test_unwrapping(script: ModuleType) -> None:
    lines = ["CHAPTER I", "", "", "It was _her_", "  father.", "", "Yes."]
    assert script.unwrap(lines) == ["CHAPTER I", "It was her father.", "Yes."]
    # whole paragraphs only
    assert script.excerpt(lines, 30) == "CHAPTER I\n\nIt was her father.\n"
    assert script.excerpt(lines, 28) == "CHAPTER I\n"
