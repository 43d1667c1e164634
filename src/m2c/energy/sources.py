"""What a counter of energy is: it adds up the joules of one component since it was opened.

What cannot be read is Absent and says why: nothing here estimates. Knows no counter.
"""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Absent:
    """A component that has no figure, and why. hint: what to type to change that."""

    component: str
    why: str
    hint: str = ""


class Lost(Exception):
    """A counter stopped answering, or answers what cannot be."""


class Source(Protocol):
    component: str  # "cpu", "dram" or "gpu"
    how: str  # in words, for people
    period_s: float  # read it at least this often

    def joules(self) -> float:
        """Since it was opened. Raises Lost."""

    def counters(self) -> dict[str, int]:
        """The last raw readings, by name."""


Found = Source | Absent
