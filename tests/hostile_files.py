"""Small honest files of every kind that m2c reads, laid out so that a mutator gets at their parts.

Knows nothing about mutations.
"""

import json
import struct
from pathlib import Path
from typing import Any, Final

import numpy as np
from tiny_models import write_checkpoint
from vocabularies import message

from m2c.model.aliases import ALIASES

SMALL: Final = {
    "num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 16,
}  # fmt: skip
_ITEM_NBYTES: Final = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1}


def small_checkpoint(folder: Path) -> Path:
    return write_checkpoint(folder, SMALL)


def folder_with_tokenizer(folder: Path) -> Path:
    small_checkpoint(folder)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizers()[0]))
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    (folder / "LICENSE").write_text("free")
    return folder


def tell(folder: Path, key: str, value: Any) -> None:
    """One more key in the files that say what a model is."""
    for name in ("config.json", "tokenizer_config.json"):
        facts = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**facts, key: value}))


def configs() -> list[dict[str, Any]]:
    """A config.json of every alias, and two with all that a folder's may say."""
    found = [config.to_hf() for alias in ALIASES.values() if (config := alias.config())]
    more = {
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "quantization_config": None, "mlp_bias": False, "attention_bias": False, "head_dim": 64,
        "eos_token_id": [1, 2], "bos_token_id": 0, "partial_rotary_factor": 1.0,
    }  # fmt: skip
    factors = [1.0, 2.5, 40.25]
    long = ALIASES["phi4-mini"].config().to_hf() | {
        "head_dim": 8, "rope_scaling": {
            "type": "longrope", "short_factor": factors, "long_factor": factors, "factor": 2.0,
            "attention_factor": 1.2,
        },
    }  # fmt: skip
    return [*found, found[0] | more, long]


