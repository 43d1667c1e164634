"""What hostile input once did to m2c, case by case: each crashed, hung, took memory without bound,
or was accepted where other readers refuse it.
"""

import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import hostile_files as files
import numpy as np
import pytest
from command_line import m2c
from hostile import judge
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from m2c.bundle.bundle import open_bundle
from m2c.bundle.files import read_small
from m2c.bundle.importance import decode_importance, encode_importance
from m2c.bundle.manifest import (
    FileFact,
    Manifest,
    MixChoice,
    Source,
    read_manifest,
    write_manifest,
)
from m2c.bundle.shard import read_index
from m2c.bundle.strict import parse_object
from m2c.bundle.tensors import load_tensors
from m2c.cli.console import plain
from m2c.contents import config_of, importance_of, vectors_of
from m2c.errors import BadInput
from m2c.hub import find_model
from m2c.model.hf_folder import HfFolder, small_files, weight_map
from m2c.model.safetensors_file import SafetensorsFile


def refused(read: Any, match: str = "") -> None:
    found = judge(read, match)
    assert isinstance(found, BadInput)
    assert match in found.message


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ('"empty"', '"\\ud800"', "half a character"),
        ('"format"', '"\\udfff"', "half a character"),
        ("[0, 4]", "[-0, 4]", "-0 is not an integer"),
    ],
)
def test_headers_that_only_m2c_took(tmp_path: Path, old: str, new: str, match: str) -> None:
    header = files.safetensors_header()
    text = json.dumps(header).replace(old, new).encode()
    content = files.with_length(text, bytes(files.data_nbytes(header)))
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(SafetensorError):
        deserialize(content)
    refused(lambda: SafetensorsFile(tmp_path / "m"), match)


def test_nesting_that_can_be_read_but_not_written() -> None:
    """Reading and writing JSON give up at different depths."""
    for depth in range(100, 1100, 7):
        text = '{"\\ud83d\\ude00": ' + "[" * depth + "]" * depth + "}"
        judge(lambda text=text: parse_object(text.encode(), "f"), f"{depth} levels")


def test_only_plain_names_travel_into_a_bundle() -> None:
    """A bundle with others would be refused when it is read."""
    names = [
        "LICENSE",
        "NOTICE.txt",
        "LICENSE\x1b[2J",
        "LICENSE\\x",
        "LICENSE" + "x" * 300,
        "LICENSE\n",
    ]
    assert list(small_files(names)) == ["LICENSE", "NOTICE.txt"]


def test_names_without_end(tmp_path: Path) -> None:
    """They came back whole in the error: ten thousand letters for a terminal."""
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}
    for changes in ({}, {"shape": [2]}, {"dtype": "F7"}, {"x": 1}):
        header = json.dumps({"a" * 10_000: entry | changes}).encode()
        (tmp_path / "m").write_bytes(files.with_length(header, bytes(8)))
        refused(lambda: SafetensorsFile(tmp_path / "m"))
    refused(lambda: weight_map(json.dumps({"weight_map": {"a": "x" * 9999}}).encode(), "f"))


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    for read in (lambda: read_small(path, limit=9), lambda: read_index(path)):
        found: list[str] = []
        waiting = threading.Thread(target=note, args=(read, found), daemon=True)
        waiting.start()
        waiting.join(20)
        assert found == [f"{path}: not a regular file"]


def note(read: Any, found: list[str]) -> None:
    try:
        read()
    except BadInput as error:
        found.append(error.message)


