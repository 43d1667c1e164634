"""Free drafts: what followed the last time the text ended like this.

A text that repeats itself (code, a summary of the prompt, a list) is often continued as before. The
ends of the history, LONGEST to SHORTEST tokens, are looked up among its earlier parts.

Knows nothing about models, probabilities or whether a draft is worth verifying.
"""

from array import array
from collections.abc import Iterable, Iterator

LONGEST = 5  # a longer match says little more
SHORTEST = 1  # followed by the same a fifth of the time, which is worth it where passes are dear

_BITS = 32  # a token id fits; ids side by side are then an exact key
_LENGTHS = tuple(range(LONGEST, SHORTEST - 1, -1))


class Lookup:
    """The history, with the last place of every run of SHORTEST to LONGEST ids in it.

    Adding, removing and proposing a token take constant time; memory grows with the history, by
    about half a kilobyte per token.
    """

    def __init__(self) -> None:
        self._history = array("I")
        # per length: a run's key to where its last occurrence ends
        self._last: dict[int, dict[int, int]] = {length: {} for length in _LENGTHS}
        # per length and end: where the same run ended before, 0 = nowhere; undoes `_last`
        self._before = {length: array("I") for length in _LENGTHS}

    def __len__(self) -> int:
        """Tokens in the history."""
        return len(self._history)

    def extend(self, ids: Iterable[int]) -> None:
        """Append ids to the history. OverflowError when an id does not fit 32 bits."""
        for token in ids:
            self._history.append(token)
            end = len(self._history)
            for length, key in self._keys():
                self._before[length].append(self._last[length].get(key, 0))
                self._last[length][key] = end

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens, as if they had never been added.

        ValueError when the history is shorter.
        """
        if not 0 <= length <= len(self):
            raise ValueError(f"cannot truncate {len(self)} tokens to {length}")
        while len(self) > length:
            for run, key in self._keys():
                if before := self._before[run].pop():
                    self._last[run][key] = before
                else:
                    del self._last[run][key]
            self._history.pop()

    @property
    def match(self) -> int:
        """Tokens of the longest end that occurred before; 0 when there is none."""
        return next((n for n, before in self._before.items() if before and before[-1]), 0)

    def propose(self, count: int) -> list[int]:
        """What may come next: `count` ids, or none when the end of the history is new.

        The most recent earlier occurrence of the longest end that has one is continued. Where it
        runs into the end of the history it goes on with what it proposed: a period is repeated.
        """
        length = self.match
        if not length:
            return []
        start = self._before[length][-1]
        source = self._history[start : start + count].tolist()
        period = len(self) - start
        return [source[i % period] for i in range(count)]

    def _keys(self) -> Iterator[tuple[int, int]]:
        """Length and key of every run that ends where the history ends."""
        key = 0
        for at, token in enumerate(self._history[: -LONGEST - 1 : -1]):
            key |= token << (_BITS * at)
            if at + 1 >= SHORTEST:
                yield at + 1, key
