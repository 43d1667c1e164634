"""What a person types at a terminal: one message, of several lines where they ask for it.

Line editing, history and pastes of several lines are readline's. Knows nothing about models.
"""

import json
import os
import select
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Final

from m2c.bundle.files import atomic_file, disk_errors
from m2c.cli.console import say
from m2c.errors import M2CError

FENCE: Final = '"""'
PROMPT: Final = "> "
CONTINUED: Final = "... "
_MOST_ENTRIES: Final = 1000
_MOST_NBYTES: Final = 1 << 20  # of the history file; longer messages are not worth typing again
_ENTRY_CHARS: Final = 1 << 14


@dataclass(frozen=True)
class Typed:
    text: str
    is_command: bool = False


class Terminal:
    """history: the file that remembers what was typed, or None."""

    def __init__(self, history: Path | None) -> None:
        # without both being terminals readline would edit into a file
        both = sys.stdin.isatty() and sys.stdout.isatty()
        self._readline = _load_readline() if both else None
        self._history = history if self._readline is not None else None
        self._begun = False  # whether lines of a message were read that are not its last
        if self._history is not None:
            self._recall(self._history)

    @property
    def has_text(self) -> bool:
        """Whether a message has been begun; to be asked while `read` waits, by a signal handler."""
        return self._begun or bool(self._readline and self._readline.get_line_buffer())

    def read(self) -> Typed:
        """One message or command. EOFError at Ctrl-D, KeyboardInterrupt at Ctrl-C."""
        self._begun = False
        text = self._line(PROMPT)
        if text.startswith(FENCE):
            typed = Typed(self._block(text.removeprefix(FENCE)))
        else:
            while text.endswith("\\"):
                self._begun = True
                text = f"{text[:-1]}\n{self._line(CONTINUED)}"
            is_command = text.startswith("/") and not text.startswith("//")
            typed = Typed(text if is_command else text.removeprefix("/"), is_command)
        if typed.text.strip():
            self._remember(typed)
        return typed

    def _block(self, text: str) -> str:
        """From behind the opening fence to the closing one, which ends a line."""
        self._begun = True
        while not text.rstrip().endswith(FENCE):
            text = f"{text}\n{self._line(CONTINUED)}"
        return text.rstrip().removesuffix(FENCE).strip("\n")

    def _line(self, prompt: str) -> str:
        """A line, or several if they were pasted together."""
        if self._readline is None:
            sys.stderr.write(prompt)
            sys.stderr.flush()
            line = sys.stdin.readline()
            if not line:
                raise EOFError
            return line.removesuffix("\n")
        line = input(prompt)
        while not _brackets_pastes(self._readline) and select.select([0], [], [], 0)[0]:
            # a line that is there already was pasted with the one before it
            line = f"{line}\n{input()}"
        return line.replace("\r\n", "\n").replace("\r", "\n")

    # -- history -----------------------------------------------------------------------------------

    def _recall(self, path: Path) -> None:
        assert self._readline is not None
        try:
            entries = read_history(path)
            if len(entries) > _MOST_ENTRIES or (entries and _size(path) > _MOST_NBYTES):
                write_history(path, entries[-_MOST_ENTRIES // 2 :])
        except M2CError as error:
            say(f"m2c: no history ({error})")
            self._history = None
            return
        for entry in entries:
            self._readline.add_history(entry)

    def _remember(self, typed: Typed) -> None:
        if self._readline is None:
            return
        entry = as_typed(typed)
        last = self._readline.get_current_history_length()
        if len(entry) > _ENTRY_CHARS or (last and self._readline.get_history_item(last) == entry):
            return
        self._readline.add_history(entry)
        if self._history is not None:
            try:
                append_history(self._history, entry)
            except M2CError as error:
                say(f"m2c: the history ends here ({error})")
                self._history = None


def as_typed(typed: Typed) -> str:
    """What has to be typed, or recalled, for the same message."""
    text = typed.text
    if not typed.is_command and text.startswith("/"):
        text = f"/{text}"
    if text.startswith(FENCE) or text.endswith("\\"):
        return f"{FENCE}{typed.text}{FENCE}"
    return text


def read_history(path: Path) -> list[str]:
    """Entries of a history file, as many of the last as fit _MOST_NBYTES.

    Lines that are no entry are left out; a file that is not there has none.
    """
    if not path.exists():
        return []
    with disk_errors(path), path.open("rb") as file:
        file.seek(max(0, _size(path) - _MOST_NBYTES))
        lines = file.read(_MOST_NBYTES).splitlines()
    entries = []
    for line in lines:
        with suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, str) and "\0" not in entry:
                entries.append(entry)
    return entries


def append_history(path: Path, entry: str) -> None:
    """One more entry; the file is for its owner's eyes only."""
    with disk_errors(path):
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o600)
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o600)
            file.write(json.dumps(entry).encode() + b"\n")


def write_history(path: Path, entries: list[str]) -> None:
    with atomic_file(path) as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(b"".join(json.dumps(entry).encode() + b"\n" for entry in entries))


def _size(path: Path) -> int:
    with disk_errors(path):
        return path.stat().st_size


def _load_readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:
        return None
    readline.set_auto_history(False)
    readline.parse_and_bind("set enable-bracketed-paste on")
    readline.parse_and_bind("tab: self-insert")  # nothing to complete, and text may have tabs
    return readline


def _brackets_pastes(readline: ModuleType) -> bool:
    """Whether a paste of several lines arrives as one; libedit and old readlines cut it up."""
    is_gnu = "libedit" not in (readline.__doc__ or "")
    return is_gnu and int(readline._READLINE_LIBRARY_VERSION.partition(".")[0]) >= 7