def safetensors_header(dtypes: tuple[str, ...] = ("F32", "BF16", "I64", "U8")) -> dict[str, Any]:
    """Of one small tensor of each dtype; the data they describe have `data_nbytes` bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for i, dtype in enumerate(dtypes):
        nbytes = 6 * _ITEM_NBYTES[dtype]
        entry = {"dtype": dtype, "shape": [2, 3], "data_offsets": [at, at + nbytes]}
        header[f"t{i}"], at = entry, at + nbytes
    header["empty"] = {"dtype": "F32", "shape": [0, 4], "data_offsets": [at, at]}
    return header


def data_nbytes(header: dict[str, Any]) -> int:
    return max(e["data_offsets"][1] for k, e in header.items() if k != "__metadata__")


def with_length(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


# -- GGUF ------------------------------------------------------------------------------------------


def _text(text: str) -> list[bytes]:
    data = text.encode()
    return [len(data).to_bytes(8, "little"), data]


def _u32(value: int) -> bytes:
    return struct.pack("<I", value)


def _pair(key: str, kind: int, *value: bytes) -> list[bytes]:
    return [*_text(key), _u32(kind), *value]


def _array(key: str, kind: int, items: list[list[bytes]]) -> list[bytes]:
    flat = [piece for item in items for piece in item]
    return _pair(key, 9, _u32(kind), len(items).to_bytes(8, "little"), *flat)


def gguf_pieces() -> list[bytes]:
    """A llama of the shape SMALL with a vocabulary, every number a piece of its own."""
    words = ["<s>", "</s>", "a", "b", "ab", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m"]
    numbers = {
        "embedding_length": 8, "feed_forward_length": 12, "block_count": 1, "context_length": 64,
        "attention.head_count": 2, "attention.head_count_kv": 1, "rope.dimension_count": 4,
    }  # fmt: skip
    pairs = [
        _pair("general.architecture", 8, *_text("llama")), _pair("general.alignment", 4, _u32(32)),
        *(_pair(f"llama.{key}", 4, _u32(value)) for key, value in numbers.items()),
        _pair("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5)),
        _pair("llama.rope.freq_base", 6, struct.pack("<f", 1e4)),
        _pair("tokenizer.ggml.model", 8, *_text("gpt2")),
        _pair("tokenizer.ggml.pre", 8, *_text("smollm")),
        _array("tokenizer.ggml.tokens", 8, [_text(word) for word in words]),
        _array("tokenizer.ggml.token_type", 5, [[_u32(3 if "<" in word else 1)] for word in words]),
        _array("tokenizer.ggml.scores", 6, [[struct.pack("<f", -i)] for i in range(len(words))]),
        _array("tokenizer.ggml.merges", 8, [_text("a b")]),
        _pair("tokenizer.ggml.bos_token_id", 4, _u32(0)),
        _pair("tokenizer.ggml.eos_token_id", 4, _u32(1)),
        _pair("tokenizer.ggml.add_bos_token", 7, b"\1"),
        _pair("tokenizer.chat_template", 8, *_text("{{ messages }}")),
        _pair("odd.u64", 10, bytes(8)), _pair("odd.f64", 12, bytes(8)),
        _array("odd.bools", 7, [[b"\0"], [b"\1"]]), _array("odd.i8", 1, [[b"\x80"]]),
    ]  # fmt: skip
    infos, at = [], 0
    for name, shape in _GGUF_SHAPES.items():
        dims = [side.to_bytes(8, "little") for side in shape[::-1]]
        infos.append([*_text(name), _u32(len(shape)), *dims, _u32(0), at.to_bytes(8, "little")])
        at += -(-4 * int(np.prod(shape)) // 32) * 32
    counts = [len(infos).to_bytes(8, "little"), len(pairs).to_bytes(8, "little")]
    pieces = [b"GGUF", _u32(3), *counts]
    pieces += [piece for group in (*pairs, *infos) for piece in group]
    head = sum(map(len, pieces))
    return [*pieces, bytes(-head % 32), bytes(at)]


_GGUF_SHAPES: Final = {
    "token_embd.weight": (16, 8), "output_norm.weight": (8,), "output.weight": (16, 8),
    "rope_freqs.weight": (2,), "blk.0.attn_norm.weight": (8,), "blk.0.ffn_norm.weight": (8,),
    "blk.0.attn_q.weight": (8, 8), "blk.0.attn_k.weight": (4, 8), "blk.0.attn_v.weight": (4, 8),
    "blk.0.attn_output.weight": (8, 8), "blk.0.ffn_gate.weight": (12, 8),
    "blk.0.ffn_up.weight": (12, 8), "blk.0.ffn_down.weight": (8, 12),
}  # fmt: skip


# -- tokenizers ------------------------------------------------------------------------------------


def tokenizers() -> list[dict[str, Any]]:
    """Small tokenizer.json that use most of what the format offers."""
    vocab = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", "▁", "a", "b", "ab", "▁a"])}
    special = {
        "id": 0, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": True,
    }  # fmt: skip
    bpe = {
        "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": False,
        "ignore_merges": False, "vocab": vocab, "merges": [["a", "b"], ["▁", "a"]],
    }  # fmt: skip
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    byte_level = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True,
    }  # fmt: skip
    split = {
        "type": "Split", "pattern": {"Regex": r"\p{L}+|\s+(?!\S)"}, "behavior": "Isolated",
        "invert": False,
    }  # fmt: skip
    template = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }  # fmt: skip
    fallback = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    first = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [special, special | {"id": 1, "content": "</s>"}],
        "normalizer": {
            "type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace],
        },
        "pre_tokenizer": None, "post_processor": template,
        "decoder": {"type": "Sequence", "decoders": [replace, *fallback, strip]}, "model": bpe,
    }  # fmt: skip
    second = first | {
        "truncation": {
            "direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0,
        },
        "padding": {
            "strategy": {"Fixed": 16}, "direction": "Left", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>",
        },
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, {"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": byte_level, "decoder": byte_level,
    }  # fmt: skip
    unigram = {
        "type": "Unigram", "unk_id": 2, "byte_fallback": False,
        "vocab": [[word, -float(i)] for word, i in vocab.items()],
    }  # fmt: skip
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    third = first | {"model": unigram, "pre_tokenizer": metaspace, "decoder": metaspace}
    return [first, second, third]


SETTINGS: Final = {
    "add_bos_token": True, "bos_token": "<s>", "eos_token": {"content": "</s>"},
    "chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "added_tokens_decoder": {"0": {"content": "<s>", "special": True}},
}  # fmt: skip


def spm_fields() -> list[tuple[int, Any]]:
    """The fields of a small tokenizer.model; inner messages are lists of fields."""
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}
    words = ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "▁a"]
    pieces = [[(1, w.encode()), (2, -float(i)), (3, kinds.get(w, 1))] for i, w in enumerate(words)]
    trainer = [(3, 2), (24, 0), (35, 0), (41, 1), (42, 2)]
    rules = [(1, b"identity"), (2, b""), (3, 0), (4, 0), (5, 1)]
    return [*((1, piece) for piece in pieces), (2, trainer), (3, rules)]


def spm_bytes(fields: list[tuple[int, Any]]) -> bytes:
    """A message; numbers beyond a protobuf's are cut."""
    flat = [(n, spm_bytes(v) if isinstance(v, list) else v) for n, v in fields]
    return message(flat)
