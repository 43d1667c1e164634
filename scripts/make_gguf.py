"""Writes the weights of a checkpoint as a GGUF file that llama.cpp loads.

    python scripts/make_gguf.py CHECKPOINT OUT.gguf [--type f16|bf16] [--tokenizer FILE.gguf]

For comparisons on the same weights: matrices in 16 bits, vectors in F32, q and k of a llama in the
row order that llama.cpp expects. Peak memory: one tensor, as stored and as written.
Knows nothing about tokenizers: it copies that of another GGUF file, or the file has none and can be
timed but not talked to.
"""

import argparse
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import torch

from m2c.bundle.files import atomic_file
from m2c.errors import BadInput, M2CError, UnsupportedModel
from m2c.model.checkpoint import Checkpoint, open_checkpoint, read_stored
from m2c.model.config import ModelConfig
from m2c.model.families import FAMILIES, by_pattern
from m2c.model.gguf_config import (
    LONG_FACTORS,
    PAIRED,
    ROPE_DIVISORS,
    SHORT_FACTORS,
    llama3_divisors,
)
from m2c.model.places import file_name, stored_tensors
from m2c.model.rope import LONGROPE


@dataclass(frozen=True)
class MatrixType:
    """A 16-bit type, as torch and as GGUF call it."""

    torch: torch.dtype
    ggml: gguf.GGMLQuantizationType
    file: gguf.LlamaFileType


TYPES: Final = {
    "f16": MatrixType(torch.float16, gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": MatrixType(
        torch.bfloat16, gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16
    ),
}
_ARCHITECTURES: Final = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}


_GATE: Final = ".shared_expert_gate.weight"
_WINDOWED: Final = ("phi3", "gemma2", "gemma3")  # whose metadata has a word for the window


def write_gguf(
    checkpoint: Checkpoint, out: Path, *, kind: str = "f16", tokenizer: Path | None = None
) -> None:
    """The whole model as the file `out`, which is complete or not there. kind: a key of `TYPES`.

    tokenizer: a GGUF file of the same vocabulary, whose tokenizer and chat template are copied.

    Raises BadInput for a matrix with numbers that `kind` cannot hold, UnsupportedModel for an
    activation that GGUF cannot name, NoSpace or StorageError when the disk refuses.
    """
    config = checkpoint.config
    _refuse_unsayable(checkpoint)
    names = together(in_file_order(stored_tensors(config)))
    with atomic_file(out) as file:
        # the writer opens its file by name; that is the same file, synced and renamed afterwards
        writer = gguf.GGUFWriter(file.name, FAMILIES[config.model_type].gguf)
        try:
            add_metadata(writer, config, checkpoint.name, TYPES[kind])
            if tokenizer is None:
                writer.add_tokenizer_model("no_vocab")
            else:
                copy_tokenizer(writer, tokenizer)
            add_tensor_infos(writer, checkpoint, names, TYPES[kind])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for array in arrays(checkpoint, names, TYPES[kind]):
                writer.write_tensor_data(array)
        finally:
            writer.close()


def _refuse_unsayable(checkpoint: Checkpoint) -> None:
    """Raises UnsupportedModel for what the metadata of the architecture cannot express."""
    config = checkpoint.config
    arch = FAMILIES[config.model_type].gguf
    family = FAMILIES[config.model_type]
    if not arch:
        raise UnsupportedModel(
            f"{checkpoint.path}: GGUF has no word for {config.model_type}",
            "compare with a program that reads safetensors",
        )
    if config.hidden_act != family.defaults.get(family.act_key, "silu"):
        raise UnsupportedModel(
            f"{checkpoint.path}: GGUF has no word for {config.hidden_act} in {arch}",
            "use a checkpoint with the usual activation of its family",
        )
    usual = by_pattern(config.num_hidden_layers, family.pattern) if family.pattern else None
    if config.sliding_window and (
        arch not in _WINDOWED or usual not in (None, list(config.sliding_layers))
    ):
        raise UnsupportedModel(
            f"{checkpoint.path}: GGUF has no word for these sliding windows in {arch}",
            "use a checkpoint whose attention sees everything",
        )
    unusual = config.o_bias or config.ffn_bias or not config.parallel_norms
    if arch == "falcon" and unusual:
        raise UnsupportedModel(
            f"{checkpoint.path}: GGUF has no word for biases or an FFN after attention in {arch}",
            "use a checkpoint like falcon-7b or falcon-40b",
        )
    adds_up = family.defaults.get("norm_topk_prob", True)
    if config.num_experts and config.norm_topk_prob != adds_up:
        raise UnsupportedModel(
            f"{checkpoint.path}: GGUF has no word for norm_topk_prob in {arch}",
            f"use a checkpoint where it is {str(adds_up).lower()}",
        )
    if config.query_pre_attn_scalar not in (None, config.head_dim):
        raise UnsupportedModel(
            f"{checkpoint.path}: GGUF has no word for query_pre_attn_scalar in {arch}",
            "use a checkpoint where it is the size of a head",
        )


def in_file_order(names: Iterable[str]) -> list[str]:
    """Layer by layer, as a forward pass needs them: a file read through is read ahead."""

    def place(name: str) -> tuple[int, int]:
        if name.startswith("model.layers."):
            return 1, int(name.split(".")[2])
        return (0, 0) if "embed_tokens" in name else (2, 0)

    return sorted(names, key=place)


