"""GGUF files for tests: honest ones through the gguf package, hostile ones byte by byte."""

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from m2c.model.gguf_config import PAIRED
from m2c.model.gguf_file import hf_tensor_name

HIDDEN, FFN, HEADS, KV_HEADS, VOCAB = 256, 512, 4, 2, 40
HEAD_DIM = HIDDEN // HEADS
META = {
    "embedding_length": HIDDEN,
    "feed_forward_length": FFN,
    "block_count": 1,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "context_length": 512,
    "vocab_size": VOCAB,
}


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """What converters to GGUF do to the rows of q and k of a llama."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def shapes(arch: str, biased: bool) -> dict[str, tuple[int, ...]]:
    """By GGUF name."""
    kv = KV_HEADS * HEAD_DIM
    found: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCAB, HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_k.weight": (kv, HIDDEN),
        "blk.0.attn_v.weight": (kv, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate.weight": (FFN, HIDDEN),
        "blk.0.ffn_up.weight": (FFN, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, FFN),
    }
    if biased or arch == "qwen2":
        found |= {"blk.0.attn_q.bias": (HIDDEN,)}
        found |= {f"blk.0.attn_{which}.bias": (kv,) for which in "kv"}
    if biased:
        found |= {"blk.0.attn_output.bias": (HIDDEN,)}
    return found


def write(
    path: Path,
    arch: str = "llama",
    *,
    kind: str = "F32",
    biased: bool = False,
    meta: dict[str, Any] | None = None,
    more: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """A one-layer model, written by the gguf package; returns its f32 weights by HF name."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (META | {"attention.layer_norm_rms_epsilon": 1e-5} | (meta or {})).items():
        if value is None:
            continue
        key = key if key.startswith(("split.", "tokenizer.")) else f"{arch}.{key}"
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        else:
            writer.add_uint32(key, value)
    rng = np.random.default_rng(0)
    weights = {}
    for name, shape in shapes(arch, biased).items():
        weight = rng.standard_normal(shape).astype(np.float32)
        weights[str(hf_tensor_name(name))] = weight
        if arch in PAIRED and "attn_q." in name:
            weight = permute(weight, HEADS)
        elif arch in PAIRED and "attn_k." in name:
            weight = permute(weight, KV_HEADS)
        qtype = gguf.GGMLQuantizationType[kind if len(shape) > 1 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(weight, qtype), raw_dtype=qtype)
    for name, weight in (more or {}).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    return text(name) + dims + struct.pack("<IQ", kind, offset)


def raw(
    pairs: list[bytes],
    infos: list[bytes],
    nbytes: int,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A header and `nbytes` bytes of tensor data after its padding."""
    tensors, keys = counts or (len(infos), len(pairs))
    head = magic + struct.pack("<IQQ", version, tensors, keys) + b"".join(pairs + infos)
    return head + bytes(-len(head) % 32) + bytes(nbytes)
