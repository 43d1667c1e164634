"""What a plan is made from: how many bytes of what kind a model needs, and how many there may be.

Facts only: `plan.py` decides.
"""

from dataclasses import dataclass

from m2c.tiers.expert_plan import ExpertFact


@dataclass(frozen=True)
class BlockFact:
    """Weights that every token uses, placed as one: a layer's attention with its shared expert,
    some of its neurons at the floor, or some rows of the head."""

    kind: str  # "dense", "head" or "neurons"
    layer: int  # the head counts as the layer after the last
    resident_nbytes: int  # in memory, ready for the kernels
    streamed_nbytes: int  # read from the SSD each time it is needed
    start: int = 0  # records [start, end) of head or neurons
    end: int | None = None  # None: all


@dataclass(frozen=True)
class UpgradeFact:
    """One plane above the floor, of one layer: the same for all layers."""

    plane: str  # "int8" or "fp16"
    record_nbytes: int  # as stored, average
    slot_nbytes: int  # in a slab of the compute tier
    compute_nbytes: int  # that the kernels read for it, the floor's share once more included
    active: int  # neurons per token that need it
    hit_share: tuple[float, ...]  # [101] share of these uses that the hottest k % neurons serve


@dataclass(frozen=True)
class DraftFact:
    """What drafts are made with, in memory: the lowest plane of everything, or another model."""

    nbytes: int
    compute_nbytes: int  # that the kernels read for a token
    layers: int
    name: str = ""  # of another model


@dataclass(frozen=True)
class Footprint:
    """Everything that needs memory. Bytes."""

    layers: int
    neurons: int  # per layer
    blocks: tuple[BlockFact, ...]  # in the order a token uses them
    upgrades: tuple[UpgradeFact, ...]
    kv_nbytes: int
    fixed_nbytes: int  # norms, biases, checksums, offsets
    workspace_nbytes: int  # activations and the temporary values of the kernels
    staging_nbytes: int  # buffer of on-demand reads
    embed_nbytes: int  # embeddings in memory; 0 when the head has them
    draft: DraftFact | None = None
    experts: ExpertFact | None = None  # what the neurons are in, if they are

    @property
    def draft_nbytes(self) -> int:
        return self.draft.nbytes if self.draft is not None else 0

    @property
    def largest_moved(self) -> int:
        """Bytes of the largest that is copied into HBM at a time."""
        if self.experts is None:
            return max(block.streamed_nbytes for block in self.blocks)
        dense = [block.streamed_nbytes for block in self.blocks if block.kind != "neurons"]
        return max(self.experts.parts * self.experts.slot_nbytes, *dense)


@dataclass(frozen=True)
class Budget:
    dram: int
    hbm: int = 0  # 0: compute happens in DRAM, there are two tiers
