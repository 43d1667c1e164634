"""R7: a disk that errs, stalls or vanishes while a model runs.

Exit 6 with the file and the byte, no wrong token, no hang. Reads of shards fail where the system
would answer, at `os.pread` and `os.preadv`; those of small files under strace.
"""

import errno
import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import COMMAND, Said
from every_mode import PROMPT, Subject, run
from trials import trials

from m2c.bundle.shard import PAGE
from m2c.contents import IMPORTANCE, VECTORS

AHEAD = 8  # blocks that a run may read ahead of its last token
CODES = (errno.EIO, errno.ENODEV, errno.ESTALE, errno.ETIMEDOUT)


class Disk:
    """Counts reads of files in `folder`, and does something else at some of them.

    at: the first such read; more: whether also at all that follow.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self._lock = threading.Lock()
        self._pread, self._preadv = os.pread, os.preadv
        self.quiet()

    def quiet(self) -> None:
        self.reads, self.at, self.more, self.met = 0, 0, False, set[str]()
        # told the bytes asked for, gives those that may be read
        self.answer: Callable[[int], int] = lambda nbytes: nbytes

    def _asks(self, descriptor: int, nbytes: int) -> int:
        """Bytes that may be read of those asked for."""
        file = os.readlink(f"/proc/self/fd/{descriptor}")
        if not file.startswith(self._folder):
            return nbytes
        with self._lock:
            self.reads += 1
            disturbed = self.reads == self.at or (self.more and self.reads > self.at > 0)
            if disturbed:
                self.met.add(os.path.relpath(file.removesuffix(" (deleted)"), self._folder))
        return self.answer(nbytes) if disturbed else nbytes

    def pread(self, descriptor: int, nbytes: int, offset: int) -> bytes:
        return self._pread(descriptor, self._asks(descriptor, nbytes), offset)

    def preadv(self, descriptor: int, buffers: Any, offset: int) -> int:
        (view,) = buffers
        allowed = max(self._asks(descriptor, len(view)), min(PAGE, len(view)))
        if offset % PAGE and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))  # as most file systems do
        return min(self._preadv(descriptor, buffers, offset), allowed)


@pytest.fixture
def disk(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> Disk:
    """Under `subject.bundle`."""
    return watched(subject.bundle.path, monkeypatch)


def watched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    made = Disk(folder)
    monkeypatch.setattr(os, "pread", made.pread)
    monkeypatch.setattr(os, "preadv", made.preadv)
    return made


def failing(code: int) -> Callable[[int], int]:
    def fail(nbytes: int) -> int:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.campaign
def test_a_read_that_fails(subject: Subject, disk: Disk) -> None:
    """The N-th of a run, alone or with all that follow, in every mode: exit 6, file and byte."""
    undisturbed: dict[str, tuple[Said, int]] = {}
    for trial in trials("R7-failing-reads", ci=20, campaign=2000):
        with trial as seed:
            rng, mode = random.Random(seed), mode_of(subject, seed)
            true = aim(disk, rng, *count_reads(subject, disk, mode, undisturbed))
            disk.answer = failing(rng.choice(CODES))
            said = run(subject.bundle.path, subject.modes[mode])
            if not disk.met:  # threads read ahead more in one run than in another
                assert (said.code, said.out) == (0, true.out)
                continue
            require_failed_at(said, true, disk.met)


def mode_of(subject: Subject, seed: int) -> str:
    return list(subject.modes)[seed % len(subject.modes)]


def aim(disk: Disk, rng: random.Random, true: Said, reads: int) -> Said:
    """At one of a run's reads, or at that and all that follow; returns `true`."""
    disk.quiet()
    # how many are read ahead of a token that nobody asks for depends on the moment it ends
    disk.at, disk.more = rng.randint(1, max(1, reads - AHEAD)), rng.random() < 0.5
    return true


def count_reads(
    subject: Subject,
    disk: Disk,
    mode: str,
    undisturbed: dict[str, tuple[Said, int]],
    path: Path | None = None,
) -> tuple[Said, int]:
    """What an undisturbed run says, and its reads of shards; the second run, as the first probes
    the disk."""
    if mode not in undisturbed:
        for _ in range(2):
            disk.quiet()
            said = run(path or subject.bundle.path, subject.modes[mode])
            assert said.code == 0
        undisturbed[mode] = said, disk.reads
    return undisturbed[mode]


def require_failed_at(said: Said, true: Said, files: set[str]) -> None:
    if said.code == 0:  # read ahead for a token that was never asked for
        assert said.out == true.out
        return
    assert said.code == 6
    assert any(f"{file} at byte " in said.reason for file in files)
    assert true.out.startswith(said.out.removesuffix("\n"))


