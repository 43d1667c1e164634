"""`m2c` as a process among others: streams that are closed, full or cut off, and signals."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import m2c, m2c_ok, shell, start
from tiny_models import pack_folder, write_checkpoint

from m2c.bundle.files import TEMPORARY_PREFIX

FULL = Path("/dev/full")


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose context takes a minute to fill."""
    folder = tmp_path_factory.mktemp("endless")
    shape = {"max_position_embeddings": 1 << 16}
    return pack_folder(write_checkpoint(folder / "checkpoint", shape), folder / "endless.m2c").path


# -- streams that end or never were ----------------------------------------------------------------


def test_closed_streams(bundle: Path) -> None:
    assert shell('"$@" <&-', "run", bundle).reason.startswith("the prompt is empty")
    words = ("run", bundle, "-p", "x", "-n", 2, "-q")
    assert shell('"$@" <&- 2>&-', *words).out == m2c_ok(*words)
    nothing = shell('"$@" <&- >&- 2>&-', *words)
    assert (nothing.code, nothing.out) == (0, "")


@pytest.mark.skipif(not FULL.is_char_device(), reason="no /dev/full")
@pytest.mark.parametrize("words", [("run", "-p", "x"), ("show",), ("--help",), ("--version",)])
def test_a_full_disk_behind_stdout(words: tuple[str, ...], bundle: Path) -> None:
    named = (words[0], bundle, *words[1:]) if words[0] in ("run", "show") else words
    said = shell('"$@" > /dev/full', *named)
    assert said.code == 5
    assert said.reason.startswith("standard output: no space left on device; ")


@pytest.mark.skipif(not FULL.is_char_device(), reason="no /dev/full")
def test_nobody_reads_stderr(bundle: Path) -> None:
    said = shell('"$@" 2> /dev/full', "run", bundle, "-p", "x", "-n", 2)
    assert said.code == 0
    assert said.out


def test_a_reader_that_has_enough(endless: Path, bundle: Path) -> None:
    tail = ' | head -c 9; echo; echo "${PIPESTATUS[0]}"'
    said = shell('"$@"' + tail, "run", endless, "-p", "x", "-n", 60000, "-c", 65536, "-q")
    assert (said.out.splitlines()[-1], said.err) == ("0", "")
    said = shell('"$@"' + tail, "show", bundle)
    assert (said.out.splitlines()[-1], said.err) == ("0", "")


# -- signals ---------------------------------------------------------------------------------------


def _wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "code", "reason"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_interrupted_while_it_writes(
    number: signal.Signals, code: int, reason: str, endless: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    words = ("run", endless, "-p", "x", "-n", 60000, "-c", 65536, "-q", "--trace", trace)
    with start(*words) as process:
        assert process.stdout
        assert process.stdout.read(1)
        process.send_signal(number)
        process.send_signal(number)  # people are impatient
        out, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert err == f"m2c: {reason}\n"
    if number == signal.SIGINT:
        assert out.endswith("\n")
    # the trace was ended, too
    assert m2c("bench", "--replay", trace).code == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_packing_is_finished_by_the_next(
    number: signal.Signals, tmp_path: Path
) -> None:
    shape = {"num_hidden_layers": 6, "hidden_size": 128, "intermediate_size": 4096}
    checkpoint = write_checkpoint(tmp_path / "checkpoint", shape)
    m2c_ok("profile", checkpoint, "--tokens", 32, "-q")
    words = ("pack", "--ssd", tmp_path, "-q", "--threads", 1)
    path = tmp_path / "checkpoint.m2c"
    with start(*words) as process:
        _wait_for(lambda: list(path.glob("neurons/00001.*")))
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert out == ""
    assert err.count("\n") == 2
    assert not list(path.rglob(f"{TEMPORARY_PREFIX}*"))
    assert m2c("run", path, "-p", "x").code == 4
    assert m2c_ok(*words) == f"{path}\n"
    assert m2c_ok("check", path, "--source", checkpoint)


def test_interrupted_waiting_for_a_message(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    (checkpoint / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    path = pack_folder(checkpoint, tmp_path / "chat.m2c").path
    with start("chat", path, "-n", 3, "-q") as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write("x\n")
        process.stdin.flush()
        assert process.stdout.readline()  # answers come while the pipe is open
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)
        assert process.stderr
        assert process.stderr.read().endswith("m2c: interrupted\n")
    assert process.returncode == 130


def test_interrupted_waiting_for_a_prompt(bundle: Path) -> None:
    with start("run", bundle) as process:
        assert process.stdin
        # more than a pipe holds: whoever took it is reading
        process.stdin.write("x" * (1 << 20))
        process.stdin.flush()
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)
        assert process.stderr
        assert process.stderr.read() == "m2c: interrupted\n"
    assert process.returncode == 130
