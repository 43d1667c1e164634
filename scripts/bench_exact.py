"""Exact mode: is its text the checkpoint's own, and how fast is it beside llama.cpp's F16?

    python scripts/bench_exact.py --bundle B.m2c --dram 600MiB [--prompts 20] [--tokens 200]
    python scripts/bench_exact.py --bundle B.m2c --gguf F16.gguf --limit 900MiB --dram 600MiB

The first compares tokens with those of one-by-one decoding at 16 bits. The second runs `m2c run
--exact` and llama-bench in turns under the same memory limit (page cache counted, needs root;
without --limit: none). Knows nothing about the quality of the text.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import limits
from peers import m2c

from m2c.bundle.bundle import open_bundle
from m2c.contents import sidecars_of
from m2c.engine import Engine, RunOptions
from m2c.generate import stream_generate
from m2c.modes import exact_options
from m2c.sampling import Sampler, SamplingParams
from m2c.units import parse_size

PROMPTS: Final = (
    "Why is the sky blue?",
    "Write a Python function that reverses a linked list.",
    "Explain how a hash table works, with an example.",
    "Tell me a story about a sailor who finds an island.",
    "What are the causes of the French Revolution?",
    "Write a SQL query that finds the second highest salary.",
    "Summarize the plot of Romeo and Juliet.",
    "How do vaccines work?",
    "Write a bash script that counts the lines of all files in a folder.",
    "Describe the water cycle for a child.",
    "What is the difference between TCP and UDP?",
    "Write a haiku about autumn, then explain it.",
    "Give me a recipe for pancakes.",
    "Implement binary search in C and explain each line.",
    "Who was Ada Lovelace?",
    "List ten uses of a paper clip.",
    "Explain recursion with a Java example.",
    "Why do leaves change colour?",
    "Write a letter that asks a landlord to mend a window.",
    "What is quantum entanglement?",
)


def compare(bundle: Path, options: RunOptions, prompts: int, tokens: int, seed: int | None) -> bool:
    """Whether every token was the same; prints a line per prompt. options: with budgets."""
    opened = open_bundle(bundle)
    params = SamplingParams() if seed is None else SamplingParams(temperature=0.8, seed=seed)
    plain = RunOptions(ctx_size=1024, device=options.device)
    expected = list(texts(opened, one_by_one(plain), params, prompts, tokens))
    found = list(texts(opened, exact_options(options), params, prompts, tokens))
    total = wrong = 0
    for prompt, (one, _), (two, stats) in zip(PROMPTS, expected, found, strict=False):
        speculation = stats.speculation
        differ = sum(a != b for a, b in zip(one, two, strict=False)) + abs(len(one) - len(two))
        total, wrong = total + len(one), wrong + differ
        print(
            f"{len(one):4} tokens, {differ} differ, {stats.decode_tps:6.2f} tok/s, "
            f"{speculation.acceptance:.0%} accepted, {speculation.tokens_per_pass:.1f} a pass, "
            f"{1e3 * speculation.draft_s / max(1, speculation.drafted):.1f} ms a draft token, "
            f"{1e3 * speculation.pass_s / max(1, speculation.passes):.0f} ms a pass: {prompt}",
            flush=True,
        )
    print(f"{total} tokens, {wrong} differ from one-by-one decoding")
    return not wrong


def one_by_one(options: RunOptions) -> RunOptions:
    from dataclasses import replace

    return replace(exact_options(options), speculate=False)


def texts(
    bundle: Any, options: RunOptions, params: SamplingParams, prompts: int, tokens: int
) -> Iterator[tuple[list[int], Any]]:
    """Ids and figures of each prompt."""
    from m2c.chat import chat_template_of
    from m2c.prompt import chat_ids, raw_ids

    template = chat_template_of(sidecars_of(bundle))
    with Engine(bundle, options) as engine:
        for prompt in PROMPTS[:prompts]:
            engine.model.kv.truncate(0)
            tokenizer = engine.tokenizer
            ids = chat_ids(tokenizer, template, prompt) if template else raw_ids(tokenizer, prompt)
            made, stats = [], None
            for piece in stream_generate(engine, ids, Sampler(params), max_tokens=tokens):
                made += piece.ids
                stats = piece.stats or stats
            yield made, stats


def race(given: argparse.Namespace, limit: int | None) -> None:
    """m2c and llama-bench in turns; prints medians, spread and the ratio."""
    mine: list[dict[str, Any]] = []
    theirs: list[float] = []
    for at in range(given.repeats):
        limits.evict(limits.files_below(given.bundle))
        mine.append(run_m2c(given, PROMPTS[at % len(PROMPTS)], limit))
        limits.evict([given.gguf])
        theirs.append(run_llama(given, limit))
        say(f"{mine[-1]['decode_tps']:.2f} and {theirs[-1]:.3f} tok/s")
    ours = [run["decode_tps"] for run in mine]
    median = statistics.median(ours) / statistics.median(theirs)
    memory = "no limit" if limit is None else f"limit {limit >> 20} MiB"
    print(f"{memory}: m2c --exact {spread(ours)} tok/s, llama.cpp {spread(theirs)}: {median:.1f}x")
    speculation = [run["speculation"] for run in mine]
    for key in ("acceptance", "tokens_per_pass", "seconds_per_draft_token", "seconds_per_pass"):
        print(f"  {key} {spread([one[key] for one in speculation])}")
    print(f"  SSD bytes per token {spread([run['ssd_nbytes_per_token'] / 1e6 for run in mine])} MB")


def run_m2c(given: argparse.Namespace, prompt: str, limit: int | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        stats = Path(folder) / "stats.json"
        words = ["run", str(given.bundle), "--exact", "-n", str(given.tokens), "-c", "1024"]
        words += ["--dram", given.dram] if given.dram else []
        outcome = limits.run(m2c(*words, "--stats", str(stats), "-p", prompt), limit=limit)
        if not stats.exists():
            sys.exit(f"m2c failed: {outcome.status} {outcome.errors}")
        found: dict[str, Any] = json.loads(stats.read_text())
        return found


def run_llama(given: argparse.Namespace, limit: int | None) -> float:
    """tok/s; under a limit without the repacked copy, which does not fit."""
    command = [given.llama_bench, "-m", str(given.gguf), "-p", "0", "-n", str(given.llama_tokens)]
    command += ["-r", "1", "-t", "2", "-o", "json"]
    command += ["-lm", "mmap", "--repack", "0"] if limit is not None else []
    outcome = limits.run(command, limit=limit)
    return float(json.loads(outcome.output)[0]["avg_ts"])


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--dram", help="of m2c, e.g. 600MiB")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for the comparison")
    parser.add_argument("--hbm", help="memory of the GPU that exact mode may use")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--seed", type=int, help="sample at temperature 0.8 instead of greedily")
    parser.add_argument("--gguf", type=Path, help="F16 weights of the same model: race instead")
    parser.add_argument("--llama-bench", default="llama-bench")
    parser.add_argument("--llama-tokens", type=int, default=16)
    parser.add_argument("--limit", help="memory of each program in all, e.g. 900MiB")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    if given.gguf is not None:
        race(given, parse_size(given.limit) if given.limit else None)
        return
    dram, hbm = (parse_size(size) if size else None for size in (given.dram, given.hbm))
    options = RunOptions(ctx_size=1024, device=given.device, dram=dram, hbm=hbm)
    if not compare(given.bundle, options, given.prompts, given.tokens, given.seed):
        sys.exit(1)


if __name__ == "__main__":
    main()
