"""`m2c check`: is a bundle what its manifest says, bit for bit, and is it the checkpoint it claims?

Finds every damage and names it; `repair` mends it. Knows nothing about printing.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from m2c.bundle.bundle import Bundle, block_damage, verified_file
from m2c.bundle.claim import MARKER
from m2c.bundle.exact import round_to
from m2c.bundle.files import TEMPORARY_PREFIX, disk_errors
from m2c.bundle.manifest import MANIFEST, Manifest, ShardFact, read_manifest
from m2c.bundle.shard import read_index
from m2c.contents import importance_of
from m2c.errors import M2CError
from m2c.hardware import auto_threads
from m2c.kernels.dispatch import exact_weights
from m2c.kernels.workers import Workers
from m2c.model.attention import MATRICES
from m2c.model.checkpoint import Checkpoint
from m2c.model.experts import SHARED
from m2c.model.weights import matrix_name, neuron_records, shared_records
from m2c.tiers.blocks import block_of
from m2c.tiers.memory import aligned_buffer
from m2c.tiers.ssd import SsdReader
from m2c.tiers.store import EMBED, FFN


@dataclass(frozen=True)
class Damage:
    name: str  # of the file, in the bundle
    sentence: str


def check_bundle(
    path: Path, *, read_data: bool, progress: Callable[[int], None] = lambda nbytes: None
) -> Iterator[str]:
    """Yield one sentence per damage. Raises BadInput when there is no readable manifest.

    read_data: verify every block and the sha256 of every shard, not only headers and indexes.
    """
    manifest = read_manifest(path)
    for damage in find_damage(path, manifest, read_data=read_data, progress=progress):
        yield damage.sentence
    # a pack stopped right after its manifest leaves its marker: the bundle is complete
    known = {MANIFEST, MARKER, *manifest.files, *manifest.shards}
    for file in sorted(p for p in path.rglob("*") if not p.is_dir()):
        name = file.relative_to(path).as_posix()
        if name not in known and not file.name.startswith(TEMPORARY_PREFIX):
            yield f"{file}: not part of the bundle"


def find_damage(
    path: Path, manifest: Manifest, *, read_data: bool,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> Iterator[Damage]:  # fmt: skip
    """All that is wrong with what the manifest names: side files, shards, and every block."""
    for name, fact in sorted(manifest.files.items()):
        try:
            verified_file(path / name, fact)
        except M2CError as error:
            yield Damage(name, error.message)
    for name, shard in sorted(manifest.shards.items()):
        for sentence in _check_shard(path / name, shard, read_data):
            yield Damage(name, sentence)
        progress(shard.nbytes)


def _check_shard(file: Path, fact: ShardFact, read_data: bool) -> Iterator[str]:
    try:
        index = read_index(file)
    except M2CError as error:
        yield error.message
        return
    if index.digest != fact.digest or file.stat().st_size != fact.nbytes:
        yield f"{file}: not the shard that the manifest names"
        return
    if not read_data:
        return
    damaged = [error.message for error in block_damage(index) if error is not None]
    yield from damaged
    if damaged:
        return
    with disk_errors(file), open(file, "rb") as data:
        if hashlib.file_digest(data, "sha256").hexdigest() != fact.sha256:
            yield f"{file}: its sha256 is not the manifest's"


def compare_with_source(
    bundle: Bundle, checkpoint: Checkpoint, progress: Callable[[int], None] = lambda weights: None
) -> Iterator[str]:
    """Yield one sentence per matrix whose exact plane is not the checkpoint, bit for bit.

    A checkpoint of another type than the bundle's is first rounded to it, as pack does.
    """
    layers = checkpoint.config.num_hidden_layers
    with torch.no_grad(), closing(Workers(auto_threads(), kernel="auto")) as workers:
        for kind, name, section, source in _pairs(bundle, checkpoint, layers):
            restored = exact_section(bundle, kind, name, section, workers)
            true = _bits(source, bundle.manifest.exact_type)
            if not np.array_equal(restored, true):
                wrong = int((restored != true).sum()) if restored.shape == true.shape else -1
                yield f"{bundle.path}: {kind} {name} {section}: {wrong} weights differ"
            progress(true.size)


def exact_section(
    bundle: Bundle, kind: str, name: int | str, section: str, workers: Workers | None = None
) -> np.ndarray:
    """The checkpoint's bits of one matrix, restored from all planes: u16 [rows, weights].

    workers: whose kernels decode; None for the numpy reference.
    """
    block = block_of(bundle, kind, name, "fp16")
    buffer = aligned_buffer(block.streamed_nbytes)
    reader = SsdReader()
    try:
        block.read(reader, buffer).wait()
    finally:
        reader.close()
    exact = exact_weights(block.rows(buffer)[section], workers)
    return exact.view(torch.int16).numpy().view(np.uint16)


def _pairs(bundle: Bundle, checkpoint: Checkpoint, layers: int) -> Iterator[tuple]:
    yield "dense", "embed", EMBED, checkpoint.read("model.embed_tokens.weight")
    for layer in range(layers):
        for short in MATRICES:
            yield "dense", layer, short, checkpoint.read(matrix_name(layer, short))
        if checkpoint.config.shared_expert_intermediate_size:
            yield "dense", layer, SHARED, shared_records(checkpoint, layer)
        yield "neurons", layer, FFN, _ordered_neurons(bundle, checkpoint, layer)
    if "dense/head.fp16" in bundle.shards:
        yield "dense", "head", "lm_head", checkpoint.read("lm_head.weight")


def _ordered_neurons(bundle: Bundle, checkpoint: Checkpoint, layer: int) -> torch.Tensor:
    order = importance_of(bundle).layers[layer].order.astype(np.int64)
    return neuron_records(checkpoint, layer)[torch.from_numpy(order)]


def _bits(values: torch.Tensor, exact_type: str) -> np.ndarray:
    if values.dtype in (torch.bfloat16, torch.float16):
        same = {"bf16": torch.bfloat16, "f16": torch.float16}[exact_type]
        if values.dtype == same:
            return values.contiguous().view(torch.int16).numpy().view(np.uint16)
    return round_to(np.ascontiguousarray(values.float().numpy()), exact_type)
