"""A pack whose every writing call has a name that is the same each time it is run.

Threads make their calls in another order each time; the third write to dense/embed.int4 is always
one call. Knows nothing about what is done to them.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from math import gcd
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, Final

from syscalls import End, Event, watch
from tiny_models import pack_again

from m2c.bundle.files import TEMPORARY_PREFIX

OUT: Final = "out.m2c"
_TEMPORARY: Final = re.compile(re.escape(TEMPORARY_PREFIX) + r"\d+-[0-9a-f]{8}-")


def spread(trial: int, things: int, stride: int = 61) -> int:
    """What trial N is about: a few are far apart, as many as there are `things` are all."""
    return trial * next(s for s in count(stride) if gcd(s, things) == 1) % things


class Names:
    """Names for the calls of one process."""

    def __init__(self) -> None:
        self._met: Counter[str] = Counter()

    def __call__(self, event: Event) -> str:
        path = _TEMPORARY.sub("TEMPORARY-", event.path)
        self._met[f"{event.call} {path}"] += 1
        return f"{event.call} {path} {self._met[f'{event.call} {path}']}"


@dataclass(frozen=True)
class WatchedPack:
    processes: ForkServerContext
    checkpoint: Path
    profile: Path

    def run(
        self, folder: Path, decide: Callable[[Event], int],
        function: Callable[..., Any] = pack_again, *more: Any,
    ) -> End:  # fmt: skip
        """Pack into OUT in `folder` and ask `decide` before every call below it."""
        arguments = (self.checkpoint, self.profile, folder / OUT, *more)
        return watch(self.processes, folder, decide, function, *arguments)

    def at(self, folder: Path, call: str, verdict: int) -> tuple[End, bool]:
        """Pack, with `verdict` on the call of that name; also whether it was met."""
        names, met = Names(), False

        def decide(event: Event) -> int:
            nonlocal met
            if names(event) != call:
                return 0
            met = True
            return verdict

        return self.run(folder, decide), met

    def names(self, folder: Path) -> list[str]:
        """The names of all writing calls of a pack that nothing happens to."""
        names, found = Names(), []

        def decide(event: Event) -> int:
            found.append(names(event))
            return 0

        assert self.run(folder, decide) == End(0)
        return sorted(found)
