"""`run` only reads: 0 bytes are written to the disk, and a bundle that cannot be written serves."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from command_line import COMMAND
from running import named_smallest, options_for
from tiny_models import pack_folder, write_checkpoint

from m2c.bundle.bundle import Bundle
from m2c.model.mix import Mix
from m2c.units import MiB

pytestmark = pytest.mark.slow
CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|answer|>"
# tells at its very end what this process has caused to be written to disks
COUNTED = """
import os, sys
from m2c.cli import app
code = app.call(sys.argv[1:])
facts = dict(line.split(": ") for line in open("/proc/self/io").read().splitlines())
print("written", facts["write_bytes"], file=sys.stderr)
os._exit(code)
"""
MEMORY = Path("/dev/shm")
TRIES = (
    3  # a file system notes once a day when a file was read; what m2c wrote it would write again
)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Layers that do not fit into the smallest --dram, and a chat format."""
    folder = tmp_path_factory.mktemp("spoken")
    shape = {"num_hidden_layers": 6, "hidden_size": 120, "intermediate_size": 700}
    checkpoint = write_checkpoint(folder / "checkpoint", shape)
    (checkpoint / "chat_template.jinja").write_text(CHAT)
    return pack_folder(checkpoint, folder / "bundle.m2c")


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A folder on no disk, for what m2c remembers."""
    if not MEMORY.is_dir() or os.stat(MEMORY).st_dev == os.stat("/").st_dev:
        pytest.skip("needs /dev/shm, a file system in memory")
    with TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


def lines(bundle: Bundle) -> dict[str, list[str]]:
    """Commands that use a bundle, streaming from it where that can be."""
    path = str(bundle.path)
    least = named_smallest(bundle, options_for(Mix(5, 15, 80), ctx_size=64, dram=1))
    dram = f"{-(-least // MiB)}MiB"
    mixed = ["--mix", "5/15/80", "--dram", dram, "-c", "64", "-q"]
    return {
        "run": ["run", path, "-n", "12", "-p", "it was", *mixed],
        "exact": ["run", path, "-n", "12", "-p", "it was", "--exact", "-c", "64", "-q"],
        "chat": ["chat", path, "-n", "6", *mixed],
        "check": ["check", path],
    }


def state_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """What changes when a file is written, made, renamed or removed; access times do not count."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        facts = path.lstat()
        found[str(path)] = (facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
    return found


@pytest.fixture(scope="module")
def enter(spoken: Bundle) -> list[str]:
    """What a command line begins with so that the bundle lies on a read-only mount; root's powers
    do not help there. Empty where no namespace can be had."""
    inside = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && shift && exec "$@"'
    unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    words = [*unshare, "/bin/sh", "-c", inside, "sh", str(spoken.path)]
    if shutil.which("unshare") is None:
        return []
    return [] if subprocess.run([*words, "true"], capture_output=True).returncode else words


def test_the_mount_is_read_only(spoken: Bundle, enter: list[str]) -> None:
    if not enter:
        pytest.skip("needs unshare and the right to mount in a namespace of its own")
    touch = subprocess.run([*enter, "touch", str(spoken.path / "x")], capture_output=True)
    assert touch.returncode


@pytest.mark.parametrize("command", ["run", "exact", "chat", "check"])
def test_nothing_is_written_to_a_disk(
    spoken: Bundle, in_memory: Path, enter: list[str], command: str
) -> None:
    """Nor could it be to the bundle; the process's own count of bytes that go to disks is 0."""
    before = state_of(spoken.path.parent)
    written = []
    while not written or (written[-1] and len(written) < TRIES):
        home = in_memory / str(len(written))
        home.mkdir()
        # what it remembers goes to memory, and Python keeps its compiled files to itself
        environment = {
            **os.environ, "M2C_HOME": str(home), "TMPDIR": str(home),
            "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        done = subprocess.run(
            [*enter, sys.executable, "-c", COUNTED, *lines(spoken)[command]], env=environment,
            input="hello\nand you\n", capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout
        written.append(int(done.stderr.split()[-1]))
    assert written[-1] == 0, written
    assert state_of(spoken.path.parent) == before


def test_the_count_sees_what_is_written(tmp_path: Path) -> None:
    write = COUNTED.replace("code = app.call(sys.argv[1:])", "code = 0").replace(
        "facts =", "open(sys.argv[1], 'wb').write(bytes(1 << 20))\nfacts ="
    )
    done = subprocess.run(
        [sys.executable, "-c", write, str(tmp_path / "x")], capture_output=True, text=True
    )
    assert int(done.stderr.split()[-1]) >= 1 << 20


def test_no_shard_is_opened_to_be_written(spoken: Bundle, tmp_path: Path) -> None:
    """As the kernel sees it: every open below the bundle is O_RDONLY, and makes nothing."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    calls = "openat,open,creat,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,truncate"
    log = tmp_path / "log"
    trace = ["strace", "-f", "-qq", "-y", "-o", str(log), "-e", f"trace={calls}"]
    done = subprocess.run(
        [*trace, *COMMAND, *lines(spoken)["run"]], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    ours = [line for line in log.read_text().splitlines() if str(spoken.path) in line]
    shards = [line for line in ours if ".int4" in line]
    assert len(shards) > 6
    for line in ours:
        assert "O_RDONLY" in line, line
        assert not any(flag in line for flag in ("O_CREAT", "O_TRUNC", "O_RDWR")), line
