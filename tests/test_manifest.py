"""The manifest and the strict reader behind it: only what we wrote, exactly as we wrote it."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2c.bundle.bundle import Bundle, open_bundle
from m2c.bundle.manifest import (
    MANIFEST,
    FileFact,
    Manifest,
    MixChoice,
    ShardFact,
    Source,
    encode_manifest,
    read_manifest,
    write_manifest,
)
from m2c.bundle.strict import decode, dump_json, load_json
from m2c.errors import BadInput, M2CError

EXAMPLE = Manifest(
    created_by="m2c 0",
    name="tiny",
    recipe="r" * 64,
    exact_type="bf16",
    source=Source("tiny", "f" * 64, "bf16"),
    architecture={"hidden_size": 64, "rope_scaling": None, "eos_token_ids": [1, 2]},
    mix=MixChoice((5, 15, 80), "error", 5.5, 0.034),
    shards={"dense/00000.int4": ShardFact(9, "a" * 64, "b" * 32)},
    files={"model/config.json": FileFact(7, "c" * 64)},
    quality={"kl": 0.5, "ppl": 7.0},
)


def test_round_trip(tmp_path: Path) -> None:
    write_manifest(tmp_path, EXAMPLE)
    assert read_manifest(tmp_path) == EXAMPLE
    assert (tmp_path / MANIFEST).read_bytes() == encode_manifest(EXAMPLE)


def test_equal_facts_are_equal_bytes() -> None:
    shuffled = replace(EXAMPLE, architecture=dict(reversed(EXAMPLE.architecture.items())))
    assert encode_manifest(shuffled) == encode_manifest(EXAMPLE)


@given(name=st.text(), numbers=st.dictionaries(st.text(), st.floats(0, 1e30), max_size=3))
def test_any_text_survives(
    tmp_path_factory: pytest.TempPathFactory, name: str, numbers: dict[str, float]
) -> None:
    folder = tmp_path_factory.mktemp("manifest")
    manifest = replace(EXAMPLE, name=name, quality=numbers)
    write_manifest(folder, manifest)
    assert read_manifest(folder) == manifest


def forge(folder: Path, change: Callable[[dict[str, Any]], None], *, sign: bool = True) -> Path:
    """A manifest with other facts; with `sign` its checksum is right."""
    facts = json.loads(encode_manifest(EXAMPLE))
    checksum = facts.pop("checksum")
    change(facts)
    if sign:
        checksum = hashlib.sha256(dump_json(facts)).hexdigest()
    (folder / MANIFEST).write_bytes(dump_json({**facts, "checksum": checksum}) + b"\n")
    return folder


@pytest.mark.parametrize(
    ("old", "new"), [(b"1e-05", b"1E-05"), (b"\\u00e4", b"\\u00E4"), (b"\n", b""), (b"\n", b"\n\n")]
)
def test_other_bytes_for_the_same_facts_are_refused(tmp_path: Path, old: bytes, new: bytes) -> None:
    """The first two differ in one bit, and the checksum of the facts is right."""
    write_manifest(tmp_path, replace(EXAMPLE, name="\xe4", quality={"kl": 1e-5}))
    data = (tmp_path / MANIFEST).read_bytes()
    assert data.count(old) == 1
    (tmp_path / MANIFEST).write_bytes(data.replace(old, new))
    with pytest.raises(BadInput, match="damaged"):
        read_manifest(tmp_path)


def put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change: the fact at `path` (keys joined by dots) becomes `value`."""

    def change(facts: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for key in parents:
            facts = facts[key]
        facts[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("surprise", 1),
        ("source.surprise", 1),
        ("mix.surprise", 1),
        ("name", 1),
        ("name", None),
        ("exact_type", ["bf16"]),
        ("source", []),
        ("architecture", None),
        ("shards", []),
        ("shards", {"a": None}),
        ("shards", {"a": {"nbytes": 1, "sha256": "x"}}),
        ("files", {"a": {"nbytes": -1, "sha256": "x"}}),
        ("files", {"a": {"nbytes": 1 << 62, "sha256": "x"}}),
        ("files", {"a": {"nbytes": True, "sha256": "x"}}),
        ("files", {"a": {"nbytes": 1.0, "sha256": "x"}}),
        ("mix.percent", [5, 15, 81]),
        ("mix.percent", [5, 95]),
        ("mix.percent", [-5, 25, 80]),
        ("mix.percent", [5.0, 15, 80]),
        ("mix.percent", "515"),
        ("mix.bits_per_weight", "5"),
        ("mix.bits_per_weight", 1 << 62),
        ("quality", {"a": None}),
        ("quality", {"a": True}),
        ("version", True),
        ("version", 1.0),
    ],
)
def test_facts_of_a_wrong_kind(tmp_path: Path, path: str, value: Any) -> None:
    with pytest.raises(BadInput, match=r"manifest\.json: "):
        read_manifest(forge(tmp_path, put(path, value)))


