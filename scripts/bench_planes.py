"""Sizes of the planes and perplexity of the mixes, as BENCHMARKS.md reports them.

    python scripts/bench_planes.py [--tokens 8192] [--work DIR]

Real weights: SmolLM2-135M-Instruct, as its GGUF and exported as a BF16 checkpoint. Synthetic
weights (random, called so): one layer shape of 64 M weights, Gaussian and Student-t(4), BF16.
Every bundle is compared with its checkpoint bit for bit.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from m2c.bundle.bundle import Bundle, open_bundle
from m2c.bundle.shard import PLANES
from m2c.contents import tokenizer_of
from m2c.engine import Engine, RunOptions
from m2c.evaluate import perplexity
from m2c.hub import resolve_model
from m2c.model.mix import Mix, bits_per_weight

HERE = Path(__file__).parent
EVAL_TEXT = HERE.parent / "tests" / "data" / "austen_eval.txt"
MIXES = ("100/0/0", "0/100/0", "0/0/100", "default", "5/15/80", "25/25/50")
SYNTHETIC = {
    "model_type": "llama", "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 4096,
    "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 4,
    "vocab_size": 2048, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}  # fmt: skip


def m2c(*words: str) -> str:
    command = [sys.executable, "-m", "m2c.cli.app", *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def make_checkpoint_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_checkpoint", HERE / "make_checkpoint.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError("make_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bundle_of(model: str, work: Path, tokens: int) -> Bundle:
    profile = work / f"{Path(model).name}.profile"
    if not profile.exists():
        m2c("profile", model, "--tokens", str(tokens), "-o", str(profile))
    name = Path(model).name
    path = m2c("pack", model, "--profile", str(profile), "--ssd", str(work), "--name", name)
    m2c("check", path, "--source", model)
    return open_bundle(Path(path))


def size_row(title: str, bundle: Bundle, checkpoint_nbytes: int) -> str:
    facts = json.loads(m2c("show", str(bundle.path), "--json"))
    count = sum(facts["weights"].values())
    cells = []
    total = 0
    for sizes in (facts["planes"][plane] for plane in PLANES):
        both = sum(sizes.values())
        total += both
        cells.append(f"{8 * both / count:.2f}")
    whole = sum(f.stat().st_size for f in bundle.path.rglob("*") if f.is_file())
    share = whole / checkpoint_nbytes
    return f"| {title} | {' | '.join(cells)} | {8 * total / count:.2f} | {share:.1%} |"


def print_sizes(work: Path) -> None:
    maker = make_checkpoint_module()
    print("| source | INT4 | INT8 adds | exact adds | all three | bundle / 16-bit checkpoint |")
    print("|---|---|---|---|---|---|")
    for distribution in ("gaussian", "student"):
        folder = work / f"synthetic-{distribution}"
        if not folder.exists():
            maker.write_checkpoint(folder, SYNTHETIC, dtype="bf16", distribution=distribution)
        bundle = bundle_of(str(folder), work, tokens=256)
        print(size_row(f"BF16 {distribution} (synthetic)", bundle, weights_nbytes(folder)))
    folder = work / "smollm2-bf16"
    if not folder.exists():
        script, gguf = HERE / "make_checkpoint.py", str(resolve_model("smollm2-135m").path)
        command = [sys.executable, str(script), str(folder), "--from-gguf", gguf, "--dtype", "bf16"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    nbytes = weights_nbytes(folder)
    print(size_row("SmolLM2-135M as BF16", bundle_of(str(folder), work, 4096), nbytes))
    print(size_row("SmolLM2-135M, GGUF (FP16)", bundle_of("smollm2-135m", work, 4096), nbytes))


def weights_nbytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def print_perplexities(work: Path, tokens: int) -> None:
    bundle = bundle_of("smollm2-135m", work, 4096)
    ids = tokenizer_of(bundle).encode(EVAL_TEXT.read_text(encoding="utf-8"))[:tokens]
    exact = _exact_bits(bundle)
    print(
        f"\n| mix FP16/INT8/INT4 | others | bits per FFN weight | perplexity, {len(ids)} tokens |"
    )
    print("|---|---|---|---|")
    for text in MIXES:
        mix = Mix.of_percent(bundle.manifest.mix.percent) if text == "default" else Mix.parse(text)
        with Engine(bundle, RunOptions(mix=mix, ctx_size=512, kv_type="f32")) as engine:
            result = perplexity(engine, ids)
            dense = engine.shape.dense
        label = f"{mix} (default)" if text == "default" else str(mix)
        bits = bits_per_weight(mix, exact)
        print(
            f"| {label} | {dense} | {bits:.2f} | {result.value:.3f} ± {result.standard_error:.2f} |"
        )


def _exact_bits(bundle: Bundle) -> float:
    from m2c.mixsearch import exact_bits

    return exact_bits(bundle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--work", type=Path, help="keep checkpoints and bundles here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="m2c-bench-") as temporary:
        work = given.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        print_sizes(work)
        print_perplexities(work, given.tokens)


if __name__ == "__main__":
    main()