@pytest.mark.campaign
def test_short_reads_are_read_on(subject: Subject, disk: Disk) -> None:
    """The system may give less than was asked; to a direct read at least a page, or what is left of
    the file."""
    undisturbed: dict[str, tuple[Said, int]] = {}
    for trial in trials("R7-short-reads", ci=10, campaign=1000):
        with trial as seed:
            rng, mode = random.Random(seed), mode_of(subject, seed)
            true = aim(disk, rng, *count_reads(subject, disk, mode, undisturbed))
            disk.answer = lambda nbytes, rng=rng: rng.randint(1, nbytes)
            assert run(subject.bundle.path, subject.modes[mode]).out == true.out
            assert disk.reads >= disk.at


@pytest.mark.campaign
def test_a_shard_cut_or_removed_while_it_runs(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the N-th read. What a process has open it may read on when it is removed."""
    undisturbed: dict[str, tuple[Said, int]] = {}
    copy = subject.copied(tmp_path / "copy.m2c")
    disk = watched(copy, monkeypatch)
    for trial in trials("R7-cut-while-running", ci=10, campaign=1000):
        with trial as seed:
            rng, mode = random.Random(seed), mode_of(subject, seed)
            true, reads = count_reads(subject, disk, mode, undisturbed, copy)
            disk.quiet()
            disk.at, victim = rng.randint(1, reads), rng.choice(list(subject.bundle.shards))
            size = (copy / victim).stat().st_size
            cut = rng.choice((None, 0, rng.randrange(size), rng.randrange(size // PAGE) * PAGE))
            disk.answer = lambda nbytes, cut=cut, v=victim: harm(copy / v, cut) or nbytes
            said = run(copy, subject.modes[mode])
            shutil.copy(subject.bundle.path / victim, copy / victim)
            if said.code == 0:
                assert said.out == true.out
            else:
                assert said.code in (4, 6)
                assert victim in said.reason
                assert true.out.startswith(said.out.removesuffix("\n"))


def harm(path: Path, cut: int | None) -> None:
    if cut is None:
        path.unlink()
    else:
        os.truncate(path, cut)


# -- as a process ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace")
@pytest.mark.parametrize("name", ["manifest.json", IMPORTANCE, VECTORS, "model/tokenizer.json"])
def test_a_small_file_that_cannot_be_read(subject: Subject, name: str) -> None:
    path = subject.bundle.path / name
    inject = ("strace", "-f", "-qq", "-o", "/dev/null", "-P", path, "-e", "inject=read:error=EIO")
    words = [*inject, *COMMAND, "run", subject.bundle.path, *PROMPT]
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, timeout=120)
    if "Operation not permitted" in done.stderr:
        pytest.skip("strace may not trace here")
    assert (done.returncode, done.stdout) == (6, "")
    assert f"{path}: input/output error" in done.stderr


# a disk whose third read of neurons does not answer; says so in the file that it is given
_STALLING = """
import os, sys, time
from m2c.cli import app, console
said, *sys.argv[1:] = sys.argv[1:]
console._PATIENCE_S, preadv, reads = 0.5, os.preadv, []
def stalling(descriptor, buffers, offset):
    if "/neurons/" in os.readlink(f"/proc/self/fd/{descriptor}"):
        reads.append(offset)
        if len(reads) > 2:
            open(said, "w").close()
            time.sleep(600)
    return preadv(descriptor, buffers, offset)
os.preadv = stalling
app.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "number", "code", "reason"),
    [
        ("mixed", signal.SIGINT, 130, "interrupted"),
        ("mixed, streamed", signal.SIGINT, 130, "interrupted"),
        ("exact, streamed", signal.SIGTERM, 143, "terminated"),
    ],
)
def test_a_disk_that_does_not_answer(
    mode: str, number: signal.Signals, code: int, reason: str, subject: Subject, tmp_path: Path
) -> None:
    """One Ctrl-C ends it all the same."""
    words = [tmp_path / "stalled", "run", subject.bundle.path, *PROMPT, *subject.modes[mode]]
    command = [sys.executable, "-c", _STALLING, *(str(word) for word in words)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as p:
        deadline = time.monotonic() + 60
        while not (tmp_path / "stalled").exists():
            assert time.monotonic() < deadline
            assert p.poll() is None
            time.sleep(0.02)
        p.send_signal(number)
        try:
            _, err = p.communicate(timeout=60)
        finally:
            p.kill()
    assert p.returncode == code
    assert err.splitlines()[-1] == f"m2c: {reason}"
