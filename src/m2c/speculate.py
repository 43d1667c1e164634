"""Exact mode: several tokens drafted cheaply, then verified in one pass with the exact weights.

A drafted token counts only if the exact model, asked about the same position, gives the same one;
the sampler's noise belongs to the position, so this holds for sampling too. The tokens are those of
decoding one by one, whatever the drafts were; drafts only decide how many come out of a pass.
A round's drafts overwrite nothing that was verified: the KV cache is cut back to it.

Drafts cost nothing where the text so far suggests them, else a model makes them: whichever promises
more tokens per second. Knows nothing about text, tiers or where drafts' weights lie.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from torch import Tensor

from m2c.depth import MOST, Depth
from m2c.drafting import Draft
from m2c.lookup import Lookup
from m2c.model.transformer import Transformer
from m2c.sampling import Sampler

MOST_AT_ONCE: Final = MOST + 1  # tokens of a pass: the drafts and the token before them
FEW_AT_ONCE: Final = 9  # where memory is short: looked-up drafts are seldom right for longer
# how sure a token is that only the text so far suggests, by the number of tokens before it that the
# texts share; what that is worth, `Depth` measures
_LOOKED_UP: Final = (0.25, 0.55, 0.65, 0.75, 0.85, 0.92)


@dataclass(frozen=True)
class Pass:
    """One round: what was drafted, what of it was right, and how long both halves took."""

    drafted: int
    accepted: int
    draft_s: float
    pass_s: float


@dataclass
class Speculation:
    """Figures of a generation, without its prompt and first token."""

    passes: int = 0
    drafted: int = 0
    looked_up: int = 0  # of them: what the text so far suggested
    accepted: int = 0
    draft_s: float = 0.0
    pass_s: float = 0.0
    history: list[Pass] = field(default_factory=list)

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were right; those behind a wrong one were not."""
        return self.accepted / self.drafted if self.drafted else 0.0

    def add(self, other: "Speculation") -> None:
        self.passes += other.passes
        self.drafted += other.drafted
        self.looked_up += other.looked_up
        self.history += other.history
        self.accepted += other.accepted
        self.draft_s += other.draft_s
        self.pass_s += other.pass_s

    @property
    def tokens_per_pass(self) -> float:
        return (self.accepted + self.passes) / self.passes if self.passes else 0.0


def verified(drafts: Sequence[int], answer: Callable[[list[int]], int]) -> list[int]:
    """The exact model's tokens, up to and with the first one that was not drafted.

    answer: what the exact model says after the tokens found so far.
    """
    found: list[int] = []
    while True:
        found.append(answer(found))
        if len(found) > len(drafts) or found[-1] != drafts[len(found) - 1]:
            return found


class Speculator:
    """model: verifies. draft: where drafts come from besides the text so far, if anywhere.

    at_once: tokens that a pass may have.
    """

    def __init__(
        self, model: Transformer, draft: Draft | None, sampler: Sampler,
        at_once: int = MOST_AT_ONCE,
    ) -> None:  # fmt: skip
        self._most = at_once - 1
        self.figures = Speculation()
        self._model = model
        self._draft = draft
        self._sampler = sampler
        self._lookup = Lookup()
        # how far to trust either, and what drafts and passes cost
        self._depth, self._lookup_depth = Depth(), Depth()

    def tokens(self, logits: Tensor, ids: Sequence[int], limit: int) -> Iterator[int]:
        """Yield up to `limit` ids after `ids`; logits: of the last of them, whose keys and values,
        like those of all before it, are in the cache."""
        kv, history, found = self._model.kv, list(ids), 0
        self._lookup.extend(ids)
        new = [self._sampler(logits, history)]
        while True:
            for token in new:
                history.append(token)
                yield token
            self._lookup.extend(new)
            found += len(new)
            room = min(limit - found, kv.ctx_size - kv.length)
            if room <= 0:
                return
            new = self._round(history, min(room - 1, self._most))

    def _round(self, history: list[int], most: int) -> list[int]:
        """One pass: the ids it found, 1 to `most` + 1 of them.

        However it ends, the KV cache holds nothing that was not verified.
        """
        start = verified_length = self._model.kv.length
        try:
            begin = time.perf_counter()
            seen = self._seen(most)
            by_lookup = self._draft is None or self._lookup_depth.rate(seen.sure) > (
                self._depth.rate()
            )
            used = self._cut(seen) if by_lookup else self._drafted(history, most)
            self._model.kv.truncate(start)
            middle = time.perf_counter()
            batch = np.asarray([history[-1], *used.ids], np.int32)
            logits = self._model.forward(batch, all_logits=True)
            found = verified(
                used.ids, lambda so_far: self._sampler(logits[len(so_far)], [*history, *so_far])
            )
            verified_length = start + len(found)
        finally:
            self._model.kv.truncate(verified_length)
        end = time.perf_counter()
        for depth in (self._depth, self._lookup_depth):
            depth.passed(len(batch), end - middle)
        if not by_lookup:
            self._depth.accepted(used.sure, len(found) - 1)
        # used or not, what the text suggests is put to the test
        self._lookup_depth.accepted(*seen.tested(found))
        figures = self.figures
        figures.passes += 1
        figures.drafted += len(used.ids)
        figures.looked_up += len(used.ids) if by_lookup else 0
        figures.accepted += len(found) - 1
        figures.draft_s += middle - begin
        figures.pass_s += end - middle
        figures.history.append(Pass(len(used.ids), len(found) - 1, middle - begin, end - middle))
        return found

    def _seen(self, most: int) -> "_Drafted":
        """What followed the last time, and how sure that is: as far as the texts agreed so far."""
        ids, match = self._lookup.propose(most), self._lookup.match
        sure = [_LOOKED_UP[min(match + at, len(_LOOKED_UP)) - 1] for at in range(len(ids))]
        return _Drafted(ids, sure)

    def _cut(self, seen: "_Drafted") -> "_Drafted":
        """As much of it as is worth verifying."""
        count = 0
        while count < len(seen.ids) and self._lookup_depth.again(
            seen.sure[:count], seen.sure[count]
        ):
            count += 1
        return _Drafted(seen.ids[:count], seen.sure[:count])

    def _drafted(self, history: list[int], most: int) -> "_Drafted":
        """Drafts of a model; the KV cache holds them too."""
        assert self._draft is not None
        drafts = _Drafted([], [])
        while len(drafts.ids) < most and self._depth.again(drafts.sure):
            begin = time.perf_counter()
            text = [*history, *drafts.ids]
            logits = self._draft.logits(text)
            if logits is None:
                break
            token, share = self._sampler.with_probability(logits, text)
            drafts.ids.append(token)
            drafts.sure.append(share)
            self._depth.drafted(time.perf_counter() - begin)
        return drafts


@dataclass
class _Drafted:
    """Tokens that may come next."""

    ids: list[int]
    sure: list[float]  # how sure each is, if those before it are right

    def tested(self, found: Sequence[int]) -> tuple[list[float], int]:
        """How sure those were that what was found puts to the test, and how many were right."""
        right = 0
        while right < min(len(self.ids), len(found)) and self.ids[right] == found[right]:
            right += 1
        return self.sure[: len(found)], right
