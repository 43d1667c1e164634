"""The store: owns every weight byte in memory and hands the kernels their operands.

It carries out a plan: loads what is resident, streams the rest through the ring, and fetches
upgrades on demand. It knows bytes and tiers; which neurons a token needs is decided in `model`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from m2c.bundle.bundle import Bundle
from m2c.bundle.shard import ShardIndex
from m2c.kernels.dispatch import exact_weights
from m2c.kernels.rows import EXACT_DTYPES, ExactRows, PackedRows, Rows
from m2c.tiers.blocks import Block, BlockUse, Precisions, block_of, head_name, planes_of
from m2c.tiers.drafts import EMBED, DraftPlanes
from m2c.tiers.expert_memory import ExpertMemory
from m2c.tiers.expert_parts import ExpertParts, joined
from m2c.tiers.experts import ExpertCache
from m2c.tiers.facts import BlockFact
from m2c.tiers.fetch import Decode, PlaneSource, RowSource
from m2c.tiers.link import Link
from m2c.tiers.loading import Loading, load_exact
from m2c.tiers.memory import aligned_buffer
from m2c.tiers.moved import MovedBlocks
from m2c.tiers.neighbours import runs
from m2c.tiers.plan import Plan
from m2c.tiers.ring import BlockRing
from m2c.tiers.seen import Gather, seen_records
from m2c.tiers.ssd import REQUEST_BLOCKS, THREADS, SsdReader
from m2c.tiers.traffic import StoreStats
from m2c.tiers.upgrades import HitStats, UpgradePlane

Ids = npt.NDArray[np.int32]
U8 = npt.NDArray[np.uint8]
FFN = "ffn"  # section of the neuron shards


class NeuronStore:
    """Use as a context manager. `progress` is told the bytes that became resident."""

    def __init__(
        self, bundle: Bundle, plan: Plan, precisions: Precisions, *,
        device: torch.device, io_threads: int = THREADS, request_blocks: int = REQUEST_BLOCKS,
        progress: Callable[[int], None] = lambda nbytes: None,
        decode: Decode = exact_weights, gather: Gather | None = None,
    ) -> None:  # fmt: skip
        """decode: from rows with frames to their 16-bit weights. gather: of the GPU's kernels."""
        self.plan = plan
        self.device = device
        self.reader = SsdReader(io_threads, request_blocks)
        self._bundle = bundle
        self._precisions = precisions
        self._progress = progress
        self._gather = gather
        self._link = Link(device, plan.hbm_staging_nbytes)
        self._moved = MovedBlocks(self._link if plan.budget.hbm else None)
        self._staging = aligned_buffer(plan.footprint.staging_nbytes)
        self._upgrades: dict[tuple[int, str], UpgradePlane] = {}
        self._ring: BlockRing | None = None
        self._uses: dict[tuple[str, int], list[BlockUse]] = {}
        self._pinned_embed: Rows | None = None
        self._experts: ExpertCache | None = None
        self.holds_experts = plan.expert_slots is None  # then their operands stay valid
        facts = plan.footprint.experts
        self._parts = ExpertParts(facts.count if facts is not None else 0)
        self.draft: DraftPlanes | None = None
        self._decode = decode
        self._embed = self._row_source("embed", EMBED, precisions.dense)
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "NeuronStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._ring is not None:
            self._ring.close()
        self.reader.close()
        self._link.close()

    # -- what the model asks for -------------------------------------------------------------------

    def uses(self, kind: str, layer: int) -> Iterator[dict[str, Rows]]:
        """Operands of a layer's blocks of `kind` by section name, block after block, records in
        order; the head is the layer after the last. Each is valid until the next is asked for.

        Layers must be used in order, pass after pass. Raises what a failed read raised.
        """
        for use in self._uses[kind, layer]:
            if use.rows is not None:
                yield use.rows
            elif use.raw is not None:
                yield self._moved.in_turn(use)
            else:
                assert self._ring is not None
                yield self._moved.rows(use, self._ring.acquire(use.ring))
                self._link.arrived()
                self._ring.release()

    def experts(self, layer: int, ids: Ids, planes: Ids) -> Iterator[Rows]:
        """Operands of a layer's experts `ids`, each at the precision of its so many lowest
        `planes`, in their order; each is valid until the next is asked for. Raises what a failed
        read raised."""
        if self._experts is not None:
            return self._experts.rows(layer, ids, planes)
        (rows,) = self.uses("neurons", layer)
        return self._parts.of(layer, rows[FFN], ids, planes)

    def upgrade(self, layer: int, plane: str, ids: Ids, floor: Rows, *, step: bool) -> Rows:
        """Rows of `ids` (ascending) of a layer at `plane`; `floor` is the layer's FFN operand."""
        assert isinstance(floor, PackedRows)
        upgrade = self._upgrades[layer, plane]
        if plane == "fp16":
            return ExactRows(floor.layout, upgrade.records(ids, floor, step=step))
        index = torch.from_numpy(ids).to(floor.int4.device)
        if upgrade.whole is not None:
            return self._indexed(upgrade, index, floor)
        records = upgrade.records(ids, floor, step=step)
        return PackedRows(floor.layout, floor.int4, records, index4=index)

    def chosen(self, layer: int, plane: str, index: torch.Tensor, floor: Rows) -> Rows | None:
        """As `upgrade`, of rows `index` (int32, ascending) on the compute device; None where what
        is wanted must be known on the host."""
        assert isinstance(floor, PackedRows)
        upgrade = self._upgrades[layer, plane]
        return None if upgrade.whole is None else self._indexed(upgrade, index, floor)

    def _indexed(self, upgrade: UpgradePlane, index: torch.Tensor, floor: PackedRows) -> Rows:
        """Nothing to gather: the kernels take the records where they lie."""
        upgrade.served(len(index))
        return PackedRows(floor.layout, floor.int4, upgrade.whole, index4=index, index8=index)

    def served_again(self) -> None:
        """A pass like the last one was made without asking for its rows."""
        for upgrade in self._upgrades.values():
            upgrade.served(upgrade.last_served)

    @property
    def holds_upgrades(self) -> bool:
        """Whether `chosen` serves all that is above the floor."""
        return all(upgrade.whole is not None for upgrade in self._upgrades.values())

    def embed(self, ids: Ids) -> torch.Tensor:
        """Embeddings of token `ids` [tokens] as f32 [tokens, hidden] on the compute device."""
        resident = self._resident_embedding
        if resident is not None:
            rows = resident.take(torch.from_numpy(ids.astype(np.int64)))
            return rows.values(0, len(rows))[:, 0].to(self.device)
        wanted, back = np.unique(ids, return_inverse=True)
        rows = self._embed.rows(wanted.astype(np.int32))
        values = rows.values(0, len(rows))[:, 0].to(self.device)
        return values[torch.from_numpy(back.astype(np.int64)).to(self.device)]

    @property
    def largest_resident(self) -> torch.Tensor | None:
        """The largest tensor of weights that is ready for the kernels."""
        held = [
            rows.weights if isinstance(rows, ExactRows) else rows.int4
            for uses in self._uses.values() for use in uses for rows in (use.rows or {}).values()
        ]  # fmt: skip
        return max(held, key=lambda tensor: tensor.nbytes, default=None)

    def read_speed(self) -> float:
        """Bytes per second of the SSD now, read as the ring or the experts are; 0 if nothing is."""
        if self._ring is not None:
            return self._ring.read_speed(self._staging)
        return self._experts.read_speed() if self._experts is not None else 0.0

    def link_speed(self) -> float:
        """Bytes per second from DRAM to HBM of experts, or of a block that lies in DRAM or passes
        through it. Not within a pass: what is in the link's slots is lost."""
        self._moved.forget()
        held = [use.raw for uses in self._uses.values() for use in uses if use.raw is not None]
        if self._experts is not None:
            held = [self._experts.memory.buffer]
        if held:
            return self._link.speed(max(held, key=len))
        return self._link.speed(self._ring.buffer) if self._ring is not None else 0.0

    @property
    def stats(self) -> StoreStats:
        totals: dict[str, HitStats] = {}
        for (_, plane), upgrade in self._upgrades.items():
            totals.setdefault(plane, HitStats()).add(upgrade.stats)
        if self._experts is not None:
            totals |= {name: replace(one) for name, one in self._experts.stats.items()}
        return StoreStats(replace(self.reader.stats), self._link.stats, totals)

    def reset_stats(self) -> None:
        self.reader.reset_stats()
        self._link.reset_stats()
        for upgrade in self._upgrades.values():
            upgrade.stats = HitStats()
        if self._experts is not None:
            self._experts.reset_stats()

    def _load(self) -> None:
        plan = self.plan
        if self._precisions.drafts:
            self.draft = DraftPlanes(
                self._bundle, self.reader, self._staging, self._parts.count, self.device
            )
            self._progress(self.draft.load(plan.footprint.layers, head_name(self._bundle)))
        streamed = [self._block(plan.footprint.blocks[i]) for i in plan.streamed]
        for layer in range(plan.footprint.layers):
            for fact in plan.footprint.upgrades:
                self._upgrades[layer, fact.plane] = self._upgrade_plane(layer, fact.plane)
        self._uses = self._place()
        # whether `uses` gives each layer's rows whole, and the same for every token
        self.holds_all = all(len(u) == 1 and u[0].rows is not None for u in self._uses.values())
        if plan.expert_slots is not None:
            self._experts = self._expert_cache()
            self._progress(self._experts.memory.load())
        if plan.holds_embed:
            self._pinned_embed = self._load_embed()
            if self.draft is not None:
                self.draft.embedding = self._pinned_embed
        if streamed:
            self._ring = BlockRing(self.reader, streamed, plan.ring_nbytes)
            self._link.pin(self._ring.buffer)

    def _place(self) -> dict[tuple[str, int], list[BlockUse]]:
        """Read what is resident. Neighbours that are ready for the kernels become one."""
        plan, found = self.plan, dict[tuple[str, int], list[BlockUse]]()
        ready = set(plan.in_hbm if plan.budget.hbm else plan.in_dram)
        waiting, ring = set(plan.in_dram) - ready, 0
        loading = Loading(self.device)
        for kind, layer, run in runs(plan, ready):
            first, last = plan.footprint.blocks[run[0]], plan.footprint.blocks[run[-1]]
            below = None if self.draft is None else self.draft.operands(kind, layer)
            use = BlockUse(self._block(replace(first, end=last.end)), below, ring=ring)
            if run[0] not in ready | waiting:
                ring += 1
            elif run[0] in ready and use.block.is_exact and not use.block.stored:
                names, there = use.block.sections, self.device
                use.rows = {n: self._load_exact(use.block, n, there) for n in names}
            else:
                stays = run[0] in waiting
                loading.start(self.reader, use.block, partial(self._put, use, stays))
            found.setdefault((kind, layer), []).append(use)
        loading.finish()
        if self.device.type == "cuda" and not plan.streamed and plan.expert_slots is None:
            in_turn = [use for uses in found.values() for use in uses if use.raw is not None]
            for use, following in zip(in_turn, in_turn[1:] + in_turn[:1], strict=True):
                use.following = following
        return found

    def _put(self, use: BlockUse, stays: bool, raw: U8) -> None:
        """A block that has arrived: kept as it is in DRAM, or given to the compute tier."""
        self._progress(use.block.streamed_nbytes)
        if stays:
            use.raw = raw
            self._link.pin(raw)
        else:
            use.rows = dict(use.block.rows(torch.from_numpy(raw).to(self.device), use.below))

    def _expert_cache(self) -> ExpertCache:
        plan, facts = self.plan, self.plan.footprint.experts
        assert facts is not None
        blocks = [self._block(fact) for fact in plan.footprint.blocks if fact.kind == "neurons"]

        def to_rows(layer: int, parts: list[tuple[Block, U8 | torch.Tensor]]) -> Rows:
            below = None if self.draft is None else self.draft.operands("neurons", layer)
            return joined(parts, below)[FFN]

        memory = ExpertMemory(self.reader, plan, blocks, self._link if plan.budget.hbm else None)
        return ExpertCache(facts, memory, to_rows)

    def _load_embed(self) -> Rows:
        """In DRAM, wherever kernels compute: a token needs one row."""
        block = block_of(self._bundle, "dense", "embed", self._precisions.dense)
        if block.is_exact:
            return self._load_exact(block, EMBED, torch.device("cpu"))
        raw = aligned_buffer(block.streamed_nbytes)
        block.read(self.reader, raw).wait()
        self._progress(block.streamed_nbytes)
        return block.rows(raw)[EMBED]

    def _load_exact(self, block: Block, name: str, device: torch.device) -> Rows:
        decode, progress = self._decode, self._progress
        return load_exact(self.reader, block, name, decode, device, progress=progress)

    def _upgrade_plane(self, layer: int, plane: str) -> UpgradePlane:
        plan, neurons = self.plan, self.plan.footprint.neurons
        layout = self._bundle.shard("neurons", layer, "int4").header.section(FFN).layout
        slots, slab = plan.slab_slots.get(plane, 0), None
        exact_type = self._bundle.manifest.exact_type if plane == "fp16" else None
        if slots:
            width = layout.vectors * layout.length if exact_type else layout.nbytes("int8")
            dtype = EXACT_DTYPES[exact_type] if exact_type else torch.uint8
            slab = torch.empty((slots, width), dtype=dtype, device=self.device)
        source = self._plane_source(layer, plane)
        source.pin_prefix(plan.prefix.get(plane, 0))
        self._progress(source.prefix_nbytes)
        below = seen = None
        if plane == "int8" and slots < neurons:
            seen = seen_records(self._link, self._gather, source.prefix)
        if plane == "fp16" and self._precisions.floor == "int4":
            known = self._upgrades.get((layer, "int8"))
            below = known.source if known else self._plane_source(layer, "int8")
        upgrade = UpgradePlane(
            source, below, exact_type=exact_type, slab=slab, neurons=neurons, policy=plan.policy,
            device=self.device,
            copied=self._link.count if plan.budget.hbm else lambda nbytes, seconds: None,
            decode=self._decode, seen=seen,
        )  # fmt: skip
        if plan.budget.hbm and plane == "int8" and slots == neurons:
            self._progress(upgrade.load_whole())
        return upgrade

    @property
    def _resident_embedding(self) -> Rows | None:
        """The embedding, where it was pinned or a tied head has it in the compute tier, whole."""
        if self._pinned_embed is not None:
            return self._pinned_embed
        head = self._uses["head", self.plan.footprint.layers]
        if len(head) > 1 or head[0].rows is None:
            return None
        rows = head[0].rows.get(EMBED)
        return None if isinstance(rows, PackedRows) and rows.frames is not None else rows

    def _block(self, fact: BlockFact) -> Block:
        neurons, head = fact.kind == "neurons", fact.kind == "head"
        name = head_name(self._bundle) if head else fact.layer
        precision = self._precisions.floor if neurons else self._precisions.dense
        whole = block_of(self._bundle, "neurons" if neurons else "dense", name, precision)
        held, stored = int(self._precisions.drafts), self._precisions.stored
        return replace(whole, start=fact.start, end=fact.end, held=held, stored=stored)

    def _plane_source(self, layer: int, plane: str) -> PlaneSource:
        return self._sources([self._bundle.shard("neurons", layer, plane)], FFN)[0]

    def _row_source(self, name: str, section: str, precision: str) -> RowSource:
        shards = [self._bundle.shard("dense", name, plane) for plane in planes_of(precision)]
        facts, exact_type = shards[0].header.section(section), self._bundle.manifest.exact_type
        return RowSource(self._sources(shards, section), facts, exact_type, self._decode)

    def _sources(self, shards: Sequence[ShardIndex], name: str) -> list[PlaneSource]:
        return [PlaneSource(self.reader, s, s.header.section(name), self._staging) for s in shards]
