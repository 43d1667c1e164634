"""Everything that a store holds in memory, compared with a fresh read from the SSD.

Knows nothing about pytest.
"""

from collections.abc import Iterator

import numpy as np
import torch

from m2c.engine import Engine
from m2c.kernels.rows import ExactRows, PackedRows, Rows
from m2c.tiers.cache import NeuronCache
from m2c.tiers.memory import aligned_buffer
from m2c.tiers.store import FFN, NeuronStore
from m2c.tiers.upgrades import UpgradePlane


def require_true_copies(engine: Engine) -> int:
    """Raises AssertionError naming what is stale; else how many records were compared."""
    store, compared = engine.store, 0
    for what, held, fresh in _pairs(store):
        assert torch.equal(held, fresh), f"{what} is not what the SSD has"
        compared += held.shape[0]
    for upgrade in store._upgrades.values():
        if upgrade.cache is not None:
            upgrade.cache.check_integrity()
    return compared


def _pairs(store: NeuronStore) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    for (kind, layer), uses in store._uses.items():
        for use in uses:
            if use.rows is None and use.raw is None:
                continue
            raw = aligned_buffer(use.block.streamed_nbytes)
            use.block.read(store.reader, raw).wait()
            if use.raw is not None:
                yield f"{kind} {layer}", torch.from_numpy(use.raw), torch.from_numpy(raw)
            for name, rows in (use.rows or {}).items():
                decoded = isinstance(rows, ExactRows)
                fresh: Rows = (
                    store._load_exact(use.block, name, store.device)
                    if decoded
                    else use.block.rows(raw, use.below)[name]
                )
                for held, true in zip(_tensors(rows), _tensors(fresh), strict=True):
                    yield f"{kind} {layer} {name}", held, true
    for (layer, plane), upgrade in store._upgrades.items():
        yield from _upgraded(store, layer, plane, upgrade)


def _upgraded(
    store: NeuronStore, layer: int, plane: str, upgrade: UpgradePlane
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """The prefix pinned in DRAM, and every slot of the slab."""
    fresh = store._plane_source(layer, plane)
    fresh.pin_prefix(upgrade.source.prefix_records)
    held = upgrade.source._prefix
    yield f"prefix {layer} {plane}", torch.from_numpy(held), torch.from_numpy(fresh._prefix)
    cache, slab = upgrade.cache, upgrade._slab
    if isinstance(cache, NeuronCache) and slab is not None and cache.size:
        ids = cache.ids
        slots = torch.from_numpy(cache.lookup(ids).astype(np.int64))
        true = fresh_records(store, layer, plane)[torch.from_numpy(ids.astype(np.int64))]
        yield f"slab {layer} {plane}", slab[slots].cpu(), true


def fresh_records(store: NeuronStore, layer: int, plane: str) -> torch.Tensor:
    """Records of all neurons of a layer at an upgrade plane, [neurons, record], from the SSD."""
    upgrade = store._upgrades[layer, plane]
    below = store._plane_source(layer, "int8") if upgrade._below is not None else None
    plain = UpgradePlane(
        store._plane_source(layer, plane), below, exact_type=upgrade._exact_type, slab=None,
        neurons=store.plan.footprint.neurons, policy="lru", device=torch.device("cpu"),
        copied=lambda nbytes, seconds: None, decode=store._decode,
    )  # fmt: skip
    ids = np.arange(store.plan.footprint.neurons, dtype=np.int32)
    return plain.records(ids, floor_rows(store, layer), step=False)


def floor_rows(store: NeuronStore, layer: int) -> PackedRows:
    """A layer's FFN at the floor, read anew."""
    facts = [b for b in store.plan.footprint.blocks if (b.kind, b.layer) == ("neurons", layer)]
    block = store._block(facts[0])
    raw = aligned_buffer(block.streamed_nbytes)
    block.read(store.reader, raw).wait()
    return block.rows(raw)[FFN]


def _tensors(rows: Rows) -> list[torch.Tensor]:
    if isinstance(rows, ExactRows):
        return [rows.weights.view(torch.int16).cpu()]
    found = [t.cpu() for t in (rows.int4, rows.int8) if t is not None]
    return found if rows.frames is None else [*found, rows.frames.data.cpu()]
