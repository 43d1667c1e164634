"""Quality at equal bytes per token, as BENCHMARKS.md reports it.

    python scripts/bench_quality.py BUNDLE [--tokens 8192] [--text FILE]
        [--llama BIN --gguf FILE --work DIR]

One bundle: uniform precisions and mixes of neurons by score, with and without dropping, each
beside the checkpoint's own weights on the same tokens. Uniform 5 and 6 bits are simulated: codes of
8 bits are rounded, with the scales as they are, once they are in memory. --llama: the folder with
llama.cpp's llama-quantize and llama-perplexity, which are not built here; --gguf: the same weights
in 16 bits (scripts/make_gguf.py --type bf16 --tokenizer). llama-perplexity scores the same half of
the same windows; its standard errors are over tokens, m2c's over windows.

A published GGUF, exported, lies on its publisher's grid, and the quantiser that has that grid wins.
make_checkpoint.py --dither takes such weights off it: only then compare across programs.
"""

import argparse
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import gguf
import torch

from m2c.bundle.bundle import Bundle, open_bundle
from m2c.bundle.planes import CODE_BIAS
from m2c.contents import config_of, tokenizer_of
from m2c.engine import Engine, RunOptions
from m2c.errors import M2CError
from m2c.evaluate import FULL, WINDOW, Estimate, Quality, Reference, compare, cut
from m2c.mixsearch import exact_bits
from m2c.model.config import ModelConfig
from m2c.model.mix import Mix, bits_per_weight
from m2c.model.tensors import dense_matrices

HERE = Path(__file__).parent
EVAL_TEXT = HERE.parent / "tests" / "data" / "austen_eval.txt"
STORED_BITS: Final = {"int4": 4.5, "int8": 8.5}
LLAMA_TYPES: Final = ("Q4_0", "Q4_K_M", "Q5_K_M", "Q8_0")
HEADER: Final = (
    "| FFN | attention, head | bits per FFN weight | bits per weight | PPL | ln PPL | KL | KL 99 % "
    "| top-1 |"
)
_LOG_LINES: Final = {
    "perplexity": r"Mean PPL\(Q\)\s*:\s*(\S+) ±\s*(\S+)",
    "log_ratio": r"Mean ln\(PPL\(Q\)/PPL\(base\)\)\s*:\s*(\S+) ±\s*(\S+)",
    "divergence": r"Mean\s+KLD:\s*(\S+) ±\s*(\S+)",
    "p99": r"99\.0%\s+KLD:\s*(\S+)()",
    "agreement": r"Same top p:\s*(\S+) ±\s*(\S+)",
}


@dataclass(frozen=True)
class Row:
    """One line of the table. refine: bits of the INT8 plane that are used, of 4."""

    mix: Mix
    dense: str = "int8"
    refine: int = 4

    @property
    def label(self) -> str:
        if self.mix.int8 == 100:
            return f"uniform {4 + self.refine} bits" + (", simulated" if self.refine < 4 else "")
        return "uniform INT4" if self.mix == Mix(0, 0, 100) else str(self.mix)

    def ffn_bits(self, exact: float) -> float:
        """Stored bits read per FFN weight of a token."""
        return bits_per_weight(self.mix, exact) - (4 - self.refine) * self.mix.int8 / 100


ROWS: Final = (
    Row(Mix(0, 0, 100), "int4"),
    Row(Mix(0, 0, 100)),
    Row(Mix(0, 0, 100, drop=30)),
    Row(Mix(0, 10, 90)),
    Row(Mix(0, 100, 0), refine=1),
    Row(Mix(0, 25, 75)),
    Row(Mix(0, 25, 75, drop=30)),
    Row(Mix(5, 15, 80)),
    Row(Mix(0, 100, 0), refine=2),
    Row(Mix(0, 50, 50)),
    Row(Mix(0, 50, 50, drop=30)),
    Row(Mix(0, 100, 0)),
    Row(Mix(25, 25, 50)),
)


def round_codes(engine: Engine, refine: int) -> None:
    """Round both codes of all neurons, which must be in memory, to 4 + `refine` bits: the nearest
    multiple of the step, not a cut of the refinement, which would move all weights one way."""
    assert not engine.plan.streamed
    for layer in range(engine.config.num_hidden_layers):
        for rows in engine.store.uses("neurons", layer):
            neurons = rows["ffn"]
            codes = neurons.int4[:, : neurons.layout.code_nbytes]
            for high, low in zip(codes.split(256), neurons.int8.split(256), strict=True):
                halves = [rounded(high >> s & 15, low >> s & 15, refine) for s in (0, 4)]
                high.copy_(halves[0][0] | halves[1][0] << 4)
                low.copy_(halves[0][1] | halves[1][1] << 4)