def together(names: Iterable[str]) -> dict[str, list[str]]:
    """The stored tensors that each tensor of the file is made of: of experts, which are one
    tensor, all; by a name without the expert's number, which GGUF knows."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(re.sub(r"\.experts\.\d+\.", ".experts.", name), []).append(name)
    return found


def add_metadata(writer: gguf.GGUFWriter, config: ModelConfig, name: str, kind: MatrixType) -> None:
    writer.add_name(name)
    writer.add_file_type(kind.file)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.rotary_dim or config.head_dim)
    if config.layer_norms:
        writer.add_layer_norm_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    if config.num_experts:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.intermediate_size)
    if config.shared_expert_intermediate_size:
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    if config.attn_logit_softcapping:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.local_rope_theta:
        writer.add_rope_freq_base_swa(config.local_rope_theta)
    if config.residual_multiplier:
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    scaling = config.rope_scaling
    if scaling and scaling.rope_type == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling.factor)
    elif scaling:
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
        if scaling.rope_type == LONGROPE:
            writer.add_rope_scaling_attn_factors(scaling.attention_factor)


def copy_tokenizer(writer: gguf.GGUFWriter, source: Path) -> None:
    """All keys of `source` that begin with "tokenizer."."""
    for field in gguf.GGUFReader(source).fields.values():
        if field.name.startswith("tokenizer."):
            kind, *item = field.types
            writer.add_key_value(
                field.name, field.contents(), kind, sub_type=item[-1] if item else None
            )


def add_tensor_infos(
    writer: gguf.GGUFWriter, checkpoint: Checkpoint, names: dict[str, list[str]], kind: MatrixType
) -> None:
    config, shapes = checkpoint.config, stored_tensors(checkpoint.config)
    arch = _ARCHITECTURES[FAMILIES[config.model_type].gguf]
    known = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    f32, f16 = np.dtype(np.float32), np.dtype(np.float16)
    for table, values in rope_tables(config).items():
        writer.add_tensor_info(table, values.shape, f32, values.nbytes)
    for name, stored in names.items():
        renamed = known.get_name(file_name(config, name), try_suffixes=(".weight", ".bias"))
        if renamed is None:
            raise UnsupportedModel(f"{checkpoint.path}: GGUF has no name for {name}")
        shape = shapes[stored[0]] if len(stored) == 1 else (len(stored), *shapes[stored[0]])
        shape = shape[1:] if name.endswith(_GATE) else shape  # there it is a vector
        plain = is_plain(name, shape)
        dtype = f32 if plain else f16
        raw = gguf.GGMLQuantizationType.F32 if plain else kind.ggml
        nbytes = int(np.prod(shape)) * dtype.itemsize
        writer.add_tensor_info(renamed, shape, dtype, nbytes, raw_dtype=raw)


def is_plain(name: str, shape: tuple[int, ...]) -> bool:
    """Whether it is written in F32: vectors and routers are."""
    routers = (".mlp.gate.weight", ".block_sparse_moe.gate.weight", _GATE)
    return len(shape) == 1 or name.endswith(routers)


def arrays(
    checkpoint: Checkpoint, names: dict[str, list[str]], kind: MatrixType
) -> Iterator[np.ndarray]:
    """The tensors announced by `add_tensor_infos`, in that order; 16-bit ones as bytes."""
    config = checkpoint.config
    yield from rope_tables(config).values()
    for name, stored in names.items():
        parts = [read_stored(checkpoint, part, gguf=True) for part in stored]
        tensor = parts[0] if len(parts) == 1 else torch.stack(parts)
        del parts
        paired = FAMILIES[config.model_type].gguf in PAIRED
        if paired and name.split(".")[-2] in ("q_proj", "k_proj"):
            tensor = permute(tensor, config.head_dim)
        if is_plain(name, tuple(tensor.shape)):
            yield tensor.float().numpy()
            continue
        rounded = tensor.to(kind.torch)
        if bool(rounded.isinf().any()) and not bool(tensor.isinf().any()):
            message = f"{checkpoint.path}: {name} has numbers beyond the range of the type"
            raise BadInput(message, "write it with --type bf16")
        del tensor  # before the rounded one is copied to the file and the next is read
        yield rounded.contiguous().view(torch.uint8).numpy()


def permute(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of whole heads, [heads * head_dim, ...], from HF's order (x0, x1, ..., y0, y1, ...).

    GGUF has both members of a rotary pair side by side: (x0, y0, x1, y1, ...).
    """
    halves = rows.view(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def rope_tables(config: ModelConfig) -> dict[str, np.ndarray]:
    """[rotary / 2] f32 each, which GGUF has in place of the parameters of llama3 and longrope."""
    scaling, found = config.rope_scaling, dict[str, Any]()
    if scaling and scaling.rope_type == "llama3":
        turned = config.rotary_dim or config.head_dim
        found[ROPE_DIVISORS] = llama3_divisors(scaling.to_dict(), turned, config.rope_theta)
    elif scaling and scaling.rope_type == LONGROPE:
        found = {SHORT_FACTORS: scaling.short_factor, LONG_FACTORS: scaling.long_factor}
    return {name: np.array(table, np.float32) for name, table in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="a Hugging Face folder or a GGUF file")
    parser.add_argument("out", type=Path, help="the .gguf file to write")
    parser.add_argument("--type", choices=tuple(TYPES), default="f16", help="of the matrices")
    parser.add_argument("--tokenizer", type=Path, help="a GGUF file to copy the tokenizer of")
    given = parser.parse_args()
    try:
        write_gguf(
            open_checkpoint(given.checkpoint), given.out, kind=given.type, tokenizer=given.tokenizer
        )
    except M2CError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
