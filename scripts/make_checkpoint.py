"""Writes a synthetic checkpoint (random weights), or exports a GGUF file as a checkpoint.

    python scripts/make_checkpoint.py OUT --shape llama2-7b
    python scripts/make_checkpoint.py OUT --layers 2 --hidden 64 --intermediate 160 --heads 4
    python scripts/make_checkpoint.py OUT --experts 8 --active 2
    python scripts/make_checkpoint.py OUT --from-gguf model.gguf [--dither]

A synthetic model has the shape, the bytes and the speed of a real one and says nothing sensible.
The result is a folder as Hugging Face lays it out: config.json, tokenizer.json, one safetensors
file per layer and their index. Peak memory: one layer in the output type plus a small buffer.
Knows nothing about bundles.
"""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from m2c.data import calibration_text
from m2c.errors import BadInput, M2CError
from m2c.model.aliases import ALIASES
from m2c.model.checkpoint import open_checkpoint, read_stored
from m2c.model.config import ModelConfig
from m2c.model.places import file_name, norm_offset, stored_tensors
from m2c.tokenizer_gguf import build_from_gguf, build_tokenizer_config

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
DISTRIBUTIONS = ("gaussian", "student")

BOS, EOS = "<|begin|>", "<|end|>"  # ids 0 and 1 of every synthetic model
MAX_TOKENS = 2048  # of the tokenizer; the model's vocabulary may be larger
MIN_TOKENS = 258  # all bytes, BOS and EOS

_DEGREES_OF_FREEDOM = 5.0  # of the heavy-tailed weights: a kurtosis of 9 where Gaussians have 3
GGUF_BLOCK = 32  # weights that share a step in every type of GGUF; some have smaller blocks
_ROWS = 1 << 12  # dithered at once
_CHUNK = 1 << 24  # weights drawn at once: 64 MiB of float32


def write_checkpoint(
    directory: Path,
    config: Mapping[str, Any],
    *,
    dtype: str = "bf16",
    distribution: str = "gaussian",
    seed: int = 0,
) -> None:
    """A synthetic model of the shape `config` (keys of a Hugging Face config.json).

    The same arguments give the same bytes. bos and eos become ids 0 and 1. A vocabulary of
    less than 258 has no room for all bytes, and no tokenizer.json is written.
    """
    vocab_size = ModelConfig.from_hf(config).vocab_size
    has_tokenizer = vocab_size >= MIN_TOKENS
    ids = {"bos_token_id": 0, "eos_token_id": 1} if has_tokenizer else {}
    name = f"synthetic, random {distribution} weights, seed {seed}"
    written = {**config, **ids, "_name_or_path": name, "torch_dtype": dtype_name(dtype)}
    facts = ModelConfig.from_hf(written)
    written.setdefault("architectures", facts.to_hf()["architectures"])
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", written)
    if has_tokenizer:
        write_tokenizer(directory, vocab_size)

    def tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        drawn = random_tensor(
            name, shape, facts.num_hidden_layers, dtype=DTYPES[dtype],
            distribution=distribution, seed=seed,
        )  # fmt: skip
        return drawn.sub_(norm_offset(facts, name))

    shapes = stored_tensors(facts)
    groups = by_layer(shapes)
    shards = (
        {file_name(facts, name): tensor(name, shapes[name]) for name in names} for names in groups
    )
    write_shards(directory, shards, len(groups))


