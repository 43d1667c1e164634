"""What memory holds of a mixture of experts, as far as sizes tell.

A token uses few of a layer's experts, so they are no blocks that every token uses: either all of
them are in memory, or some are, in slots that are taken over by others (`experts.ExpertCache`),
beside a few slots for those under way; with a GPU, in HBM too. Reads nothing, allocates nothing.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class ExpertFact:
    """The experts of a model. Bytes.

    What is read of an expert at a time, and what a slot holds, is a *part*: all of its planes, or
    with a mix one plane, so that an expert that needs few does not read the others.
    """

    layers: int
    count: int  # of a layer
    uses: tuple[int, ...]  # experts of a layer that a token uses in each part, the lowest first
    slot_nbytes: int  # room for any part of any of them as it is read
    stored_nbytes: tuple[int, ...]  # that are read for each part of one, average
    # [layers][count] share of the tokens that use it; empty: not known, all the same
    popularity: tuple[tuple[float, ...], ...] = ()
    shared: bool = False  # besides, one that every token uses is part of the blocks of attention

    @property
    def active(self) -> int:
        """Experts of a layer that a token uses."""
        return self.uses[0]

    @property
    def parts(self) -> int:
        return len(self.uses)

    @property
    def of_a_part(self) -> int:
        """Experts of all layers."""
        return self.layers * self.count

    @property
    def total(self) -> int:
        """Parts of all experts."""
        return self.of_a_part * self.parts

    @property
    def window(self) -> int:
        """Slots for what is under way: an expert that is computed, and all others of a token."""
        return min(self.count * self.parts, max(2 * self.parts, sum(self.uses)))

    @property
    def window_nbytes(self) -> int:
        return self.window * self.slot_nbytes

    def slots_of_hbm(self, room: int) -> int:
        """Parts that `room` bytes of HBM hold, beside one on its way there."""
        return max(0, min(self.total, room // self.slot_nbytes - 1))

    def in_hbm_nbytes(self, slots: int) -> int:
        """What they take there, that one included."""
        return (slots + 1) * self.slot_nbytes if slots else 0

    @cached_property
    def ranking(self) -> tuple[int, ...]:
        """part * of_a_part + layer * count + expert of all parts of experts, those that most tokens
        use first; of equals those of each layer in turn, so that what memory holds is spread over
        the layers."""
        every = np.arange(self.total).reshape(self.parts, self.layers, self.count)
        ids = every.transpose(0, 2, 1).ravel()
        return tuple(ids[np.argsort(-self._shares[ids], kind="stable")].tolist())

    @property
    def _shares(self) -> npt.NDArray[np.float64]:
        """[total] share of the tokens that use a part. Which expert of a token gets the largest
        weight is taken not to depend on which experts it has."""
        shares = np.full(self.of_a_part, self.active / self.count)
        if self.popularity:
            shares = np.array(self.popularity).ravel()
        return np.concatenate([shares * uses / self.active for uses in self.uses])

    def missed(self, held: int, tokens: int = 1) -> list[float]:
        """Of each part, experts that a pass of `tokens` tokens reads it for if memory holds the
        `held` parts that most tokens use: what tokens choose is taken to be independent."""
        used = 1 - (1 - self._shares.clip(0, 1)) ** tokens
        used[list(self.ranking[:held])] = 0
        return used.reshape(self.parts, -1).sum(1).tolist()

    def reads(self, held: int, tokens: int = 1) -> int:
        """Bytes that are then read."""
        missed = self.missed(held, tokens)
        return int(sum(n * nbytes for n, nbytes in zip(missed, self.stored_nbytes, strict=True)))

    @property
    def used_nbytes(self) -> int:
        """Of a layer, that a token uses."""
        return sum(n * nbytes for n, nbytes in zip(self.uses, self.stored_nbytes, strict=True))
