"""`pack` repeated, refused or out of space: the same bytes, or nothing that looks finished."""

import builtins
import errno
import multiprocessing
import os
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from tiny_models import digest, hold_lock, job_for, run_pack, write_checkpoint

from m2c.bundle import files
from m2c.bundle.claim import MARKER
from m2c.bundle.files import TEMPORARY_PREFIX
from m2c.bundle.manifest import MANIFEST
from m2c.errors import Busy, NoSpace, StorageError, UsageError
from m2c.pack import PackJob

# -- repeated --------------------------------------------------------------------------------------


def test_two_packs_are_the_same_bytes(job: PackJob, undisturbed: str, tmp_path: Path) -> None:
    assert run_pack(job, tmp_path / "again")
    assert digest(tmp_path / "again") == undisturbed


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_change_a_byte(
    job: PackJob, undisturbed: str, tmp_path: Path, threads: int
) -> None:
    run_pack(job, tmp_path / "out", threads=threads)
    assert digest(tmp_path / "out") == undisturbed


def test_a_complete_bundle_is_left_alone(job: PackJob, undisturbed: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_pack(job, out)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert not run_pack(job, out)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p != out} == {
        p: t for p, t in before.items() if p != out
    }
    assert not (out / MARKER).exists()


def test_leftovers_of_a_killed_pack_are_removed(
    job: PackJob, undisturbed: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run_pack(job, out)
    (out / MANIFEST).unlink()
    (out / MARKER).write_text(job.recipe + "\n")
    for folder in (out, out / "dense", out / "neurons", out / "model"):
        (folder / f"{TEMPORARY_PREFIX}999-x").write_bytes(b"half")
    run_pack(job, out)
    assert digest(out) == undisturbed


def test_a_pack_killed_before_its_marker_is_resumed(
    job: PackJob, undisturbed: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for pid in (1, os.getpid()):
        (out / f"{TEMPORARY_PREFIX}{pid}-{MARKER}").write_bytes(b"")
    run_pack(job, out)
    assert digest(out) == undisturbed


def test_progress_adds_up(job: PackJob, tmp_path: Path) -> None:
    done: list[int] = []
    run_pack(job, tmp_path / "out", progress=done.append)
    assert sum(done) == job.weights
    (tmp_path / "out" / MANIFEST).unlink()
    (tmp_path / "out" / MARKER).write_text(job.recipe)
    resumed: list[int] = []
    run_pack(job, tmp_path / "out", progress=resumed.append)
    assert sum(resumed) == job.weights


# -- refused ---------------------------------------------------------------------------------------


def test_somebody_elses_folder_is_refused(job: PackJob, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"dear")
    with pytest.raises(UsageError, match="not empty and holds no bundle of ours"):
        run_pack(job, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["photo.jpg"]


def test_what_is_no_folder_is_refused(job: PackJob, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"dear")
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for name in ("file", "link"):
        with pytest.raises(UsageError, match=f"{name} is not a folder"):
            run_pack(job, tmp_path / name)
    assert (tmp_path / "file").read_bytes() == b"dear"
    assert not list((tmp_path / "target").iterdir())


@pytest.mark.parametrize("finished", [True, False])
def test_another_recipe_is_refused(job: PackJob, tmp_path: Path, finished: bool) -> None:
    out = tmp_path / "out"
    run_pack(job, out)
    if not finished:
        (out / MANIFEST).unlink()
        (out / MARKER).write_text(job.recipe)
    before = digest(out)
    for other in (
        replace(job, mix_request="entropy"),
        replace(job, exact_type="f16"),
        replace(job, budget_bits=6.5),
        replace(job, sidecars={}),
    ):
        with pytest.raises(UsageError, match="other weights, another profile or other options"):
            run_pack(other, out)
    assert digest(out) == before


def test_a_bundle_that_cannot_be_read_is_not_overwritten(job: PackJob, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_pack(job, out)
    (out / MANIFEST).write_text("{}")
    before = digest(out)
    with pytest.raises(UsageError, match="cannot be read"):
        run_pack(job, out)
    assert digest(out) == before


@pytest.mark.parametrize("relation", ["same", "inside", "around"])
def test_input_as_output_is_refused(tmp_path: Path, relation: str) -> None:
    source = write_checkpoint(tmp_path / "outer" / "checkpoint")
    before = digest(tmp_path)
    out = {"same": source, "inside": source / "bundle.m2c", "around": source.parent}[relation]
    with pytest.raises(UsageError, match="lie inside each other"):
        run_pack(job_for(source), out)
    assert digest(tmp_path) == before


def test_the_profile_of_another_model_is_refused(job: PackJob, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(UsageError, match="does not belong to"):
        run_pack(job_for(other, job.importance), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_another_process_packs_is_busy(
    job: PackJob, undisturbed: str, processes: ForkServerContext, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    ours, theirs = multiprocessing.Pipe()
    holder = processes.Process(target=hold_lock, args=(out, theirs))
    holder.start()
    try:
        assert ours.poll(60)
        with pytest.raises(Busy, match="another m2c pack"):
            run_pack(job, out)
        assert not list(out.iterdir())
    finally:
        holder.kill()
        holder.join()
    run_pack(job, out)  # a lock dies with its process
    assert digest(out) == undisturbed


# -- disks -----------------------------------------------------------------------------------------


def test_too_little_space_is_said_before_anything_is_written(
    job: PackJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = os.statvfs(tmp_path)
    facts = list(true)[:10]
    facts[4] = 5  # f_bavail: five blocks
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(facts))
    with pytest.raises(NoSpace, match=r"the bundle needs .* are free"):
        run_pack(job, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Failing:
    """A file whose disk fails after `left[0]` more bytes, shared by all files of a pack."""

    def __init__(self, file: Any, left: list[int], code: int) -> None:
        self._file, self._left, self._code = file, left, code

    def write(self, data: Any) -> int:
        self._left[0] -= len(data)
        if self._left[0] < 0:
            raise OSError(self._code, os.strerror(self._code))
        return int(self._file.write(data))

    def __enter__(self) -> "Failing":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize("allowed", [10, 30_000, 60_000, 120_000])
@pytest.mark.parametrize(
    ("code", "kind"), [(errno.ENOSPC, NoSpace), (errno.EDQUOT, NoSpace), (errno.EIO, StorageError)]
)
def test_a_disk_that_fails_midway(
    job: PackJob, undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    allowed: int, code: int, kind: type[Exception],
) -> None:  # fmt: skip
    left = [allowed]

    def opened(path: Any, mode: str = "r") -> Any:
        file = builtins.open(path, mode)  # noqa: SIM115
        return Failing(file, left, code) if mode == "xb" else file

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(files, "open", opened, raising=False)
        with pytest.raises(kind, match=str(out)):
            run_pack(job, out)
    assert not list(out.rglob(f"{TEMPORARY_PREFIX}*"))
    assert not (out / MANIFEST).exists()
    run_pack(job, out)
    assert digest(out) == undisturbed
