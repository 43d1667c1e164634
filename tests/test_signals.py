"""SIGINT, SIGTERM and readers that leave, at any time: the exit code, nobody and nothing left over.

Knows nothing about what a command does, but that a pack which was stopped can be finished.
"""

import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Final

import pytest
from cli_process import Running, begin, seconds_to_end
from command_line import m2c_ok
from tiny_models import digest, pack_folder, write_checkpoint
from trials import trials

from m2c.bundle.files import TEMPORARY_PREFIX
from m2c.cli.app import Terminated, _explain
from m2c.errors import BadInput
from m2c.tokenizer import _engine_errors

COMMANDS: Final = ("profile", "pack", "run", "chat")
CODES: Final = {signal.SIGINT: 130, signal.SIGTERM: 143}
PATIENCE_S: Final = 60.0  # promised are 2 s; a machine that runs tests may be busy
NULL: Final = Path("/dev/null")
TEMPLATE: Final = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|answer|>"


class Place:
    """A checkpoint, its profile and bundles, and the words of every command on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shape = {"num_hidden_layers": 4, "max_position_embeddings": 1 << 16}
        self.checkpoint = write_checkpoint(folder / "tiny", shape)
        (self.checkpoint / "chat_template.jinja").write_text(TEMPLATE)
        self.profile = folder / "profile.safetensors"
        m2c_ok("profile", self.checkpoint, "--tokens", 32, "-q", "-o", self.profile)
        self.bundle = pack_folder(self.checkpoint, folder / "run.m2c").path
        self.messages = folder / "messages"
        self.messages.write_text("one\ntwo\n" * 2000)
        self.packed = digest(self.pack(folder / "undisturbed"))

    def words(self, command: str, folder: Path) -> tuple[object, ...]:
        """Commands that take long enough to be stopped; what they write goes into `folder`."""
        few = ("-q", "--threads", 1)
        return {
            "profile": ("profile", self.checkpoint, "-o", folder / "p", "--tokens", 512, *few),
            "pack": ("pack", self.checkpoint, "--ssd", folder, "--profile", self.profile, *few),
            "run": ("run", self.bundle, "-p", "x", "-n", 60000, "-c", 65536, *few),
            "chat": ("chat", self.bundle, "-n", 3, "-c", 65536, *few),
        }[command]

    def pack(self, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        return Path(m2c_ok(*self.words("pack", folder)).strip())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("signals"))


def require_nothing_left(running: Running, folder: Path) -> None:
    assert not running.relatives()
    assert not list(folder.rglob(f"{TEMPORARY_PREFIX}*"))


@pytest.mark.slow
@pytest.mark.campaign
def test_stopped_at_random_moments(
    place: Place, processes: ForkServerContext, tmp_path: Path
) -> None:
    """Trial N: one of the commands, one of the signals, sometimes twice, at some moment."""
    took = []
    for trial in trials("R20-random-moment", ci=8, campaign=2000):
        with trial as seed:
            rng = random.Random(seed)
            command, number = COMMANDS[seed % 4], list(CODES)[seed // 4 % 2]
            folder = tmp_path / str(seed)
            folder.mkdir()
            said = folder / "err"
            said.touch()
            streams = (place.messages if command == "chat" else NULL, NULL, said)
            words = place.words(command, folder)
            running = begin(processes, words, folder / "home", streams)
            running.process.join(rng.random() ** 2)
            twice = running.process.exitcode is None and rng.random() < 0.3
            if twice:
                running.signal(number)
            code, seconds = stop(running, number)
            lines = said.read_text().splitlines()
            require_nothing_left(running, folder)
            assert code in (0, CODES[number]), (words, code, lines)
            assert "Traceback" not in said.read_text()
            if code:
                took.append(seconds)
                assert lines[-1] == f"m2c: {'interrupted' if code == 130 else 'terminated'}"
            if command == "pack":
                assert digest(place.pack(folder)) == place.packed
            shutil.rmtree(folder)
    assert max(took) < PATIENCE_S
    print(f"\n{len(took)} stopped, {percentiles(took)}")  # noqa: T201


def stop(running: Running, number: signal.Signals) -> tuple[int, float]:
    """As seconds_to_end; one that has ended by itself is no error."""
    if running.process.exitcode is not None:
        return running.wait(), 0.0
    return seconds_to_end(running, number)


def percentiles(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    parts = {"median": 0.5, "99 %": 0.99, "longest": 1.0}
    return ", ".join(f"{k} {ordered[int((len(ordered) - 1) * v)]:.2f} s" for k, v in parts.items())


def test_stopped_while_a_tokenizer_is_read() -> None:
    """What a signal raises there is not about the file; what a panic in Rust raises is."""
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(Terminated), _engine_errors("tokenizer.json"):
        raise Terminated
    with pytest.raises(BadInput, match="not a usable tokenizer"), _engine_errors("tokenizer.json"):
        raise panic


@pytest.mark.parametrize(
    "order", ["signal(words)", "code = true(words); signal(words); return code"]
)
def test_stopped_just_before_or_after_the_work(order: str) -> None:
    script = f"""
