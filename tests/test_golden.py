"""Bundles written in the past open today, and a reader written from docs/FORMAT.md agrees.

The golden files are never regenerated: tests/golden/README.md.
"""

import hashlib
import importlib.util
import json
import shutil
import struct
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import independent_reader as other
import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from safetensors import safe_open
from safetensors.numpy import load, save
from tiny_models import pack_folder, write_checkpoint

from m2c.bundle.bundle import Bundle, open_bundle
from m2c.bundle.importance import decode_importance, read_importance
from m2c.bundle.shard import read_index
from m2c.check import check_bundle, compare_with_source, exact_section
from m2c.contents import config_of, importance_of, tokenizer_of, vectors_of
from m2c.errors import BadInput
from m2c.model.attention import MATRICES
from m2c.model.checkpoint import open_checkpoint
from m2c.model.experts import SHARED
from m2c.model.tensors import ffn_names
from m2c.tiers.blocks import block_of
from m2c.tiers.memory import aligned_buffer
from m2c.tiers.ssd import SsdReader

GOLDEN = Path(__file__).parent / "golden" / "v3"
BUNDLE = GOLDEN / "golden.m2c"
EXPECTED: dict[str, npt.NDArray[Any]] = dict(np.load(GOLDEN / "expected.npz", allow_pickle=False))
SECTIONS = [name.removeprefix("int4/") for name in EXPECTED if name.startswith("int4/")]
RECORDS = [0, 3, -1]


@cache
def make_golden_script() -> ModuleType:
    scripts = Path(__file__).parents[1] / "scripts"
    spec = importlib.util.spec_from_file_location("make_golden", scripts / "make_golden.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(scripts))  # it imports its neighbour
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(scripts))
    return module


def key_of(shard: str) -> tuple[str, int | str]:
    kind, name = shard.split("/")
    return kind, int(name) if name.isdigit() else name


def values_at(bundle: Bundle, shard: str, section: str, precision: str) -> npt.NDArray[np.float32]:
    """What m2c computes with: f32 [records, vectors, length] at "int4" or "int8"."""
    block = block_of(bundle, *key_of(shard), precision)
    buffer = aligned_buffer(block.streamed_nbytes)
    reader = SsdReader(1)
    block.read(reader, buffer).wait()
    reader.close()
    rows = block.rows(buffer)[section]
    return np.array(rows.values(0, len(rows)).numpy())


