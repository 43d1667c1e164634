"""Could a low-rank predictor tell which neurons a draft may skip before it reads gate and up?

    python scripts/bench_predictor.py recall --bundle B.m2c
    python scripts/bench_predictor.py drafts --bundle B.m2c [--settings 0:70 128:70 64:50]

`recall` compares predictors with the neurons that truly score best, on the model's own answers to
prompts that no predictor was made from. `drafts` runs exact mode with drafts that compute only
the predicted neurons, through the native kernels: how often they are right, and what they cost.

Knows nothing about how predictors are made (predictors.py).
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from bench_exact import PROMPTS
from predictors import RANKS, SHARES, Packed, Weights, guesses, judge, low_rank
from safetensors.torch import load_file, save_file
from skipping_drafts import Draft, all_neurons, best_neurons, predicted_neurons
from torch import Tensor

from m2c.bundle.bundle import open_bundle
from m2c.chat import chat_template_of
from m2c.contents import sidecars_of
from m2c.data import calibration_text
from m2c.depth import Depth
from m2c.engine import Engine, RunOptions
from m2c.generate import prefill
from m2c.kernels.operands import Norm
from m2c.kernels.reference import apply_norm
from m2c.kernels.rows import PackedRows
from m2c.model.transformer import Transformer
from m2c.modes import exact_options
from m2c.prompt import chat_ids, raw_ids
from m2c.sampling import Sampler, SamplingParams
from m2c.speculate import Speculation, Speculator
from m2c.tiers.store import FFN
from m2c.units import parse_size

WINDOW: Final = 512
HELD_OUT: Final = 8  # the first prompts; calibration sees answers to the others
AT_ONCE: Final = 16  # draft tokens of a round where the depth is fixed


def inputs_of(engine: Engine, texts: Sequence[list[int]]) -> list[Tensor]:
    """The FFN's input of every layer, [tokens, hidden], as the draft computes it over `texts`."""
    found: list[list[Tensor]] = [[] for _ in range(engine.config.num_hidden_layers)]
    full = all_neurons(engine)

    def ffn(layer: int, x: Tensor, neurons: PackedRows, norm: Norm) -> Tensor:
        found[layer].append(apply_norm(x, norm))
        return full(layer, x, neurons, norm)

    model = Draft(engine, ffn)
    for ids in texts:
        for start in range(0, len(ids), WINDOW):
            engine.model.kv.truncate(0)
            model.forward(np.asarray(ids[start : start + WINDOW], np.int32))
    engine.model.kv.truncate(0)
    return [torch.cat(parts) for parts in found]


class Fixed(Depth):
    """The same number of draft tokens every round; counts those that were tested."""

    tests = hits = 0

    def again(self, confidences: Sequence[float]) -> bool:
        return len(confidences) < AT_ONCE

    def accepted(self, confidences: Sequence[float], count: int) -> None:
        self.hits += count
        self.tests += min(count + 1, len(confidences))


def answer(
    engine: Engine, prompt: str, tokens: int, draft: Transformer, depth: type[Depth]
) -> tuple[list[int], list[int], Speculation, Depth]:
    """Ids of the prompt, of the answer, figures, what the depth learned."""
    template = chat_template_of(sidecars_of(engine.bundle))
    tokenizer = engine.tokenizer
    ids = chat_ids(tokenizer, template, prompt) if template else raw_ids(tokenizer, prompt)
    engine.model.kv.truncate(0)
    speculator = Speculator(engine.model, draft, Sampler(SamplingParams()))
    speculator._depth = learned = depth()
    found = list(speculator.tokens(prefill(engine.model, ids), ids, tokens))
    return ids, found, speculator.figures, learned


def seen(engine: Engine, given: argparse.Namespace) -> list[Tensor]:
    """Inputs of every layer over calibration prose and answers to prompts that are not held out."""
    prose = engine.tokenizer.encode(calibration_text())[: given.tokens]
    return inputs_of(engine, [prose, *texts(engine, given, PROMPTS[HELD_OUT:][: given.prompts])])


def texts(engine: Engine, given: argparse.Namespace, prompts: Sequence[str]) -> Iterator[list[int]]:
    """Prompts with the model's own answers."""
    assert engine.draft is not None
    for prompt in prompts:
        ids, found, *_ = answer(engine, prompt, given.length, engine.draft, Depth)
        say(prompt)
        yield ids + found


def recall(engine: Engine, given: argparse.Namespace) -> None:
    """A table of predictors beside the neurons that truly score best."""
    known = seen(engine, given)
    asked = inputs_of(engine, list(texts(engine, given, PROMPTS[:HELD_OUT])))
    found: dict[str, tuple[float, list[list[float]]]] = {}
    for layer in range(1, len(known), given.every):  # the first has none before it
        weights = Weights.of(neurons_of(engine, layer))
        inputs = (known[layer], known[layer - 1]), (asked[layer], asked[layer - 1])
        for name, cost, guess in guesses(weights, *inputs):
            found.setdefault(name, (cost, []))[1].append(judge(weights, asked[layer], guess))
        say(f"layer {layer} of {len(known) - 1}")
    print(f"{len(known[0])} tokens seen, {len(asked[0])} held out; recall / energy / output error")
    shares = " | ".join(f"top {share} %" for share in SHARES)
    print(f"| predictor | bytes | {shares} |\n|---|---|{'---|' * len(SHARES)}")
    for name, (cost, rows) in found.items():
        mean = np.mean(rows, axis=0).reshape(-1, 3)
        cells = " | ".join(f"{r:.2f} / {e:.3f} / {o:.2f}" for r, e, o in mean)
        print(f"| {name} | {cost:.0%} | {cells} |", flush=True)


