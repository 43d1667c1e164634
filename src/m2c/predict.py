"""How fast a plan will decode: its bytes over what memory, disk and link give right now.

Transfers overlap with compute, so the slowest of them decides; compute also pays a little for every
layer. Knows nothing about text and prints nothing.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Final

import torch
from torch import Tensor

from m2c.depth import MOST
from m2c.engine import Engine
from m2c.hardware import probe_dram
from m2c.model.config import ModelConfig
from m2c.model.footprint import RunShape
from m2c.model.mix import LEVELS
from m2c.model.tensors import active_count
from m2c.tiers.plan import Plan
from m2c.tiers.traffic import StoreStats
from m2c.units import MiB

# of a plain read of memory, what the kernels reach on whole layers (BENCHMARKS.md, "Kernels")
_EFFICIENCY: Final = 0.88
_LAYER_S: Final = 0.0001  # Python between the kernels of a layer
_MIXED_LAYER_S: Final = 0.0004  # ranking and gathering besides
# of every block that is copied into HBM besides, estimated from whole runs (BENCHMARKS.md)
_MOVED_S: Final = 0.0002
# Python of a layer where a GPU replays a recorded pass: kernels wait for each other
_REPLAYED_LAYER_S: Final = 0.00008
_REPLAYED_MIXED_LAYER_S: Final = 0.0002
_EXPERT_S: Final = 0.00004  # the router, and likewise each expert
# of a thread: weights decoded a second, by the kernels' name, two thirds of what a quiet machine
# gives (BENCHMARKS.md, "Kernels");
# products of weights and activations in a prompt of 128 tokens, AVX-512
_DECODED: Final = {
    "avx512": 0.75e9, "avx2": 0.55e9, "scalar": 0.03e9, "torch": 0.01e9, "cuda": 50e9,
}  # fmt: skip
_PRODUCTS: Final = {"fp16": 26e9, "int8": 35e9, "int4": 41e9}
_ON_GPU: Final = 50.0  # times a processor's thread; an H100 gives 170 to 300, most cards less
_SAMPLE_S: Final = 0.001  # from logits to a draft and how sure it is
# share of drafted tokens that are right: by the INT4 planes, by another, smaller model, and by
# looking up the text so far
_ACCEPTED: Final = 0.8
_OTHERS: Final = 0.65
_LOOKED_UP: Final = 0.3
_ENOUGH_NBYTES: Final = 64 * MiB
_READ_NBYTES: Final = 256 * MiB


@dataclass(frozen=True)
class Speeds:
    """Bytes per second; 0: nothing passes there, or it was not measured."""

    ssd: float
    link: float  # DRAM to HBM
    memory: float  # that the kernels compute on, plainly read


def measured_speeds(engine: Engine, stats: StoreStats | None = None) -> Speeds:
    """What this machine gives now. stats: traffic of a run, if there was one.

    The disk is read for a moment, as while decoding; what it reached in the run counts if that was
    faster.
    """
    ssd, link = engine.store.read_speed(), 0.0
    if stats is not None:
        if stats.ssd.busy_s and stats.ssd.nbytes >= _ENOUGH_NBYTES:
            ssd = max(ssd, stats.ssd.nbytes / stats.ssd.busy_s)
        if stats.link.busy_s:
            link = stats.link.nbytes / stats.link.busy_s
    if not link and engine.plan.link_nbytes_per_token:
        link = engine.store.link_speed()
    return Speeds(ssd, link, _memory_speed(engine))


def predicted_tps(plan: Plan, speeds: Speeds, *, decode_s: float = 0.0, kernel: str = "") -> float:
    """Tokens per second while decoding; 0 when nothing that limits was measured.

    Experts are read, and copied to HBM, once they are chosen: nothing else is computed meanwhile.
    decode_s: see `decoding_s`; kernel: name of the kernels that compute.
    """
    seconds = [0.0]
    waited_s = plan.expert_reads() / speeds.ssd if speeds.ssd else 0.0
    if speeds.ssd:
        seconds.append(plan.streamed_nbytes_per_token / speeds.ssd + waited_s)
    if speeds.link:
        seconds.append(plan.link_nbytes_per_token / speeds.link)
        waited_s += plan.expert_moves() / speeds.link
    if speeds.memory:
        layer_s = _layer_s(plan, kernel)
        if (facts := plan.footprint.experts) is not None:
            layer_s += (1 + facts.active + facts.shared) * _EXPERT_S
        compute_s = plan.compute_nbytes_per_token / (_EFFICIENCY * speeds.memory)
        if kernel == "cuda":
            compute_s += (len(plan.in_dram) + len(plan.streamed)) * _MOVED_S
        seconds.append(compute_s + plan.footprint.layers * layer_s + waited_s + decode_s)
    return 1 / max(seconds) if max(seconds) else 0.0


def _layer_s(plan: Plan, kernel: str) -> float:
    replayed = kernel == "cuda" and not plan.link_nbytes_per_token and not plan.footprint.experts
    if plan.footprint.upgrades:
        return _REPLAYED_MIXED_LAYER_S if replayed else _MIXED_LAYER_S
    return _REPLAYED_LAYER_S if replayed else _LAYER_S


def decoding_s(config: ModelConfig, shape: RunShape, plan: Plan, kernel: str) -> float:
    """Seconds of a token, decoded by itself, that go into decoding exact planes: of experts, and
    where a GPU computes of what crosses the link."""
    if config.num_experts:
        return expert_decode_s(config, shape, plan, kernel)
    if kernel != "cuda" or not shape.mix.is_uniform or shape.mix.floor != "fp16" or shape.stored:
        return 0.0
    moved = (plan.footprint.blocks[i].resident_nbytes for i in (*plan.in_dram, *plan.streamed))
    return sum(moved) / 2 / _DECODED[kernel]


def expert_decode_s(config: ModelConfig, shape: RunShape, plan: Plan, kernel: str) -> float:
    """Seconds of a token that go into decoding the exact planes of its experts, which are kept
    decoded only where all weights are at 16 bits and in memory."""
    if not shape.by_expert or (plan.expert_slots is None and not shape.stored):
        return 0.0
    count = shape.mix.by_rank(config.num_experts_per_tok).count(LEVELS["fp16"])
    expert = config.vectors * config.hidden_size * config.intermediate_size
    threads = 1 if kernel == "cuda" else shape.threads
    return config.num_hidden_layers * count * expert / (_DECODED[kernel] * threads)


def predicted_exact_tps(
    plan: Plan, shape: RunShape, weights: int, speeds: Speeds, *, kernel: str
) -> float:
    """Tokens per second of drafting and verifying, at the depth that suits the costs.

    weights: that a token meets; kernel: name of the kernels that compute. How often drafts are
    right is a guess until they are: it depends on the text.
    """
    footprint, threads = plan.footprint, shape.threads
    memory = _EFFICIENCY * speeds.memory or float("inf")  # of a GPU it may not be known
    draft_s = 0.0
    if (draft := footprint.draft) is not None:
        draft_s = draft.compute_nbytes / memory
        draft_s += draft.layers * _LAYER_S + _SAMPLE_S
        if (facts := footprint.experts) is not None and not draft.name:
            draft_s += draft.layers * (1 + facts.active + facts.shared) * _EXPERT_S
    read_s = plan.streamed_nbytes_per_token / speeds.ssd if speeds.ssd else 0.0
    if speeds.link:
        moved = plan.link_nbytes_per_token - plan.expert_moves()
        read_s = max(read_s, moved / speeds.link)
    decodes = shape.stored and shape.dense == "fp16"
    decode_s = weights / (_DECODED[kernel] * threads) if decodes else 0.0
    more_s = weights / (_PRODUCTS[shape.dense] * threads)
    if kernel == "cuda":
        decode_s, more_s = decode_s * threads, more_s * threads / _ON_GPU
    memory_s = plan.compute_nbytes_per_token / memory
    chance = assumed_acceptance(plan)
    best, tokens = 0.0, 1.0
    for depth in range(MOST + 1):
        tokens += chance**depth if depth else 0.0
        compute_s = max(memory_s, decode_s + (depth + 1) * more_s)
        compute_s += footprint.layers * _LAYER_S
        if speeds.ssd:  # of experts, those of all tokens; nothing is computed meanwhile
            compute_s += plan.expert_reads(depth + 1) / speeds.ssd
        if speeds.link:
            compute_s += plan.expert_moves(depth + 1) / speeds.link
        seconds = depth * draft_s + max(read_s, compute_s)
        best = max(best, tokens / seconds)
    return best


def assumed_acceptance(plan: Plan) -> float:
    """Share of drafted tokens taken to be right, before any was drafted."""
    if (draft := plan.footprint.draft) is None:
        return _LOOKED_UP
    return _OTHERS if draft.name else _ACCEPTED


def expected_tps(engine: Engine) -> float:
    """Tokens per second of the engine's mode on this machine as it is now."""
    speeds = measured_speeds(engine)
    if not engine.speculates:
        return predicted_mixed_tps(engine, speeds)
    weights = active_count(engine.config)
    kernel = engine.workers.kernel
    return predicted_exact_tps(engine.plan, engine.shape, weights, speeds, kernel=kernel)


