"""`m2c pack`: write a checkpoint as a bundle of nested planes, safely.

Every file appears complete or not at all, the manifest last. A pack that was stopped at any moment
is finished by running it again, and the result is the same bytes. Peak memory is one layer, plus a
constant. Knows nothing about printing.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Final

import torch
from safetensors.numpy import save

from m2c import __version__
from m2c.bundle.bundle import Bundle, open_shards
from m2c.bundle.claim import claim_folder
from m2c.bundle.files import disk_errors, write_atomic
from m2c.bundle.importance import Importance, encode_importance
from m2c.bundle.manifest import (
    FileFact,
    Manifest,
    MixChoice,
    ShardFact,
    Source,
    write_manifest,
)  # fmt: skip
from m2c.bundle.planes import GROUP
from m2c.bundle.shard import VERSION
from m2c.bundle.strict import dump_json
from m2c.contents import IMPORTANCE, VECTORS, keeps_experts
from m2c.encode import PIECE_WEIGHTS, Spent, Tools, encode_piece
from m2c.errors import NoSpace, UsageError
from m2c.kernels.encoder import load_encoder
from m2c.kernels.workers import Workers
from m2c.model.checkpoint import Checkpoint
from m2c.model.footprint import bundle_nbytes
from m2c.model.tensors import dense_matrices, small_tensors
from m2c.model.weights import vector_tensors
from m2c.pipeline import write_shards
from m2c.sections import embedding, shard_groups
from m2c.steer import Steering
from m2c.units import format_size

_SAMPLE_ROWS: Final = 64
_WHOLE: Final = 3  # times encoding: a pack with reading, hashing, writing and the search for a mix
_STORED_NBYTES: Final = {"f32": 4, "f16": 2, "bf16": 2}


@dataclass(frozen=True)
class PackJob:
    """What to pack. `sidecars`: the files of the bundle's model/ folder."""

    checkpoint: Checkpoint
    importance: Importance
    sidecars: dict[str, bytes]
    exact_type: str  # "bf16" or "f16"
    mix_request: str  # "error", "entropy" or a mix: part of what makes two packs the same
    budget_bits: float

    @property
    def shard_recipe(self) -> str:
        """Identity of the shards: source, profile, format."""
        profile = hashlib.sha256(encode_importance(self.importance)).hexdigest()
        facts = [self.checkpoint.fingerprint(), profile, self.exact_type, GROUP, VERSION]
        return hashlib.sha256(dump_json(facts)).hexdigest()

    @property
    def recipe(self) -> str:
        """Identity of the whole bundle."""
        sidecars = {k: hashlib.sha256(v).hexdigest() for k, v in self.sidecars.items()}
        facts = [self.shard_recipe, sidecars, self.mix_request, self.budget_bits]
        return hashlib.sha256(dump_json(facts)).hexdigest()

    @property
    def weights(self) -> int:
        """Weights that `pack` reports progress in."""
        config = self.checkpoint.config
        dense = sum(rows * columns for rows, columns in dense_matrices(config).values())
        neurons = config.neurons + config.shared_expert_intermediate_size
        ffn = config.vectors * config.hidden_size * neurons
        return dense + config.num_hidden_layers * ffn

    @property
    def source_nbytes(self) -> int:
        """Bytes of the checkpoint's weights as they are stored; of a GGUF file, all of it."""
        given = self.checkpoint
        if given.path.is_file():
            return given.path.stat().st_size
        return sum(
            prod(given.shape(name)) * _STORED_NBYTES[given.stored_type(name)]
            for name in given.names()
        )


@dataclass(frozen=True)
class Figures:
    """What a pack did and how long it took; what an earlier attempt had finished does not count."""

    weights: int
    source_nbytes: int
    written_nbytes: int
    seconds: float  # without the search for the mix
    mix_seconds: float
    spent: Spent


