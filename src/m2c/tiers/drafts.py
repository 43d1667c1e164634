"""The INT4 planes of a whole model in memory: what drafts are made with while exact weights stream.

They are planes of the exact weights too, so a pass that verifies drafts reads only what is above
them. Knows nothing about drafts being right or wrong.
"""

from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from m2c.bundle.bundle import Bundle
from m2c.kernels.rows import PackedRows, Rows
from m2c.tiers.blocks import Block, block_of
from m2c.tiers.expert_parts import ExpertParts
from m2c.tiers.fetch import PlaneSource, RowSource
from m2c.tiers.loading import Loading
from m2c.tiers.ssd import SsdReader

EMBED = "embed_tokens"
_PLANE = "int4"

Ids = npt.NDArray[np.int32]
U8 = npt.NDArray[np.uint8]


class DraftPlanes:
    """What `Transformer` asks of a store, at INT4. staging: shared with the store's own sources.
    experts: of a layer, if its neurons are in experts. device: that computes."""

    holds_all = True
    holds_experts = True

    def __init__(
        self, bundle: Bundle, reader: SsdReader, staging: U8, experts: int = 0,
        device: torch.device = torch.device("cpu"),
    ) -> None:  # fmt: skip
        self.device = device
        self._bundle = bundle
        self._reader = reader
        self._layers = 0
        self._parts = ExpertParts(experts)
        self._operands: dict[tuple[str, int], dict[str, PackedRows]] = {}
        index = bundle.shard("dense", "embed", _PLANE)
        section = index.header.section(EMBED)
        source = PlaneSource(reader, index, section, staging)
        self._embed = RowSource([source], section, bundle.manifest.exact_type)
        # where a store has it in memory; else a tied head is used, or the SSD is asked
        self.embedding: Rows | None = None

    def load(self, layers: int, head: str) -> int:
        """Read everything, many reads in flight; the bytes read."""
        self._layers = layers
        wanted: list[tuple[str, int, int | str, str]] = [("head", layers, head, "dense")]
        for layer in range(layers):
            wanted += [("dense", layer, layer, "dense"), ("neurons", layer, layer, "neurons")]
        loading, loaded = Loading(self.device), 0
        for kind, layer, name, shards in wanted:
            block = block_of(self._bundle, shards, name, _PLANE)
            loaded += block.streamed_nbytes
            loading.start(self._reader, block, partial(self._put, (kind, layer), block))
        loading.finish()
        return loaded

    def _put(self, key: tuple[str, int], block: Block, raw: U8) -> None:
        self._operands[key] = block.rows(torch.from_numpy(raw).to(self.device))

    def operands(self, kind: str, layer: int) -> Mapping[str, PackedRows]:
        """All rows of a layer's `kind` by section name."""
        return self._operands[kind, layer]

    def uses(self, kind: str, layer: int) -> Iterator[Mapping[str, Rows]]:
        """As `NeuronStore.uses`: one block."""
        yield self._operands[kind, layer]

    def experts(self, layer: int, ids: Ids, planes: Ids) -> Iterator[Rows]:
        """As `NeuronStore.experts`."""
        ((whole,),) = (rows.values() for rows in self.uses("neurons", layer))
        yield from self._parts.of(layer, whole, ids, planes)

    def embed(self, ids: Ids) -> torch.Tensor:
        """As `NeuronStore.embed`."""
        resident = self.embedding or self._operands["head", self._layers].get(EMBED)
        if resident is not None:
            rows = resident.take(torch.from_numpy(ids.astype(np.int64)))
            return rows.values(0, len(rows))[:, 0].to(self.device)
        wanted, back = np.unique(ids, return_inverse=True)
        rows = self._embed.rows(wanted.astype(np.int32))
        values = rows.values(0, len(rows))[:, 0][torch.from_numpy(back.astype(np.int64))]
        return values.to(self.device)