def predicted_mixed_tps(engine: Engine, speeds: Speeds) -> float:
    """Of an engine that does not speculate, at these speeds."""
    kernel = engine.workers.kernel
    decode_s = decoding_s(engine.config, engine.shape, engine.plan, kernel)
    return predicted_tps(engine.plan, speeds, decode_s=decode_s, kernel=kernel)


def _memory_speed(engine: Engine) -> float:
    """Plain reads of the largest weights in memory, or where these are too few of zeros, the median
    of five: with all threads, or by the GPU."""
    rows, native, device = engine.store.largest_resident, engine.workers.host, engine.store.device
    # a GPU's cache holds more than a processor's
    enough = _ENOUGH_NBYTES if device.type == "cuda" else _ENOUGH_NBYTES // 4
    few = rows is None or rows.nbytes < enough
    read: Callable[[Tensor], object]
    if device.type == "cuda":
        read = _read_on_gpu
        if few:
            rows = _zeros(device)
    elif few or native is None:
        return probe_dram(engine.shape.threads)
    else:
        read = native.read
    if rows is None:
        return 0.0
    data = rows.view(torch.uint8).flatten()[:_READ_NBYTES]
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        read(data)
        seconds.append(time.perf_counter() - begin)
    return data.nbytes / median(seconds)


def _zeros(device: torch.device) -> Tensor | None:
    """More than a GPU's cache holds, for a moment; None where there is not the memory."""
    try:
        return torch.zeros(_ENOUGH_NBYTES, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        return None


def _read_on_gpu(data: Tensor) -> None:
    data[: len(data) // 8 * 8].view(torch.int64).sum()
    torch.cuda.synchronize(data.device)