def test_a_small_file_takes_little_memory(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    assert judge(lambda: read_small(tmp_path / "x", limit=1 << 30), "a limit of a gigabyte") == b"x"


def test_a_link_is_named_as_one(tmp_path: Path) -> None:
    """It was an input/output error about too many levels of links."""
    (tmp_path / "link").symlink_to(tmp_path)
    refused(
        lambda: read_small(tmp_path / "link", limit=9), "a symbolic link, which is not followed"
    )


def test_a_link_to_itself_among_the_files_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to(tmp_path / "config.json")
    refused(lambda: HfFolder(tmp_path), "leads nowhere")


def test_a_folder_of_a_bundle_that_is_a_link(tmp_path: Path) -> None:
    manifest = Manifest(
        "m2c", "x", "r", "bf16", Source("x", "f", "bf16"), {},
        MixChoice((0, 25, 75), "given", 5.5, 0.0), {}, {"model/config.json": FileFact(1, "x")},
    )  # fmt: skip
    write_manifest(tmp_path, manifest)
    (tmp_path / "model").symlink_to("/")
    refused(lambda: read_manifest(tmp_path), "a link, and all of a bundle lies in its folder")


def test_a_manifest_that_names_no_profile(bundle: Path) -> None:
    """A KeyError, and so an internal error."""
    opened = open_bundle(bundle)
    empty = replace(opened, manifest=replace(opened.manifest, files={}))
    refused(lambda: importance_of(empty), "holds no importance.safetensors")
    refused(lambda: vectors_of(empty, config_of(opened)), "holds no vectors.safetensors")


def test_arrays_that_numpy_cannot_hold() -> None:
    """The package reads the header; numpy then raised what nobody expected."""
    honest = save({"a": np.zeros((0, 4), np.float32)})
    for new in (b"[0,9223372036854775808]", b"[9223372036854775807,0,2]"):
        text = honest[8:].replace(b"[0,4]", new)
        refused(lambda text=text: load_tensors(files.with_length(text, b""), Path("f")))
    bf16 = b'{"a":{"dtype":"F8_E5M2","shape":[1],"data_offsets":[0,1]}}'
    refused(lambda: load_tensors(files.with_length(bf16, b"x"), Path("f")))


CHANGES = {
    "attn_input": np.zeros(3), "sample": np.zeros((2, 3)), "overlap": np.zeros(1),
    "coverage_own": np.zeros(5), "coverage_static": np.full(101, 1e38), "frequency": 5.0,
    "o_directions": np.zeros((1, 1)), "down_norm": np.zeros(()), "order": np.zeros(()),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_profiles_of_no_model(tiny_importance: Any, name: str) -> None:
    """`m2c show` divided, indexed and multiplied by what they say."""
    layer = tiny_importance.layers[0]
    old = getattr(layer, name)
    value = np.broadcast_to(CHANGES[name], old.shape) if name == "frequency" else CHANGES[name]
    object.__setattr__(layer, name, np.ascontiguousarray(value, old.dtype))
    data = encode_importance(tiny_importance)
    object.__setattr__(layer, name, old)
    refused(
        lambda: decode_importance(data, Path("p")), "p: layer 0 has" if name != "order" else "p: "
    )


@pytest.fixture
def tiny_importance(bundle: Path) -> Any:
    return decode_importance((bundle / "importance.safetensors").read_bytes(), Path("p"))


def test_an_index_in_the_cache_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was read whole, whatever it was."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40
    folder = tmp_path / "models--a--b" / "snapshots" / commit
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").symlink_to("/dev/zero")
    refused(lambda: find_model(f"a/b@{commit}"), "not a regular file")


def test_escape_sequences_reach_no_terminal(tmp_path: Path) -> None:
    assert plain("a\x1b[2J\u202e\n\tb") == "a\\x1b[2J\\u202e\n\tb"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "\x1b]0;owned\x07\n\u2028x"}))
    said = m2c("plan", tmp_path)
    assert said.code == 3
    assert said.reason.isprintable()


def test_markup_in_names_is_shown_as_it_is(bundle: Path, tmp_path: Path) -> None:
    """A closing tag without an opening one ended `m2c show` with an internal error."""
    importance = decode_importance((bundle / "importance.safetensors").read_bytes(), Path("p"))
    object.__setattr__(importance.calibration, "model", "[/x][link=http://e]\x1b[2J")
    (tmp_path / "p.safetensors").write_bytes(encode_importance(importance))
    said = m2c("show", tmp_path / "p.safetensors")
    assert said.code == 0, said.err
    assert "\x1b[2J" not in said.out
    assert "[/x]" in said.out