ChooseMix = Callable[[Bundle], tuple[MixChoice, dict[str, float]]]


def pack(
    job: PackJob, path: Path, *, workers: Workers, choose_mix: ChooseMix,
    progress: Callable[[int], None] = lambda weights: None,
    report: Callable[[Figures], None] = lambda figures: None, reclaim: bool = False,
) -> bool:  # fmt: skip
    """Write the bundle at `path`; False if it was complete already. reclaim: as for claim_folder.

    `choose_mix` is asked once all shards are there; `report` is told how it went. Raises
    UsageError, NoSpace, StorageError, Busy, BadInput; whatever was finished by then is kept for the
    next attempt.
    """
    begin = time.perf_counter()
    _refuse_input_as_output(job.checkpoint.path, path)
    require_matching(job)
    require_space(job, path)
    # derived once: every use reads samples of the whole checkpoint
    recipe, shard_recipe = job.recipe, job.shard_recipe
    with _sizes_said(job, path), claim_folder(path, recipe, reclaim=reclaim) as complete:
        if complete:
            return False
        tools = Tools(job.exact_type, workers, load_encoder(), progress, Spent())
        steering = Steering(job.exact_type, tools.encoder)
        groups = shard_groups(job.checkpoint, job.importance, steering)
        shards, weights = write_shards(groups, path, shard_recipe, tools)
        files = _write_files(job, path)
        manifest = _manifest(job, recipe, shards, files)
        packed = time.perf_counter()
        mix, quality = choose_mix(Bundle(path, manifest, open_shards(path, manifest)))
        write_manifest(path, replace(manifest, mix=mix, quality=quality))
    share = weights / job.weights
    written = sum(fact.nbytes for fact in shards.values())
    report(
        Figures(
            weights, round(share * job.source_nbytes), round(share * written), packed - begin,
            time.perf_counter() - packed, tools.spent,
        )
    )  # fmt: skip
    return True


def choose_exact_type(checkpoint: Checkpoint) -> str:
    """The checkpoint's own 16-bit type, or for other sources the one that loses less.

    Judged on a sample of every matrix; bf16 when both lose the same, as its planes are smaller.
    """
    small = small_tensors(checkpoint.config)
    names = [name for name in checkpoint.names() if name not in small]
    stored = {checkpoint.stored_type(name) for name in names}
    if len(stored) == 1 and stored <= {"bf16", "f16"}:
        return stored.pop()
    lost = {"bf16": 0.0, "f16": 0.0}
    for name in names:
        rows = checkpoint.read(name, 0, min(_SAMPLE_ROWS, checkpoint.shape(name)[0])).float()
        scale = float(rows.square().mean()) or 1.0
        for kind, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
            lost[kind] += float((rows - rows.to(dtype).float()).square().mean()) / scale
    return "f16" if lost["f16"] < lost["bf16"] else "bf16"


def require_space(job: PackJob, path: Path) -> tuple[int, int]:
    """(bytes needed, bytes free). Raises NoSpace when the bundle will not fit."""
    needed, free = _space(job, path)
    if needed > free:
        raise NoSpace(
            f"{path}: the bundle needs {format_size(needed)}, {format_size(free)} are free",
            "free some space or give another --ssd",
        )
    return needed, free


@contextmanager
def _sizes_said(job: PackJob, path: Path) -> Iterator[None]:
    """A disk that is full before the end: how much is missing is said with it."""
    try:
        yield
    except NoSpace as error:
        needed, free = _space(job, path)
        sizes = f"{format_size(needed)} more are needed, {format_size(free)} are free"
        raise NoSpace(f"{error.message}: {sizes}", error.hint) from None


def _space(job: PackJob, path: Path) -> tuple[int, int]:
    """(bytes that are still to be written, bytes free)."""
    existing = path
    while not existing.exists():
        existing = existing.parent
    with disk_errors(existing):
        stats = os.statvfs(existing)
    free = stats.f_bavail * stats.f_frsize
    done = sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if path.is_dir() else 0
    return max(0, bundle_nbytes(job.checkpoint.config, job.exact_type) - done), free