def same_bits(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> bool:
    """Also tells -0 from +0."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def assert_readers_agree(bundle: Bundle, but: tuple[int, ...] = ()) -> None:
    """Every section of every shard, all three planes. but: layers that are left out."""
    for shard in other.shard_groups(other.read_manifest(bundle.path)):
        if key_of(shard)[1] in but:
            continue
        for section in other.read_shard(bundle.path / f"{shard}.int4").sections:
            int4, int8, bits = other.read_section(
                bundle.path, shard, section, bundle.manifest.exact_type
            )
            assert same_bits(values_at(bundle, shard, section, "int4"), int4)
            assert same_bits(values_at(bundle, shard, section, "int8"), int8)
            restored = exact_section(bundle, *key_of(shard), section)
            assert same_bits(restored, bits.reshape(len(bits), -1))


def golden_weights(shard: str, section: str) -> npt.NDArray[np.uint16]:
    """The records [records, weights] that the format prescribes, from the checkpoint's tensors."""
    kind, name = key_of(shard)
    if name == "embed":
        return EXPECTED["weights/model.embed_tokens.weight"]
    assert isinstance(name, int)
    if kind == "dense":
        return EXPECTED[f"weights/model.layers.{name}.self_attn.{section}.weight"]
    gate, up, down = (EXPECTED[f"weights/{tensor}"] for tensor in ffn_names(name))
    order = importance_of(open_bundle(BUNDLE)).layers[name].order
    return np.concatenate((gate, up, down.T), axis=1)[order]


def test_golden_bundle_is_sound() -> None:
    assert list(check_bundle(BUNDLE, read_data=True)) == []


def test_golden_bundle_covers_every_shard() -> None:
    shards = {section.rpartition("/")[0] for section in SECTIONS}
    assert sorted(shards) == other.shard_groups(other.read_manifest(BUNDLE))


def test_golden_side_files_are_read() -> None:
    bundle = open_bundle(BUNDLE)
    for name, vector in vectors_of(bundle, config_of(bundle)).items():
        bits = EXPECTED[f"weights/{name}"].astype(np.uint32) << 16
        assert same_bits(vector.numpy(), bits.view(np.float32))
    tokenizer = tokenizer_of(bundle)
    assert tokenizer.decode(tokenizer.encode("golden")).endswith("golden")


@pytest.mark.parametrize("name", SECTIONS)
def test_golden_planes_decode_to_what_they_did(name: str) -> None:
    shard, _, section = name.rpartition("/")
    bundle = open_bundle(BUNDLE)
    for precision in ("int4", "int8"):
        values = values_at(bundle, shard, section, precision)
        assert same_bits(values[RECORDS], EXPECTED[f"{precision}/{name}"])
    weights = golden_weights(shard, section)
    assert np.array_equal(exact_section(bundle, *key_of(shard), section), weights)


def test_independent_reader_agrees_on_golden() -> None:
    assert_readers_agree(open_bundle(BUNDLE))


def test_independent_reader_finds_the_digests_of_the_manifest() -> None:
    for name, fact in other.read_manifest(BUNDLE)["shards"].items():
        assert other.read_shard(BUNDLE / name).digest == fact["digest"]


def test_independent_reader_agrees_over_many_blocks(deep_bundle: Bundle) -> None:
    """Shards of several checksum blocks, frames of several records, a head of its own."""
    assert "dense/head.fp16" in deep_bundle.shards
    assert max(len(index.block_hashes) for index in deep_bundle.shards.values()) > 1
    # the other reader is slow, and the layers between are of the same shape
    assert_readers_agree(deep_bundle, but=(1, 2, 3, 4, 5, 6))


def test_independent_reader_agrees_on_shared_experts(tmp_path: Path) -> None:
    shape = {
        "model_type": "qwen2_moe", "num_experts": 2, "num_experts_per_tok": 1,
        "moe_intermediate_size": 40, "shared_expert_intermediate_size": 50, "num_hidden_layers": 1,
    }  # fmt: skip
    bundle = pack_folder(write_checkpoint(tmp_path / "checkpoint", shape), tmp_path / "a.m2c")
    assert [*other.read_shard(bundle.path / "dense/00000.fp16").sections] == [*MATRICES, SHARED]
    assert_readers_agree(bundle)


@pytest.mark.parametrize("exact_type", ["bf16", "f16"])
def test_packing_the_golden_checkpoint_today(exact_type: str, tmp_path: Path) -> None:
    """Every byte of every shard is what it was, save headers that name another checkpoint."""
    script = make_golden_script()
    prefix = "weights/"
    bits = {k.removeprefix(prefix): v for k, v in EXPECTED.items() if k.startswith(prefix)}
    if exact_type == "f16":  # beyond its range: pack would refuse it
        bits["model.embed_tokens.weight"] = bits["model.embed_tokens.weight"].copy()
        bits["model.embed_tokens.weight"][3, 5] = 0
    script.write_checkpoint(tmp_path / "golden", bits)
    checkpoint = open_checkpoint(tmp_path / "golden")
    known, _ = read_importance(GOLDEN / "importance.safetensors")
    script.pack_checkpoint(checkpoint, known, tmp_path / "new.m2c", exact_type=exact_type)
    bundle = open_bundle(tmp_path / "new.m2c")
    assert_readers_agree(bundle)
    assert list(compare_with_source(bundle, checkpoint)) == []
    if exact_type == "bf16":
        for name, fact in open_bundle(BUNDLE).manifest.shards.items():
            old, new = ((p / name).read_bytes() for p in (BUNDLE, bundle.path))
            # the header holds the recipe, and the recipe the checkpoint's own header
            assert old[4096:] == new[4096:], f"{name}, digest {fact.digest}"


def test_golden_files_are_not_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["make_golden.py", str(GOLDEN)])
    with pytest.raises(SystemExit, match="never written again"):
        make_golden_script().main()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return shutil.copytree(BUNDLE, tmp_path / "copy.m2c")


