"""`m2c` in a process of its own that has imported everything already: a tenth of a second to start.

It leads a session of its own, with files, pipes or a terminal as its streams. Knows nothing about
pytest.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from m2c.cli import app


@dataclass
class Running:
    """`wait` for its exit code; `pid` leads its process group."""

    process: Any
    pid: int

    def signal(self, number: signal.Signals) -> None:
        """Too late for a process that has just ended: its exit code tells."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, timeout_s: float = 120.0) -> int:
        self.process.join(timeout_s)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError
        return int(self.process.exitcode)

    def sleeps(self) -> bool:
        """Whether it waits, and still does a moment later."""
        for _ in range(3):
            text = Path(f"/proc/{self.pid}/stat").read_text()
            if text.rpartition(")")[2].split()[0] != "S":
                return False
            time.sleep(0.02)
        return True

    def relatives(self) -> list[int]:
        """Processes of its session that are still there, but for those nobody has waited for."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(session) == self.pid and state != "Z":
                found.append(int(folder.name))
        return found


def begin(
    processes: ForkServerContext, words: Sequence[object], home: Path, streams: Sequence[Path]
) -> Running:
    """Start a command line; returns once it is under way. `streams`: files opened as 0, 1 and 2."""
    ours, theirs = multiprocessing.Pipe()
    texts = [str(word) for word in words]
    process = processes.Process(target=_child, args=(texts, home, tuple(streams), theirs))
    process.start()
    theirs.close()
    assert ours.poll(60)
    ours.recv()
    ours.close()
    assert process.pid
    return Running(process, process.pid)


def _child(words: list[str], home: Path, streams: tuple[Path, ...], ready: Connection) -> None:
    os.setsid()  # the first terminal that is opened below becomes ours
    for number, path in enumerate(streams):
        flags = os.O_RDWR if path.is_char_device() else os.O_WRONLY if number else os.O_RDONLY
        opened = os.open(path, flags)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # as in a process of its own; else the locks of progress bars count as leaked
    multiprocessing.set_start_method("fork", force=True)
    os.environ.update(M2C_HOME=str(home), HF_HUB_OFFLINE="1", TERM="xterm", COLUMNS="80")
    sys.argv = ["m2c", *words]
    true = app.call

    def call(words: list[str]) -> int:
        ready.send(True)  # the handlers of signals are in place
        ready.close()
        return true(words)

    app.call = call
    app.main()


def seconds_to_end(running: Running, number: signal.Signals) -> tuple[int, float]:
    """Send a signal; the exit code, and how long it took."""
    begun = time.monotonic()
    running.signal(number)
    return running.wait(), time.monotonic() - begun
