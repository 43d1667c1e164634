"""What memory holds of a mixture of experts, as far as sizes tell.

A token uses few of a layer's experts, so they are no blocks that every token uses: either all of
them are in memory, or some are, in slots that are taken over by others (`experts.ExpertCache`),
beside a few slots for those under way. Reads nothing, allocates nothing.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class ExpertFact:
    """The experts of a model. Bytes."""

    layers: int
    count: int  # of a layer
    active: int  # of a layer, that a token uses
    slot_nbytes: int  # room for any of them as it is read
    stored_nbytes: int  # that are read for one, average
    # [layers][count] share of the tokens that use it; empty: not known, all the same
    popularity: tuple[tuple[float, ...], ...] = ()
    shared: bool = False  # besides, one that every token uses is part of the blocks of attention

    @property
    def total(self) -> int:
        return self.layers * self.count

    @property
    def window(self) -> int:
        """Experts under way at a time: one that is computed, and all others of a token."""
        return min(self.count, max(2, self.active))

    @property
    def window_nbytes(self) -> int:
        return self.window * self.slot_nbytes

    @cached_property
    def ranking(self) -> tuple[int, ...]:
        """layer * count + expert of all experts, the most popular first; of equals those of each
        layer in turn, so that what memory holds is spread over the layers."""
        if not self.popularity:
            return tuple(np.arange(self.total).reshape(self.layers, self.count).T.ravel().tolist())
        shares = np.array(self.popularity).ravel()
        return tuple(np.argsort(-shares, kind="stable").tolist())

    def missed(self, held: int, tokens: int = 1) -> float:
        """Experts that a pass of `tokens` tokens reads if the `held` most popular are in memory:
        what tokens choose is taken to be independent."""
        shares = np.full(self.total, self.active / self.count)
        if self.popularity:
            shares = np.array(self.popularity).ravel()
        used = 1 - (1 - shares.clip(0, 1)) ** tokens
        return float(used[list(self.ranking[held:])].sum())