def estimate_seconds(job: PackJob, workers: Workers) -> float:
    """How long packing will take, roughly, from encoding a few rows of the checkpoint now."""
    matrix, encoder = embedding(job.checkpoint), load_encoder()
    piece = matrix.open(workers)(0, min(matrix.records, 16 * PIECE_WEIGHTS // matrix.weights + 1))
    begin = time.perf_counter()
    encode_piece(piece, matrix, job.exact_type, encoder=encoder)
    seconds = (time.perf_counter() - begin) / piece.rows.numel() * job.weights / workers.threads
    return seconds * _WHOLE


def side_files(job: PackJob) -> dict[str, bytes]:
    """Every file of the bundle but shards and manifest."""
    vectors = {k: v.numpy() for k, v in vector_tensors(job.checkpoint).items()}
    contents = {f"model/{name}": data for name, data in job.sidecars.items()}
    contents[IMPORTANCE] = encode_importance(job.importance.without_directions())
    contents[VECTORS] = save(vectors)
    return contents


def _write_files(job: PackJob, path: Path) -> dict[str, FileFact]:
    contents = side_files(job)
    for name, data in contents.items():
        write_atomic(path / name, data)
    return {
        name: FileFact(len(data), hashlib.sha256(data).hexdigest())
        for name, data in contents.items()
    }


def _manifest(
    job: PackJob, recipe: str, shards: dict[str, ShardFact], files: dict[str, FileFact]
) -> Manifest:
    checkpoint = job.checkpoint
    stored = {checkpoint.stored_type(n) for n in checkpoint.names()}
    return Manifest(
        created_by=f"m2c {__version__}",
        name=checkpoint.name,
        recipe=recipe,
        exact_type=job.exact_type,
        source=Source(checkpoint.name, checkpoint.fingerprint(), "+".join(sorted(stored))),
        architecture=checkpoint.config.to_dict(),
        mix=MixChoice((0, 0, 100), "given", 4.5, 0.0),
        shards=shards,
        files=files,
    )


def require_matching(job: PackJob) -> None:
    """The profile must be of this checkpoint, and of its shapes: it comes from a file."""
    known = job.importance
    config = job.checkpoint.config
    heads = config.num_attention_heads * config.head_dim
    shapes = {
        "order": config.neurons, "attn_input": config.hidden_size,
        "o_input": heads, "ffn_input": config.hidden_size,
    }  # fmt: skip
    inputs = {
        "attn_directions": config.hidden_size, "o_directions": heads,
        "ffn_directions": config.hidden_size, "down_directions": config.neurons,
    }  # fmt: skip
    matches = (
        known.calibration.fingerprint == job.checkpoint.fingerprint()
        and len(known.layers) == config.num_hidden_layers
        and known.head_input.shape == (config.hidden_size,)
        and all(
            getattr(layer, name).shape == (size,)
            for layer in known.layers
            for name, size in shapes.items()
        )
        and len(known.head_directions) == config.hidden_size
        and all(
            len(getattr(layer, name)) == size
            for layer in known.layers
            for name, size in inputs.items()
        )
        and all(layer.sample.shape[1] == config.hidden_size for layer in known.layers)
        and all(keeps_experts(layer.order, config) for layer in known.layers)
    )
    if not matches:
        raise UsageError(
            f"the profile of {known.calibration.model} does not belong to {job.checkpoint.path}",
            "run m2c profile on this model",
        )


def _refuse_input_as_output(source: Path, path: Path) -> None:
    source, path = source.resolve(), path.resolve()
    if source == path or path in source.parents or (source.is_dir() and source in path.parents):
        raise UsageError(
            f"{path} and the checkpoint {source} lie inside each other", "choose another --ssd"
        )