def rewrite_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and make its checksum right again."""
    path = folder / "manifest.json"
    facts = json.loads(path.read_bytes())
    change(facts)
    del facts["checksum"]
    canonical = json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()
    facts["checksum"] = hashlib.sha256(canonical).hexdigest()
    path.write_text(json.dumps(facts, sort_keys=True, separators=(",", ":")) + "\n")


def test_another_bundle_version_is_refused(copy: Path) -> None:
    rewrite_manifest(copy, lambda facts: facts.update(version=1))
    with pytest.raises(BadInput, match=r"manifest\.json: bundle format 1, this m2c reads 3") as why:
        open_bundle(copy)
    assert "m2c profile MODEL | m2c pack - --ssd DIR" in why.value.hint


def test_a_profile_of_an_older_m2c_is_refused(tmp_path: Path) -> None:
    tensors = load((GOLDEN / "importance.safetensors").read_bytes())
    with safe_open(GOLDEN / "importance.safetensors", "numpy") as file:
        metadata = file.metadata()
    del tensors["head_directions"]
    with pytest.raises(BadInput, match="head_directions is missing") as why:
        decode_importance(save(tensors, metadata=metadata), tmp_path / "old")
    assert "m2c profile MODEL" in why.value.hint


@pytest.mark.parametrize("where", [None, "mix", "source"])
def test_an_unknown_manifest_key_is_refused(copy: Path, where: str | None) -> None:
    rewrite_manifest(copy, lambda facts: (facts[where] if where else facts).update(colour="red"))
    with pytest.raises(BadInput, match=r"manifest\.json: unknown key .*'colour'"):
        open_bundle(copy)


def test_an_unknown_exact_type_is_refused(copy: Path) -> None:
    rewrite_manifest(copy, lambda facts: facts.update(exact_type="f8"))
    with pytest.raises(BadInput, match="exact_type must be one of bf16, f16"):
        open_bundle(copy)


def test_another_shard_version_is_refused(copy: Path) -> None:
    path = copy / "dense" / "embed.int4"
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, 8, 1)
    data[4088:4096] = struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(data[:4088])))
    path.write_bytes(data)
    with pytest.raises(BadInput, match=r"embed\.int4: shard format 1, this m2c reads 3") as why:
        read_index(path)
    assert why.value.hint


def test_a_shard_of_another_shape_is_refused(copy: Path) -> None:
    rewrite_manifest(copy, lambda facts: facts["architecture"].update(intermediate_size=36))
    with pytest.raises(BadInput, match=r"neurons/00000\.int4 is missing or of another model"):
        config_of(open_bundle(copy))


def test_a_missing_shard_is_refused(copy: Path) -> None:
    rewrite_manifest(copy, lambda facts: facts["shards"].pop("dense/00001.fp16"))
    with pytest.raises(BadInput, match=r"dense/00001\.fp16 is missing"):
        config_of(open_bundle(copy))


def test_shards_of_two_planes_exchanged_are_refused(copy: Path) -> None:
    def exchange(facts: dict[str, Any]) -> None:
        shards = facts["shards"]
        a, b = "neurons/00000.int4", "neurons/00000.int8"
        shards[a], shards[b] = shards[b], shards[a]

    rewrite_manifest(copy, exchange)
    low, high = (copy / "neurons" / f"00000.{plane}" for plane in ("int4", "int8"))
    low.rename(copy / "aside")
    high.rename(low)
    (copy / "aside").rename(high)
    with pytest.raises(BadInput, match="of another model"):
        config_of(open_bundle(copy))


def test_independent_reader_refuses_damage(copy: Path) -> None:
    path = copy / "neurons" / "00001.fp16"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    with pytest.raises(other.FormatError):
        other.read_shard(path)
