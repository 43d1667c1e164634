"""`pack` killed at any moment: never a wrong bundle, and running it again finishes the job."""

import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from syscalls import KILL, End
from tiny_models import digest, pack_again, require_sound, run_pack
from trials import trials
from watched_pack import OUT, WatchedPack, spread

from m2c.bundle.bundle import open_bundle
from m2c.bundle.claim import MARKER
from m2c.bundle.importance import write_importance
from m2c.bundle.manifest import MANIFEST
from m2c.errors import BadInput
from m2c.pack import PackJob


@pytest.fixture
def kill_pack(
    processes: ForkServerContext, tiny_checkpoint: Path, job: PackJob, tmp_path: Path
) -> Callable[..., bool]:
    """A function that packs into a folder and kills; False if the pack was done before."""
    profile = tmp_path / "profile.safetensors"
    write_importance(profile, job.importance)

    def kill(out: Path, *, after_s: float = 60.0, at_call: int = 0) -> bool:
        arguments = (tiny_checkpoint, profile, out, at_call)
        process = processes.Process(target=pack_again, args=arguments)
        process.start()
        process.join(after_s)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        return process.exitcode != 0

    return kill


@pytest.mark.campaign
def test_killed_at_random_moments(
    kill_pack: Callable[..., bool], job: PackJob, undisturbed: str, tmp_path: Path
) -> None:
    """Trial N: killed up to three times, then finished."""
    start = time.monotonic()
    kill_pack(tmp_path / "whole")
    whole = time.monotonic() - start
    out = tmp_path / "out"
    for trial in trials("R1-random-moment", ci=10, campaign=1000):
        with trial as seed:
            rng = random.Random(seed)
            for _ in range(rng.choice((1, 1, 2, 3))):
                kill_pack(out, after_s=rng.random() * whole)
                require_sound(out)
            run_pack(job, out)
            assert digest(out) == undisturbed
            shutil.rmtree(out)


@pytest.mark.slow
@pytest.mark.campaign
def test_killed_at_every_call(
    watched: WatchedPack, calls: list[str], job: PackJob, undisturbed: str, tmp_path: Path
) -> None:
    """Right before each mkdir, open, write, fsync, close, rename and unlink of every thread."""
    for trial in trials("R1-every-call", ci=6, campaign=len(calls)):
        with trial as seed:
            folder = tmp_path / str(seed)
            folder.mkdir()
            out = folder / OUT
            assert watched.at(folder, calls[spread(seed, len(calls))], KILL) == (End(None), True)
            require_sound(out)
            run_pack(job, out)
            assert digest(out) == undisturbed
            shutil.rmtree(folder)


@pytest.mark.parametrize("call", ["openat", "write", "fsync", "close", "rename"])
def test_killed_while_the_manifest_is_written(
    watched: WatchedPack, job: PackJob, undisturbed: str, tmp_path: Path, call: str
) -> None:
    """No part of one has its name; a folder with half a manifest would be nobody's."""
    deadly = f"{call} {OUT}/TEMPORARY-{MANIFEST} 1"
    assert watched.at(tmp_path, deadly, KILL) == (End(None), True)
    with pytest.raises(BadInput, match="not a complete bundle"):
        open_bundle(tmp_path / OUT)
    run_pack(job, tmp_path / OUT)
    assert digest(tmp_path / OUT) == undisturbed


@pytest.mark.parametrize("first", [1, 9, 18, 26])
def test_killed_where_files_become_durable(
    kill_pack: Callable[..., bool], job: PackJob, undisturbed: str, tmp_path: Path, first: int
) -> None:
    """Before an fsync or a rename, early and late: the folder's marker, shards, the manifest."""
    for call in range(first, 150, 34):
        out = tmp_path / str(call)
        killed = kill_pack(out, at_call=call)
        require_sound(out)
        run_pack(job, out)
        assert digest(out) == undisturbed
        if not killed:
            return
    pytest.fail("no pack has so many files: the last call was never reached")


def test_shards_of_another_recipe_are_not_kept(
    job: PackJob, undisturbed: str, tmp_path: Path
) -> None:
    """Each is sound and where ours belongs, as where two packs met in one folder without locks."""
    out = tmp_path / "out"
    run_pack(replace(job, exact_type="f16"), out)
    (out / MANIFEST).unlink()
    (out / MARKER).write_text(job.recipe)
    run_pack(job, out)
    assert digest(out) == undisturbed


def test_killed_again_and_again(
    kill_pack: Callable[..., bool], undisturbed: str, tmp_path: Path
) -> None:
    """Each attempt goes on where the one before was stopped, and the last one finishes."""
    out = tmp_path / "out"
    attempts = 0
    while kill_pack(out, at_call=30):
        require_sound(out)
        attempts += 1
        assert attempts < 20
    assert attempts > 2
    assert digest(out) == undisturbed


def test_finished_shards_are_not_written_again(
    kill_pack: Callable[..., bool], job: PackJob, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert kill_pack(out, at_call=40)
    before = {p: p.stat().st_ino for p in out.rglob("*.int4") if not p.name.startswith(".")}
    assert len(before) > 1
    run_pack(job, out)
    assert [p.stat().st_ino for p in before] == list(before.values())


def test_a_finished_shard_that_was_damaged_is_written_again(
    kill_pack: Callable[..., bool], job: PackJob, undisturbed: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert kill_pack(out, at_call=40)
    shard = out / "dense" / "00000.int8"
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    run_pack(job, out)
    assert digest(out) == undisturbed
