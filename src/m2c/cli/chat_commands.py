"""What can be typed in a conversation besides messages: /help and the others.

Knows nothing about how an answer is made or a line is typed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from m2c.bundle.files import read_small, write_atomic
from m2c.bundle.strict import dump_json
from m2c.cli.console import say
from m2c.cli.names import require_unicode, require_writable
from m2c.cli.runs import summary_line
from m2c.conversation import Conversation
from m2c.errors import UsageError
from m2c.generate import together

if TYPE_CHECKING:
    from m2c.cli.chat_session import Session

_MAX_FILE_NBYTES: Final = 64 << 20
_SAMPLING: Final = {
    "temp": float, "top-k": int, "top-p": float, "min-p": float, "repeat-penalty": float,
    "seed": int,
}  # fmt: skip
_FIELDS: Final = {"temp": "temperature"}  # whose name is another in SamplingParams
_ALSO: Final = {"temperature": "temp", "n": "max-tokens"}


class Leave(Exception):
    """/exit."""


class Command(NamedTuple):
    words: str  # what goes after the name
    about: str
    do: Callable[["Session", str], None]


def obey(session: "Session", line: str) -> None:
    """Do what a line that begins with a slash says. UsageError for what is no command."""
    name, _, rest = line.removeprefix("/").strip().partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        known = " ".join(f"/{name}" for name in COMMANDS)
        raise UsageError(f"there is no /{name[:40]}", f"there are {known}; // begins a message")
    rest = rest.strip()
    require_unicode(rest)
    if rest and not command.words:
        raise UsageError(f"/{name} takes nothing after it", f"type /{name}")
    command.do(session, rest)


def _help(_session: "Session", _: str) -> None:
    for name, command in COMMANDS.items():
        say(f"  {f'/{name} {command.words}':20} {command.about}")
    say('  a line that ends in \\ goes on in the next; """ begins and ends several lines')
    say("  // begins a message with a slash; Ctrl-C stops an answer, Ctrl-D leaves")


def _clear(session: "Session", _: str) -> None:
    session.dialogue.conversation.clear()
    say("m2c: the conversation is forgotten")


def _system(session: "Session", text: str) -> None:
    session.dialogue.set_system(text or None)
    say("m2c: system message set" if text else "m2c: no system message")


def _undo(session: "Session", _: str) -> None:
    last = session.dialogue.conversation.pop()
    if last is None:
        raise UsageError("there is no exchange to drop", "type a message")
    say(f"m2c: dropped: {_short(last.message)}")


def _retry(session: "Session", _: str) -> None:
    dialogue = session.dialogue
    if not dialogue.conversation.exchanges:
        raise UsageError("there is no message to answer again", "type one")
    if dialogue.sampler.params.temperature == 0:
        raise UsageError("at temperature 0 the answer is the same again", "type: /set temp 0.8")
    last = dialogue.conversation.pop()
    assert last is not None
    dialogue.set_sampling(seed=(dialogue.sampler.seed + 1) % (1 << 63))
    say(f"m2c: again, seed {dialogue.sampler.seed}: {_short(last.message)}")
    session.retry(last)


def _save(session: "Session", name: str) -> None:
    _write(session, name, replace=False)


def _save_over(session: "Session", name: str) -> None:
    _write(session, name, replace=True)


def _write(session: "Session", name: str, *, replace: bool) -> None:
    path, conversation = _path(name, "save"), session.dialogue.conversation
    if not conversation.exchanges:
        raise UsageError("there is nothing to save", "type a message first")
    require_writable(path, "/save")
    if path.exists() and not replace:
        raise UsageError(f"{path} is there already", f"/save! {name} replaces it")
    records = conversation.to_records()
    write_atomic(path, b"".join(dump_json(record) + b"\n" for record in records))
    say(f"m2c: {len(records)} messages in {path}")