import os
from m2c.cli import app
true = app.call
def signal(_): os.kill(os.getpid(), 15)
def call(words): {order}
app.call = call
app.main()
"""
    command = [sys.executable, "-c", script, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (143, "m2c: terminated\n")


@pytest.mark.parametrize("command", ["profile", "pack", "run", "chat", "show", "check", "plan"])
def test_nobody_reads_the_result(
    place: Place, processes: ForkServerContext, tmp_path: Path, command: str
) -> None:
    """As in `m2c ... | head -1` that has seen enough: the end, without a word about it."""
    pipe, said = tmp_path / "pipe", tmp_path / "err"
    os.mkfifo(pipe)
    said.touch()
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    words = place.words(command, tmp_path) if command in COMMANDS else (command, place.bundle)
    stdin = place.messages if command == "chat" else NULL
    running = begin(processes, words, tmp_path / "home", (stdin, pipe, said))
    if command in ("run", "chat"):
        select.select([reader], [], [], 60)
        os.read(reader, 1)
    os.close(reader)
    assert running.wait() == 0
    assert "Traceback" not in said.read_text()
    assert "rror" not in said.read_text()
    require_nothing_left(running, tmp_path)


# -- at a terminal ---------------------------------------------------------------------------------


class Screen:
    """A terminal: what was written to it, and how it is set."""

    def __init__(self) -> None:
        self.ours, self.theirs = os.openpty()
        termios.tcsetwinsize(self.theirs, (24, 80))
        self.path = Path(os.ttyname(self.theirs))
        self.text = ""
        self.before = termios.tcgetattr(self.theirs)

    def read_until(self, done: Callable[[], object]) -> None:
        deadline = time.monotonic() + 2 * PATIENCE_S
        while not done():
            assert time.monotonic() < deadline, self.text
            if select.select([self.ours], [], [], 0.02)[0]:
                self.text += os.read(self.ours, 1 << 16).decode(errors="replace")

    def require_restored(self) -> None:
        assert termios.tcgetattr(self.theirs) == self.before
        for mode in ("25", "1049", "2004"):  # the cursor, another page, marks around what is pasted
            last = [m[1] for m in re.findall(rf"\x1b\[\?({mode})([hl])", self.text)][-1:]
            assert last in ([], ["h"] if mode == "25" else ["l"])
        colours = re.findall(r"\x1b\[[0-9;]*m", self.text)
        assert not colours or colours[-1] in ("\x1b[0m", "\x1b[m")


@contextmanager
def screen() -> Iterator[Screen]:
    made = Screen()
    try:
        yield made
    finally:
        os.close(made.ours)
        os.close(made.theirs)


SHOWN: Final = {"profile": "profile:", "pack": "pack tiny", "run": "", "chat": "> "}
LEAVES: Final = "m2c: Ctrl-D or /exit leaves"


@pytest.mark.parametrize("by", ["SIGTERM", "SIGINT", "Ctrl-C"])
@pytest.mark.parametrize("command", COMMANDS)
def test_the_terminal_is_as_it_was(
    place: Place, processes: ForkServerContext, tmp_path: Path, command: str, by: str
) -> None:
    """Stopped while it shows its bar, writes, or waits for what is typed."""
    words = [word for word in place.words(command, tmp_path) if word != "-q"]
    with screen() as terminal:
        running = begin(processes, words, tmp_path / "home", [terminal.path] * 3)
        shown = SHOWN[command]
        terminal.read_until(lambda: shown in terminal.text if shown else terminal.text)
        if command == "chat":
            # readline misses a signal between its prompt and its wait; the next key would show it
            terminal.read_until(running.sleeps)
        if by == "Ctrl-C":
            os.write(terminal.ours, b"\x03")
        else:
            running.signal(signal.Signals[by])
        if command == "chat" and by != "SIGTERM":
            terminal.read_until(lambda: LEAVES in terminal.text)  # Ctrl-C only drops the line
            terminal.read_until(running.sleeps)
            os.write(terminal.ours, b"\x04")
        terminal.read_until(lambda: running.process.exitcode is not None)
        expected = 0 if command == "chat" and by != "SIGTERM" else 143 if by == "SIGTERM" else 130
        assert running.wait() == expected, terminal.text
        terminal.require_restored()
        assert "Traceback" not in terminal.text
        require_nothing_left(running, tmp_path)


_FINALIZER = """
import os, signal, sys, time
from m2c.cli.app import Terminated, _explain, _unwind

