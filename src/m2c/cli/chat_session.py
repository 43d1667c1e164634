"""A conversation going on: messages in, answers out, and what Ctrl-C means meanwhile.

Knows nothing about options or how a message is typed.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

from m2c.cli.chat_commands import Leave, obey
from m2c.cli.chat_input import Terminal
from m2c.cli.console import exit_in_time, say, stdin_lines, write
from m2c.conversation import Dialogue, Exchange
from m2c.engine import Engine
from m2c.errors import M2CError, UsageError
from m2c.generate import GenerationStats

MAX_MESSAGE_NBYTES: Final = 16 << 20
_CUT: Final = {
    "interrupted": "stopped; what was said stays in the conversation",
    "length": "stopped at --max-tokens {limit}",
    "context": "stopped as the context is full",
}
_WAIT: Final = b"\nm2c: stopping after this layer; Ctrl-C once more leaves\n"


class Impatience(KeyboardInterrupt):
    """Ctrl-C again and again: leave, whatever is going on."""


class Interrupts:
    """What Ctrl-C does: while an answer is made it only asks for its end, at layers, where weights
    and caches are consistent; otherwise it is a KeyboardInterrupt."""

    def __init__(self) -> None:
        self.idle: Callable[[], None] = lambda: None  # called before a KeyboardInterrupt
        self._answering = False
        self._presses = 0

    def asked(self) -> bool:
        return self._presses > 0

    @contextmanager
    def answering(self) -> Iterator[None]:
        self._answering, self._presses = True, 0
        try:
            yield
        finally:
            self._answering, self._presses = False, 0

    @contextmanager
    def handled(self) -> Iterator[None]:
        before = signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _handle(self, _number: int, _: FrameType | None) -> None:
        if not self._answering:
            self.idle()
            raise KeyboardInterrupt
        self._presses += 1
        if self._presses == 2:
            os.write(2, _WAIT)  # a print could have been interrupted by this very signal
        elif self._presses > 2:
            exit_in_time(130, "interrupted")
            raise Impatience


class Session:
    """One conversation. facts: of figures, for the line that says what they were."""

    def __init__(
        self, engine: Engine, dialogue: Dialogue, facts: Callable[[GenerationStats], dict[str, Any]]
    ) -> None:
        self.engine = engine
        self.dialogue = dialogue
        self.facts = facts
        self._interrupts = Interrupts()

    def talk(self, terminal: Terminal) -> None:
        """Until the person leaves; Ctrl-C and errors of one message do not end it."""
        self.engine.stop_when(self._interrupts.asked)
        had_text = False

        def look() -> None:
            nonlocal had_text  # the line is gone once the exception is there
            had_text = terminal.has_text

        self._interrupts.idle = look
        with self._interrupts.handled():
            while True:
                try:
                    self._turn(terminal)
                except Impatience:
                    raise
                except KeyboardInterrupt:
                    write("\n")
                    if not had_text:
                        say("m2c: Ctrl-D or /exit leaves")
                except M2CError as error:
                    say(f"m2c: {' '.join(str(error).split())}")
                except EOFError:
                    write("\n")
                    return
                except Leave:
                    return

    def read_from_pipe(self) -> None:
        """Every line of stdin is a message, word for word. Errors and Ctrl-C end it."""
        for number, line in enumerate(stdin_lines(MAX_MESSAGE_NBYTES), 1):
            if len(line) > MAX_MESSAGE_NBYTES:
                raise UsageError(f"line {number} is longer than {MAX_MESSAGE_NBYTES >> 20} MiB")
            try:
                message = line.decode("utf-8").removesuffix("\r")
            except UnicodeDecodeError as error:
                where = f"line {number} of stdin is not UTF-8 text (byte {error.start})"
                raise UsageError(where, "convert it, e.g. with iconv") from None
            if message.strip():
                self.ask(message)

    def ask(self, message: str) -> None:
        """Have a message answered, on stdout."""
        known = self.dialogue.conversation
        before = known.dropped
        with self._interrupts.answering():
            ids = self.dialogue.prompt(message)
            if gone := known.dropped - before:
                what = "exchange" if gone == 1 else f"{gone} exchanges"
                say(f"m2c: the context is full: the oldest {what} dropped from it")
            self._answer(message, ids)

    def retry(self, last: Exchange) -> None:
        """Answer the message of `last`, which was taken out, again; put it back if that fails."""
        known = self.dialogue.conversation
        others = len(known.exchanges)
        try:
            self.ask(last.message)
        finally:
            if len(known.exchanges) == others:
                known.exchanges.append(last)

    def _turn(self, terminal: Terminal) -> None:
        typed = terminal.read()
        if typed.is_command:
            obey(self, typed.text)
        elif typed.text.strip():
            self.ask(typed.text)

    def _answer(self, message: str, ids: list[int]) -> None:
        said, finish = False, ""
        try:
            for piece in self.dialogue.answer(message, ids):
                write(piece.text)
                said = said or bool(piece.text)
                finish = piece.stats.finish_reason if piece.stats else finish
        except (KeyboardInterrupt, M2CError):
            if said:
                write("\n")
            raise
        write("\n")
        if finish == "interrupted" and not said:
            say("m2c: stopped before the answer began; the message is forgotten")
        elif why := _CUT.get(finish):
            say(f"m2c: {why.format(limit=self.dialogue.max_tokens)}")
