"""Which blocks of a plan are read as one.

Reads nothing.
"""

from collections.abc import Iterator

from m2c.tiers.plan import Plan


def runs(plan: Plan, ready: set[int]) -> Iterator[tuple[str, int, list[int]]]:
    """(kind, layer, positions): blocks of one layer and kind that follow each other and are ready.

    Others stay apart: they are taken from the ring, or copied into HBM, block by block.
    """
    run: list[int] = []
    for i, fact in enumerate(plan.footprint.blocks):
        if fact.kind == "neurons" and plan.expert_slots is not None:
            continue
        before = plan.footprint.blocks[run[-1]] if run else fact
        same = (before.kind, before.layer) == (fact.kind, fact.layer)
        if run and not (same and i in ready and run[-1] in ready):
            yield before.kind, before.layer, run
            run = []
        run.append(i)
    last = plan.footprint.blocks[run[-1]]
    yield last.kind, last.layer, run