def drop(key: str, facts: dict[str, Any]) -> None:
    del facts[key]


def test_every_key_is_needed(tmp_path: Path) -> None:
    for key in ("created_by", "name", "recipe", "exact_type", "source", "mix", "shards", "files"):
        with pytest.raises(BadInput, match=f"'{key}' is missing"):
            read_manifest(forge(tmp_path, partial(drop, key)))


ESCAPES = (
    "../outside", "/etc/passwd", "..", ".", "", "a/../../b", "a/b/c", "dense/../x", ".hidden",
    "dense/.hidden", "a\\b", "a\0b", "x" * 201, "//a", "./a/../../b",
)  # fmt: skip


@pytest.mark.parametrize("name", ESCAPES)
@pytest.mark.parametrize("kind", ["shards", "files"])
def test_names_that_leave_the_bundle(tmp_path: Path, kind: str, name: str) -> None:
    fact = {"nbytes": 1, "sha256": "x"} | ({"digest": "y"} if kind == "shards" else {})
    with pytest.raises(BadInput, match="is not a name inside a bundle"):
        read_manifest(forge(tmp_path, put(kind, {name: fact})))


def test_a_changed_fact_breaks_the_checksum(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="damaged"):
        read_manifest(forge(tmp_path, put("name", "other"), sign=False))


