"""Tiny checkpoints, profiled and packed: what the tests of the core run on.

Knows nothing about pytest, so that a test can also pack in another process.
"""

import fcntl
import hashlib
import importlib.util
import itertools
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

from m2c.bundle.bundle import Bundle, open_bundle
from m2c.bundle.importance import Importance, read_importance
from m2c.bundle.manifest import MixChoice
from m2c.check import check_bundle
from m2c.errors import BadInput
from m2c.kernels.workers import Workers
from m2c.model.checkpoint import open_checkpoint
from m2c.pack import PackJob, choose_exact_type, pack
from m2c.profile import profile
from m2c.repair import repair
from m2c.source import model_files

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
TEXT = "calibration"
IDS = [(7 * i * i + 3 * i) % 300 for i in range(96)]
MIX = MixChoice((0, 25, 75), "given", 5.5, 0.0)


@cache
def make_checkpoint_script() -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / "make_checkpoint.py"
    spec = importlib.util.spec_from_file_location("make_checkpoint", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_checkpoint(
    folder: Path, changes: Mapping[str, Any] | None = None, *, dtype: str = "bf16", seed: int = 0
) -> Path:
    """CONFIG with `changes`, as a Hugging Face folder with random weights; returns `folder`."""
    config = {**CONFIG, **(changes or {})}
    make_checkpoint_script().write_checkpoint(folder, config, dtype=dtype, seed=seed)
    return folder


def profile_folder(folder: Path) -> Importance:
    workers = Workers(1)
    return profile(open_checkpoint(folder), IDS, text=TEXT, text_source="test", workers=workers)


def job_for(folder: Path, importance: Importance | None = None, **changes: Any) -> PackJob:
    """A job that packs the checkpoint in `folder`; `changes` replace fields of it."""
    checkpoint = open_checkpoint(folder)
    known = profile_folder(folder) if importance is None else importance
    kind = choose_exact_type(checkpoint)
    job = PackJob(checkpoint, known, model_files(checkpoint), kind, "0/25/75", 5.5)
    return replace(job, **changes)


def run_pack(
    job: PackJob, out: Path, *, threads: int = 1,
    progress: Callable[[int], None] = lambda weights: None,
) -> bool:  # fmt: skip
    workers = Workers(threads)
    try:
        return pack(job, out, workers=workers, choose_mix=lambda _: (MIX, {}), progress=progress)
    finally:
        workers.close()


def pack_folder(folder: Path, out: Path) -> Bundle:
    """Profile and pack the checkpoint in `folder` as the bundle `out`."""
    run_pack(job_for(folder), out)
    return open_bundle(out)


def run_repair(job: PackJob, path: Path) -> list[str]:
    workers = Workers(1)
    try:
        return repair(job, path, workers=workers, choose_mix=lambda _: (MIX, {}))
    finally:
        workers.close()


def pack_again(folder: Path, importance: Path, out: Path, deadly_call: int = 0) -> None:
    """Pack with a stored profile, in a process of its own.

    deadly_call: the process kills itself at this call of those that make files durable (0: never).
    """
    job = job_for(folder, read_importance(importance)[0])
    _die_at(deadly_call)
    run_pack(job, out)


def mend_again(folder: Path, importance: Path, path: Path, deadly_call: int) -> None:
    """As `pack_again`, but a repair."""
    job = job_for(folder, read_importance(importance)[0])
    _die_at(deadly_call)
    run_repair(job, path)


def _die_at(call: int) -> None:
    if not call:
        return
    calls = itertools.count(1)

    def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return wrapped

    os.fsync, os.rename = deadly(os.fsync), deadly(os.rename)


def hold_lock(path: Path, ready: Connection) -> None:
    """Lock the folder `path` as a pack does, say so, and wait to be killed."""
    descriptor = os.open(path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    ready.send(True)
    signal.pause()


def require_sound(out: Path) -> None:
    """No bundle, or one that is whole; never one that looks complete and is not."""
    try:
        open_bundle(out)
    except BadInput:
        return
    assert not list(check_bundle(out, read_data=True))


def digest(folder: Path) -> str:
    """sha256 over the names and bytes of all files below `folder`."""
    total = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = file.read_bytes()
        total.update(f"{file.relative_to(folder)}\0{len(data)}\0".encode() + data)
    return total.hexdigest()
