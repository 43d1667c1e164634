"""m2c beside llama.cpp: the same weights, threads and memory, one after the other in turns.

    python scripts/bench_peers.py --bundle B.m2c --gguf B.gguf [--prefill 512] [--cold] [--out T.md]

Fractions of the weights fit: `fits` is no limit at all, 0.5 a memory limit of half the weights and
what each program needs besides them. Limits need root (scripts/limits.py); scripts/make_gguf.py and
llama-quantize make the GGUF. Knows nothing about the quality of the text.
"""

import argparse
import shlex
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import limits
from peers import M2C, Llama, MiB, Result, Workload

# repacking keeps a second copy of the weights, and a limit would end in a kill
LLAMA_LIMITED: Final = "-lm mmap --repack 0"
HEADER: Final = (
    "| test | weights in memory | program | memory | median (spread) | read per token | "
    "while decoding | of the roof | m2c / llama.cpp |\n|---|---|---|---|---|---|---|---|---|"
)


def measure(
    programs: Sequence[M2C | Llama], work: Workload, fraction: float | None, *,
    repeats: int, same_total: bool,
) -> Iterator[str]:  # fmt: skip
    """Run the programs in turns, `repeats` times; yield a row of the table for each."""
    totals = [program.needs.total(fraction) for program in programs]
    if same_total:
        totals = [max(totals)] * len(totals)
    allowed = [None if fraction is None else total for total in totals]
    results = take_turns(programs, work, allowed, repeats)
    label = "all" if fraction is None else f"{fraction:.0%}"
    ratio = speed_ratio(work, results)
    for program, total, found in zip(programs, allowed, results, strict=True):
        missing = 0 if total is None else program.needs.missing(total)
        memory = f"peak {max(result.peak_nbytes for result in found) / MiB:.0f} MiB"
        if total is not None:
            memory = f"limit {total / MiB:.0f} MiB"
        start = [f"{work.kind} {work.tokens}", label, program.name, memory]
        end = ratio if program is programs[0] else ""
        yield f"| {' | '.join([*start, *row(found, work, missing), end])} |"


def take_turns(
    programs: Sequence[M2C | Llama], work: Workload, allowed: Sequence[int | None], repeats: int
) -> list[list[Result]]:
    """Results of each program. allowed: bytes of memory of each, None for no limit.

    Disks swing within seconds, so each run has probes of its own, of the first program's files.
    """
    results: list[list[Result]] = [[] for _ in programs]
    probed = programs[0].files
    for repeat in range(repeats):
        for program, total, found in zip(programs, allowed, results, strict=True):
            limits.evict([*probed, *program.files])
            before = limits.disk_bandwidth(probed, seed=2 * repeat)
            result = program.run(work, total)
            limits.evict(probed)
            after = limits.disk_bandwidth(probed, seed=2 * repeat + 1)
            reached = result.read_nbytes * result.value
            found.append(replace(result, disk=max(before, after, reached)))
    return results


def speed_ratio(work: Workload, results: Sequence[Sequence[Result]]) -> str:
    """How many times as fast the first of two is, by medians; "" if there is no such number."""
    if len(results) != 2 or any(result.failure for found in results for result in found):
        return ""
    ours, theirs = (statistics.median(result.value for result in found) for found in results)
    return f"{theirs / ours if work.kind == 'cold' else ours / theirs:.2f}"


def row(results: Sequence[Result], work: Workload, missing: int) -> list[str]:
    """Median and spread, read per token, while decoding, of the roof.

    missing: bytes that a token has to read; the roof is to read them as fast as the disk can.
    """
    failures = [result.failure for result in results if result.failure]
    if failures:
        return [failures[0], "", "", ""]
    values = sorted(result.value for result in results)
    middle = statistics.median(values)
    unit = "s" if work.kind == "cold" else "tok/s"
    first = f"{middle:.3g} {unit} ({values[0]:.3g}-{values[-1]:.3g})"
    if work.kind != "decode":
        return [first, "", "", ""]
    read = statistics.median(result.read_nbytes for result in results)
    speed = statistics.median(result.read_nbytes * result.value for result in results)
    shares = [result.value * missing / result.disk for result in results if result.disk]
    share = f"{statistics.median(shares):.0%}" if missing and shares else ""
    return [first, f"{read / 1e6:.0f} MB", f"{speed / 1e9:.2f} GB/s", share]


