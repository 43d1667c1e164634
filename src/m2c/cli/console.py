"""How m2c speaks: results on stdout, everything else on stderr, one line per error.

Knows nothing about what is said.
"""

import contextlib
import os
import select
import shutil
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

_PART_NBYTES = 1 << 20
_PATIENCE_S = 10.0
_TIDY_S = 0.5

if TYPE_CHECKING:
    from rich.console import Console


def say(text: str) -> None:
    """A line for people, on stderr. Work does not stop because nobody can read about it."""
    with contextlib.suppress(OSError):
        print(plain(text), file=sys.stderr, flush=True)


def plain(text: str) -> str:
    """What a file says may reach a terminal as letters only, never as a command to it."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def result(text: str) -> None:
    """A line of the result, on stdout."""
    print(text, flush=True)


def page_width() -> int:
    """Columns of a page on stdout: the terminal's, of which more than 100 are hard to read."""
    if not sys.stdout.isatty():
        return 80
    return max(20, min(shutil.get_terminal_size().columns, 100))


def result_page(lines: list[str]) -> None:
    """Lines of the result, broken between words where the page ends; the rest is indented more.

    A path or an address that is longer than a line stays whole: it is there to be copied.
    """
    width = page_width()
    for line in lines:
        start = " " * (len(line) - len(line.lstrip()))
        broken = textwrap.wrap(
            line.strip(), width, initial_indent=start, subsequent_indent=start + "  ",
            break_on_hyphens=False, break_long_words=False,
        )  # fmt: skip
        result("\n".join(broken))


def write(text: str) -> None:
    """A piece of the result, on stdout, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def tables() -> "Console":
    """A rich console on stdout; plain text of a readable width when it is not a terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 100, soft_wrap=False)


def print_markdown(header: list[str], rows: list[list[str]], *, words: int) -> None:
    """A table on stdout with padded columns; the first `words` are text, the others numbers."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        padded = [
            cell.ljust(width) if i < words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    result(line(header))
    rules = ["-" * w if i < words else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    result(line(rules))
    for row in rows:
        result(line(row))


@contextmanager
def progress(label: str, total: int, *, unit: str, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar on stderr while the block runs; nothing when stderr is no terminal."""
    from tqdm import tqdm

    binary = unit == "B"
    with tqdm(
        total=total, desc=label, unit=unit, unit_scale=True, unit_divisor=1024 if binary else 1000,
        file=sys.stderr, disable=True if quiet else None, leave=False, dynamic_ncols=True,
    ) as bar:  # fmt: skip
        yield lambda amount: bar.update(amount) and None


def end_now(code: int) -> None:
    """End the process without waiting for anybody, least of all for a disk."""
    try:
        from m2c.bundle.files import remove_unfinished

        tidy = threading.Thread(target=remove_unfinished, daemon=True)
        tidy.start()
        tidy.join(_TIDY_S)
    finally:  # a signal may come here too
        os._exit(code)


def exit_in_time(code: int, reason: str) -> None:
    """End the process with `code` in a while, come what may: tidying up can wait for a disk that
    does not answer. Whoever ends earlier is not affected."""

    def end() -> None:
        say(f"m2c: {reason}")
        end_now(code)

    watchdog = threading.Timer(_PATIENCE_S, end)
    watchdog.daemon = True
    watchdog.start()


def read_stdin(limit: int) -> bytes:
    """At most `limit` bytes of stdin, up to its end; Ctrl-C always ends the wait."""
    data = bytearray()
    with contextlib.closing(_stdin_parts()) as parts:
        for part in parts:
            data += part
            if len(data) >= limit:
                break
    return bytes(data[:limit])


def stdin_lines(limit: int) -> Iterator[bytes]:
    """Lines of stdin as they come, without their ends; Ctrl-C always ends the wait.

    A line that is longer than `limit` bytes is yielded at some greater length, and is the last.
    """
    held = b""
    with contextlib.closing(_stdin_parts()) as parts:
        for part in parts:
            *lines, held = (held + part).split(b"\n")
            yield from lines
            if len(held) > limit:
                break
    if held:
        yield held


def _stdin_parts() -> Generator[bytes]:
    """What arrives on stdin, up to its end.

    A plain read can miss a signal that arrives just before it blocks: Python's handler then waits
    for the read, and the read for input. A pipe that the signal itself writes to closes that gap.
    """
    try:
        stdin = sys.stdin.fileno()
    except (OSError, ValueError):  # not a file of the system: nothing to wait for
        yield sys.stdin.buffer.read()
        return
    woken, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = signal.set_wakeup_fd(waker)
    try:
        while True:
            ready, _, _ = select.select([stdin, woken], [], [])
            part = os.read(stdin, _PART_NBYTES) if stdin in ready else b""
            if stdin in ready and not part:
                return
            yield part
    finally:
        signal.set_wakeup_fd(before)
        os.close(woken)
        os.close(waker)
