"""Small files that ask for much: bounded before the memory or the time is spent (R11, R12).

What a file claims is in other tests; here it says the truth, and there is a lot of it.
"""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile_files as files
import pytest
from hostile import judge
from vocabularies import llama_pieces, spm_model

from m2c.bundle.strict import load_json
from m2c.errors import M2CError
from m2c.model.gguf_header import read_header
from m2c.model.ranged_file import RangedFile
from m2c.tokenizer import MOST_GROWTH, Tokenizer
from m2c.tokenizer_spm import convert_tokenizer_model


def refused(read: Callable[[], Any], match: str, nbytes: int = 0) -> None:
    found = judge(read, match, nbytes)
    assert isinstance(found, M2CError)
    assert match in found.message


def spm(data: bytes) -> Callable[[], Any]:
    return lambda: convert_tokenizer_model(data, source="t")


def test_a_vocabulary_that_joins_in_half_a_million_ways() -> None:
    """Half a megabyte, of which 1.5 GB of merges would be made."""
    every = [("a" * i, -1000.0 - i, 1) for i in range(2, 1024)]
    refused(spm(spm_model([*llama_pieces("▁ a"), *every])), "too many ways to join", 1 << 20)


def test_a_large_tokenizer_model() -> None:
    """Two bytes a field become a hundred bytes and a microsecond each: few bytes are accepted."""
    refused(spm(bytes(17 << 20)), "more than any tokenizer.model holds")


def test_lists_of_a_gguf(tmp_path: Path) -> None:
    path, count = tmp_path / "m.gguf", 3 << 20
    head = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 0, count)
    path.write_bytes(head + bytes(count))
    refused(lambda: read_header(RangedFile(path)), f"k claims an array of {count} items", count)


@pytest.mark.parametrize("item", ["[]", "{}", "1", '""'])
def test_json_of_many_values(item: str) -> None:
    data = f"[{(item + ',') * (5 << 20)}0]".encode()
    refused(lambda: load_json(data, file="f"), "JSON values")


def test_a_key_that_comes_back_late() -> None:
    """Looking for it took the square of the keys before it: an hour for these."""
    data = ("{" + ",".join(f'"{i}":1' for i in range(200_000)) + ',"199999":1}').encode()
    refused(lambda: load_json(data, file="f"), "duplicate key '199999'", len(data))


def replacing(times: int) -> dict[str, Any]:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    return {"type": "Sequence", "normalizers": [step] * times}


def nested(times: int) -> dict[str, Any]:
    found = replacing(1)
    for _ in range(times):
        found = {"type": "Sequence", "normalizers": [found, replacing(1)]}
    return found


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
MAPS = {"type": "Precompiled", "precompiled_charsmap": ""}
LONG = {"type": "Replace", "pattern": {"Regex": "b*"}, "content": "b" * 5000}
TOKEN = {"id": "<s>", "ids": [0] * 1000, "tokens": ["<s>"] * 1000}
TEMPLATE = {
    "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * 1000,
    "pair": [], "special_tokens": {"<s>": TOKEN},
}  # fmt: skip

DOUBLE = files.tokenizers()[0]["post_processor"]


@pytest.mark.parametrize(
    ("part", "step"),
    [
        ("normalizer", replacing(40)),
        ("normalizer", nested(60)),
        ("normalizer", LONG),
        ("normalizer", {"type": "Sequence", "normalizers": [MAPS, MAPS]}),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFKD"}, replacing(1)] * 5}),
        ("normalizer", {"type": "Prepend", "prepend": "a" * 5000}),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [BYTES] * 40}),
        ("decoder", {"type": "Sequence", "decoders": replacing(40)["normalizers"]}),
        ("post_processor", TEMPLATE),
        ("post_processor", {"type": "Sequence", "processors": [DOUBLE] * 40}),
    ],
)  # fmt: skip
def test_steps_that_multiply_a_text(part: str, step: dict[str, Any]) -> None:
    """The engine would end the process, or fill the memory first."""
    data = json.dumps({**files.tokenizers()[0], part: step}).encode()
    refused(
        lambda: Tokenizer.from_json(data, source="t"),
        f"its {part} makes a text more than {MOST_GROWTH}",
    )


def test_steps_of_published_tokenizers_are_taken() -> None:
    for document in files.tokenizers():
        made = Tokenizer.from_json(json.dumps(document).encode(), source="t")
        assert made.encode("ab")
    # as ALBERT has it, the one that grows most
    steps = [
        {"type": "Replace", "pattern": {"String": "``"}, "content": '"'}, {"type": "NFKD"},
        {"type": "StripAccents"}, {"type": "Lowercase"},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
    ]  # fmt: skip
    albert = {**files.tokenizers()[2], "normalizer": {"type": "Sequence", "normalizers": steps}}
    assert Tokenizer.from_json(json.dumps(albert).encode(), source="t").encode("ab")


def test_a_panic_of_the_engine_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    """Its Rust prints where it was; what is wrong with the file is in the error."""
    document = files.tokenizers()[0]
    document["post_processor"]["special_tokens"] = {}
    refused(lambda: Tokenizer.from_json(json.dumps(document).encode(), source="t"), "not a usable")
    assert capfd.readouterr().err == ""


def test_a_panic_with_little_memory_ends(tmp_path: Path) -> None:
    """Where Rust is asked to say where it was, it needs memory for that, and waited for itself."""
    document = files.tokenizers()[0]
    document["post_processor"]["special_tokens"] = {}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    code = (
        "import sys; from pathlib import Path; from hostile import judge\n"
        "from m2c.tokenizer import Tokenizer\n"
        "data = Path(sys.argv[1]).read_bytes()\n"
        "print(judge(lambda: Tokenizer.from_json(data, source='t'), 't'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "tokenizer.json")], timeout=60,
        capture_output=True, text=True, check=True,
        env={**os.environ, "RUST_BACKTRACE": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert "not a usable tokenizer" in done.stdout
