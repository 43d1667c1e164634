"""R26: NaN and infinity in a bundle whose every checksum is right, as an attacker can make it.

A run stops with a message: no token is ever chosen by logits that are no numbers. Checkpoints are
refused by `profile` and `pack`, naming the tensor: test_model.py, test_encode.py.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash
from every_mode import Subject, run
from safetensors.numpy import load, save
from trials import trials

from m2c.bundle.bundle import Bundle, open_bundle
from m2c.bundle.manifest import FileFact, ShardFact, write_manifest
from m2c.bundle.shard import BLOCK, PAGE, read_index
from m2c.contents import VECTORS

BAD = {"NaN": 0x7E00, "-NaN": 0xFE01, "inf": 0x7C00, "-inf": 0xFC00}  # F16


def forge_file(path: Path, name: str, data: bytes) -> None:
    manifest = open_bundle(path).manifest
    (path / name).write_bytes(data)
    fact = FileFact(len(data), hashlib.sha256(data).hexdigest())
    write_manifest(path, replace(manifest, files={**manifest.files, name: fact}))


def forge_payload(path: Path, name: str, change: Callable[[bytearray], None]) -> None:
    """Another payload in a shard, and all hashes above it made to fit."""
    manifest, index = open_bundle(path).manifest, read_index(path / name)
    data = bytearray((path / name).read_bytes())
    end = PAGE + index.header.payload_nbytes
    payload = data[PAGE:end]
    change(payload)
    hashes = [
        xxhash.xxh3_64_intdigest(bytes(payload[at : at + BLOCK]))
        for at in range(0, len(payload), BLOCK)
    ]
    data[PAGE:end] = payload
    data[end : end + 8 * len(hashes)] = np.array(hashes, "<u8").tobytes()
    data[-8:] = xxhash.xxh3_64_intdigest(bytes(data[end:-8])).to_bytes(8, "little")
    (path / name).write_bytes(data)
    digest = read_index(path / name).digest
    fact = ShardFact(len(data), hashlib.sha256(data).hexdigest(), digest)
    write_manifest(path, replace(manifest, shards={**manifest.shards, name: fact}))


def poison_scales(
    bundle: Bundle, path: Path, name: str, bits: int, rng: random.Random, *, single: bool
) -> None:
    """One scale of one record, or of every record, of an INT4 shard becomes `bits`."""

    def change(payload: bytearray) -> None:
        sections = bundle.shards[name].header.sections
        for section in [rng.choice(sections)] if single else sections:
            width = section.layout.nbytes("int4")
            codes = section.vectors * -(-section.length // 32) * 16
            records = range(section.records)
            for record in [rng.choice(records)] if single else records:
                at = section.offset + record * width + rng.randrange(codes, width, 2)
                payload[at : at + 2] = bits.to_bytes(2, "little")

    forge_payload(path, name, change)


@pytest.mark.campaign
def test_scales_that_are_no_numbers(subject: Subject, tmp_path: Path) -> None:
    copy, undisturbed = tmp_path / "copy.m2c", dict[str, str]()
    shards = [name for name in subject.bundle.shards if name.endswith(".int4")]
    for trial in trials("R26-scales", ci=20, campaign=2000):
        with trial as seed:
            rng = random.Random(seed)
            mode = list(subject.modes)[seed % len(subject.modes)]
            if mode not in undisturbed:
                undisturbed[mode] = run(subject.bundle.path, subject.modes[mode]).out
            name, single = rng.choice(shards), rng.random() < 0.5
            subject.copied(copy)
            bits = BAD[rng.choice(list(BAD))]
            poison_scales(subject.bundle, copy, name, bits, rng, single=single)
            said = run(copy, subject.modes[mode])
            if said.code == 0:
                # a row of the embedding, or the down column of a dropped neuron, that nobody used
                assert single
                assert name == "dense/embed.int4" or (mode == "mixed, dropping" and "neur" in name)
                assert said.out == undisturbed[mode]
            else:
                assert said.code == 4, said.err
                assert undisturbed[mode].startswith(said.out.removesuffix("\n"))
                assert "Traceback" not in said.err


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_vectors_that_are_no_numbers(subject: Subject, tmp_path: Path, value: float) -> None:
    """Each norm: refused before a token, naming the tensor."""
    whole = (subject.bundle.path / VECTORS).read_bytes()
    for name in load(whole):
        copy = subject.copied(tmp_path / "copy.m2c")
        vectors = {k: v.copy() for k, v in load(whole).items()}
        vectors[name][-1] = value
        forge_file(copy, VECTORS, save(vectors))
        for mode in ("mixed", "exact"):
            said = run(copy, subject.modes[mode])
            assert (said.code, said.out) == (4, "")
            assert f"{VECTORS}: {name} holds NaN or infinity" in said.reason
