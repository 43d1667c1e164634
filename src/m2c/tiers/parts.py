"""What each tier holds, by kind, in bytes: the parts that a plan's totals are made of.

Knows nothing about drawing them.
"""

from typing import Any

from m2c.tiers.plan import Plan

ATTENTION, FFN, HEAD = "attention", "FFN", "head"
EXPERTS = "experts"
EMBEDDINGS, DRAFTS, UPGRADES = "embeddings", "drafts", "upgrades"
KV, RING, WORK = "KV cache", "ring", "work"
_KINDS = {"dense": ATTENTION, "neurons": FFN, "head": HEAD}

Parts = dict[str, int]  # kind -> bytes, none of them zero


def tier_parts(plan: Plan) -> list[dict[str, Any]]:
    """The tiers that there are, fastest first: name, budget and parts, for charts and programs."""
    tiers = (
        ("HBM", plan.budget.hbm, hbm_parts(plan)), ("DRAM", plan.budget.dram, dram_parts(plan))
    )  # fmt: skip
    return [
        {"name": name, "budget": nbytes, "parts": parts} for name, nbytes, parts in tiers if parts
    ]


def hbm_parts(plan: Plan) -> Parts:
    """They add up to `plan.used_hbm`; empty where there is no such tier."""
    if not plan.budget.hbm:
        return {}
    parts = _blocks(plan, plan.in_hbm, resident=True)
    parts[UPGRADES] = plan.slab_nbytes
    parts[EXPERTS] = plan.hbm_experts_nbytes
    parts[RING] = plan.hbm_staging_nbytes
    return _without_nothing({**parts, **_working(plan)})


def dram_parts(plan: Plan) -> Parts:
    """They add up to `plan.used_dram`."""
    alone = not plan.budget.hbm
    parts = _blocks(plan, plan.in_dram, resident=alone)
    parts[UPGRADES] = plan.prefix_nbytes + (plan.slab_nbytes if alone else 0)
    parts[EMBEDDINGS] = plan.footprint.embed_nbytes if plan.holds_embed else 0
    parts[EXPERTS] = plan.experts_nbytes
    parts[RING] = plan.ring_nbytes
    working = _working(plan) if alone else {}
    work = plan.footprint.staging_nbytes + working.pop(WORK, 0)
    return _without_nothing({**parts, **working, WORK: work})


def _blocks(plan: Plan, positions: tuple[int, ...], *, resident: bool) -> Parts:
    parts = dict.fromkeys(_KINDS.values(), 0)
    for i in positions:
        block = plan.footprint.blocks[i]
        parts[_KINDS[block.kind]] += block.resident_nbytes if resident else block.streamed_nbytes
    return parts


def _working(plan: Plan) -> Parts:
    f = plan.footprint
    return {DRAFTS: f.draft_nbytes, KV: f.kv_nbytes, WORK: f.fixed_nbytes + f.workspace_nbytes}


def _without_nothing(parts: Parts) -> Parts:
    return {kind: nbytes for kind, nbytes in parts.items() if nbytes}
