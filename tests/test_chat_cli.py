"""`m2c chat`: what goes where from a pipe, and how it is used at a terminal."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from command_line import COMMAND, m2c
from tiny_models import pack_folder, write_checkpoint

from m2c.cli import chat_input
from m2c.cli.chat_input import Terminal, Typed, append_history, as_typed, read_history

CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|answer|>"
WORDS = ("--max-tokens", 6, "--threads", 1, "--mode", "mixed", "--mix", "0/0/100")


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat format and a context that takes long to fill."""
    folder = tmp_path_factory.mktemp("spoken")
    checkpoint = write_checkpoint(folder / "checkpoint", {"max_position_embeddings": 1 << 16})
    (checkpoint / "chat_template.jinja").write_text(CHAT)
    return pack_folder(checkpoint, folder / "spoken.m2c").path


# -- from a pipe -----------------------------------------------------------------------------------


def test_every_line_is_a_message_and_only_answers_are_on_stdout(spoken: Path) -> None:
    said = m2c("chat", spoken, *WORDS, stdin=b"he said\n\n/help\r\n")
    assert said.code == 0
    first = m2c("chat", spoken, *WORDS, "-q", stdin=b"he said")
    assert first.err == "m2c: stopped at --max-tokens 6\n"
    assert first.out == m2c("run", spoken, *WORDS, "-q", "-p", "he said").out
    second = said.out.removeprefix(first.out)
    assert second
    assert said.out != second
    # the slash is no command, and the first message is remembered
    assert second != m2c("chat", spoken, *WORDS, "-q", stdin=b"/help").out
    assert said.err.count("stopped at --max-tokens 6") == 2
    assert re.match(r"m2c: TTFT .* decode .* tok/s", said.err.splitlines()[-1])
    assert "exchange" not in said.err


def test_a_full_context_is_said_and_survived(spoken: Path) -> None:
    lines = b"a message of some length\n" * 6
    said = m2c("chat", spoken, *WORDS, "-q", "--ctx-size", 160, stdin=lines)
    assert said.code == 0
    assert "m2c: the context is full: the oldest " in said.err
    long = b"x" * 200
    said = m2c("chat", spoken, *WORDS, "-q", "--ctx-size", 160, stdin=long)
    assert said.code == 2
    assert "the context holds 160" in said.reason


def test_what_is_refused(spoken: Path, bundle: Path) -> None:
    assert "has no chat format" in m2c("chat", bundle, stdin=b"hi").reason
    said = m2c("chat", spoken, *WORDS, "-q", stdin=b"\xff\n")
    assert (said.code, said.out) == (2, "")
    assert said.reason.startswith("line 1 of stdin is not UTF-8 text (byte 0)")
    assert m2c("chat", spoken, "--top-p", "2", stdin=b"hi").code == 2
    said = m2c("chat", spoken, *WORDS, stdin=b"")
    assert (said.code, said.out) == (0, "")


# -- what is typed ---------------------------------------------------------------------------------


def typed(text: str) -> list[Typed]:
    """What a terminal without line editing makes of `text`."""
    with patch.object(sys, "stdin", io.StringIO(text)), patch.object(sys, "stderr", io.StringIO()):
        terminal, found = Terminal(None), []
        while True:
            try:
                found.append(terminal.read())
            except EOFError:
                return found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hi\n", Typed("hi")),
        ("one \\\ntwo\\\n\n", Typed("one \ntwo\n")),
        ('"""one\n\n/two\\\nthree"""\n', Typed("one\n\n/two\\\nthree")),
        ('"""\none\n"""\n', Typed("one")),
        ('"""one"""\n', Typed("one")),
        ('""""""\n', Typed("")),
        ("/help\n", Typed("/help", is_command=True)),
        ("/system a\\\nb\n", Typed("/system a\nb", is_command=True)),
        ("//help\n", Typed("/help")),
        ("///\n", Typed("//")),
        ('"""/help"""\n', Typed("/help")),
        (" /help\n", Typed(" /help")),
    ],
)
def test_what_a_line_means(text: str, message: Typed) -> None:
    assert typed(text) == [message]


