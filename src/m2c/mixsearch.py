"""Which precision mix is best for a model at a given number of bytes per token.

Two searches. By output error: on stored calibration inputs, the mix whose FFN outputs are closest
to the 16-bit ones. By entropy: the paper's (M2Cache, algorithm 1), the mix whose own generated text
has the least token entropy.
Knows nothing about files beyond an open bundle.
"""

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from torch import Tensor

from m2c.bundle.bundle import Bundle
from m2c.bundle.importance import Importance
from m2c.bundle.manifest import MixChoice
from m2c.contents import config_of, in_shard_order, vectors_of
from m2c.engine import Engine, RunOptions
from m2c.generate import prefill
from m2c.kernels import reference
from m2c.kernels.dispatch import exact_weights
from m2c.kernels.operands import Router
from m2c.kernels.reference import CHUNK, gate_up, rank
from m2c.kernels.rows import ExactRows, PackedRows, Rows
from m2c.kernels.workers import Workers
from m2c.model.experts import planes_by_rank, router_of
from m2c.model.mix import LEVELS, Mix, bits_per_weight
from m2c.model.tensors import up_bias_name
from m2c.prompt import raw_ids
from m2c.tiers.blocks import block_of
from m2c.tiers.memory import aligned_buffer
from m2c.tiers.ssd import SsdReader

FP16_SHARES: Final = (0, 1, 2, 5, 10)
SAMPLED_LAYERS: Final = 8
DROPS: Final = (0, 10, 20, 30, 40, 50, 60, 70)
SEARCHES: Final = ("error", "entropy")
ENTROPY_TOKENS: Final = 64
ENTROPY_PROMPT: Final = "The history of the town begins with"


@dataclass(frozen=True)
class MixError:
    mix: Mix
    bits: float  # stored bits read per FFN weight
    relative_error: float  # ||y - y16|| / ||y16|| over the sampled layers and tokens


def candidates(budget_bits: float, exact_bits: float) -> list[Mix]:
    """Mixes that read at most `budget_bits` per weight, one for each share of FP16 that fits."""
    found = []
    for fp16 in FP16_SHARES:
        left = budget_bits - 4.5 - fp16 / 100 * (4 + exact_bits)
        if left >= 0:
            int8 = min(100 - fp16, math.floor(left / 4 * 100 + 1e-9))
            found.append(Mix(fp16, int8, 100 - fp16 - int8))
    return found or [Mix(0, 0, 100)]


def expert_candidates(budget_bits: float, exact_bits: float, active: int) -> list[Mix]:
    """Mixes of a token's `active` experts that read at most `budget_bits` per weight, one for each
    number of them at FP16 that fits; in whole percents, as a manifest has them."""
    found = []
    for fp16 in range(active + 1):
        left = active * (budget_bits - 4.5) - fp16 * (4 + exact_bits)
        if left >= 0:
            int8 = min(active - fp16, math.floor(left / 4 + 1e-9))
            shares = round(100 * fp16 / active), round(100 * int8 / active)
            found.append(Mix(*shares, 100 - sum(shares)))
    return found or [Mix(0, 0, 100)]


def exact_bits(bundle: Bundle) -> float:
    """Bits per weight of the exact plane of the neurons, averaged over the layers."""
    sections = [
        index.header.sections[0]
        for name, index in bundle.shards.items()
        if name.startswith("neurons/") and name.endswith(".fp16")
    ]
    weights = sum(s.records * s.vectors * s.length for s in sections)
    return 8 * sum(s.nbytes for s in sections) / weights


def search_by_error(
    bundle: Bundle, importance: Importance, mixes: list[Mix], workers: Workers,
    progress: Callable[[int], None] = lambda layers: None,
) -> list[MixError]:  # fmt: skip
    """The relative output error of each mix, over at most SAMPLED_LAYERS layers.

    Of a mixture: of the weighted sum of the experts that each token's own router chooses, without
    a shared expert, which has one precision."""
    config = config_of(bundle)
    errors = torch.zeros(len(mixes), dtype=torch.float64)
    total = 0.0
    vectors = in_shard_order(vectors_of(bundle, config), importance)
    for layer in sampled_layers(config.num_hidden_layers):
        known = importance.layers[layer]
        x = torch.from_numpy(known.sample)
        if config.num_experts:
            differences, truth = _expert_errors(
                x, bundle, layer, router_of(config, vectors, layer), act=config.activation,
                mixes=mixes, workers=workers,
            )  # fmt: skip
        else:
            rows = _read_neurons(bundle, layer)
            norms = torch.from_numpy(known.down_norm[known.order])
            differences, truth = _layer_errors(
                x, rows, _decoded(rows, workers), norms, act=config.activation, mixes=mixes,
                workers=workers, bias=vectors.get(up_bias_name(layer)),
            )  # fmt: skip
        # layers differ in the size of their output: each counts by its relative error
        errors += differences / max(truth, 1e-30)
        total += 1
        progress(1)
    return [
        MixError(mix, _bits(bundle, mix), math.sqrt(float(error) / total))
        for mix, error in zip(mixes, errors, strict=True)
    ]


def _bits(bundle: Bundle, mix: Mix) -> float:
    """Stored bits that a token reads of each weight of its FFN at this mix."""
    active = config_of(bundle).num_experts_per_tok
    return bits_per_weight(mix.among(active) if active else mix, exact_bits(bundle))


def sampled_layers(layers: int) -> list[int]:
    """At most SAMPLED_LAYERS layer numbers, evenly spaced, both ends included."""
    return sorted({round(i) for i in np.linspace(0, layers - 1, min(SAMPLED_LAYERS, layers))})


def choose_mix(
    bundle: Bundle, importance: Importance, request: str, budget_bits: float, workers: Workers
) -> tuple[MixChoice, dict[str, float], list[str]]:
    """The mix asked for ("error", "entropy" or given), the price of dropping, and what to tell.

    The price: relative FFN output error with the chosen mix and 0, 10, ... 70 % dropped.
    """
    bits, active = exact_bits(bundle), config_of(bundle).num_experts_per_tok
    mixes = candidates(budget_bits, bits)
    if active:
        mixes = expert_candidates(budget_bits, bits, active)
    if request not in ("error", "entropy"):
        mixes = [Mix.parse(request)]
    lines = []
    if request == "entropy":
        ranked = [(mean_entropy(bundle, mix, workers.threads), mix) for mix in mixes]
        lines = [f"mix {mix}: {entropy:.3f} nats per generated token" for entropy, mix in ranked]
        best = min(ranked, key=lambda pair: pair[0])[1]
    else:
        errors = search_by_error(bundle, importance, mixes, workers)
        lines = [
            f"mix {e.mix}: {e.bits:.2f} bits, output error {e.relative_error:.4f}" for e in errors
        ]
        best = min(errors, key=lambda e: e.relative_error).mix
    drops = (0,) if active else DROPS  # experts are not dropped
    dropped = [replace(best, drop=float(drop)) for drop in drops]
    prices = search_by_error(bundle, importance, dropped, workers)
    choice = MixChoice(
        (round(best.fp16), round(best.int8), round(best.int4)), request if request in SEARCHES
        else "given", round(prices[0].bits, 4), round(prices[0].relative_error, 6),
    )  # fmt: skip
    quality = {
        f"ffn_error_drop_{drop}": round(price.relative_error, 6)
        for drop, price in zip(drops, prices, strict=True)
    }
    return choice, quality, [*lines, f"default mix {best}"]


def mean_entropy(bundle: Bundle, mix: Mix, threads: int) -> float:
    """Mean entropy, in nats, of the model's next-token distribution over its own greedy text.

    The paper's uncertainty estimate (UQEst): generated from a fixed prompt, ENTROPY_TOKENS tokens.
    """
    options = RunOptions(mix=mix, ctx_size=4 * ENTROPY_TOKENS, threads=threads)
    with Engine(bundle, options) as engine:
        logits = prefill(engine.model, raw_ids(engine.tokenizer, ENTROPY_PROMPT))
        total = 0.0
        for _ in range(ENTROPY_TOKENS):
            logp = logits.double().log_softmax(0)
            total -= float((logp.exp() * logp).sum())
            logits = engine.model.forward(np.asarray([int(logits.argmax())], np.int32))
    return total / ENTROPY_TOKENS


