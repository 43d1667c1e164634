"""The plan: what lies in which tier, computed before a byte of weights is read.

Blocks that every token uses (attention, head, the lowest plane of the FFN) have the highest value
per byte and are placed first, attention before neurons; over a cyclic scan of the layers a fixed
set is the best any policy can do. What does not fit is streamed through a ring, `depth` blocks
ahead; so that the SSD is never idle, what is resident is spread evenly over the layers. Memory that
remains holds the upgrade planes of the hottest neurons.

Neurons in experts are such blocks only if memory holds everything. Otherwise attention and head are
placed, and what remains holds experts (`expert_plan.py`): in HBM the hottest, in DRAM those that
come next, so that nothing is held twice while anything is held nowhere. Where DRAM has room for all
of them it holds all, unless they are pinned: what HBM drives out then need not go back.

Knows only sizes; reads nothing, allocates nothing.
"""

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

from m2c.bundle.shard import BLOCK
from m2c.errors import DoesNotFit
from m2c.tiers.expert_plan import ExpertFact
from m2c.tiers.facts import Budget, Footprint, UpgradeFact
from m2c.tiers.placement import Placement, Tier, place, too_small

# blocks read ahead: enough that reads go on while attention is computed
DEPTH: Final = 3


@dataclass(frozen=True)
class Plan:
    budget: Budget
    footprint: Footprint
    policy: str  # of the neuron cache in the compute tier
    in_hbm: tuple[int, ...]  # positions in footprint.blocks
    in_dram: tuple[int, ...]
    streamed: tuple[int, ...]
    ring_nbytes: int
    hbm_staging_nbytes: int
    slab_slots: dict[str, int]  # plane -> neurons per layer in the compute tier
    prefix: dict[str, int]  # plane -> hottest neurons per layer pinned in DRAM
    holds_embed: bool  # embeddings lie in DRAM; else a token's row is read when it is needed
    expert_slots: int | None = (
        None  # parts of experts cached in DRAM; None: they are blocks, or there are none
    )
    hbm_expert_slots: int = 0  # likewise in HBM, the hottest

    @property
    def experts_nbytes(self) -> int:
        """Of slots for experts in DRAM, those for experts under way included."""
        if self.expert_slots is None:
            return 0
        assert self.footprint.experts is not None
        facts = self.footprint.experts
        return self.expert_slots * facts.slot_nbytes + facts.window_nbytes

    @property
    def hbm_experts_nbytes(self) -> int:
        """Likewise in HBM."""
        facts = self.footprint.experts
        return facts.in_hbm_nbytes(self.hbm_expert_slots) if facts is not None else 0

    def expert_reads(self, tokens: int = 1) -> int:
        """Bytes of experts that a pass of `tokens` tokens is expected to read from the SSD."""
        return self._missed(self.hbm_expert_slots + (self.expert_slots or 0), tokens)

    def expert_moves(self, tokens: int = 1) -> int:
        """Likewise to copy from DRAM to HBM."""
        return self._missed(self.hbm_expert_slots, tokens) if self.budget.hbm else 0

    def _missed(self, held: int, tokens: int) -> int:
        """Bytes of experts that are not among the `held` hottest, for a pass of `tokens` tokens."""
        if self.expert_slots is None:
            return 0
        assert self.footprint.experts is not None
        return self.footprint.experts.reads(min(held, self.footprint.experts.total), tokens)

    @property
    def slab_nbytes(self) -> int:
        return _per_layer(self.footprint, self.slab_slots, "slot_nbytes")

    @property
    def prefix_nbytes(self) -> int:
        return _per_layer(self.footprint, self.prefix, "record_nbytes")

    @property
    def working_nbytes(self) -> int:
        """KV cache, norms, temporary values, a draft's weights: in the compute tier."""
        return _working(self.footprint)

    @property
    def used_dram(self) -> int:
        used = self._dram_blocks() + self.ring_nbytes + self.prefix_nbytes + self.experts_nbytes
        used += self.footprint.staging_nbytes + self.holds_embed * self.footprint.embed_nbytes
        return used + (self.working_nbytes + self.slab_nbytes if not self.budget.hbm else 0)

    @property
    def used_hbm(self) -> int:
        if not self.budget.hbm:
            return 0
        used = self._resident(self.in_hbm) + self.hbm_staging_nbytes
        return used + self.working_nbytes + self.slab_nbytes + self.hbm_experts_nbytes

    @property
    def ssd_nbytes_per_token(self) -> int:
        """Expected reads from the SSD while decoding: streamed blocks, missing upgrades, missing
        experts."""
        return self.streamed_nbytes_per_token + self.expert_reads()

    @property
    def streamed_nbytes_per_token(self) -> int:
        """Of these, what is known before the token is: all but experts."""
        blocks = self.footprint.blocks
        streamed = sum(blocks[i].streamed_nbytes for i in self.streamed)
        if streamed <= self.ring_nbytes:
            streamed = 0  # the ring keeps them all
        return streamed + self.footprint.layers * sum(
            self._upgrade_reads(u) for u in self.footprint.upgrades
        )

    @property
    def link_nbytes_per_token(self) -> int:
        """Expected copies from DRAM to HBM while decoding."""
        if not self.budget.hbm:
            return 0
        blocks = self.footprint.blocks
        moved = sum(blocks[i].streamed_nbytes for i in (*self.in_dram, *self.streamed))
        moved += self.expert_moves()
        for u in self.footprint.upgrades:
            missing = 1 - min(1.0, self.slab_slots[u.plane] / self.footprint.neurons)
            moved += int(self.footprint.layers * u.active * missing) * u.slot_nbytes
        return moved

    @property
    def compute_nbytes_per_token(self) -> int:
        """Weight bytes the kernels read for a token."""
        facts = self.footprint.experts
        share = 1.0
        if facts is not None:
            share = facts.used_nbytes / (facts.count * sum(facts.stored_nbytes))
        blocks = sum(
            int(b.resident_nbytes * share) if b.kind == "neurons" else b.resident_nbytes
            for b in self.footprint.blocks
        )
        upgrades = sum(u.active * u.compute_nbytes for u in self.footprint.upgrades)
        return blocks + self.footprint.layers * upgrades

    def _resident(self, positions: tuple[int, ...]) -> int:
        return sum(self.footprint.blocks[i].resident_nbytes for i in positions)

    def _dram_blocks(self) -> int:
        if not self.budget.hbm:
            return self._resident(self.in_dram)
        return sum(self.footprint.blocks[i].streamed_nbytes for i in self.in_dram)

    def _upgrade_reads(self, u: UpgradeFact) -> int:
        """Bytes of whole checksum blocks that the missing upgrades of one layer touch."""
        neurons = self.footprint.neurons
        held = min(1.0, max(self.prefix[u.plane], self.slab_slots[u.plane]) / neurons)
        missing = u.active * (1 - u.hit_share[int(held * 100)])
        cold = neurons * (1 - held)
        if cold < 1 or missing <= 0:
            return 0
        per_block = max(1.0, BLOCK / u.record_nbytes)
        touched = cold / per_block * (1 - (1 - min(1.0, missing / cold)) ** per_block)
        return int(touched * BLOCK)