class Slow:
    def __del__(self):
        os.kill(os.getpid(), signal.{name})
        time.sleep(0.2)

for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, _unwind)
begin = time.monotonic()
try:
    one = Slow()
    del one
    time.sleep(10)
except (KeyboardInterrupt, Terminated) as error:
    print(type(error).__name__, time.monotonic() - begin < 1.5, flush=True)
    os._exit(0)
"""


@pytest.mark.parametrize(
    ("name", "raised"), [("SIGINT", "KeyboardInterrupt"), ("SIGTERM", "Terminated")]
)
def test_a_signal_where_nothing_can_be_raised_is_raised_later(name: str, raised: str) -> None:
    """Python drops what a finalizer raises: the process still ends at once, and in silence."""
    program = _FINALIZER.format(name=name)
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert said.stdout == f"{raised} True\n"
    assert said.stderr == ""


_WRITING = """
import sys, threading, time
from pathlib import Path
from m2c.bundle.files import atomic_file
from m2c.cli.console import end_now

def write():
    with atomic_file(Path(sys.argv[1]) / "a") as file:
        file.write(b"half")
        begun.set()
        time.sleep(60)

begun = threading.Event()
threading.Thread(target=write, daemon=True).start()
begun.wait()
end_now(3)
"""


def test_a_process_that_ends_leaves_nothing_that_its_threads_were_writing(tmp_path: Path) -> None:
    said = subprocess.run([sys.executable, "-c", _WRITING, str(tmp_path)], timeout=60, check=False)
    assert said.returncode == 3
    assert list(tmp_path.iterdir()) == []


_ENDING = """
import os, signal
from m2c.bundle import files
from m2c.cli import app, console

for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, app._unwind)
files.remove_unfinished = lambda: os.kill(os.getpid(), signal.SIGTERM)
console.end_now(3)
"""


def test_a_signal_while_a_process_ends_changes_nothing() -> None:
    said = subprocess.run(
        [sys.executable, "-c", _ENDING], capture_output=True, text=True, timeout=60
    )
    assert (said.returncode, said.stdout, said.stderr) == (3, "", "")


@pytest.mark.parametrize(("raised", "code"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_a_signal_while_a_class_is_made(raised: type[BaseException], code: int) -> None:
    """Python makes a RuntimeError of it, as of anything that __set_name__ raises."""

    class Named:
        def __set_name__(self, owner: type, name: str) -> None:
            raise raised

    with pytest.raises((RuntimeError, raised)) as caught:
        type("Made", (), {"named": Named()})
    assert _explain(caught.value)[0] == code
