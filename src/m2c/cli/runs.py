"""What run, plan and bench share: options to RunOptions, a plan in words, figures of a run.

Knows nothing about argument parsing.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from m2c.bundle.bundle import Bundle
from m2c.cli.names import parse_budget
from m2c.engine import Engine, RunOptions
from m2c.errors import UsageError
from m2c.generate import GenerationStats
from m2c.hardware import probe_dram
from m2c.kernels.native import CHOICES
from m2c.model.footprint import RunShape
from m2c.model.kv import KV_DTYPES
from m2c.model.mix import LEVELS, PRECISIONS, Mix
from m2c.predict import Speeds, measured_speeds
from m2c.tiers.expert_plan import ExpertFact
from m2c.tiers.experts import EXPERTS
from m2c.tiers.plan import Plan
from m2c.tiers.trace import TraceWriter
from m2c.tokenizer import Tokenizer
from m2c.units import format_size

POLICY_WORDS = {
    "pinned": "pinned", "lru": "LRU", "lfu": "LFU", "atu": "adjacent-token update",
    "ema": "moving average",
}  # fmt: skip
_CUT = {"length": "stopped at --max-tokens", "context": "stopped as the context is full"}


def run_options(
    *, mix: str | None, drop: float, dense: str | None, ctx_size: int | None, kv: str,
    dram: str | None, hbm: str | None, device: str, policy: str | None, depth: int,
    threads: int | None, kernel: str = "auto",
) -> RunOptions:  # fmt: skip
    """Checked options. Raises UsageError naming the flag."""
    if dense not in (None, *PRECISIONS):
        raise UsageError(f"--dense {dense}: choose one of {', '.join(PRECISIONS)}")
    if kv not in KV_DTYPES:
        raise UsageError(f"--kv {kv}: choose one of {', '.join(KV_DTYPES)}")
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", device, re.ASCII):
        raise UsageError(f"--device {device}: choose cpu or cuda[:N]")
    if kernel not in CHOICES:
        raise UsageError(f"--kernel {kernel}: choose one of {', '.join(CHOICES)}")
    if hbm == "auto" and device == "cpu":
        hbm = None
    return RunOptions(
        mix=None if mix is None else Mix.parse(mix, drop), dense=dense, ctx_size=ctx_size,
        kv_type=kv, threads=threads, device=device, dram=parse_budget(dram),
        hbm=parse_budget(hbm), policy=policy, depth=depth, kernel=kernel,
    )  # fmt: skip


def tracing_engine(
    bundle: Bundle, options: RunOptions, path: Path, progress: Callable[[int], None],
    tokenizer: Tokenizer,
) -> Engine:  # fmt: skip
    """An engine that records the active neurons of every decoded token in `path`."""
    from m2c.contents import config_of
    from m2c.engine import run_shape

    config = config_of(bundle)
    if config.num_experts:
        raise UsageError(
            "a mixture of experts chooses no neurons: there is nothing to trace",
            "leave out --trace; --report shows from where each token's experts came",
        )
    planes = run_shape(bundle, config, options).mix.upgrades
    if not planes:
        raise UsageError("this mix upgrades no neurons: there is nothing to trace", "use --mix")
    writer = TraceWriter(
        path, num_layers=config.num_hidden_layers, num_neurons=config.intermediate_size,
        planes=planes,
    )  # fmt: skip
    engine = Engine(bundle, options, progress=progress, record=writer.write, tokenizer=tokenizer)
    engine.closing.enter_context(writer)
    return engine


def describe_plan(plan: Plan, shape: RunShape, speeds: Speeds | None = None) -> list[str]:
    """The plan in lines of text: what lies where, traffic per token, the bound that follows."""
    f = plan.footprint
    use = "pass" if shape.speculates else "token"
    context = f"context {shape.ctx_size} ({format_size(f.kv_nbytes)} of KV cache)"
    if shape.speculates:
        drafts = "the text so far"
        if f.draft is not None:
            drafts = f"{f.draft.name or 'INT4 planes'} in memory ({format_size(f.draft.nbytes)})"
        lines = [f"exact mode at {shape.dense}, drafts from {drafts}, {context}"]
    else:
        lines = [f"mix {shape.mix} (FP16/INT8/INT4), attention and head {shape.dense}, {context}"]
    lines += _tiers(plan)
    if plan.streamed:
        lines.append(
            f"SSD   streams {_blocks(plan, plan.streamed)} for every {use}, through a ring of "
            f"{format_size(plan.ring_nbytes)}"
        )
    for u in f.upgrades:
        lines.append(
            f"{u.plane.upper():5} {u.active} of {f.neurons} neurons a layer and token; "
            f"{plan.slab_slots[u.plane]} cached ({POLICY_WORDS[plan.policy]}), "
            f"{plan.prefix[u.plane]} hottest pinned in DRAM"
        )
    if f.experts is not None:
        lines.append(_experts(plan, shape, f.experts))
    lines.append(
        f"bytes per {use}: SSD {format_size(plan.ssd_nbytes_per_token)}, "
        + (f"DRAM to HBM {format_size(plan.link_nbytes_per_token)}, " if plan.budget.hbm else "")
        + f"weights computed {format_size(plan.compute_nbytes_per_token)}"
    )
    if speeds is not None:
        lines.append(_bound(plan, shape, speeds))
    return lines


def _experts(plan: Plan, shape: RunShape, facts: ExpertFact) -> str:
    held = "all in memory"
    if (slots := plan.expert_slots) is not None:
        what = "planes of experts " if facts.parts > 1 else ""
        in_hbm = f"{n} in HBM and " if (n := plan.hbm_expert_slots) else ""
        held = f"{in_hbm}{slots} of {facts.total} {what}cached in DRAM"
        held += f" ({POLICY_WORDS[plan.policy]})"
    levels = () if shape.mix.is_uniform else shape.mix.by_rank(facts.active)
    counts = [(levels.count(LEVELS[plane]), plane.upper()) for plane in PRECISIONS]
    mixed = ", ".join(f"{count} at {plane}" for count, plane in counts if count)
    mixed = f" ({mixed})" if mixed else ""
    shared = ", and a shared one, placed with attention" if facts.shared else ""
    return f"experts: {facts.active} of {facts.count} a layer and token{mixed}{shared}; {held}"


def _bound(plan: Plan, shape: RunShape, speeds: Speeds) -> str:
    """Transfers overlap, so the slowest of them bounds a token, or a pass over drafts."""
    computes = "HBM" if plan.budget.hbm else "DRAM"
    moved = {
        "the SSD": (plan.ssd_nbytes_per_token, speeds.ssd),
        "DRAM to HBM": (plan.link_nbytes_per_token, speeds.link),
        computes: (plan.compute_nbytes_per_token, speeds.memory),
    }
    seconds = {name: nbytes / speed for name, (nbytes, speed) in moved.items() if nbytes}
    slowest = max(seconds, key=lambda name: seconds[name])
    unit = "passes/s" if shape.speculates else "tok/s"
    by = f"{slowest} at {moved[slowest][1] / 1e9:.3g} GB/s"
    return f"bound: {1 / seconds[slowest]:.3g} {unit}, by {by}"


def _tiers(plan: Plan) -> list[str]:
    """What memory holds. Embeddings are small beside the rest, and named where they are alone."""
    lines = []
    if plan.budget.hbm:
        held = _blocks(plan, plan.in_hbm, "experts" if plan.hbm_expert_slots else "")
        lines.append(_tier("HBM", plan.used_hbm, plan.budget.hbm, held or "nothing"))
    pinned = "hottest neurons" if plan.prefix_nbytes else ""
    held = _blocks(plan, plan.in_dram, "experts" if plan.expert_slots else "", pinned)
    held = held or ("embeddings" if plan.holds_embed else "nothing")
    return [*lines, _tier("DRAM", plan.used_dram, plan.budget.dram, held)]


def _blocks(plan: Plan, positions: tuple[int, ...], *others: str) -> str:
    kinds = {"dense": "attention", "neurons": "FFN", "head": "head"}
    names = [plan.footprint.blocks[i].kind for i in positions]
    parts = [f"{names.count(k)} {kinds[k]}" for k in kinds if k in names]
    return ", ".join([*parts, *filter(None, others)])


def _tier(name: str, used: int, budget: int, blocks: str) -> str:
    return f"{name:5} {format_size(used)} of {format_size(budget)}: {blocks}"


def where_weights_lie(plan: Plan) -> str:
    """Few words for the line before a run."""
    if not plan.ssd_nbytes_per_token:
        return "all weights in memory"
    read = format_size(plan.ssd_nbytes_per_token)
    if plan.footprint.draft_nbytes:
        return f"{read} a pass come from the SSD"
    return f"{read} of {format_size(plan.compute_nbytes_per_token)} a token come from the SSD"


def plan_facts(plan: Plan) -> dict[str, Any]:
    """The plan for programs. Bytes."""
    return {
        "dram_budget": plan.budget.dram, "dram_used": plan.used_dram,
        "hbm_budget": plan.budget.hbm, "hbm_used": plan.used_hbm,
        "blocks_in_hbm": len(plan.in_hbm), "blocks_in_dram": len(plan.in_dram),
        "blocks_streamed": len(plan.streamed), "ring_nbytes": plan.ring_nbytes,
        "kv_nbytes": plan.footprint.kv_nbytes, "slab_slots": plan.slab_slots,
        "prefix_neurons": plan.prefix, "expert_slots": plan.expert_slots,
        "hbm_expert_slots": plan.hbm_expert_slots, "policy": plan.policy,
        "ssd_nbytes_per_token": plan.ssd_nbytes_per_token,
        "link_nbytes_per_token": plan.link_nbytes_per_token,
        "compute_nbytes_per_token": plan.compute_nbytes_per_token,
    }  # fmt: skip


def stats_facts(engine: Engine, figures: GenerationStats, predicted: float) -> dict[str, Any]:
    """Figures of a run, for `--stats` and the summary line. Bytes, seconds, bytes per second.

    predicted: tokens per second that were expected before.
    """
    steps = max(1, figures.decode_steps)
    decode, prefill = figures.decode, figures.prefill
    assert decode is not None
    achieved = decode.ssd.nbytes / decode.ssd.busy_s if decode.ssd.busy_s else 0.0
    # disks swing: the roof is at least what this very run has reached
    speeds = measured_speeds(engine, decode)
    ssd_bandwidth = max(speeds.ssd, achieved)
    dram_bandwidth = speeds.memory or probe_dram(engine.shape.threads)
    moved = decode.ssd.nbytes / steps
    computed = engine.plan.compute_nbytes_per_token
    # reads overlap compute, so the slower of the two bounds a token
    floor_s = max(moved / ssd_bandwidth if moved else 0.0, computed / dram_bandwidth)
    crossed, link_speed = decode.link.nbytes / steps, 0.0
    if decode.link.busy_s:
        link_speed = decode.link.nbytes / decode.link.busy_s
        floor_s = max(floor_s, crossed / link_speed)
    return {
        "mode": "exact" if engine.speculates else "mixed",
        "speculation": _speculation_facts(engine, figures),
        "mix": str(engine.shape.mix),
        "dense": engine.shape.dense,
        "kernel": engine.workers.kernel,
        "threads": engine.shape.threads,
        "prompt_tokens": figures.prompt_tokens,
        "generated_tokens": figures.generated_tokens,
        "finish_reason": figures.finish_reason,
        "ttft_s": figures.ttft_s,
        "prefill_tps": figures.prefill_tps,
        "decode_tps": figures.decode_tps,
        "predicted_tps": predicted,
        "prefill_ssd_nbytes": prefill.ssd.nbytes if prefill else 0,
        "ssd_nbytes_per_token": moved,
        "ssd_bytes_per_second": achieved,
        "ssd_roof_bytes_per_second": ssd_bandwidth,
        "link_nbytes_per_token": crossed,
        "link_bytes_per_second": link_speed,
        "dram_probe_bytes_per_second": dram_bandwidth,
        "weights_nbytes_per_token": computed,
        "share_of_roof": figures.decode_tps * floor_s,
        "upgrades": {
            plane: {"hbm_or_cache": hit.compute, "dram": hit.dram, "ssd": hit.ssd}
            for plane, hit in decode.upgrades.items()
        },
        "peak_memory_nbytes": figures.peak_memory_nbytes,
        "plan": plan_facts(engine.plan),
    }


def _speculation_facts(engine: Engine, figures: GenerationStats) -> dict[str, Any] | None:
    """How drafting and verifying went; None when tokens were decoded one by one."""
    found, decode = figures.speculation, figures.decode
    if found is None or decode is None:
        return None
    return {
        "precision": engine.shape.dense,
        "drafts": engine.draft.name if engine.draft is not None else "text so far",
        "passes": found.passes,
        "drafted": found.drafted,
        "looked_up": found.looked_up,
        "accepted": found.accepted,
        "acceptance": found.acceptance,
        "tokens_per_pass": found.tokens_per_pass,
        "seconds_per_draft_token": found.draft_s / max(1, found.drafted - found.looked_up),
        "seconds_per_pass": found.pass_s / max(1, found.passes),
    }


def summary_line(facts: dict[str, Any]) -> str:
    """One line: speed, traffic, hits, roof, memory, and what cut the text short."""
    parts = [f"TTFT {facts['ttft_s']:.2f} s", f"prefill {facts['prefill_tps']:.1f} tok/s"]
    parts += _decode_words(facts) if facts["generated_tokens"] > 1 else []
    parts.append(f"peak {format_size(facts['peak_memory_nbytes'])}")
    parts.append(f"{facts['kernel']} kernels, {facts['threads']} threads")
    if why := _CUT.get(facts["finish_reason"]):
        parts.append(why)
    return "m2c: " + ", ".join(parts)


def _decode_words(facts: dict[str, Any]) -> list[str]:
    parts = [
        f"decode {facts['decode_tps']:.2f} tok/s"
        + (f" (expected {facts['predicted_tps']:.2f})" if facts["predicted_tps"] else ""),
        f"SSD {facts['ssd_nbytes_per_token'] / 1e6:.1f} MB/token"
        + (
            f" at {facts['ssd_bytes_per_second'] / 1e9:.2f} GB/s"
            if facts["ssd_bytes_per_second"]
            else ""
        ),
    ]
    if facts["plan"]["hbm_budget"]:
        link = f"DRAM-HBM {facts['link_nbytes_per_token'] / 1e6:.1f} MB/token"
        speed = facts["link_bytes_per_second"]
        parts.append(link + (f" at {speed / 1e9:.2f} GB/s" if speed else ""))
    for plane, hits in facts["upgrades"].items():
        total = max(1, sum(hits.values()))
        experts = plane.startswith(EXPERTS)
        nearest = "HBM" if experts else "cached"
        served = (("hbm_or_cache", nearest), ("dram", "DRAM"), ("ssd", "SSD"))
        name = plane if experts else plane.upper()
        shares = [f"{hits[key] / total:.0%} {tier}" for key, tier in served if hits[key]]
        if shares:
            parts.append(f"{name} from " + " + ".join(shares))
    if speculation := facts["speculation"]:
        return [*parts, *_speculation_words(speculation)]
    return [*parts, f"{facts['share_of_roof']:.0%} of the roof"]


def _speculation_words(facts: dict[str, Any]) -> list[str]:
    return [
        f"{facts['acceptance']:.0%} of {facts['drafted']} drafts accepted ({facts['drafts']})",
        f"{facts['tokens_per_pass']:.1f} tokens per pass",
        f"{1e3 * facts['seconds_per_draft_token']:.1f} ms per draft token",
        f"{facts['seconds_per_pass']:.2f} s per pass",
    ]
