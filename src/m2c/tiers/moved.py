"""Blocks on their way from DRAM to where kernels compute.

Where kernels compute in DRAM there is no way. Knows nothing about files, or which block is next.
"""

from m2c.kernels.rows import Rows
from m2c.tiers.blocks import U8, BlockUse
from m2c.tiers.link import Copied, Link


class MovedBlocks:
    """link: None where kernels compute in DRAM."""

    def __init__(self, link: Link | None) -> None:
        self._link = link
        self._ahead: tuple[BlockUse, dict[str, Rows], Copied] | None = None

    def rows(self, use: BlockUse, payload: U8) -> dict[str, Rows]:
        """Operands of a payload that lies in DRAM, copied to HBM if that is where we compute."""
        if self._link is None:
            address = payload.ctypes.data
            if address not in use.made:  # of the ring, it is mostly that of the pass before
                use.made = {address: dict(use.block.rows(payload, use.below))}
            return use.made[address]
        found, copied = self._moved(use, payload, ahead=False)
        self._link.await_copy(copied)
        return found

    def in_turn(self, use: BlockUse) -> dict[str, Rows]:
        """As `rows`, of a block whose payload stays in DRAM. What comes after it, if that is known
        and waits there too, is copied from now on: also while nothing is computed, as between two
        tokens."""
        assert use.raw is not None
        if self._link is None or use.following is None:
            return self.rows(use, use.raw)
        if self._ahead is not None and self._ahead[0] is use:
            _, found, copied = self._ahead
        else:  # the first of all, or a pass was broken off
            found, copied = self._moved(use, use.raw, ahead=True)
        self._link.await_copy(copied)
        following = use.following
        assert following.raw is not None
        self._ahead = following, *self._moved(following, following.raw, ahead=True)
        return found

    def forget(self) -> None:
        """What was copied ahead is there no more: the slots held something else since."""
        self._ahead = None

    def _moved(self, use: BlockUse, payload: U8, *, ahead: bool) -> tuple[dict[str, Rows], Copied]:
        assert self._link is not None
        slot = self._link.turn
        view, copied = self._link.start(payload[: use.block.streamed_nbytes], ahead=ahead)
        if slot not in use.made:
            use.made[slot] = dict(use.block.rows(view, use.below))
        return use.made[slot], copied
