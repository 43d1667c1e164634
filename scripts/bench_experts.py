"""How much faster a mixture of experts decodes on a GPU the more of its experts HBM holds.

    python scripts/bench_experts.py BUNDLE [--device cuda] [--mix 0/100/0] [--policy lru]
        [--shares 0 25 50 75 95 all] [--dram-slots 0]

For every share of the experts in HBM: what is planned, tokens a second, bytes over the link, and
which tier served. `all`: with all weights in HBM, no slots. Every split must give the same logits,
bit for bit; exit code 1 where one does not. With --device cpu HBM is emulated: no speed, the same
checks. Random ids, so a synthetic model's router is as good as any.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from m2c.bundle.bundle import Bundle, open_bundle
from m2c.contents import config_of, importance_of
from m2c.engine import Engine, RunOptions, plan_for, run_shape
from m2c.model.mix import Mix
from m2c.predict import measured_speeds, predicted_mixed_tps
from m2c.speed import SpeedJob, measure_speed
from m2c.tiers.plan import Plan

CTX, CHECKED, PLENTY = 512, 24, 1 << 40


def plan_of(bundle: Bundle, options: RunOptions) -> Plan:
    config = config_of(bundle)
    shape = run_shape(bundle, config, options)
    return plan_for(bundle, config, shape, importance_of(bundle), options)[1]


def with_share(bundle: Bundle, options: RunOptions, share: str, dram_slots: int) -> RunOptions:
    """HBM for `share` percent of the parts of experts, DRAM for all of them, or for so many."""
    options = replace(options, hbm=PLENTY)
    if share == "all":
        return options
    whole = plan_of(bundle, options)
    staging = 2 * whole.footprint.largest_moved  # what is needed besides unless all is there
    most = plan_of(bundle, replace(options, hbm=whole.used_hbm + staging - 1))
    facts = most.footprint.experts
    assert facts is not None
    slots = min(most.hbm_expert_slots, int(float(share) / 100 * facts.total))
    rest = most.used_hbm - most.hbm_experts_nbytes
    options = replace(options, hbm=rest + facts.in_hbm_nbytes(slots))
    if dram_slots:
        plan = plan_of(bundle, options)
        held = (plan.expert_slots or 0) - dram_slots
        options = replace(options, dram=plan.used_dram - held * facts.slot_nbytes)
    return options


def logits_of(engine: Engine) -> torch.Tensor:
    """Of a prompt, and of tokens one by one that are known before."""
    engine.model.kv.truncate(0)
    random = np.random.default_rng(3)
    ids = random.integers(0, engine.config.vocab_size, CHECKED + 16, dtype=np.int32)
    found = [engine.model.forward(ids[:16])]
    found += [engine.model.forward(ids[i : i + 1]) for i in range(16, len(ids))]
    return torch.stack(found).cpu()


def row(engine: Engine, job: SpeedJob) -> list[str]:
    (speed,) = measure_speed(engine, job)
    stats, tokens, plan = engine.store.stats, job.generate * job.repetitions, engine.plan
    hits = stats.upgrades.values()
    served = [sum(getattr(hit, tier) for hit in hits) for tier in ("compute", "dram", "ssd")]
    percent = [f"{100 * n / max(1, sum(served)):.0f}" for n in served]
    link = stats.link.nbytes / stats.link.busy_s / 1e9 if stats.link.busy_s else 0.0
    predicted = predicted_mixed_tps(engine, measured_speeds(engine, stats))
    return [
        f"{plan.hbm_expert_slots}", f"{plan.expert_slots}", f"{plan.used_hbm / 2**30:.2f}",
        f"{speed.mean:.2f} ± {speed.deviation:.2f}", f"{predicted:.2f}",
        f"{stats.link.nbytes / tokens / 1e6:.1f}", f"{plan.link_nbytes_per_token / 1e6:.1f}",
        f"{link:.1f}", "/".join(percent),
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Experts in HBM: tokens a second by their share.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--mix", default="0/100/0")
    parser.add_argument("--policy", default="lru")
    parser.add_argument("--shares", nargs="+", default=["0", "25", "50", "75", "95", "all"])
    parser.add_argument("--dram-slots", type=int, default=0, help="0: as many as there are parts")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repetitions", type=int, default=3)
    given = parser.parse_args(arguments)
    bundle = open_bundle(given.bundle)
    options = RunOptions(
        mix=Mix.parse(given.mix), ctx_size=CTX, device=given.device, dram=PLENTY,
        policy=given.policy,
    )  # fmt: skip
    job = SpeedJob(prompt=0, generate=given.tokens, repetitions=given.repetitions)
    print(
        "| share | HBM slots | DRAM slots | HBM GiB | tok/s | predicted | link MB/token | planned "
        "| link GB/s | HBM/DRAM/SSD % | same bits |\n" + "|---" * 11 + "|"
    )
    known, right = None, True
    for share in given.shares:
        with Engine(bundle, with_share(bundle, options, share, given.dram_slots)) as engine:
            found = [logits_of(engine)]
            cells = row(engine, job)
            found.append(logits_of(engine))
        known = found[0] if known is None else known
        same = all(torch.equal(one, known) for one in found)
        right &= same
        print("| " + " | ".join([share, *cells, "yes" if same else "NO"]) + " |", flush=True)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