def neurons_of(engine: Engine, layer: int) -> PackedRows:
    assert engine.store.draft is not None
    return engine.store.draft.operands("neurons", layer)[FFN]


def predictors(
    engine: Engine, given: argparse.Namespace, ranks: set[int]
) -> dict[int, list[Packed]]:
    """Of every layer, by rank. kept: where the factors are, or are put."""
    kept = given.kept
    if not kept.exists():
        factors = {}
        for layer, x in enumerate(seen(engine, given)):
            after, before = low_rank(Weights.of(neurons_of(engine, layer)), x)
            factors[f"{layer}.after"] = after[:, : max(RANKS)].contiguous()
            factors[f"{layer}.before"] = before[: max(RANKS)].contiguous()
            say(f"predictor of layer {layer}")
        save_file(factors, kept)
    factors = load_file(kept)
    return {
        r: [
            Packed.of(factors[f"{i}.after"][:, :r].contiguous(), factors[f"{i}.before"][:r])
            for i in range(engine.config.num_hidden_layers)
        ]
        for r in ranks
    }


def ways_to_draft(engine: Engine, given: argparse.Namespace) -> dict[str, Draft]:
    pairs = [tuple(int(n) for n in setting.split(":")) for setting in given.settings]
    made = predictors(engine, given, {r for r, _ in pairs if r})
    ways = {"all neurons": all_neurons(engine)}
    for r, share in pairs:
        best = best_neurons(engine, share) if r == 0 else None
        name = f"rank {r}, {share} %" if r else f"true best {share} %"
        ways[name] = best or predicted_neurons(engine, share, made[r])
    return {name: Draft(engine, ffn) for name, ffn in ways.items()}


def drafts(engine: Engine, given: argparse.Namespace) -> None:
    """A table of how often drafts are right and what they cost; they take turns at every prompt."""
    models = ways_to_draft(engine, given)
    counts = {name: np.zeros(3, int) for name in models}  # right, tested, passes
    draft_ms: dict[str, list[float]] = {name: [] for name in models}
    for prompt in PROMPTS[:HELD_OUT]:
        expected = None
        for name, model in models.items():
            _, ids, figures, learned = answer(engine, prompt, given.length, model, Fixed)
            expected = expected or ids
            assert ids == expected, f"{name} changed the text"
            assert isinstance(learned, Fixed)
            counts[name] += learned.hits, learned.tests, figures.passes
            draft_ms[name].append(1e3 * figures.draft_s / figures.drafted)
        say(prompt)
    one, five = pass_s(engine, 1), pass_s(engine, 5)
    print(f"a pass over 1 token {1e3 * one:.1f} ms, over 5 {1e3 * five:.1f} ms")
    print(f"| draft | agreement | a pass at depth {AT_ONCE} | ms a draft token | tok/s to expect |")
    print("|---|---|---|---|---|")
    for name, (hits, tests, passes) in counts.items():
        share, seconds = hits / tests, statistics.median(draft_ms[name]) / 1e3
        print(
            f"| {name} | {share:.3f} | {hits / passes + 1:.1f} | {spread(draft_ms[name])} | "
            f"{best_rate(share, seconds, one, (five - one) / 4):.1f} |"
        )


def pass_s(engine: Engine, tokens: int) -> float:
    """Median seconds of a pass of the exact model."""
    found, length = [], engine.model.kv.length
    for _ in range(7):
        begin = time.perf_counter()
        engine.model.forward(np.arange(100, 100 + tokens, dtype=np.int32), all_logits=True)
        found.append(time.perf_counter() - begin)
        engine.model.kv.truncate(length)
    return statistics.median(found)


def best_rate(share: float, draft_s: float, pass_s: float, more_s: float) -> float:
    """Tokens per second at the depth that suits the costs."""
    tokens, best = 1.0, 1 / pass_s
    for depth in range(1, AT_ONCE + 1):
        tokens += share**depth
        best = max(best, tokens / (depth * (draft_s + more_s) + pass_s))
    return best


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


COMMANDS: Final = {"recall": recall, "drafts": drafts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--dram", help="of the engine, e.g. 600MiB: exact weights stream")
    parser.add_argument("--tokens", type=int, default=4096, help="of calibration prose")
    parser.add_argument("--prompts", type=int, default=12, help="whose answers calibrate besides")
    parser.add_argument("--every", type=int, default=1, help="recall: judge every so manyth layer")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--ctx-size", type=int, default=1024)
    parser.add_argument("--length", type=int, default=100, help="tokens of an answer")
    parser.add_argument(
        "--settings", nargs="+", default=["0:50", "0:70", "64:70", "128:50", "128:70", "256:70"],
        help="RANK:PERCENT of the neurons; rank 0: the true best",
    )  # fmt: skip
    parser.add_argument("--kept", type=Path, default=Path("predictors.safetensors"))
    given = parser.parse_args()
    dram = parse_size(given.dram) if given.dram else None
    options = exact_options(RunOptions(ctx_size=given.ctx_size, dram=dram, threads=given.threads))
    with Engine(open_bundle(given.bundle), options) as engine:
        COMMANDS[given.command](engine, given)


if __name__ == "__main__":
    main()
