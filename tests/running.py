"""Running a packed bundle in tests: mixes, budgets, plans, and a decode that keeps its logits.

Knows nothing about pytest.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from m2c.bundle.bundle import Bundle
from m2c.contents import config_of, importance_of
from m2c.engine import Engine, RunOptions, plan_for, run_shape
from m2c.errors import DoesNotFit
from m2c.model.mix import Mix
from m2c.tiers.plan import Plan, make_plan

GiB = 1 << 30
PROMPT = np.array([5, 17, 99, 230, 4, 256, 78], np.int32)
TOKENS = 4
MIXES = {
    "100/0/0": Mix(100, 0, 0),
    "0/100/0": Mix(0, 100, 0),
    "0/0/100": Mix(0, 0, 100),
    "5/15/80": Mix(5, 15, 80),
    "0/25/75": Mix(0, 25, 75),
    "50/50/0": Mix(50, 50, 0),
    "5/0/95": Mix(5, 0, 95),
    "5/15/80 drop 30": Mix(5, 15, 80, drop=30),
    "0/0/100 drop 30": Mix(0, 0, 100, drop=30),
}
Run = tuple[list[int], torch.Tensor]


def options_for(mix: Mix, **changes: Any) -> RunOptions:
    return replace(RunOptions(mix=mix, ctx_size=32, threads=1, dram=GiB), **changes)


def plan_of(bundle: Bundle, options: RunOptions) -> Plan:
    config = config_of(bundle)
    shape = run_shape(bundle, config, options)
    return plan_for(bundle, config, shape, importance_of(bundle), options)[1]


def decode(engine: Engine) -> Run:
    """Greedy tokens after PROMPT, and all the logits they were chosen by."""
    engine.model.kv.truncate(0)
    logits = [engine.model.forward(PROMPT)]
    ids = []
    for _ in range(TOKENS):
        ids.append(int(logits[-1].argmax()))
        logits.append(engine.model.forward(np.array(ids[-1:], np.int32)))
    return ids, torch.stack(logits)


def same(one: Run, two: Run) -> bool:
    return one[0] == two[0] and torch.equal(one[1], two[1])


def smallest_dram(bundle: Bundle, options: RunOptions) -> int:
    """The fewest bytes that a plan can be made for, found by halving."""
    known = plan_of(bundle, replace(options, dram=GiB))
    low, high = 0, GiB
    while high - low > 1:
        budget = replace(known.budget, dram=(low + high) // 2)
        try:
            make_plan(known.footprint, budget, policy=known.policy, depth=options.depth)
            high = budget.dram
        except DoesNotFit:
            low = budget.dram
    return high


def named_smallest(bundle: Bundle, options: RunOptions) -> int:
    """The bytes of the budget that a plan with too little names; 0 if there is a plan."""
    try:
        plan_of(bundle, options)
    except DoesNotFit as error:
        return error.smallest
    return 0


def budgets(bundle: Bundle, options: RunOptions) -> Iterator[int]:
    """DRAM sizes from the smallest that works to one where nearly everything is resident."""
    smallest = smallest_dram(bundle, options)
    most = plan_of(bundle, options).used_dram
    for share in (0, 0.3, 0.65, 0.95):
        yield smallest + int((most - smallest) * share)


def inputs(tokens: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random activations [tokens, length]."""
    return torch.randn(tokens, length, generator=torch.Generator().manual_seed(seed))
