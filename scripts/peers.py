"""The programs that bench_peers.py compares: how each is started, what it needs, what it says.

Every run is a process of its own. Knows nothing about turns, repeats or tables.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import limits

MiB: Final = 1 << 20
M2C_FIXED: Final = 400 * MiB  # interpreter and torch, as `m2c run` counts them
LLAMA_FIXED: Final = 100 * MiB  # binary, compute buffers


@dataclass(frozen=True)
class Workload:
    """kind: decode and prefill (tok/s of so many tokens), or cold (seconds to the first token)."""

    kind: str
    tokens: int


@dataclass(frozen=True)
class Result:
    """Of one run. value: tok/s, or seconds for cold. failure: why there is no value."""

    value: float = 0.0
    read_nbytes: float = 0.0  # per token
    peak_nbytes: int = 0
    failure: str = ""
    disk: float = 0.0  # bytes per second: the most that the disk has shown around this run


@dataclass(frozen=True)
class Needs:
    """Bytes of memory: of the weights that a token uses, and of everything else."""

    weights: int
    fixed: int

    def total(self, fraction: float | None) -> int:
        """Memory in which `fraction` of the weights fit (None: all)."""
        return self.fixed + int(self.weights * (1.0 if fraction is None else fraction))

    def missing(self, total: int) -> int:
        """Bytes that a token has to read again, at best, with `total` bytes of memory."""
        return min(self.weights, max(0, self.weights + self.fixed - total))


class M2C:
    """`m2c run` in a process of its own."""

    name = "m2c"

    def __init__(self, bundle: Path, options: Sequence[str], threads: int, tokens: int) -> None:
        """tokens: of the workload. Raises SystemExit when m2c has no plan."""
        self.bundle = bundle
        # llama-bench makes a context of its tokens in steps of 256; a prompt is of about so many
        context = -(-(tokens + 32) // 256) * 256
        self.options = ["-c", str(context), "-t", str(threads), *options]
        self.words = " ".join(self.options)
        self.files = limits.files_below(bundle)
        plan = json.loads(self._ask("plan", str(bundle), *self.options, "--dram", "1TiB", "--json"))
        self.needs, self.kv_nbytes = m2c_needs(plan), int(plan["kv_nbytes"])

    def run(self, work: Workload, total: int | None) -> Result:
        dram = (self.needs.total(None) if total is None else total) - M2C_FIXED
        with tempfile.TemporaryDirectory(prefix="m2c-bench-") as folder:
            stats = Path(folder) / "stats.json"
            words = [*m2c("run", str(self.bundle), *self.options), "--dram", f"{dram}B", "--raw"]
            words += ["-p", self._prompt(work.tokens) if work.kind == "prefill" else "a", "-q"]
            if work.kind == "cold":
                words += ["-n", "1"]
            else:
                # the first token comes out of the prompt; figures need one after it
                words += ["-n", str(1 + (work.tokens if work.kind == "decode" else 1))]
                words += ["--stats", str(stats)]
            outcome = limits.run(words, limit=total)
            if outcome.status or work.kind == "cold":
                return without_figures(self.name, outcome)
            return m2c_result(json.loads(stats.read_text()), work, outcome.peak_nbytes)

    def _prompt(self, tokens: int) -> str:
        """Text of about so many tokens."""
        from m2c.bundle.bundle import open_bundle
        from m2c.contents import tokenizer_of
        from m2c.data import calibration_text

        tokenizer = tokenizer_of(open_bundle(self.bundle))
        return tokenizer.decode(tokenizer.encode(calibration_text())[:tokens])

    def _ask(self, *words: str) -> str:
        done = subprocess.run(m2c(*words), capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr.strip())
        return done.stdout


class Llama:
    """`llama-bench` in a process of its own."""

    name = "llama.cpp"

    def __init__(
        self, bench: str, gguf: Path, limited: Sequence[str], threads: int, kv_nbytes: int
    ) -> None:
        """kv_nbytes: of the KV cache. limited: options for runs under a limit."""
        self.files = [gguf]
        self.needs = Needs(gguf.stat().st_size, LLAMA_FIXED + kv_nbytes)
        self._command = [bench, "-m", str(gguf), "-t", str(threads), "-r", "1", "-o", "json"]
        self._limited = list(limited)
        self.words = f"-t {threads}, under a limit {' '.join(limited)}"

    def run(self, work: Workload, total: int | None) -> Result:
        words = [*self._command, *([] if total is None else self._limited)]
        if work.kind == "prefill":
            words += ["-p", str(work.tokens), "-n", "0"]
        else:
            words += ["-p", "0", "-n", str(work.tokens)]
        if work.kind == "cold":
            words.append("--no-warmup")
        outcome = limits.run(words, limit=total)
        if outcome.status or work.kind == "cold":
            return without_figures(self.name, outcome)
        return llama_result(outcome, work)


def m2c(*words: str) -> list[str]:
    return [sys.executable, "-m", "m2c.cli.app", *words]


def m2c_needs(plan: Mapping[str, Any]) -> Needs:
    """From `m2c plan --json` with room for everything."""
    weights = int(plan["compute_nbytes_per_token"])
    return Needs(weights, int(plan["dram_used"]) - weights + M2C_FIXED)


def m2c_result(stats: Mapping[str, Any], work: Workload, peak_nbytes: int) -> Result:
    """From what `m2c run --stats` wrote."""
    if work.kind == "prefill":
        return Result(float(stats["prefill_tps"]), 0.0, peak_nbytes)
    if not stats["decode_tps"]:
        return Result(failure=f"ended after {stats['generated_tokens']} tokens")
    return Result(float(stats["decode_tps"]), float(stats["ssd_nbytes_per_token"]), peak_nbytes)


def llama_result(outcome: limits.Outcome, work: Workload) -> Result:
    """From what `llama-bench -r 1 -o json` printed; its timed tokens end as the process does."""
    try:
        (record,) = json.loads(outcome.output)
        (speed,), (nanoseconds,) = record["samples_ts"], record["samples_ns"]
        read = outcome.read_in_last(nanoseconds / 1e9) / work.tokens
        return Result(float(speed), read, outcome.peak_nbytes)
    except (ValueError, KeyError, TypeError):
        return Result(failure="no figures in the output of llama-bench")


def without_figures(name: str, outcome: limits.Outcome) -> Result:
    """The time of the whole process, or why it failed."""
    if outcome.status:
        last = (outcome.errors.strip().splitlines() or [""])[-1]
        print(f"{name}: {outcome.status} {last}", file=sys.stderr)
    return Result(outcome.seconds, 0.0, outcome.peak_nbytes, outcome.status)
