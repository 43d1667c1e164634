"""How many tokens to draft before the next pass verifies them, decided after each of them.

One more draft token costs the seconds to draft it and what it adds to the pass; it brings a token
if it and all before it are accepted. That is worth it while it brings more tokens per second than
the run as a whole: a round that looks bad is ended early, because the next is an average one.

Knows nothing about tokens or models: only how sure a draft was, and seconds.
"""

import bisect
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

MOST = 32  # draft tokens in a round

_EDGES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)
_KEEP = 0.98  # of old counts at each new one: some 50 tokens are remembered
_PRIOR = 2.0  # tokens that the first guess counts for
_GUESS = 0.7  # acceptance before any token was tested
_WINDOW = 32  # measurements that a line goes through
_FIRST = (0, 4, 2)  # draft tokens of the first rounds: without a spread a slope is not known
_PROBE = 0.02  # of the time, for finding out whether a draft that never paid does so now


class Share:
    """A share of successes that forgets slowly."""

    def __init__(self, guess: float) -> None:
        self._hits, self._tests = guess * _PRIOR, _PRIOR

    def add(self, success: bool) -> None:
        """Count one more test."""
        self._hits = self._hits * _KEEP + success
        self._tests = self._tests * _KEEP + 1

    @property
    def value(self) -> float:
        """From 0 to 1."""
        return self._hits / self._tests


class Line:
    """Seconds as base + slope * tokens, neither negative, through the last _WINDOW measurements.

    Slope and height are medians, so that a pass that waited for another process changes little.
    Where all measurements are of the same number of tokens the slope stays what it was.
    """

    def __init__(self) -> None:
        self.count = 0
        self.base = self.slope = 0.0
        self._tokens, self._seconds = np.zeros(_WINDOW), np.zeros(_WINDOW)

    def at(self, tokens: int) -> float:
        """Seconds expected for so many tokens; 0 before the first measurement."""
        return self.base + self.slope * tokens

    def add(self, tokens: int, seconds: float) -> None:
        """One measurement; the oldest is forgotten."""
        self._tokens[self.count % _WINDOW] = tokens
        self._seconds[self.count % _WINDOW] = seconds
        self.count += 1
        known = min(self.count, _WINDOW)
        x, y = self._tokens[:known], self._seconds[:known]
        one, other = np.nonzero(x[:, None] > x)
        slopes = (y[one] - y[other]) / (x[one] - x[other])
        # the old slope has the say of a few pairs, which a single odd measurement makes
        slopes = np.append(slopes, [self.slope] * (known - 1 if self.slope else 0))
        if len(slopes):
            self.slope = max(0.0, float(np.median(slopes)))
        self.base = max(0.0, float(np.median(y - self.slope * x)))


class Depth:
    """Decides whether to draft another token, from what earlier rounds were like.

    A round: `again` before each draft token, `drafted` after it; `passed` after the pass over the
    draft and the token before it, and `accepted`.
    """

    def __init__(self) -> None:
        self._shares = [Share((low + high) / 2) for low, high in pairwise(_EDGES)]
        self._any = Share(_GUESS)
        self._draft = Line()
        self._pass = Line()
        self._without = 0  # rounds without a draft since the last one with

    def again(self, confidences: Sequence[float], following: float | None = None) -> bool:
        """Whether to draft another token after those with these confidences (0 to 1).

        following: the confidence of that token, where it is known before.
        """
        if len(confidences) >= MOST:
            return False
        if self._pass.count < len(_FIRST):
            return len(confidences) < _FIRST[self._pass.count]
        tokens, seconds = self._best()
        chance = self._any.value if following is None else self._share(following).value
        for confidence in confidences:
            chance *= self._share(confidence).value
        more = chance * seconds > tokens * self._step_s
        if not confidences:
            more = more or self._without * seconds * _PROBE >= self._step_s
            self._without = 0 if more else self._without + 1
        return more

    def drafted(self, seconds: float) -> None:
        """One token was drafted in so many seconds."""
        self._draft.add(1, seconds)

    def passed(self, tokens: int, seconds: float) -> None:
        """One pass over so many tokens, 1 or more, took so many seconds."""
        self._pass.add(tokens, seconds)

    def accepted(self, confidences: Sequence[float], count: int) -> None:
        """Of the tokens drafted with these confidences the first `count` were accepted.

        What came after the first rejected one was not tested. ValueError when `count` is no number
        of them.
        """
        if not 0 <= count <= len(confidences):
            raise ValueError(f"{count} of {len(confidences)} draft tokens cannot be accepted")
        for at, confidence in enumerate(confidences[: count + 1]):
            self._share(confidence).add(at < count)
            self._any.add(at < count)

    def rate(self, confidences: Sequence[float] | None = None) -> float:
        """Tokens per second expected: of a round with this draft, which is there already, cut where
        that is best; None: of drafting as usual. 0 before the first pass."""
        if confidences is None:
            tokens, seconds = self._best()
            return tokens / seconds if seconds else 0.0
        tokens, seconds, chance = 1.0, self.pass_s, 1.0
        best = tokens / seconds if seconds else 0.0
        for confidence in confidences:
            chance *= self._share(confidence).value
            tokens += chance
            seconds += self.pass_token_s
            best = max(best, tokens / seconds if seconds else 0.0)
        return best

    @property
    def acceptance(self) -> float:
        """Share of tested draft tokens that were accepted lately, 0 to 1."""
        return self._any.value

    @property
    def draft_s(self) -> float:
        """Seconds per draft token lately."""
        return self._draft.at(1)

    @property
    def pass_s(self) -> float:
        """Seconds of a pass without a draft."""
        return self._pass.at(1)

    @property
    def pass_token_s(self) -> float:
        """Seconds that each draft token adds to a pass."""
        return self._pass.slope

    @property
    def _step_s(self) -> float:
        return self.draft_s + self.pass_token_s

    def _best(self) -> tuple[float, float]:
        """Tokens and seconds of a round at the best fixed depth: the rate of the whole run."""
        tokens, seconds, chance = 1.0, self.pass_s, 1.0
        for _ in range(MOST):
            chance *= self.acceptance
            if chance * seconds <= tokens * self._step_s:
                break
            tokens += chance
            seconds += self._step_s
        return tokens, seconds

    def _share(self, confidence: float) -> Share:
        return self._shares[bisect.bisect(_EDGES[1:-1], confidence)]
