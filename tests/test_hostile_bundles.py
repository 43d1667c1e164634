"""Bundles made to hurt by somebody who can compute checksums: read, or refused in one line (R12).

A trial is BATCH mutations; what is changed gets right hashes all the way up to the manifest. What
opens is also run: the kernels must neither crash nor read beyond a buffer (`make sanitize` looks).
"""

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile_files as files
import numpy as np
import pytest
import xxhash
import zstandard
from hostile import BATCH, judge, mutate_bytes, mutate_json, mutate_pieces, number
from hostile_files import with_length
from running import PROMPT, GiB
from shards import page_of
from tiny_models import job_for, run_pack
from trials import trials

from m2c.bundle.bundle import open_bundle
from m2c.bundle.importance import decode_importance
from m2c.bundle.manifest import MANIFEST
from m2c.bundle.shard import BLOCK, PAGE, read_index
from m2c.bundle.strict import dump_json
from m2c.check import check_bundle
from m2c.contents import config_of, importance_of, sidecars_of, tokenizer_of, vectors_of
from m2c.engine import Engine, RunOptions
from m2c.errors import BadInput, M2CError
from m2c.kernels.workers import Workers
from m2c.model.checkpoint import open_checkpoint
from m2c.profile import profile
from m2c.replay import replay
from m2c.tiers.trace import TraceWriter, read_trace

pytestmark = pytest.mark.campaign


