"""A bar per tier: what lies in it and what is free, in letters that also read without colour.

Knows nothing about plans.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Final

from m2c.units import format_size

if TYPE_CHECKING:
    from rich.text import Text

_FREE: Final = "."
# kind of content -> its letter and colour; other kinds get the letter they begin with
_LOOKS: Final = {
    "attention": ("A", "cyan"), "FFN": ("F", "green"), "head": ("H", "blue"),
    "experts": ("X", "green"),
    "embeddings": ("E", "blue"), "drafts": ("D", "yellow"), "upgrades": ("U", "magenta"),
    "KV cache": ("K", "red"), "ring": ("R", "bright_black"), "work": ("W", "bright_black"),
    "read for every token": ("S", "yellow"), "read for every pass": ("S", "yellow"),
}  # fmt: skip


@dataclass(frozen=True)
class Tier:
    name: str
    parts: Mapping[str, int]  # kind -> bytes, in the order they are drawn
    capacity: int
    rest: str  # what the part of the capacity that is in no kind is


def bar(parts: Mapping[str, int], capacity: int, width: int) -> str:
    """`width` letters: every kind by its share of the capacity, and at least one of each."""
    total = max(capacity, sum(parts.values()), 1)
    letters, done, drawn = "", 0, 0
    for i, (kind, nbytes) in enumerate(parts.items()):
        done += nbytes
        # kinds yet to come keep a letter each
        most = width - (len(parts) - 1 - i)
        end = max(drawn + 1, min(most, round(done * width / total)))
        letters += letter(kind) * (end - drawn)
        drawn = end
    return (letters + _FREE * width)[:width]


def letter(kind: str) -> str:
    return _LOOKS[kind][0] if kind in _LOOKS else kind[0].upper()


def lines_of(tier: Tier, width: int) -> list[str]:
    """The tier in lines of at most `width` columns: its sizes, its bar, what the letters mean."""
    used = sum(tier.parts.values())
    head = f"{tier.name:5} {format_size(used)} of {format_size(tier.capacity)}"
    words = [f"{letter(kind)} {kind} {format_size(n)}" for kind, n in tier.parts.items()]
    words.append(f"{_FREE} {tier.rest} {format_size(max(0, tier.capacity - used))}")
    return [head, bar(tier.parts, tier.capacity, width), *_filled(words, width)]


def coloured(line: str) -> "Text":
    """A line of a bar with the kinds in their colours."""
    from rich.text import Text

    styles = dict(_LOOKS.values())
    text = Text()
    for character, run in groupby(line):
        style = styles.get(character)
        text.append("".join(run), f"{style} reverse" if style else None)
    return text


def _filled(words: Sequence[str], width: int) -> list[str]:
    """Words joined by commas, broken between them."""
    lines = [""]
    for i, word in enumerate(words):
        word += "," if i + 1 < len(words) else ""
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if lines[-1] and len(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
