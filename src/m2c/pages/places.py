"""What a plan puts into each tier, in bytes by name, for a chart or a program.

Knows nothing about drawing.
"""

from typing import Any, Final

from m2c.tiers.plan import Plan

_KINDS: Final = {"dense": "attention", "neurons": "FFN", "head": "head, embeddings"}
_MOVING: Final = "ring and staging"


def tier_parts(plan: Plan) -> list[dict[str, Any]]:
    """A tier each: name, budget and parts. Their bytes add up to what the plan uses."""
    f = plan.footprint
    computing = {
        "draft's INT4 planes": f.draft_nbytes, "neuron cache": plan.slab_nbytes,
        "KV cache": f.kv_nbytes,
        "norms and temporary values": f.fixed_nbytes + f.workspace_nbytes,
    }  # fmt: skip
    tiers, in_dram = [], "resident_nbytes"
    if plan.budget.hbm:
        parts = {**_blocks(plan, plan.in_hbm, "resident_nbytes"), **computing}
        parts[_MOVING] = plan.hbm_staging_nbytes
        tiers.append({"name": "HBM", "budget": plan.budget.hbm, "parts": _there(parts)})
        computing, in_dram = {}, "streamed_nbytes"
    parts = {
        **_blocks(plan, plan.in_dram, in_dram), "hottest neurons, pinned": plan.prefix_nbytes,
        **computing, _MOVING: plan.ring_nbytes + f.staging_nbytes,
    }  # fmt: skip
    parts[_KINDS["head"]] += plan.holds_embed * f.embed_nbytes
    return [*tiers, {"name": "DRAM", "budget": plan.budget.dram, "parts": _there(parts)}]


def _blocks(plan: Plan, positions: tuple[int, ...], size: str) -> dict[str, int]:
    found = dict.fromkeys(_KINDS.values(), 0)
    for i in positions:
        block = plan.footprint.blocks[i]
        found[_KINDS[block.kind]] += getattr(block, size)
    return found


def _there(parts: dict[str, int]) -> dict[str, int]:
    return {name: nbytes for name, nbytes in parts.items() if nbytes}
