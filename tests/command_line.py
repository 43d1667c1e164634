"""Running `m2c` in tests: within this process where that is enough, else as a process of its own.

Knows nothing about pytest.
"""

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from m2c.cli.app import call

COMMAND = (sys.executable, "-m", "m2c.cli.app")
_NOTES = ("m2c: using ", "m2c: exact mode, expecting ", "m2c: mixed mode, expecting ")


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str

    @property
    def reason(self) -> str:
        """The one line on stderr beside the notes on which default was taken."""
        lines = [line for line in self.err.splitlines() if not line.startswith(_NOTES)]
        assert len(lines) == 1, self.err
        assert lines[0].startswith("m2c: ")
        return lines[0].removeprefix("m2c: ")


def m2c(*words: object, stdin: bytes = b"") -> Said:
    """One command line in this process. Neither stream is a terminal."""
    out, err = io.StringIO(), io.StringIO()
    given = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
    with patch.object(sys, "stdin", given), redirect_stdout(out), redirect_stderr(err):
        code = call([str(word) for word in words])
    return Said(code, out.getvalue(), err.getvalue())


def m2c_ok(*words: object, stdin: bytes = b"") -> str:
    """stdout of a command that must succeed."""
    said = m2c(*words, stdin=stdin)
    assert said.code == 0, said.err
    return said.out


def shell(line: str, *words: object, **options: Any) -> Said:
    """A line for bash in which "$@" is the m2c command with `words`."""
    command = ["bash", "-c", line, "bash", *COMMAND, *(str(word) for word in words)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, **options
    )
    return Said(done.returncode, done.stdout, done.stderr)


def start(*words: object, **options: Any) -> "subprocess.Popen[str]":
    """A process to send signals to."""
    return subprocess.Popen(
        [*COMMAND, *(str(word) for word in words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip
