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
from m2c.contents import in_shard_order, vectors_of
from m2c.engine import Engine, RunOptions
from m2c.generate import prefill
from m2c.kernels.dispatch import exact_weights
from m2c.kernels.reference import CHUNK, gate_up, rank
from m2c.kernels.rows import ExactRows, PackedRows, Rows
from m2c.kernels.workers import Workers
from m2c.model.config import ModelConfig
from m2c.model.mix import LEVELS, Mix, bits_per_weight
from m2c.model.tensors import up_bias_name
from m2c.prompt import raw_ids
from m2c.tiers.blocks import block_of
from m2c.tiers.memory import aligned_buffer
from m2c.tiers.ssd import SsdReader

FP16_SHARES: Final = (0, 1, 2, 5, 10)
SAMPLED_LAYERS: Final = 8
UNIFORM: Final = (Mix(0, 0, 100), Mix(0, 100, 0), Mix(100, 0, 0))
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
    """The relative output error of each mix, over at most SAMPLED_LAYERS layers."""
    config = ModelConfig.from_dict(bundle.manifest.architecture)
    errors = torch.zeros(len(mixes), dtype=torch.float64)
    total = 0.0
    vectors = in_shard_order(vectors_of(bundle, config), importance)
    for layer in sampled_layers(config.num_hidden_layers):
        rows = _read_neurons(bundle, layer)
        known = importance.layers[layer]
        x = torch.from_numpy(known.sample)
        norms = torch.from_numpy(known.down_norm[known.order])
        with closing(
            Workers(workers.threads, kernel="auto")
        ) as native:  # decodes fast, where it was built
            exact = exact_weights(rows, native)
        differences, truth = _layer_errors(
            x, rows, exact, norms, act=config.activation, mixes=mixes, workers=workers,
            bias=vectors.get(up_bias_name(layer)),
        )  # fmt: skip
        # layers differ in the size of their output: each counts by its relative error
        errors += differences / max(truth, 1e-30)
        total += 1
        progress(1)
    bits = exact_bits(bundle)
    return [
        MixError(mix, bits_per_weight(mix, bits), math.sqrt(float(error) / total))
        for mix, error in zip(mixes, errors, strict=True)
    ]


def sampled_layers(layers: int) -> list[int]:
    """At most SAMPLED_LAYERS layer numbers, evenly spaced, both ends included."""
    return sorted({round(i) for i in np.linspace(0, layers - 1, min(SAMPLED_LAYERS, layers))})


def choose_mix(
    bundle: Bundle, importance: Importance, request: str, budget_bits: float, workers: Workers
) -> tuple[MixChoice, dict[str, float], list[str]]:
    """The mix asked for ("error", "entropy" or given), the price of dropping, and what to tell.

    The price: relative FFN output error with the chosen mix and 0, 10, ... 70 % dropped.
    """
    bits = exact_bits(bundle)
    mixes = candidates(budget_bits, bits)
    config = ModelConfig.from_dict(bundle.manifest.architecture)
    if config.num_experts:
        mixes = [mix for mix in UNIFORM if bits_per_weight(mix, bits) <= budget_bits]
        if request != "entropy":
            return _best_uniform(mixes, request, bits)
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
    if config.num_experts:
        choice, quality, _ = _best_uniform([best], request, bits)
        return replace(choice, search=request), quality, [*lines, f"default mix {best}"]
    dropped = [replace(best, drop=float(drop)) for drop in DROPS]
    prices = search_by_error(bundle, importance, dropped, workers)
    choice = MixChoice(
        (round(best.fp16), round(best.int8), round(best.int4)), request if request in SEARCHES
        else "given", round(bits_per_weight(best, bits), 4), round(prices[0].relative_error, 6),
    )  # fmt: skip
    quality = {
        f"ffn_error_drop_{drop}": round(price.relative_error, 6)
        for drop, price in zip(DROPS, prices, strict=True)
    }
    return choice, quality, [*lines, f"default mix {best}"]


def _best_uniform(
    mixes: list[Mix], request: str, bits: float
) -> tuple[MixChoice, dict[str, float], list[str]]:
    """As `choose_mix`, of experts: the precision asked for or the best that the budget allows.
    Output errors are not measured."""
    best = mixes[-1] if request == "error" else Mix.parse(request)
    percent = (round(best.fp16), round(best.int8), round(best.int4))
    spent = round(bits_per_weight(best, bits), 4)
    choice = MixChoice(percent, request if request in SEARCHES else "given", spent, 0.0)
    return choice, {}, [f"default mix {best}: {spent:.2f} bits; experts run at one precision"]


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


def _read_neurons(bundle: Bundle, layer: int) -> PackedRows:
    """All planes of a layer's neurons, verified."""
    block = block_of(bundle, "neurons", layer, "fp16")
    payload = aligned_buffer(block.streamed_nbytes)
    with closing(SsdReader()) as reader:
        block.read(reader, payload).wait()
    return block.rows(payload)["ffn"]