def _load(session: "Session", name: str) -> None:
    path = _path(name, "load")
    loaded = Conversation.of_lines(read_small(path, limit=_MAX_FILE_NBYTES), file=path)
    session.dialogue.conversation = loaded
    say(
        f"m2c: {len(loaded.to_records())} messages; the last: {_short(loaded.exchanges[-1].answer)}"
    )


def _path(name: str, command: str) -> Path:
    if not name:
        raise UsageError(f"/{command} which file?", f"type: /{command} chat.jsonl")
    return Path(name).expanduser()


def _stats(session: "Session", _: str) -> None:
    engine, dialogue = session.engine, session.dialogue
    known = dialogue.conversation
    words = [f"{dialogue.context_used} of {engine.shape.ctx_size} tokens of context used"]
    count = len(known.exchanges)
    words.append("1 exchange" if count == 1 else f"{count} exchanges")
    if known.dropped:
        words.append(f"the oldest {known.dropped} no longer in the context")
    say(f"m2c: {', '.join(words)}")
    if engine.speculates:
        say(f"m2c: exact mode at {engine.shape.dense}, seed {dialogue.sampler.seed}")
    else:
        say(f"m2c: mixed mode, mix {engine.shape.mix}, seed {dialogue.sampler.seed}")
    if dialogue.figures:
        say(f"m2c: last answer: {_figures(session, last=True)}")
    if (count := len(dialogue.figures)) > 1:
        say(f"m2c: all {count} answers: {_figures(session, last=False)}")


def _figures(session: "Session", *, last: bool) -> str:
    figures = session.dialogue.figures
    facts = session.facts(figures[-1] if last else together(figures))
    return summary_line(facts).removeprefix("m2c: ")


def _set(session: "Session", words: str) -> None:
    dialogue = session.dialogue
    name, _, value = words.partition(" ")
    name = name.lstrip("-").replace("_", "-")
    name = _ALSO.get(name, name)
    if not words:
        known = dialogue.sampler.params
        now = {n: getattr(known, _FIELDS.get(n, n.replace("-", "_"))) for n in _SAMPLING}
        now |= {"seed": dialogue.sampler.seed, "max-tokens": dialogue.max_tokens}
        say(
            "m2c: " + ", ".join(f"{n} {v:g}" if n != "seed" else f"{n} {v}" for n, v in now.items())
        )
        return
    kind = int if name == "max-tokens" else _SAMPLING.get(name)
    if kind is None:
        names = ", ".join([*_SAMPLING, "max-tokens"])
        raise UsageError(f"there is no {name[:40]} to set", f"there are {names}")
    try:
        number = kind(value)
    except ValueError:
        example = "0.8" if kind is float else "40"
        raise UsageError(
            f"{name} {value[:40]!r} is not a number", f"type: /set {name} {example}"
        ) from None
    if name != "max-tokens":
        dialogue.set_sampling(**{_FIELDS.get(name, name.replace("-", "_")): number})
    elif number < 1:
        raise UsageError(f"max-tokens is {number}", "give a number from 1")
    else:
        dialogue.max_tokens = int(number)
    say(f"m2c: {name} {number}")


def _leave(_session: "Session", _: str) -> None:
    raise Leave


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:57]}..."


COMMANDS: Final = {
    "help": Command("", "this list", _help),
    "clear": Command("", "forget the conversation", _clear),
    "system": Command("TEXT", "set the system message; nothing: none", _system),
    "undo": Command("", "drop the last message and its answer", _undo),
    "retry": Command("", "answer the last message again with another seed", _retry),
    "save": Command("FILE", "write the messages as JSON lines, to a new file", _save),
    "save!": Command("FILE", "the same, also over a file that is there", _save_over),
    "load": Command("FILE", "go on with a conversation that was saved", _load),
    "stats": Command("", "speed, hits, context used", _stats),
    "set": Command(
        "NAME VALUE", "temp, top-k, top-p, min-p, repeat-penalty, seed, max-tokens", _set
    ),
    "exit": Command("", "leave; so does Ctrl-D", _leave),
}