def test_every_changed_byte_is_refused(tmp_path: Path) -> None:
    data = encode_manifest(EXAMPLE)
    for at in range(len(data) - 1):  # the last byte is a newline, white space means nothing
        for flip in (1, 32):
            damaged = bytearray(data)
            damaged[at] ^= flip
            (tmp_path / MANIFEST).write_bytes(damaged)
            with pytest.raises(BadInput, match="manifest"):
                read_manifest(tmp_path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    data = encode_manifest(EXAMPLE)
    for length in range(len(data) - 1):
        (tmp_path / MANIFEST).write_bytes(data[:length])
        with pytest.raises(BadInput, match="manifest"):
            read_manifest(tmp_path)


@pytest.mark.parametrize("version", [0, 2, 4, "3", None])
def test_another_version_says_which(tmp_path: Path, version: Any) -> None:
    with pytest.raises(BadInput, match=f"bundle format {version!r}, this m2c reads 3"):
        read_manifest(forge(tmp_path, put("version", version)))


def test_what_is_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not a complete bundle") as caught:
        read_manifest(tmp_path)
    assert "m2c pack" in caught.value.hint
    for text in ("", "[]", "null", "{", '{"format": "gguf"}', '{"format": "m2c-bundle"}'):
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(BadInput, match="manifest"):
            read_manifest(tmp_path)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    write_manifest(tmp_path, EXAMPLE)
    (tmp_path / MANIFEST).rename(tmp_path / "elsewhere")
    (tmp_path / MANIFEST).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(M2CError, match="manifest"):
        read_manifest(tmp_path)


def test_a_shard_must_be_the_manifests(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Two shards that are each intact, exchanged."""
    for name in ("dense", "neurons"):
        (tmp_path / name).mkdir()
    for name in tiny_bundle.manifest.shards:
        (tmp_path / name).hardlink_to(tiny_bundle.path / name)
    (tmp_path / MANIFEST).hardlink_to(tiny_bundle.path / MANIFEST)
    assert open_bundle(tmp_path).manifest == tiny_bundle.manifest
    first, second = (tmp_path / "neurons" / f"0000{i}.int4" for i in range(2))
    first.rename(tmp_path / "kept")
    second.rename(first)
    (tmp_path / "kept").rename(second)
    with pytest.raises(BadInput, match="not the shard that the manifest names"):
        open_bundle(tmp_path)


# -- strict JSON -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inner:
    count: int
    ratio: float = 0.5


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner | None
    items: tuple[Inner, ...]
    table: dict[str, int]
    flag: bool = False


GOOD: dict[str, Any] = {
    "name": "x", "inner": {"count": 1}, "items": [{"count": 2, "ratio": 3}], "table": {"a": 4},
}  # fmt: skip


def test_decode_builds_nested_facts() -> None:
    expected = Outer("x", Inner(1), (Inner(2, 3.0),), {"a": 4})
    assert decode(Outer, GOOD, file="f") == expected
    assert decode(Outer, {**GOOD, "inner": None, "flag": True}, file="f").inner is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 1}, "f: name must be of type str"),
        ({"inner": {"count": True}}, r"f: inner\.count must be of type int"),
        ({"inner": {"count": 1.0}}, r"f: inner\.count must be of type int"),
        ({"inner": {"count": -1}}, r"f: inner\.count is out of range"),
        ({"inner": {"count": 1 << 62}}, r"f: inner\.count is out of range"),
        ({"inner": {"count": 1, "ratio": 1 << 62}}, r"f: inner\.ratio is out of range"),
        ({"inner": {"count": 1, "x": 1}}, r"f: unknown key inner\.'x'"),
        ({"inner": {}}, r"f: key inner\.'count' is missing"),
        ({"inner": []}, r"f: inner\. must be an object"),
        ({"items": {}}, "f: items must be a list"),
        ({"items": [{"count": 1}, {"count": "1"}]}, r"f: items\[1\]\.count must be of type int"),
        ({"table": []}, "f: table must be an object"),
        ({"table": {"a": "1"}}, r"f: table\.a must be of type int"),
        ({"flag": 1}, "f: flag must be of type bool"),
        ({"extra": 1}, "f: unknown key 'extra'"),
    ],
)
def test_decode_names_the_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        decode(Outer, {**GOOD, **change}, file="f")


@pytest.mark.parametrize("value", [None, [], 1, "x"])
def test_decode_wants_an_object(value: Any) -> None:
    with pytest.raises(BadInput, match="the top level must be an object"):
        decode(Outer, value, file="f")


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 2}',
        '{"b": {"a": 1, "a": 1}}',
        '{"a": NaN}',
        '{"a": Infinity}',
        '{"a": -Infinity}',
        '{"a": 1e999}',
        '{"a": -1e999}',
        "{'a': 1}",
        '{"a": 1,}',
        "",
        "[" * 100_000,
        '{"a": ' + "9" * 5000 + "}",
    ],
)
def test_json_that_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="f: not valid JSON"):
        load_json(text.encode(), file="f")


def test_json_of_other_encodings_is_refused() -> None:
    for data in (
        b'"\xff"',
        '"é"'.encode("latin-1"),
        b"\xef\xbb\xbf{}",
        '{"a": 1}'.encode("utf-16"),
    ):
        with pytest.raises(BadInput, match="f: not valid JSON"):
            load_json(data, file="f")


def test_dump_is_canonical() -> None:
    assert dump_json({"b": [1, 2.5], "a": "é"}) == b'{"a":"\\u00e9","b":[1,2.5]}'
    with pytest.raises(ValueError):
        dump_json(float("nan"))