def rounded(q: torch.Tensor, r: torch.Tensor, refine: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored codes (with CODE_BIAS) of both planes, u8, to such codes on the coarser grid."""
    step = 16 >> refine
    value = 16 * (q.short() - CODE_BIAS) + (r.short() - CODE_BIAS)
    value = (value.float() / step).round().mul(step).clamp(-136, 119 // step * step).short()
    coarse = (value + 8).div(16, rounding_mode="floor")
    return (coarse + CODE_BIAS).byte(), (value - 16 * coarse + CODE_BIAS).byte()


def read_weights(config: ModelConfig) -> tuple[int, int]:
    """Weights a token meets: (of the FFN, of attention and head)."""
    ffn = config.vectors * config.num_hidden_layers * config.hidden_size * config.intermediate_size
    shapes = dense_matrices(config)
    attention = sum(n * m for name, (n, m) in shapes.items() if name.startswith("model.layers."))
    return ffn, attention + config.vocab_size * config.hidden_size


def measure(bundle: Bundle, ids: list[int]) -> Iterator[str]:
    """The table's rows of m2c."""
    config, exact = config_of(bundle), exact_bits(bundle)
    ffn, dense = read_weights(config)
    tokenizer = tokenizer_of(bundle)
    windows = cut(ids, bos=tokenizer.bos_id if tokenizer.add_bos else None)
    with Engine(bundle, RunOptions(mix=FULL, ctx_size=WINDOW)) as engine:
        reference = Reference(engine, windows, folder=bundle.path.parent)
    full = reference.predictions.perplexity
    yield f"| 16 bits | fp16 | 16 | 16 | {figure(full, 3)} | - | - | - | - |"
    with reference:
        for row in ROWS:
            options = RunOptions(mix=row.mix, dense=row.dense, ctx_size=WINDOW)
            with Engine(bundle, options) as engine:
                if row.refine < 4:
                    round_codes(engine, row.refine)
                quality = compare(engine, reference)
            bits = row.ffn_bits(exact)
            overall = (bits * ffn + STORED_BITS[row.dense] * dense) / (ffn + dense)
            yield line(row.label, row.dense, bits, overall, quality)


def line(label: str, dense: str, bits: float, overall: float, quality: Quality) -> str:
    cells = (
        label, dense, f"{bits:.2f}", f"{overall:.2f}", figure(quality.perplexity, 3),
        figure(quality.log_ratio, 4), figure(quality.divergence, 4),
        f"{quality.divergence_p99:.3f}", figure(quality.agreement, 3),
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def figure(found: Estimate, digits: int) -> str:
    return f"{found.value:.{digits}f} ± {found.standard_error:.{max(1, digits)}f}"


# -- llama.cpp -------------------------------------------------------------------------------------


def llama_rows(tools: Path, model: Path, text: Path, chunks: int, work: Path) -> Iterator[str]:
    """The table's rows of llama.cpp's types, from `model` in 16 bits."""
    base = work / f"{model.stem}.logits"
    ask = (tools / "llama-perplexity", "-f", text, "-c", WINDOW, "--chunks", chunks)
    run(*ask, "-m", model, "--kl-divergence-base", base)
    for kind in LLAMA_TYPES:
        quantised = work / f"{model.stem}-{kind}.gguf"
        if not quantised.exists():
            run(tools / "llama-quantize", model, quantised, kind)
        said = run(*ask, "-m", quantised, "--kl-divergence-base", base, "--kl-divergence")
        bits, overall = file_bits(quantised)
        yield line(f"llama.cpp {kind}", "its own", bits, overall, parse_log(said))
    base.unlink()


def parse_log(text: str) -> Quality:
    found = {}
    for name, pattern in _LOG_LINES.items():
        match = re.search(pattern, text)
        if match is None:
            raise SystemExit(f"llama-perplexity said nothing of {name}:\n{text[-2000:]}")
        found[name] = Estimate(float(match[1]), float(match[2] or 0))
    percent = found["agreement"]
    return Quality(
        found["perplexity"], found["log_ratio"], found["divergence"], found["p99"].value,
        Estimate(percent.value / 100, percent.standard_error / 100),
    )  # fmt: skip


def file_bits(path: Path) -> tuple[float, float]:
    """Bits per FFN weight and per weight that a token meets. The embeddings are not met, unless
    they are the head."""
    tensors = [t for t in gguf.GGUFReader(path).tensors if len(t.shape) > 1]
    if any(t.name == "output.weight" for t in tensors):
        tensors = [t for t in tensors if t.name != "token_embd.weight"]

    def bits(some: list[gguf.ReaderTensor]) -> float:
        return 8 * sum(int(t.n_bytes) for t in some) / sum(int(t.n_elements) for t in some)

    return bits([t for t in tensors if ".ffn_" in t.name]), bits(tensors)


def run(*words: object) -> str:
    done = subprocess.run(
        [str(word) for word in words], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        raise SystemExit(f"{words[0]} failed:\n{done.stdout[-2000:]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--text", type=Path, default=EVAL_TEXT)
    parser.add_argument("--llama", type=Path, help="folder with llama.cpp's programs")
    parser.add_argument("--gguf", type=Path, help="the same weights in 16 bits, for --llama")
    parser.add_argument("--work", type=Path, default=Path("."), help="where its files go")
    given = parser.parse_args()
    if (given.llama is None) != (given.gguf is None):
        parser.error("--llama and --gguf go together")
    try:
        bundle = open_bundle(given.bundle)
        content = given.text.read_text(encoding="utf-8")
        ids = tokenizer_of(bundle).encode(content)[: given.tokens]
        print(HEADER)
        print("|---" * (HEADER.count("|") - 1) + "|")
        for row in measure(bundle, ids):
            print(row, flush=True)
    except M2CError as error:
        raise SystemExit(str(error)) from None
    if given.llama is not None:
        chunks = len(ids) // WINDOW
        for row in llama_rows(given.llama, given.gguf, given.text, chunks, given.work):
            print(row, flush=True)


if __name__ == "__main__":
    main()