def batches(promise: str, campaign: int, attack: Callable[[random.Random], None]) -> None:
    for trial in trials(promise, ci=1, campaign=campaign):
        with trial as seed:
            for i in range(BATCH):
                attack(random.Random(f"{promise} {seed} {i}"))


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a small bundle, by name."""
    folder = tmp_path_factory.mktemp("small")
    checkpoint = open_checkpoint(files.small_checkpoint(folder / "model"))
    ids = [i * i % 16 for i in range(40)]
    importance = profile(checkpoint, ids, text="t", text_source="t", workers=Workers(1))
    (folder / "model" / "tokenizer.json").write_text(json.dumps(files.tokenizers()[0]))
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(files.SETTINGS))
    path = folder / "bundle.m2c"
    run_pack(job_for(folder / "model", importance), path)
    found = (p for p in sorted(path.rglob("*")) if p.is_file())
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in found}


@pytest.fixture
def folder(honest: dict[str, bytes], tmp_path: Path) -> Path:
    path = tmp_path / "bundle.m2c"
    for name, data in honest.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def signed(facts: Any) -> bytes:
    """A manifest whose checksum is right, of any facts."""
    if isinstance(facts, dict):
        facts = {key: value for key, value in facts.items() if key != "checksum"}
        facts["checksum"] = hashlib.sha256(dump_json(facts)).hexdigest()
    return dump_json(facts) + b"\n"


def use(folder: Path) -> None:
    """All that `show`, `plan` and `run` read; then two passes."""
    bundle = open_bundle(folder)
    config_of(bundle)
    importance_of(bundle).hit_share  # noqa: B018 - computed
    sidecars_of(bundle)
    tokenizer_of(bundle)
    vectors_of(bundle, config_of(bundle))
    list(check_bundle(folder, read_data=True))


def run(folder: Path, kernel: str = "auto") -> None:
    options = RunOptions(ctx_size=8, threads=1, dram=GiB, kernel=kernel)
    with Engine(open_bundle(folder), options) as engine:
        engine.model.forward(PROMPT[:3] % 16)


def test_manifests(folder: Path, honest: dict[str, bytes]) -> None:
    known = json.loads(honest[MANIFEST])
    names = ("dense/embed.int4", "../x", "model/config.json", {"nbytes": 1, "sha256": "x"})

    def attack(rng: random.Random) -> None:
        text = mutate_json(rng, known, names)
        try:
            data = signed(json.loads(text))
        except (ValueError, RecursionError):
            data = text
        (folder / MANIFEST).write_bytes(data)
        judge(lambda: use(folder), repr(data), len(data))

    batches("R12-manifest", 400, attack)


# -- shards and side files -------------------------------------------------------------------------


def forge_shard(rng: random.Random, data: bytes) -> bytes:
    """Another header, other tables or another payload, hashed anew."""
    facts = json.loads(data[16 : 16 + int.from_bytes(data[12:16], "little")])
    payload = data[PAGE : PAGE + facts["payload_nbytes"]]
    blocks = -(-len(payload) // BLOCK)
    tables = data[PAGE + len(payload) + 8 * blocks : -8]
    kind = rng.randrange(4)
    if kind == 0:
        text = mutate_json(rng, facts, tuple(facts["sections"]))
        try:
            facts = json.loads(text)
            page = page_of(facts if isinstance(facts, dict) else {"x": facts})
        except (ValueError, RecursionError, OverflowError):
            page = data[:PAGE]
        page = page if len(page) == PAGE else data[:PAGE]
    else:
        page = data[:PAGE]
    if kind == 1:
        cells = [tables[i : i + 4] for i in range(0, len(tables), 4)]
        tables = b"".join(mutate_pieces(rng, cells)) if cells else number(rng, "<I")
    elif kind == 2:
        made = bytearray(payload)
        for _ in range(rng.choice((1, 1, 20, 300))):
            made[rng.randrange(len(made))] = rng.randrange(256)
        payload = bytes(made)
    elif kind == 3:
        return mutate_bytes(rng, data)
    hashes = [
        xxhash.xxh3_64_digest(payload[i : i + BLOCK])[::-1] for i in range(0, len(payload), BLOCK)
    ]
    index = b"".join(hashes) + tables
    return page + payload + index + xxhash.xxh3_64_digest(index)[::-1]


def forge_file(rng: random.Random, name: str, data: bytes) -> bytes:
    if name.endswith(".json"):
        return mutate_json(rng, json.loads(data))
    if not name.endswith(".safetensors"):
        return mutate_bytes(rng, data)
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    if rng.random() < 0.3:
        body = mutate_bytes(rng, body)
        return with_length(data[8 : 8 + length], body)
    if "__metadata__" in header and rng.random() < 0.4:
        facts = mutate_json(rng, json.loads(header["__metadata__"]["m2c"]))
        header["__metadata__"]["m2c"] = facts.decode("utf-8", "replace")
        return with_length(json.dumps(header).encode(), body)
    return with_length(mutate_json(rng, header, ("BF16", "F64", "I32", [0, 2**62], [12])), body)


def chained(honest: dict[str, bytes], name: str, data: bytes, folder: Path) -> bytes:
    """Put `data` in place of the file `name`; returns a manifest that vouches for it."""
    (folder / name).write_bytes(data)
    manifest = json.loads(honest[MANIFEST])
    kind = "shards" if name in manifest["shards"] else "files"
    fact = manifest[kind][name]
    fact |= {"nbytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    if kind == "shards":
        try:
            fact["digest"] = read_index(folder / name).digest
        except M2CError:
            fact["digest"] = "0" * 32
    return signed(manifest)


def test_files_of_a_bundle(folder: Path, honest: dict[str, bytes]) -> None:
    names = [name for name in honest if name != MANIFEST]

    def attack(rng: random.Random) -> None:
        name = rng.choice(names)
        shard = name.startswith(("dense/", "neurons/"))
        forge = forge_shard if shard else lambda r, d: forge_file(r, name, d)
        data = forge(rng, honest[name])
        (folder / MANIFEST).write_bytes(chained(honest, name, data, folder))
        what = f"{name}: {data[:3000]!r}"
        try:
            if not isinstance(judge(lambda: use(folder), what, len(data)), M2CError):
                judge(lambda: run(folder), what, 1 << 24)
        finally:
            (folder / name).write_bytes(honest[name])

    batches("R12-files", 200, attack)


def test_profiles(honest: dict[str, bytes]) -> None:
    """What `m2c pack` and `m2c show` take as a profile."""
    data = honest["importance.safetensors"]

    def attack(rng: random.Random) -> None:
        made = forge_file(rng, "importance.safetensors", data)
        found = judge(lambda: decode_importance(made, Path("p")), repr(made[:2000]), len(made))
        if not isinstance(found, M2CError):
            judge(lambda: (found.hit_share, shown(found)), repr(made[:2000]), len(made))

    batches("R12-profile", 400, attack)


def shown(importance: Any) -> None:
    from m2c.cli.show import _importance_facts
    from m2c.pages.show_page import show_page

    show_page(_importance_facts(importance), importance, [], created="2026-01-01")


@pytest.mark.slow
def test_packing_with_a_hostile_profile(tmp_path: Path, honest: dict[str, bytes]) -> None:
    """A profile that is read but is not of this model, or nonsense: packed, or refused."""
    folder = files.small_checkpoint(tmp_path / "model")
    good = job_for(folder, decode_importance(honest["importance.safetensors"], Path("p")))
    for trial in trials("R12-pack", ci=20, campaign=2000):
        with trial as seed:
            rng = random.Random(seed)
            made = forge_file(rng, "importance.safetensors", honest["importance.safetensors"])
            try:
                importance = decode_importance(made, Path("p"))
            except BadInput:
                continue
            job = job_for(folder, importance, sidecars=good.sidecars)
            judge(lambda job=job, seed=seed: run_pack(job, tmp_path / str(seed)), repr(made[:2000]))


# -- traces ----------------------------------------------------------------------------------------


def trace_pieces(path: Path) -> list[bytes]:
    with TraceWriter(path, num_layers=2, num_neurons=20, planes=["int8", "fp16"]) as writer:
        for token in range(5):
            for layer in range(2):
                for plane in ("int8", "fp16"):
                    writer.write(layer, plane, np.arange(token, 20, 3))
    data = path.read_bytes()
    length = int.from_bytes(data[12:16], "little")
    start = 16 + length
    return [
        data[:8], data[8:12], data[12:16], data[16:start], data[start : start + 4],
        data[start + 4 : start + 8], data[start + 8 : -8], data[-8:-4], data[-4:],
    ]  # fmt: skip


def test_traces(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    pieces = trace_pieces(path)
    raw = zstandard.ZstdDecompressor().decompress(pieces[6])

    def attack(rng: random.Random) -> None:
        made = list(pieces)
        if rng.random() < 0.3:
            made[3] = mutate_json(rng, json.loads(pieces[3]))
            made[2] = len(made[3]).to_bytes(4, "little")
        if rng.random() < 0.3:
            made[6] = zstandard.compress(mutate_bytes(rng, raw))
            made[5] = len(made[6]).to_bytes(4, "little")
        if rng.random() < 0.6:
            made = mutate_pieces(rng, made)
        data = b"".join(made)
        path.write_bytes(data)

        def read() -> None:
            trace = read_trace(path)
            replay(trace, plane=trace.planes[0], capacity_nbytes=10, record_nbytes=1)

        judge(read, repr(data), len(data))

    batches("R12-trace", 400, attack)


def test_a_trace_that_is_all_zeros(tmp_path: Path) -> None:
    """Compressed ten thousand times: what is set aside follows from the file, not its claims."""
    path = tmp_path / "trace"
    with TraceWriter(path, num_layers=1, num_neurons=1 << 24, planes=["int8"]) as writer:
        writer.write(0, "int8", np.arange(0))
    data = path.read_bytes()
    start = 16 + int.from_bytes(data[12:16], "little")
    end = (0).to_bytes(4, "little") + (100).to_bytes(4, "little")
    path.write_bytes(data[:start] + 100 * data[start:-8] + end)  # 200 MiB of zeros
    found = judge(lambda: read_trace(path), "zeros", path.stat().st_size)
    assert isinstance(found, BadInput)
    assert "next to nothing was active" in found.message