def make_plan(footprint: Footprint, budget: Budget, *, policy: str, depth: int = DEPTH) -> Plan:
    """Raises DoesNotFit naming the smallest budget that works."""
    if budget.hbm:
        return _three_tiers(footprint, budget, policy, depth)
    return _two_tiers(footprint, budget, policy, depth)


def _two_tiers(f: Footprint, budget: Budget, policy: str, depth: int) -> Plan:
    fixed = f.staging_nbytes + _working(f)
    if f.experts is not None:
        return _two_tiers_of_experts(f, f.experts, budget, policy, depth)
    placement = place(f, Tier(budget.dram, fixed, "--dram", raw=False), depth, _by_value(f))
    room = budget.dram - fixed - placement.nbytes
    # decoded FP16 neurons save their decoding, so they get slots before raw bytes get pinned
    slabs = {u.plane: 0 for u in f.upgrades}
    for u in f.upgrades:
        if u.plane == "fp16" or policy != "pinned":
            slabs[u.plane] = min(f.neurons, 2 * u.active, room // (f.layers * u.slot_nbytes))
            room -= slabs[u.plane] * f.layers * u.slot_nbytes
    return _plan(f, budget, policy, (), placement, 0, slabs, room)


def _two_tiers_of_experts(
    f: Footprint, experts: ExpertFact, budget: Budget, policy: str, depth: int
) -> Plan:
    """Everything in memory, or what is no expert first."""
    fixed = f.staging_nbytes + _working(f)
    with suppress(DoesNotFit):
        tier = Tier(budget.dram, fixed, "--dram", raw=False)
        placement = place(f, tier, depth, _by_value(f))
        if not placement.streamed:
            room = budget.dram - fixed - placement.nbytes
            return _plan(f, budget, policy, (), placement, 0, {}, room)
    fixed += experts.window_nbytes
    tier = Tier(budget.dram, fixed, "--dram", raw=False)
    placement = place(f, tier, depth, [i for i in _by_value(f) if f.blocks[i].kind != "neurons"])
    room = budget.dram - fixed - placement.nbytes
    slots = min(experts.total, room // experts.slot_nbytes)
    return _plan(f, budget, policy, (), placement, 0, {}, room - slots * experts.slot_nbytes, slots)


def _three_tiers(f: Footprint, budget: Budget, policy: str, depth: int) -> Plan:
    """Slabs for the active sets first, as in the paper, or blocks first, which every token uses:
    whichever way fewer bytes cross the link, of those that fit."""
    fitting, refused = list[Plan](), list[DoesNotFit]()
    for share in (0.5, 0.0) if f.upgrades else (0.0,):
        try:
            fitting.append(_three_tiers_with(f, budget, policy, depth, share))
        except DoesNotFit as error:
            refused.append(error)
    if not fitting:
        raise min(refused, key=lambda error: error.smallest)
    return min(fitting, key=lambda plan: plan.link_nbytes_per_token)


def _three_tiers_with(
    f: Footprint, budget: Budget, policy: str, depth: int, slab_share: float
) -> Plan:
    """slab_share: of HBM, at most, for the slabs of active sets before any block; what blocks leave
    widens them."""
    staging = 2 * f.largest_moved
    room = budget.hbm - _working(f) - staging
    if room < 0:
        raise too_small("--hbm", budget.hbm, budget.hbm - room)
    slabs = {}
    for u in f.upgrades:
        most = int(room * slab_share) // (f.layers * u.slot_nbytes)
        slabs[u.plane] = min(f.neurons, u.active, most)
        room -= slabs[u.plane] * f.layers * u.slot_nbytes
    in_hbm = []
    for i in _by_value(f):
        if f.blocks[i].resident_nbytes <= room:
            in_hbm.append(i)
            room -= f.blocks[i].resident_nbytes
    for u in f.upgrades:
        more = min(f.neurons - slabs[u.plane], room // (f.layers * u.slot_nbytes))
        slabs[u.plane] += more
        room -= more * f.layers * u.slot_nbytes
    if len(in_hbm) == len(f.blocks):
        staging = 0
    slots, in_slots, fixed = None, 0, f.staging_nbytes
    if f.experts is not None and staging:
        # experts that a token does not use must not cross the link: in HBM they lie all as blocks,
        # or the hottest in slots
        own = [i for i in in_hbm if f.blocks[i].kind == "neurons"]
        room += sum(f.blocks[i].resident_nbytes for i in own)
        in_hbm = [i for i in in_hbm if f.blocks[i].kind != "neurons"]
        in_slots = f.experts.slots_of_hbm(room)
        slots, fixed = 0, fixed + f.experts.window_nbytes
    rest = [
        i
        for i in _by_value(f)
        if i not in set(in_hbm) and (slots is None or f.blocks[i].kind != "neurons")
    ]
    tier = Tier(budget.dram, fixed, "--dram", raw=True)
    placement = place(f, tier, depth, rest)
    room = budget.dram - fixed - placement.nbytes
    if f.experts is not None and slots is not None:
        moves = policy != "pinned" and in_slots < f.experts.total
        most = f.experts.total - (0 if moves else in_slots)
        slots = min(most, room // f.experts.slot_nbytes)
        room -= slots * f.experts.slot_nbytes
    made = _plan(f, budget, policy, tuple(sorted(in_hbm)), placement, staging, slabs, room, slots)
    return replace(made, hbm_expert_slots=in_slots)


def _plan(
    f: Footprint, budget: Budget, policy: str, in_hbm: tuple[int, ...], placement: "Placement",
    staging: int, slabs: dict[str, int], room: int, expert_slots: int | None = None,
) -> Plan:  # fmt: skip
    prefix = _prefixes(f, room)
    room -= f.layers * sum(prefix[u.plane] * u.record_nbytes for u in f.upgrades)
    # last: it saves a small read a token
    holds_embed = not placement.streamed and 0 < f.embed_nbytes <= room
    return Plan(
        budget, f, policy, in_hbm, placement.resident, placement.streamed, placement.ring_nbytes,
        staging, slabs, prefix, holds_embed, expert_slots,
    )  # fmt: skip


def _by_value(f: Footprint) -> list[int]:
    """Attention and head first, then the first neurons of every layer, then the next.

    All are used by every token; layers in an order whose every beginning is spread evenly.
    """

    def key(i: int) -> tuple[bool, int, int, int]:
        block = f.blocks[i]
        neurons = block.kind == "neurons"
        return neurons, block.start if neurons else 0, _spread(block.layer) if neurons else 0, i

    return sorted(range(len(f.blocks)), key=key)


def _spread(layer: int) -> int:
    """The bits of a layer number reversed (van der Corput's sequence)."""
    return int(f"{layer:016b}"[::-1], 2)


def _prefixes(f: Footprint, room: int) -> dict[str, int]:
    prefix = {u.plane: 0 for u in f.upgrades}
    for u in sorted(f.upgrades, key=lambda u: -u.active / u.record_nbytes):
        prefix[u.plane] = max(0, min(f.neurons, room // (f.layers * u.record_nbytes)))
        room -= prefix[u.plane] * f.layers * u.record_nbytes
    return prefix


def _per_layer(f: Footprint, neurons: dict[str, int], size: str) -> int:
    return f.layers * sum(neurons[u.plane] * getattr(u, size) for u in f.upgrades)


def _working(f: Footprint) -> int:
    return f.kv_nbytes + f.fixed_nbytes + f.workspace_nbytes + f.draft_nbytes
