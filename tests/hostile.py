"""Input made to hurt a reader, and the judge of what a reader may do with it: accept it, or raise
an error of m2c's own that is one line. Knows no format; the tests say what their files are made of.
"""

import json
import random
import re
import resource
import signal
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final

from m2c.errors import M2CError

BATCH: Final = 250  # mutations in one trial
SECONDS: Final = 5.0  # of processor time: a busy machine must not fail anybody
_MIB: Final = 1 << 20
_SPARE: Final = 64 * _MIB
_LONGEST: Final = 2000  # letters of a message: longer ones show what a file said at length

INTEGERS: Final = (
    -1, 0, 1, 2, 3, 7, 8, 9, 31, 127, 255, 256, 4095, 4096, 65535, 65536, (1 << 24) - 1, 1 << 24,
    (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 48, (1 << 53) + 1, (1 << 62) - 1, 1 << 62,
    (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, -(1 << 31), -(1 << 63), 10**40,
)  # fmt: skip
TEXTS: Final = (
    "", "x", "../../outside", "/etc/hostname", "a\\b", "a\0b", "a" * 10_000, "\ud800", "\udcff",
    "\x1b[2J\x1b]0;owned\x07", "one\ntwo\rthree\u2028four", "\u202e", "💥" * 300, "nan", "F32",
    "__metadata__", "{{ 1 }}", "1e309", "<s>", "weight",
)  # fmt: skip
# "@raw:X" becomes a bare X: JSON that Python does not write
_RAW: Final = ("NaN", "Infinity", "-0", "1e999", "1E400", "01", "9" * 5000, "[" * 3000, "{", "'x'")
_OTHERS: Final = (None, True, False, [], {}, [[]], {"": {}}, 0.5, -0.5, 1e308, 5e-324, 1e40)
_DEEP: Final = 300  # levels: more than any file of these has, fewer than Python refuses


class TooSlow(BaseException):
    """A reader that is still at work after SECONDS."""


def judge(read: Callable[[], Any], what: str, nbytes: int = 0) -> Any:
    """What `read` returns, or the M2CError it raises; AssertionError for anything else.

    what: the input, for the message; nbytes: its size, from which the allowed memory follows.
    """
    begin, what = time.process_time(), what[:3000]
    try:
        with _limits(2 * nbytes + _SPARE):
            found = read()
    except M2CError as error:
        complaint = _complaint(str(error))
        found = error
        if complaint:
            raise AssertionError(f"{what}: {complaint}: {str(error)[:300]!r}") from None
    except (Exception, TooSlow) as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {str(error)[:300]}") from error
    assert time.process_time() - begin < SECONDS, f"{what}: too slow"
    return found


def _complaint(message: str) -> str:
    """What is wrong with an error for people: its whole text, with the hint."""
    if not message.strip():
        return "an empty message"
    if len(message) > _LONGEST:
        return f"a message of {len(message)} letters"
    if "Traceback" in message or re.search(r"<\w+ object at 0x", message):
        return "a message for programmers"
    return ""


@contextmanager
def _limits(nbytes: int) -> Iterator[None]:
    """At most `nbytes` more address space, at most SECONDS."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGPROF, _too_slow)
    resource.setrlimit(resource.RLIMIT_AS, (held + nbytes, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        signal.signal(signal.SIGPROF, before)


def _too_slow(_number: int, _frame: FrameType | None) -> None:
    raise TooSlow


# -- bytes -----------------------------------------------------------------------------------------


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to three of: flips, numbers at places, cuts, repeats, noise."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(made) + 1)
        kind = rng.randrange(8)
        if kind == 0:
            del made[at:]
        elif kind == 1:
            del made[at : at + rng.choice((1, 2, 4, 8, 100))]
        elif kind == 2:
            made[at:at] = made[at : at + rng.choice((1, 8, 64))]
        elif kind == 3:
            made[at:at] = rng.randbytes(rng.choice((1, 4, 8, 300)))
        elif kind == 4:
            made[at : at + 8] = number(rng, "<Q")
        elif kind == 5:
            made[at : at + 4] = number(rng, "<I")
        elif made:
            made[at - 1] ^= 1 << rng.randrange(8)
    return bytes(made)


def number(rng: random.Random, layout: str) -> bytes:
    """A troublesome integer in the width of `layout`."""
    bits = 8 * struct.calcsize(layout)
    return struct.pack(layout, rng.choice(INTEGERS) % (1 << bits))


def mutate_pieces(rng: random.Random, pieces: list[bytes]) -> list[bytes]:
    """A file as the pieces that it is made of: some lost, doubled, exchanged or with other bytes.

    Pieces of 1, 4 and 8 bytes are taken for numbers.
    """
    made = list(pieces)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, kind = rng.randrange(len(made)), rng.randrange(9)
        piece = made[at]
        if kind == 0 and len(made) > 1:
            del made[at]
        elif kind == 1:
            made.insert(at, made[rng.randrange(len(made))])
        elif kind == 2:
            other = rng.randrange(len(made))
            made[at], made[other] = made[other], made[at]
        elif len(piece) in (1, 4, 8) and kind < 8:
            layout = {1: "<B", 4: "<I", 8: "<Q"}[len(piece)]
            near = int.from_bytes(piece, "little") + rng.choice((-1, 1, 8, 256, 1 << 20))
            step = (near % (1 << 8 * len(piece))).to_bytes(len(piece), "little")
            made[at] = step if kind == 7 else number(rng, layout)
        else:
            made[at] = mutate_bytes(rng, piece)
    return made


# -- JSON ------------------------------------------------------------------------------------------


def mutate_json(rng: random.Random, value: Any, others: tuple[Any, ...] = ()) -> bytes:
    """The JSON text of `value` with one to three changes at random places.

    others: values of the format that are worth trying elsewhere.
    """
    made = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        made = _change(rng, made, others)
    try:
        text = json.dumps(made)
    except RecursionError:  # one nesting put into another
        text = "[" * 5000
    text = re.sub(r'"@raw:([^"]*)"', r"\1", text).replace('"@twice:', '"')
    data = text.encode()
    return mutate_bytes(rng, data) if rng.random() < 0.05 else data


def hostile_value(rng: random.Random, others: tuple[Any, ...] = ()) -> Any:
    kind = rng.randrange(8)
    if kind < 3:
        return rng.choice(INTEGERS)
    if kind == 3:
        return rng.choice(TEXTS)
    if kind == 4:
        return "@raw:" + rng.choice(_RAW)
    if kind == 5 and others:
        return json.loads(json.dumps(rng.choice(others)))  # a copy: it may be changed in its turn
    if kind == 6 and rng.random() < 0.2:
        found: Any = []
        for _ in range(_DEEP):
            found = [found] if rng.random() < 0.5 else {"a": found}
        return found
    return json.loads(json.dumps(rng.choice(_OTHERS)))


def _change(rng: random.Random, value: Any, others: tuple[Any, ...]) -> Any:
    holders = list(_holders(value))
    if not holders:
        return hostile_value(rng, others)
    holder = rng.choice(holders)
    keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    key, kind = rng.choice(keys), rng.randrange(10)
    old = holder[key]
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[f"@twice:{key}"] = old if rng.random() < 0.5 else hostile_value(rng, others)
    elif kind == 2 and isinstance(holder, dict):
        holder[rng.choice((*TEXTS, key + "x"))] = holder.pop(key)
    elif kind == 3:
        other = rng.choice(holders)
        names = list(other) if isinstance(other, dict) else list(range(len(other)))
        picked = other[rng.choice(names)] if names else None
        holder[key] = json.loads(json.dumps(picked))
    elif kind == 4 and isinstance(old, int | float):
        holder[key] = old + rng.choice((-1, 1, 0.5, 32, old, -2 * old))
    elif kind == 5 and isinstance(holder, list):
        holder[key:key] = [old] * rng.choice((1, 2, 300))
    else:
        holder[key] = hostile_value(rng, others)
    return value


def _holders(value: Any) -> Iterator[Any]:
    """Every list and object in `value` that is not empty."""
    if isinstance(value, dict | list) and value:
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _holders(inner)
