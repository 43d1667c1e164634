"""A GGUF model seen as a Hugging Face checkpoint: its names, its row order, its config keys.

GGUF renames the tensors, and for the llama architecture reorders the rows of q and k so that the
two halves of a rotary pair are neighbours; both are undone here. Quantized rows come out as f32.
Knows nothing about tokenizers: `metadata` is handed on as it is.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from m2c.errors import BadInput, UnsupportedModel
from m2c.model.families import FAMILIES, SUPPORTED
from m2c.model.gguf_config import PAIRED, ROPE_TABLES, config_from_metadata
from m2c.model.gguf_header import TensorInfo, read_header
from m2c.model.mixture import MOST_EXPERTS
from m2c.model.ranged_file import RangedFile, check_rows

_TOP_NAMES: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output_norm.bias": "model.norm.bias",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_NAMES: Final = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_FUSED_NAMES: Final = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_QKV_NAMES: Final = {"attn_qkv": "self_attn.qkv_proj"}
# {}: the number of an expert, of which a file has all in one tensor
_EXPERT_NAMES: Final = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_SHARED_NAMES: Final = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_MIXTRAL_NAMES: Final = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
# of falcon with two norms a layer: the second one is that of attention
_SECOND_NORM: Final = "attn_norm_2"
_TWO_NORMS: Final = {"attn_norm": "post_attention_layernorm", _SECOND_NORM: "input_layernorm"}
_OTHER_NAMES: Final = {
    "phi3": _FUSED_NAMES, "gemma2": _GEMMA_NAMES, "gemma3": _GEMMA_NAMES, "falcon": _QKV_NAMES,
    "llama": _MIXTRAL_NAMES, "qwen3moe": _EXPERT_NAMES,
    "qwen2moe": _EXPERT_NAMES | _SHARED_NAMES,
}  # fmt: skip
_LAYER = re.compile(r"blk\.(0|[1-9]\d{0,3})\.(\w+)\.(weight|bias)", re.ASCII)
_SPLIT = re.compile(r"-\d{5}-of-(\d{5})\.gguf", re.ASCII)
_STORED: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GgufFile:
    """Opened at once, read on demand. Tensors go by their Hugging Face names."""

    def __init__(self, path: Path) -> None:
        """Raises BadInput for a damaged file, UnsupportedModel for a model we do not run."""
        self.path = path
        self.file = RangedFile(path)
        header = read_header(self.file)
        self.header_nbytes = header.nbytes
        self.metadata: dict[str, Any] = header.metadata
        _refuse_split(path, header.metadata)
        arch = header.metadata.get("general.architecture")
        self.tensors: Mapping[str, TensorInfo] = _rename(header.tensors, path, arch)
        self.config = config_from_metadata(
            header.metadata,
            self.tensors.keys(),
            self._rope_tables(header.tensors),
            file=str(path),
        )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) as f32, f16 or bf16 where stored so, else dequantized to f32.

        Raises BadInput when the file was cut since it was opened, KeyError and IndexError for a
        name or rows that are not there.
        """
        info = self.tensors[name]
        end = check_rows(name, start, stop, info.shape[0])
        permuted = FAMILIES[self.config.model_type].gguf in PAIRED
        if not permuted or name.split(".")[-2] not in ("q_proj", "k_proj"):
            return self._read(info, start, end)
        # a row moves within its head only: read whole heads, put their rows back, cut
        size = self.config.head_dim
        first, last = start // size * size, min(-(-end // size) * size, info.shape[0])
        rows = unpermute(self._read(info, first, last), size)
        return rows[start - first : end - first].clone()

    def _rope_tables(self, tensors: Mapping[str, TensorInfo]) -> dict[str, np.ndarray]:
        """[rotary / 2] f32 each: llama3 models have one table, those with longrope two."""
        found = {}
        for name in ROPE_TABLES:
            if (info := tensors.get(name)) is None:
                continue
            if info.type_name != "F32" or len(info.shape) != 1 or info.shape[0] > 2**12:
                raise BadInput(f"{self.path}: {name} is not a short vector of F32")
            found[name] = self._read(info, 0, info.shape[0]).numpy()
        return found

    def _read(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) in the order of the file."""
        row_nbytes = info.nbytes // info.shape[0]
        data = self.file.read(info.offset + start * row_nbytes, (stop - start) * row_nbytes)
        return _decode(data, info.type_name, (stop - start, *info.shape[1:]))


def _decode(data: bytearray, type_name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if not data:
        return torch.empty(shape, dtype=_STORED.get(type_name, torch.float32))
    if dtype := _STORED.get(type_name):
        return torch.frombuffer(data, dtype=dtype).view(shape)
    import gguf  # here, because it takes a while and F16 files do not need it

    rows = np.frombuffer(data, np.uint8).reshape(shape[0], -1)
    values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[type_name])
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).view(shape)


def unpermute(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of whole heads from GGUF's order (x0, y0, x1, y1, ...) to HF's (x0, x1, ..., y0, ...).

    rows: [heads * head_dim, ...]. Rotary embedding turns the pairs (x, y).
    """
    pairs = rows.view(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def _rename(tensors: Mapping[str, TensorInfo], path: Path, arch: Any) -> dict[str, TensorInfo]:
    found = dict[str, TensorInfo]()
    two_norms = f"blk.0.{_SECOND_NORM}.weight" in tensors
    for name, info in tensors.items():
        if name in ROPE_TABLES:
            continue
        hf_name = hf_tensor_name(name, arch, two_norms=two_norms)
        if hf_name is None:
            raise UnsupportedModel(
                f"{path}: the tensor {name[:80]!r} belongs to no model this version runs",
                SUPPORTED,
            )
        if len(info.shape) == 1 and info.type_name not in _STORED:
            raise BadInput(f"{path}: the vector {name[:80]!r} is quantized")
        if hf_name.endswith(".shared_expert_gate.weight") and len(info.shape) == 1:
            info = replace(info, shape=(1, *info.shape))  # elsewhere it is a matrix of one row
        found |= _experts(hf_name, info, path) if "{}" in hf_name else {hf_name: info}
    return found


def _experts(name: str, info: TensorInfo, path: Path) -> dict[str, TensorInfo]:
    """A tensor [experts, rows, columns] as the matrices that it is made of."""
    if len(info.shape) != 3 or info.shape[0] > MOST_EXPERTS:
        raise BadInput(f"{path}: {name[:80]} has the shape {list(info.shape)}")
    count, *shape = info.shape
    nbytes = info.nbytes // count
    return {
        name.format(i): TensorInfo(info.type_name, tuple(shape), info.offset + i * nbytes, nbytes)
        for i in range(count)
    }


def hf_tensor_name(name: str, arch: Any = "llama", *, two_norms: bool = False) -> str | None:
    """The Hugging Face name of a GGUF tensor, with {} for the number of an expert; None if no model
    we run has such a tensor."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    match = _LAYER.fullmatch(name)
    names = _LAYER_NAMES | _OTHER_NAMES.get(str(arch), {}) | (_TWO_NORMS if two_norms else {})
    if not match or match[2] not in names:
        return None
    return f"model.layers.{match[1]}.{names[match[2]]}.{match[3]}"


def _refuse_split(path: Path, metadata: Mapping[str, Any]) -> None:
    match = _SPLIT.search(path.name)
    parts = metadata.get("split.count", int(match[1]) if match else 0)
    if type(parts) is not int or parts > 1:
        raise UnsupportedModel(
            f"{path}: one of {parts} parts of a split GGUF",
            "join them first: llama-gguf-split --merge FIRST_PART JOINED.gguf",
        )