def random_tensor(
    name: str,
    shape: tuple[int, ...],
    layers: int,
    *,
    dtype: torch.dtype,
    distribution: str,
    seed: int,
) -> torch.Tensor:
    """The weights called `name`: a function of the name and the seed, not of the order."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    mean, std = (
        (1.0, 0.1) if name.endswith("norm.weight") else (0.0, weight_std(name, shape, layers))
    )
    tensor = torch.empty(shape, dtype=dtype)
    for part in tensor.view(-1).split(_CHUNK):
        part.copy_(standard(len(part), distribution, generator).mul_(std).add_(mean))
    return tensor


def weight_std(name: str, shape: tuple[int, ...], layers: int) -> float:
    """Keeps activations near 1 through any number of layers (0.016 at a hidden size of 4096)."""
    if name.endswith(".bias"):
        return 0.1
    if ".embed_" in name:
        return 0.3
    std = 1 / math.sqrt(shape[1])
    # 2 * layers outputs add up in the residual stream
    gives = ("o_proj", "down_proj", ".w2.")
    return std / math.sqrt(2 * layers) if any(part in name for part in gives) else std


def standard(count: int, distribution: str, generator: torch.Generator) -> torch.Tensor:
    """`count` random float32 of mean 0 and variance 1."""
    if distribution == "gaussian":
        return torch.empty(count).normal_(generator=generator)
    # Bailey's polar method: one draw of Student's t from two uniform numbers, no rejection
    freedom = _DEGREES_OF_FREEDOM
    radius = 1 - torch.rand(count, generator=generator)  # never 0
    radius = radius.pow_(-2 / freedom).sub_(1).mul_(freedom - 2).sqrt_()
    angle = torch.rand(count, generator=generator).mul_(2 * math.pi)
    return radius.mul_(angle.cos_())


def by_layer(names: Iterable[str]) -> list[list[str]]:
    """Names grouped into shards: one per layer, one for the embedding, one for the rest."""
    groups: dict[str, list[str]] = {}
    for name in names:
        in_layer = name.startswith("model.layers.")
        key = name.split(".")[2] if in_layer else name.rpartition("embed_tokens")[1]
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def write_shards(directory: Path, shards: Iterator[dict[str, torch.Tensor]], count: int) -> None:
    """Consumes `count` shards one at a time; the index is written last."""
    weight_map: dict[str, str] = {}
    nbytes = 0
    for number, tensors in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{count:05}.safetensors"
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        nbytes += sum(tensor.nbytes for tensor in tensors.values())
        print(f"{file} {nbytes / 1e9:.2f} GB", file=sys.stderr)
        del tensors  # before the next shard is made
    index = {"metadata": {"total_size": nbytes}, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """A byte-level BPE learned from the calibration text, with at most `vocab_size` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, MAX_TOKENS),
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([calibration_text()], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": BOS, "eos_token": EOS, "add_bos_token": True}
    write_json(directory / "tokenizer_config.json", config)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def export_gguf(
    directory: Path, source: Path, *, dtype: str, dither: bool = False, seed: int = 0
) -> None:
    """The model in a GGUF file, dequantised and rounded to `dtype`, with a tokenizer.json.

    dither: take the weights off the file's grid, see `dithered`.
    Raises BadInput or UnsupportedModel as `open_checkpoint` and `build_from_gguf` do.
    """
    checkpoint = open_checkpoint(source)
    metadata = checkpoint.gguf_metadata()
    if metadata is None:
        raise BadInput(f"{source}: not a GGUF file", "pass the path of a .gguf file")
    tokenizer = build_from_gguf(metadata)
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in checkpoint.sidecars().items():
        (directory / name).write_bytes(data)
    config = {**checkpoint.config.to_hf(), "torch_dtype": dtype_name(dtype)}
    write_json(directory / "config.json", config)
    (directory / "tokenizer.json").write_bytes(tokenizer)
    (directory / "tokenizer_config.json").write_bytes(build_tokenizer_config(metadata))

    def tensor(name: str) -> torch.Tensor:
        tensor = read_stored(checkpoint, name)
        if dither and tensor.ndim > 1:
            tensor = dithered(tensor.float(), generator)
        tensor = tensor - norm_offset(checkpoint.config, name)
        return tensor.to(DTYPES[dtype]).contiguous()

    generator = torch.Generator().manual_seed(seed)
    facts = checkpoint.config
    groups = by_layer(stored_tensors(facts))
    shards = ({file_name(facts, name): tensor(name) for name in names} for names in groups)
    write_shards(directory, shards, len(groups))


def dithered(weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Quantised weights [rows, n] f32 plus noise as large as the rounding that they went through.

    Each group of GGUF_BLOCK gets uniform noise of one step of its grid, found as the least distance
    between two of its values. Afterwards no quantiser finds the levels of an earlier one, so that
    quantisers can be compared; the model is as good as one that was rounded twice.
    """
    noisy = torch.empty_like(weights)
    for part, out in zip(weights.split(_ROWS), noisy.split(_ROWS), strict=True):
        groups = part.reshape(-1, GGUF_BLOCK)
        gaps = groups.sort(dim=1).values.diff(dim=1)
        # values on one level differ by rounding when they were dequantised
        apart = gaps > 1e-4 * groups.abs().amax(dim=1, keepdim=True)
        step = gaps.where(apart, math.inf).amin(dim=1, keepdim=True)
        step = step.where(step.isfinite(), 0)
        noise = torch.rand(groups.shape, generator=generator) - 0.5
        out.copy_((groups + noise * step).view_as(part))
    return noisy


def dtype_name(dtype: str) -> str:
    """As config.json spells it: bfloat16."""
    return str(DTYPES[dtype]).removeprefix("torch.")


def shape_of(options: argparse.Namespace) -> dict[str, Any]:
    """The config that the command line describes."""
    if options.shape:
        if options.shape not in ALIASES:
            raise SystemExit(f"no shape {options.shape}: choose from {', '.join(ALIASES)}")
        return dict(ALIASES[options.shape].hf_config)
    experts = {
        "model_type": "mixtral", "num_local_experts": options.experts,
        "num_experts_per_tok": options.active,
    }  # fmt: skip
    return {
        "model_type": "llama",
        "hidden_act": options.activation,
        "num_hidden_layers": options.layers,
        "hidden_size": options.hidden,
        "intermediate_size": options.intermediate,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.kv_heads or options.heads,
        "vocab_size": options.vocab,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        **(experts if options.experts else {}),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="folder to write, made if it does not exist")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--shape", help="shape of a published model, such as llama2-7b")
    source.add_argument("--from-gguf", type=Path, metavar="FILE", help="export this model instead")
    parser.add_argument("--dither", action="store_true", help="take exported weights off the grid")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=688)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, help="as many as --heads unless given")
    parser.add_argument("--experts", type=int, default=0, help="of a layer, --intermediate each")
    parser.add_argument("--active", type=int, default=2, help="experts that a token uses")
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--activation", choices=("silu", "relu"), default="silu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--distribution", choices=DISTRIBUTIONS, default="gaussian")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    try:
        if options.from_gguf:
            export_gguf(
                options.directory, options.from_gguf, dtype=options.dtype,
                dither=options.dither, seed=options.seed,
            )  # fmt: skip
            return
        write_checkpoint(
            options.directory,
            shape_of(options),
            dtype=options.dtype,
            distribution=options.distribution,
            seed=options.seed,
        )
    except M2CError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
