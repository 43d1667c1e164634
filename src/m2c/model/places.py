"""Where checkpoints keep the tensors of a model: some families store several matrices as one, or
call them otherwise.

Knows nothing about files or formats; names are those of Hugging Face's llama.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from m2c.model.config import ModelConfig
from m2c.model.families import FAMILIES
from m2c.model.tensors import expected_tensors

_FUSED: Final = {
    "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}  # fmt: skip
# what safetensors files of a family write in place of parts of our names
_WORDS: Final[Mapping[str, Mapping[str, str]]] = {
    "falcon": {
        "model.embed_tokens": "transformer.word_embeddings", "model.layers": "transformer.h",
        "model.norm": "transformer.ln_f", "self_attn.qkv_proj": "self_attention.query_key_value",
        "self_attn.o_proj": "self_attention.dense", "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    },
    "opt": {
        "model.norm": "model.decoder.final_layer_norm", "model.embed": "model.decoder.embed",
        "model.layers": "model.decoder.layers", "input_layernorm": "self_attn_layer_norm",
        "post_attention_layernorm": "final_layer_norm", "self_attn.o_proj": "self_attn.out_proj",
        "mlp.up_proj": "fc1", "mlp.down_proj": "fc2",
    },
}  # fmt: skip
_TWO_NORMS: Final = {"input_layernorm": "ln_attn", "post_attention_layernorm": "ln_mlp"}


_EXPERT_MATRICES: Final = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


@dataclass(frozen=True)
class Place:
    """Rows of the stored tensor `stored`: those from `start` on, or runs of `run` rows, each
    beginning `step` rows after the one before."""

    stored: str
    start: int
    run: int = 0
    step: int = 0

    def parts(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Where rows [start, stop) are stored: (first, end) of each piece."""
        if not self.run:
            yield self.start + start, self.start + stop
            return
        while start < stop:
            number, at = divmod(start, self.run)
            count = min(self.run - at, stop - start)
            begin = self.start + number * self.step + at
            yield begin, begin + count
            start += count


def places(config: ModelConfig, *, gguf: bool = False) -> dict[str, Place]:
    """The place of each of `expected_tensors`, in safetensors or in GGUF files."""
    found, used = {}, dict[str, int]()
    grouped = FAMILIES[config.model_type].grouped and not gguf
    kv_heads = config.num_key_value_heads
    for name, shape in expected_tensors(config).items():
        stored, rows = _stored_name(config, name), shape[0]
        start = used.get(stored, 0)
        used[stored] = start + rows
        found[name] = Place(stored, start)
        if grouped and ".qkv_proj." in stored:
            # the heads of q that share keys, their head of k, their head of v; then the next ones
            step = (config.num_attention_heads // kv_heads + 2) * config.head_dim
            found[name] = Place(stored, start // kv_heads, rows // kv_heads, step)
    return found


def stored_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor as it is stored."""
    found = dict[str, tuple[int, ...]]()
    for name, shape in expected_tensors(config).items():
        stored = _stored_name(config, name)
        rows = found[stored][0] if stored in found else 0
        found[stored] = (rows + shape[0], *shape[1:])
    return found


def file_name(config: ModelConfig, stored: str) -> str:
    """What safetensors files of the family call a stored tensor."""
    words = _WORDS.get(config.model_type, {})
    if words and config.parallel_norms == 2:
        words = {**words, **_TWO_NORMS}
    for ours, theirs in words.items():
        stored = stored.replace(ours, theirs)
    return stored


def norm_offset(config: ModelConfig, name: str) -> float:
    """What safetensors files of the family leave out of a norm's weights; GGUF files do not."""
    one_less = FAMILIES[config.model_type].one_less_norms and name.endswith("norm.weight")
    return 1.0 if one_less else 0.0


def _stored_name(config: ModelConfig, name: str) -> str:
    if config.model_type == "mixtral" and ".mlp." in name:
        return _mixtral_name(name)
    if not FAMILIES[config.model_type].fused:
        return name
    *path, short, kind = name.split(".")
    if short == "up_proj" and not config.gated:
        return name
    return ".".join((*path, _FUSED.get(short, short), kind))


def _mixtral_name(name: str) -> str:
    *path, short, kind = name.replace(".mlp.", ".block_sparse_moe.").split(".")
    return ".".join((*path, _EXPERT_MATRICES.get(short, short), kind))