def parse_fractions(text: str) -> list[float | None]:
    """`fits,0.5` is [None, 0.5]."""
    found: list[float | None] = []
    for word in text.split(","):
        try:
            found.append(None if word == "fits" else float(word))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{word!r} is neither fits nor a number") from None
        if found[-1] is not None and not 0 < found[-1] <= 1:
            raise argparse.ArgumentTypeError(f"{word} is not above 0 and at most 1")
    return found


def count(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) <= 1 << 20:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count")
    return int(text)


def find_bench(given: argparse.Namespace) -> str | None:
    """llama-bench, if it can be compared with; says why not. Raises SystemExit for a bad path."""
    bench = shutil.which(given.llama_bench)
    if bench is None:
        say(f"{given.llama_bench} was not found: build llama.cpp, or give --llama-bench PATH")
    elif given.gguf is None:
        say("no --gguf was given; scripts/make_gguf.py writes one")
    elif not given.gguf.is_file():
        raise SystemExit(f"{given.gguf}: no such file; scripts/make_gguf.py writes one")
    else:
        return bench
    say("m2c is measured alone")
    return None


def programs_for(given: argparse.Namespace, work: Workload, bench: str | None) -> list[M2C | Llama]:
    """m2c, and llama.cpp if there is a llama-bench."""
    ours = M2C(given.bundle, shlex.split(given.m2c_options), given.threads, work.tokens)
    if bench is None:
        return [ours]
    limited = shlex.split(given.llama_limited_options)
    return [ours, Llama(bench, given.gguf, limited, given.threads, ours.kv_nbytes)]


def describe(work: Workload, programs: Sequence[M2C | Llama]) -> Iterator[str]:
    """What the rows of a workload rest on: a line for each program."""
    for program in programs:
        weights, fixed = program.needs.weights / 1e9, program.needs.fixed / MiB
        yield (
            f"* {work.kind} {work.tokens}, {program.name}: {weights:.2f} GB of weights, "
            f"{fixed:.0f} MiB besides; {program.words}"
        )


def say(text: str) -> None:
    print(text, file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True, help="what m2c pack printed")
    parser.add_argument("--gguf", type=Path, help="the same weights for llama.cpp")
    parser.add_argument("--llama-bench", default="llama-bench", metavar="PATH")
    parser.add_argument("--llama-limited-options", default=LLAMA_LIMITED, metavar="WORDS")
    parser.add_argument("--m2c-options", default="--mix 0/0/100", metavar="WORDS",
                        help="options that m2c plan and m2c run share")  # fmt: skip
    parser.add_argument("--threads", type=count, default=2)
    parser.add_argument("--tokens", type=count, default=32, help="to decode")
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--fractions", type=parse_fractions, default="fits,0.5,0.25")
    parser.add_argument(
        "--prefill", type=count, default=0, metavar="TOKENS", help="also of a prompt"
    )
    parser.add_argument("--cold", action="store_true",
                        help="also the time to the first token of the whole process")  # fmt: skip
    parser.add_argument("--same-total", action="store_true", help="both get the larger limit")
    parser.add_argument("--out", type=Path, help="write the table here too, as Markdown")
    return parser.parse_args()


def main() -> None:
    given = parse_arguments()
    works = [Workload("decode", given.tokens)]
    works += [Workload("prefill", given.prefill)] if given.prefill else []
    works += [Workload("cold", 1)] if given.cold else []
    fractions = given.fractions
    if not limits.can_limit() and any(f is not None for f in fractions):
        say("memory limits need root and a memory cgroup: only `fits` is measured")
        fractions = [None]
    bench = find_bench(given)
    notes = [
        f"* {given.threads} threads, {given.repeats} runs each in turns, files evicted before each"
    ]
    rows: list[str] = []
    print(HEADER, flush=True)
    for work in works:
        programs = programs_for(given, work, bench)
        notes += describe(work, programs)
        # a limit says nothing about how fast everything is loaded
        for fraction in [None] if work.kind == "cold" else fractions:
            for line in measure(programs, work, fraction, repeats=given.repeats,
                                same_total=given.same_total):  # fmt: skip
                print(line, flush=True)
                rows.append(line)
    print("", *notes, sep="\n")
    if given.out:
        given.out.write_text("\n".join([HEADER, *rows, "", *notes]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
