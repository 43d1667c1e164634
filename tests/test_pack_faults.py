"""`pack` when a call fails: no space, short writes, a disk that answers with errors.

One line and the documented exit code, nothing left over, nothing trusted that may not be on the
disk, and the same bytes once the command is run again.
"""

import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from syscalls import SHORT, End
from tiny_models import digest, pack_again, run_pack
from trials import trials
from watched_pack import OUT, WatchedPack, spread

from m2c import pack as pack_module
from m2c import pipeline
from m2c.bundle.bundle import open_bundle
from m2c.bundle.claim import MARKER
from m2c.bundle.files import TEMPORARY_PREFIX, atomic_file
from m2c.bundle.manifest import MANIFEST
from m2c.bundle.shard import ShardIndex
from m2c.errors import BadInput, NoSpace, StorageError
from m2c.pack import PackJob

NEEDS_SPACE: Final = ("mkdir", "openat", "write", "rename")


def chosen(
    calls: list[str], kinds: tuple[str, ...], seed: int, codes: tuple[int, ...]
) -> tuple[str, int]:
    """Trial `seed` of every call of those kinds with each of `codes`."""
    every = [call for call in calls if call.split()[0] in kinds]
    call = spread(seed, len(every) * len(codes), stride=29)
    return every[call % len(every)], codes[call // len(every)]


def count(calls: list[str], kinds: tuple[str, ...]) -> int:
    return sum(call.split()[0] in kinds for call in calls)


def require_tidy(out: Path) -> None:
    """No temporary file, and no bundle that looks complete."""
    assert not list(out.rglob(f"{TEMPORARY_PREFIX}*"))
    with pytest.raises(BadInput):
        open_bundle(out)


def require_finished(job: PackJob, out: Path, undisturbed: str) -> None:
    run_pack(job, out)
    assert digest(out) == undisturbed


@pytest.mark.slow
@pytest.mark.campaign
def test_no_space_at_any_call(
    watched: WatchedPack, calls: list[str], job: PackJob, undisturbed: str, tmp_path: Path
) -> None:
    given = digest(watched.checkpoint), watched.profile.read_bytes()
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    for trial in trials("R5-every-call", ci=5, campaign=3 * count(calls, NEEDS_SPACE)):
        with trial as seed:
            call, code = chosen(calls, NEEDS_SPACE, seed, codes)
            folder = tmp_path / str(seed)
            folder.mkdir()
            end, met = watched.at(folder, call, code)
            assert met
            assert end.code == 5, (call, end)
            assert str(folder) in end.text
            assert "more are needed" in end.text
            assert "are free; free some space and run the same command" in end.text
            assert "\n" not in end.text
            require_tidy(folder / OUT)
            require_finished(job, folder / OUT, undisturbed)
    assert given == (digest(watched.checkpoint), watched.profile.read_bytes())


@pytest.mark.campaign
def test_a_write_that_is_cut_short_goes_on(
    watched: WatchedPack, calls: list[str], undisturbed: str, tmp_path: Path
) -> None:
    for trial in trials("R5-short-write", ci=3, campaign=count(calls, ("write",))):
        with trial as seed:
            call, _ = chosen(calls, ("write",), seed, (0,))
            folder = tmp_path / str(seed)
            folder.mkdir()
            assert watched.at(folder, call, SHORT) == (End(0), True)
            assert digest(folder / OUT) == undisturbed


@pytest.mark.slow
@pytest.mark.campaign
def test_a_sync_or_close_that_fails(
    watched: WatchedPack, calls: list[str], job: PackJob, undisturbed: str, tmp_path: Path
) -> None:
    """Pages of a failed fsync count as clean, so a second one would succeed: the file must go."""
    kinds = ("fsync", "close")
    for trial in trials("R6-every-sync", ci=5, campaign=count(calls, kinds)):
        with trial as seed:
            call, code = chosen(calls, kinds, seed, (errno.EIO,))
            require_failure(watched, call, code, tmp_path / str(seed), job, undisturbed)


@pytest.mark.slow
@pytest.mark.campaign
def test_an_error_of_the_disk_at_any_other_call(
    watched: WatchedPack, calls: list[str], job: PackJob, undisturbed: str, tmp_path: Path
) -> None:
    kinds = (*NEEDS_SPACE, "unlink")
    for trial in trials("R6-every-other-call", ci=2, campaign=2 * count(calls, kinds)):
        with trial as seed:
            call, code = chosen(calls, kinds, seed, (errno.EIO, errno.EROFS))
            require_failure(watched, call, code, tmp_path / str(seed), job, undisturbed)


def require_failure(
    watched: WatchedPack, call: str, code: int, folder: Path, job: PackJob, undisturbed: str
) -> None:
    folder.mkdir()
    end, met = watched.at(folder, call, code)
    out = folder / OUT
    assert met
    assert end.code == 6, (call, end)
    assert str(folder) in end.text
    assert "\n" not in end.text
    kind, path, _ = call.split()
    if (kind, path) == ("unlink", f"{OUT}/{MARKER}"):
        open_bundle(out)  # its last act, once all is safe
    else:
        require_tidy(out)
    if kind != "unlink" and "TEMPORARY-" in path:
        assert not (folder / path.replace("TEMPORARY-", "")).exists()
    require_finished(job, out, undisturbed)


@pytest.mark.parametrize("name", ["dense", "neurons", "."])
def test_a_name_that_could_not_be_synced_is_taken_back(
    watched: WatchedPack, calls: list[str], tmp_path: Path, name: str
) -> None:
    """The n-th fsync of a folder follows the n-th rename in it, but for the first, of the claim."""
    path = f"{OUT}/{name}".removesuffix("/.")
    last = max(int(c.split()[2]) for c in calls if c.startswith(f"fsync {path} "))
    end, met = watched.at(tmp_path, f"fsync {path} {last}", errno.EIO)
    assert (end.code, met) == (6, True)
    there = {p.name for p in (tmp_path / path).iterdir() if p.is_file()}
    renames = [c.split()[1] for c in calls if c.startswith(f"rename {path}/TEMPORARY")]
    expected = {Path(c).name.replace("TEMPORARY-", "") for c in renames}
    assert len(expected - there) == 1


def test_a_file_system_that_cannot_sync_folders(
    watched: WatchedPack, undisturbed: str, tmp_path: Path
) -> None:
    end, met = watched.at(tmp_path, f"fsync {OUT}/dense 2", errno.EINVAL)
    assert (end, met) == (End(0), True)
    assert digest(tmp_path / OUT) == undisturbed


def test_a_finished_shard_that_cannot_be_read_is_written_again(
    job: PackJob, undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad sector must not stop every later pack: other sectors will be taken for a new file."""
    out = tmp_path / "out"
    run_pack(job, out)
    (out / MANIFEST).unlink()
    (out / MARKER).write_text(job.recipe)
    bad = out / "dense" / "00000.int8"
    before, true = bad.stat().st_ino, pipeline.verify_blocks

    def verify(index: ShardIndex) -> Iterator[int]:
        if index.path == bad:
            raise StorageError(f"{bad}: input/output error")
        return true(index)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "verify_blocks", verify)
        run_pack(job, out)
    assert digest(out) == undisturbed
    assert bad.stat().st_ino != before


def test_a_temporary_name_is_never_met_again(tmp_path: Path) -> None:
    """In a container the process has the same number every time."""
    with atomic_file(tmp_path / "a") as first, atomic_file(tmp_path / "a") as second:
        assert first.name != second.name


def test_a_signal_leaves_no_temporary_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "a"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


# -- limits that are real --------------------------------------------------------------------------


def pack_limited(checkpoint: Path, profile: Path, out: Path, nbytes: int) -> None:
    """Pack where no file may grow beyond `nbytes`."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))
    pack_again(checkpoint, profile, out)


def pack_unasked(checkpoint: Path, profile: Path, out: Path) -> None:
    """Pack without asking before how much is free: somebody else fills the disk meanwhile."""
    pack_module.require_space = lambda job, path: (0, 0)  # type: ignore[assignment]
    pack_again(checkpoint, profile, out)


@pytest.mark.parametrize("nbytes", [10, 4096, 5000, 16_384, 20_500])
def test_a_limit_on_the_size_of_files(
    watched: WatchedPack, job: PackJob, undisturbed: str, tmp_path: Path, nbytes: int
) -> None:
    end = watched.run(tmp_path, lambda event: 0, pack_limited, nbytes)
    assert end.code == 5
    assert "file too large" in end.text
    require_tidy(tmp_path / OUT)
    require_finished(job, tmp_path / OUT, undisturbed)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of its own, to be remounted with a size."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "m2c-test", str(place)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def resize(disk: Path, kib: int) -> None:
    command = ["mount", "-o", f"remount,size={kib}k", str(disk)]
    subprocess.run(command, check=True)


@pytest.mark.campaign
def test_disks_of_many_sizes(
    watched: WatchedPack, job: PackJob, undisturbed: str, disk: Path
) -> None:
    """Trial N: a disk of so many pages; every other pack does not ask beforehand."""
    out = disk / OUT
    refused = 0
    for trial in trials("R5-disk-size", ci=3, campaign=240):
        with trial as seed:
            resize(disk, 4 * (1 + seed * 43 % 120))
            function = pack_unasked if seed % 2 else pack_again
            end = watched.run(disk, lambda event: 0, function)
            assert end.code in (0, 5), end
            if end.code:
                refused += 1
                assert " are free; free some space" in end.text
                if out.exists():
                    require_tidy(out)
                resize(disk, 4096)
                require_finished(job, out, undisturbed)
            assert digest(out) == undisturbed
            subprocess.run(["rm", "-r", str(out)], check=True)
    assert refused


def test_no_space_says_how_much(
    job: PackJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise NoSpace("here: no space left on device", "free some space")

    monkeypatch.setattr(pack_module, "write_manifest", full)
    with pytest.raises(NoSpace, match=r"device: 0 B more are needed, \d+.* are free; free some"):
        run_pack(job, tmp_path / "out")
