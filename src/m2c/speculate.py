"""Exact mode: several tokens drafted cheaply, then verified in one pass with the exact weights.

A drafted token counts only if the exact model, asked about the same position, gives the same one;
the sampler's noise belongs to the position, so this holds for sampling too. The tokens are those of
decoding one by one, whatever the drafts were; drafts only decide how many come out of a pass.
A round's drafts overwrite nothing that was verified: the KV cache is cut back to it.

Knows nothing about text, tiers or where drafts' weights lie.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from torch import Tensor

from m2c.depth import MOST, Depth
from m2c.lookup import Lookup
from m2c.model.transformer import Transformer
from m2c.sampling import Sampler

MOST_AT_ONCE: Final = MOST + 1  # tokens of a pass: the drafts and the token before them
# how sure a token is that only the text so far suggests; what that is worth, `Depth` measures
_LOOKED_UP: Final = 0.5


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
    accepted: int = 0
    draft_s: float = 0.0
    pass_s: float = 0.0
    history: list[Pass] = field(default_factory=list)

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were right; those behind a wrong one were not."""
        return self.accepted / self.drafted if self.drafted else 0.0

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
    """model: verifies. draft: the same model with cheaper weights and the same KV cache, or None:
    then the text so far is all that drafts come from."""

    def __init__(self, model: Transformer, draft: Transformer | None, sampler: Sampler) -> None:
        self.figures = Speculation()
        self._model = model
        self._draft_model = draft
        self._sampler = sampler
        self._depth = Depth()
        self._lookup = Lookup()

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
            new = self._round(history, room - 1)

    def _round(self, history: list[int], most: int) -> list[int]:
        """One pass: the ids it found, 1 to `most` + 1 of them."""
        start = self._model.kv.length
        begin = time.perf_counter()
        drafts, sure = self._drafts(history, most)
        middle = time.perf_counter()
        batch = np.asarray([history[-1], *drafts], np.int32)
        logits = self._model.forward(batch, all_logits=True)
        found = verified(
            drafts, lambda so_far: self._sampler(logits[len(so_far)], [*history, *so_far])
        )
        self._model.kv.truncate(start + len(found))
        end = time.perf_counter()
        self._depth.passed(len(batch), end - middle)
        self._depth.accepted(sure, len(found) - 1)
        figures = self.figures
        figures.passes += 1
        figures.drafted += len(drafts)
        figures.accepted += len(found) - 1
        figures.draft_s += middle - begin
        figures.pass_s += end - middle
        figures.history.append(Pass(len(drafts), len(found) - 1, middle - begin, end - middle))
        return found

    def _drafts(self, history: list[int], most: int) -> tuple[list[int], list[float]]:
        """Drafted ids and how sure each is; the KV cache is left as it was."""
        drafts: list[int] = []
        sure: list[float] = []
        if self._draft_model is None:
            for token in self._lookup.propose(min(most, MOST)):
                if not self._depth.again(sure):
                    break
                drafts.append(token)
                sure.append(_LOOKED_UP)
                self._depth.drafted(0.0)
            return drafts, sure
        start = self._model.kv.length
        while len(drafts) < most and self._depth.again(sure):
            begin = time.perf_counter()
            last = drafts[-1] if drafts else history[-1]
            logits = self._draft_model.forward(np.asarray([last], np.int32))
            token, share = self._sampler.with_probability(logits, [*history, *drafts])
            drafts.append(token)
            sure.append(share)
            self._depth.drafted(time.perf_counter() - begin)
        self._model.kv.truncate(start)
        return drafts, sure