@pytest.mark.parametrize(
    "message",
    [
        Typed("hi"), Typed("/help", is_command=True), Typed("/help"), Typed("//"), Typed("a\\"),
        Typed('"""'), Typed("/a\\"),
    ],
    ids=repr,
)  # fmt: skip
def test_what_is_recalled_means_what_was_typed(message: Typed) -> None:
    assert typed(as_typed(message) + "\n") == [message]


def test_leaving_in_the_middle_of_a_message() -> None:
    assert typed('one\n"""two\n') == [Typed("one")]


def test_history_is_private_bounded_and_forgiving(tmp_path: Path) -> None:
    path = tmp_path / "history"
    assert read_history(path) == []
    path.write_bytes(b'"old"\n\xff{\n17\nnull\n"a\\u0000b"\n')
    path.chmod(0o644)
    for entry in ("two\nlines", "\udc80"):
        append_history(path, entry)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_history(path) == ["old", "two\nlines", "\udc80"]
    chat_input.write_history(path, ["x"])
    assert path.stat().st_mode & 0o777 == 0o600


# -- at a terminal ---------------------------------------------------------------------------------


_PATIENCE_S = 120


class Screen:
    """m2c chat in a terminal of its own."""

    def __init__(self, *words: object, home: Path) -> None:
        self.side, other = pty.openpty()
        env = {**os.environ, "M2C_HOME": str(home), "TERM": "xterm", "COLUMNS": "200"}
        self.process = subprocess.Popen(
            [*COMMAND, *(str(word) for word in words)], stdin=other, stdout=other, stderr=other,
            env=env, start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(other)
        self._text = ""
        self.lines = 0  # that the program has taken from the terminal

    def until(self, *texts: str) -> str:
        """What was shown up to the last of `texts`, which come in this order."""
        shown = ""
        for text in texts:
            while text not in self._text:
                part = self._read()
                assert part, f"{text!r} never came: {self._text!r}"
                self._text += part
            before, _, self._text = self._text.partition(text)
            shown += before + text
        return shown

    def computes(self, seconds: float) -> None:
        """Wait until the process took so much time of the processor: it shows nothing meanwhile."""
        enough = self._cpu_s() + seconds
        deadline = time.monotonic() + _PATIENCE_S
        while self._cpu_s() < enough:
            assert time.monotonic() < deadline, "it does not compute"
            time.sleep(0.005)

    def _cpu_s(self) -> float:
        stat = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")

    def more(self) -> None:
        """Wait for anything to be shown."""
        while not self._text.strip():
            part = self._read()
            assert part, "nothing came"
            self._text += part

    def _read(self) -> str:
        """What comes next, without what switches pastes on and off; empty when nothing does."""
        if not select.select([self.side], [], [], _PATIENCE_S)[0]:
            return ""
        try:
            part = os.read(self.side, 1 << 16).decode(errors="replace")
        except OSError:
            return ""
        self.lines += part.count("\x1b[?2004l")
        return re.sub("\x1b\\[\\?2004[hl]|\r", "", part) or "\n"

    def taken(self, text: str) -> None:
        """Type a line, and wait until the program has it."""
        before = self.lines
        self.type(text)
        while self.lines == before:
            part = self._read()
            assert part, f"{text!r} was never taken"
            self._text += part

    def type(self, text: str) -> None:
        os.write(self.side, text.encode())

    def close(self) -> int:
        """The exit code."""
        try:
            while os.read(self.side, 1 << 16):
                pass
        except OSError:
            pass
        os.close(self.side)
        return self.process.wait(timeout=60)


@pytest.fixture
def screen(spoken: Path, tmp_path: Path) -> Iterator[Screen]:
    words = ("chat", spoken, "--mode", "mixed", "--mix", "0/0/100", "-t", 1, "-c", 65536)
    made = Screen(*words, "-n", 60000, home=tmp_path / "home")
    yield made
    if made.process.poll() is None:
        made.process.kill()
        made.process.wait()


def test_a_conversation_at_a_terminal(screen: Screen, tmp_path: Path) -> None:
    pytest.importorskip("readline")
    file = tmp_path / "chat.jsonl"
    screen.until("/help lists", "> ")
    screen.type("\x03")
    screen.until("Ctrl-D or /exit leaves", "> ")
    screen.type("/nonsense\n")
    screen.until("there is no /nonsense; there are /help /clear", "> ")
    screen.type("/undo\n")
    screen.until("there is no exchange to drop", "> ")
    screen.type("half a line")
    screen.until("half a line")
    screen.type("\x03")
    assert "leaves" not in screen.until("> ")
    screen.type("//he said\n")
    screen.until("//he said\n")
    # an answer that would take minutes is stopped, and the program goes on
    screen.more()
    screen.type("\x03")
    screen.until("stopped; what was said stays in the conversation", "> ")
    screen.type("/set max-tokens 5\n")
    screen.until("m2c: max-tokens 5", "> ")
    screen.type("/retry\n")
    screen.until("at temperature 0 the answer is the same again; type: /set temp 0.8", "> ")
    # all but greedy: which token comes is not left to chance
    screen.type("/set temp 0.01\n/retry\n")
    screen.until("again, seed ", ": /he said\n", "stopped at --max-tokens 5", "> ")
    # a paste of two lines is one message
    screen.type("\x1b[200~one\ntwo\x1b[201~\n")
    screen.until("stopped at --max-tokens 5", "> ")
    screen.type(f"/save {file}\n")
    screen.until("4 messages in", "> ")
    screen.type(f"/save {file}\n")
    screen.until("is there already", "> ")
    screen.type("/clear\n/stats\n")
    screen.until("0 exchanges", "> ")
    screen.type(f"/load {file}\n")
    screen.until("4 messages; the last", "> ")
    screen.type("/undo\n")
    screen.until("dropped: one two", "> ")
    screen.type("\x04")
    screen.until("m2c: TTFT ")
    assert screen.close() == 0
    saved = [json.loads(line) for line in file.read_text().splitlines()]
    assert [message["content"] for message in saved[::2]] == ["/he said", "one\ntwo"]
    assert [message.get("cut") for message in saved] == [None, "length", None, "length"]
    history = tmp_path / "home" / "chat_history"
    assert history.stat().st_mode & 0o777 == 0o600
    assert "one\ntwo" in read_history(history)
    assert "half a line" not in read_history(history)


def test_ctrl_c_before_the_answer_begins(screen: Screen) -> None:
    screen.until("/help lists", "> ")
    # some ten thousand tokens: the prompt alone takes seconds
    screen.type('"""\n')
    screen.until("... ")
    for _ in range(40):
        screen.type("x" * 1000 + "\n")
        screen.until("... ")
    screen.taken('"""\n')
    screen.computes(0.2)  # a template is rendered in between, by another process
    screen.process.send_signal(signal.SIGINT)
    screen.until("stopped before the answer began; the message is forgotten", "> ")
    screen.type("/stats\n")
    screen.until("0 exchanges", "> ")
    screen.type("/exit\n")
    assert screen.close() == 0


def test_no_history_leaves_no_file(spoken: Path, tmp_path: Path) -> None:
    made: Any = Screen("chat", spoken, *WORDS, "--no-history", home=tmp_path / "home")
    made.until("/help lists", "> ")
    made.type("hi\n")
    made.until("stopped at --max-tokens 6", "> ")
    made.type("/exit\n")
    assert made.close() == 0
    assert not (tmp_path / "home" / "chat_history").exists()