def _layer_errors(
    x: Tensor, rows: PackedRows, exact: Tensor, norms: Tensor, *, act: str, mixes: list[Mix],
    workers: Workers, bias: Tensor | None,
) -> tuple[Tensor, float]:  # fmt: skip
    """Squared output error of each mix [mixes], and the squared norm of the 16-bit output.

    exact: the 16-bit weights of the rows.
    """
    views: dict[str, Rows] = {
        "int4": PackedRows(rows.layout, rows.int4),
        "int8": PackedRows(rows.layout, rows.int4, rows.int8),
        "fp16": ExactRows(rows.layout, exact),
    }
    hidden = {name: gate_up(x, view, act, workers, bias=bias) for name, view in views.items()}
    down = rows.layout.vectors - 1
    levels = [rank(hidden["int4"], norms, mix.ranks(norms.shape[0])) for mix in mixes]

    def piece(i: int) -> tuple[list[Tensor], Tensor]:
        start, stop = i * CHUNK, min((i + 1) * CHUNK, len(rows))
        columns = {name: view.values(start, stop, first=down)[:, 0] for name, view in views.items()}
        parts = []
        for level in levels:
            y = torch.zeros_like(x)
            for name, column in columns.items():
                chosen = level[:, start:stop] == LEVELS[name]
                y += (hidden[name][:, start:stop] * chosen) @ column
            parts.append(y)
        return parts, hidden["fp16"][:, start:stop] @ columns["fp16"]

    pieces = workers.map(piece, -(-len(rows) // CHUNK))
    truth = sum((part for _, part in pieces), start=torch.zeros_like(x))
    outputs = [sum((p[i] for p, _ in pieces), start=torch.zeros_like(x)) for i in range(len(mixes))]
    errors = [(y - truth).double().square().sum() for y in outputs]
    return torch.stack(errors), float(truth.double().square().sum())


def _expert_errors(
    x: Tensor, bundle: Bundle, layer: int, router: Router, *, act: str, mixes: list[Mix],
    workers: Workers,
) -> tuple[Tensor, float]:  # fmt: skip
    """As `_layer_errors`, of x [tokens, hidden] and the experts it goes to; one expert's weights
    are in memory at a time."""
    logits = reference.matmul_rows(x, router.rows, workers)
    chosen, weights, _ = reference.route(logits, router)
    found = torch.zeros(len(LEVELS), *chosen.shape, x.shape[1])  # what each gives, by planes
    for expert in torch.unique(chosen).tolist():
        tokens, place = (chosen == expert).nonzero(as_tuple=True)
        rows = _read_neurons(bundle, layer, expert, router.experts)
        exact = ExactRows(rows.layout, _decoded(rows, workers))
        views: list[Rows] = [rows.lowest(1), rows.lowest(2), exact]
        for i, view in enumerate(views):
            part = reference.gather_ffn(x[tokens], view, act, workers)
            found[i, tokens, place] = part * weights[tokens, place, None]
    truth = found[-1].sum(1)
    errors = []
    for mix in mixes:
        planes = planes_by_rank(weights, mix.by_rank(router.active))
        taken = found.gather(0, (planes - 1)[None, :, :, None].expand_as(found[:1]))[0]
        errors.append((taken.sum(1) - truth).double().square().sum())
    return torch.stack(errors), float(truth.double().square().sum())


def _decoded(rows: PackedRows, workers: Workers) -> Tensor:
    """The 16-bit weights of the rows, by the C kernels where they were built."""
    with closing(Workers(workers.threads, kernel="auto")) as native:
        return exact_weights(rows, native)


def _read_neurons(bundle: Bundle, layer: int, part: int = 0, parts: int = 1) -> PackedRows:
    """All planes of a layer's neurons, verified: of all, or of one of so many experts."""
    block = block_of(bundle, "neurons", layer, "fp16")
    if parts > 1:
        size = block.shards[0].header.sections[0].records // parts
        block = replace(block, start=part * size, end=(part + 1) * size)
    payload = aligned_buffer(block.streamed_nbytes)
    with closing(SsdReader()) as reader:
        block.read(reader, payload).wait()
    return block.rows(payload)["ffn"]
