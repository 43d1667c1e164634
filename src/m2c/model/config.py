"""What a model is: `ModelConfig`, and the names and shapes of the tensors that follow from it.

Fields are named as in Hugging Face's config.json. Everything is checked for type and range here,
once, so that no later code sizes an array by a number nobody looked at.
Knows nothing about files, weights or torch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from math import prod
from typing import Any, Final

from m2c.errors import BadInput, UnsupportedModel
from m2c.model.fields import Fields

MODEL_TYPES: Final = ("llama", "qwen2")
HIDDEN_ACTS: Final = ("silu", "relu")
ROPE_TYPES: Final = ("linear", "llama3")
SUPPORTED: Final = (
    f"this version runs {' and '.join(MODEL_TYPES)} models with {' or '.join(HIDDEN_ACTS)} "
    "activation, full attention and default, linear or llama3 rope"
)
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched. Only llama3 uses the last three fields."""

    rope_type: str
    factor: float
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_max_position_embeddings: int = 0

    def to_dict(self) -> dict[str, Any]:
        if self.rope_type == "linear":
            return {"rope_type": self.rope_type, "factor": self.factor}
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, file: str) -> "RopeScaling":
        """Raises UnsupportedModel for another rope_type, BadInput for a wrong number."""
        read = Fields(data, file, where="rope_scaling.")
        rope_type = read.choice("rope_type", ROPE_TYPES, SUPPORTED)
        factor = read.number("factor", 1.0, 1e6)
        if rope_type == "linear":
            return cls(rope_type, factor)
        low = read.number("low_freq_factor", 1e-6, 1e6)
        high = read.number("high_freq_factor", 1e-6, 1e6)
        if low >= high:
            raise BadInput(f"{file}: rope_scaling.low_freq_factor is not below high_freq_factor")
        original = read.integer("original_max_position_embeddings", 1, 2**31 - 1)
        return cls(rope_type, factor, low, high, original)


@dataclass(frozen=True)
class ModelConfig:
    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    hidden_act: str
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_hf(cls, data: Mapping[str, Any], *, file: str = "config.json") -> "ModelConfig":
        """From a parsed config.json. Unknown keys are ignored, known ones checked.

        Raises UnsupportedModel for a model this version would compute wrongly, BadInput for a
        value of a wrong type or range.
        """
        _refuse_unsupported(data, file)
        return cls.from_dict(_from_hf_keys(data, file), file=file)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, file: str = "manifest") -> "ModelConfig":
        """Inverse of `to_dict`: exactly its keys. Raises BadInput, UnsupportedModel."""
        names = {field.name for field in fields(cls)}
        if odd := sorted(names.symmetric_difference(data)):
            raise BadInput(f"{file}: the model config lacks or does not know {odd[0][:80]!r}")
        read = Fields(data, file)
        heads = read.integer("num_attention_heads", 1, 2**12)
        kv_heads = read.integer("num_key_value_heads", 1, heads)
        if heads % kv_heads:
            raise BadInput(f"{file}: {heads} attention heads do not share {kv_heads} KV heads")
        head_dim = read.integer("head_dim", 2, 2**12)
        if head_dim % 2:
            raise BadInput(f"{file}: head_dim {head_dim} is odd, rotary embedding needs pairs")
        vocab = read.integer("vocab_size", 1, 2**22)
        scaling = read.mapping("rope_scaling")
        return cls(
            model_type=read.choice("model_type", MODEL_TYPES, SUPPORTED),
            hidden_size=read.integer("hidden_size", 1, 2**17),
            intermediate_size=read.integer("intermediate_size", 1, 2**20),
            num_hidden_layers=read.integer("num_hidden_layers", 1, 4096),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=vocab,
            hidden_act=read.choice("hidden_act", HIDDEN_ACTS, SUPPORTED),
            rms_norm_eps=read.number("rms_norm_eps", 1e-12, 1.0),
            rope_theta=read.number("rope_theta", 1.0, 1e12),
            rope_scaling=None if scaling is None else RopeScaling.from_dict(scaling, file=file),
            max_position_embeddings=read.integer("max_position_embeddings", 1, 2**31 - 1),
            tie_word_embeddings=read.flag("tie_word_embeddings"),
            qkv_bias=read.flag("qkv_bias"),
            o_bias=read.flag("o_bias"),
            bos_token_id=read.token("bos_token_id", vocab),
            eos_token_ids=read.tokens("eos_token_ids", vocab),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, for a manifest."""
        scaling = None if self.rope_scaling is None else self.rope_scaling.to_dict()
        return asdict(self) | {
            "rope_scaling": scaling,
            "eos_token_ids": list(self.eos_token_ids),
        }

    def to_hf(self) -> dict[str, Any]:
        """As a config.json that other programs read too; `from_hf` gives this config back."""
        data = self.to_dict()
        eos = data.pop("eos_token_ids")
        data["eos_token_id"] = eos if len(eos) > 1 else (eos[0] if eos else None)
        del data["qkv_bias"], data["o_bias"]
        if self.model_type == "llama":
            data["attention_bias"] = self.qkv_bias
        return {"architectures": [_ARCHITECTURES[self.model_type]], **data}


def _refuse_unsupported(data: Mapping[str, Any], file: str) -> None:
    model_type = data.get("model_type")
    reason = ""
    if model_type not in MODEL_TYPES:
        reason = f"model_type {str(model_type)[:80]!r}"
    elif data.get("quantization_config") is not None:
        reason = "a quantized checkpoint (quantization_config)"
    elif data.get("mlp_bias"):
        reason = "mlp_bias"
    elif model_type == "qwen2" and _slides(data, file):
        reason = "sliding-window attention"
    if reason:
        raise UnsupportedModel(f"{file}: {reason} is not supported", SUPPORTED)


def _slides(data: Mapping[str, Any], file: str) -> bool:
    """Whether some layer would see less than the whole context."""
    read = Fields(data, file)
    if not read.flag("use_sliding_window", False) or data.get("sliding_window") is None:
        return False
    window = read.integer("sliding_window", 1, 2**31 - 1)
    context = read.integer("max_position_embeddings", 1, 2**31 - 1)
    full_layers = read.integer("max_window_layers", 0, 2**31 - 1)
    return window < context and full_layers < read.integer("num_hidden_layers", 1, 4096)


def _from_hf_keys(data: Mapping[str, Any], file: str) -> dict[str, Any]:
    """The same facts under the names of our fields, with the defaults that HF applies."""
    read = Fields(data, file)
    hidden = read.integer("hidden_size", 1, 2**17)
    heads = read.integer("num_attention_heads", 1, 2**12)
    if data.get("head_dim") is None and hidden % heads:
        raise BadInput(f"{file}: hidden_size {hidden} is not a multiple of {heads} heads")
    llama = data["model_type"] == "llama"
    bias = read.flag("attention_bias", False) if llama else True
    theta, scaling = _rope(data, file)

    def value(key: str, default: Any = None) -> Any:
        return default if data.get(key) is None else data[key]

    eos = value("eos_token_id", [])
    return {
        "model_type": data["model_type"],
        "hidden_size": hidden,
        "intermediate_size": value("intermediate_size"),
        "num_hidden_layers": value("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("num_key_value_heads", heads),
        "head_dim": value("head_dim", hidden // heads),
        "vocab_size": value("vocab_size"),
        "hidden_act": value("hidden_act", "silu"),
        "rms_norm_eps": value("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "max_position_embeddings": value("max_position_embeddings"),
        "tie_word_embeddings": value("tie_word_embeddings", False),
        "qkv_bias": bias,
        "o_bias": bias and llama,
        "bos_token_id": value("bos_token_id"),
        "eos_token_ids": eos if isinstance(eos, list) else [eos],
    }


def _rope(data: Mapping[str, Any], file: str) -> tuple[Any, dict[str, Any] | None]:
    """rope_theta and rope_scaling, from either the old pair of keys or `rope_parameters`."""
    read = Fields(data, file)
    new = read.mapping("rope_parameters")
    rope = dict(new if new is not None else read.mapping("rope_scaling") or {})
    theta = rope.pop("rope_theta", None)
    if theta is None:
        theta = data.get("rope_theta")
    partial = rope.get("partial_rotary_factor", data.get("partial_rotary_factor"))
    nested = any(isinstance(value, dict) for value in rope.values())
    if nested or partial not in (None, 1.0):
        raise UnsupportedModel(f"{file}: partial or per-layer rope is not supported", SUPPORTED)
    rope_type = rope.get("rope_type", rope.get("type", "default"))  # "type" until mid 2024
    scaling = None if rope_type == "default" else {**rope, "rope_type": rope_type}
    return (10000.0 if theta is None else theta), scaling


def dense_matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(rows, columns) of every matrix outside the FFN: embeddings, attention, lm_head if untied."""
    hidden = config.hidden_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    found = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.self_attn."
        found[prefix + "q_proj.weight"] = (q, hidden)
        found[prefix + "k_proj.weight"] = (kv, hidden)
        found[prefix + "v_proj.weight"] = (kv, hidden)
        found[prefix + "o_proj.weight"] = (hidden, q)
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = (config.vocab_size, hidden)
    return found


def ffn_names(layer: int) -> tuple[str, str, str]:
    """gate and up [intermediate, hidden], down [hidden, intermediate]."""
    prefix = f"model.layers.{layer}.mlp."
    return prefix + "gate_proj.weight", prefix + "up_proj.weight", prefix + "down_proj.weight"


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the model, under its Hugging Face name."""
    found: dict[str, tuple[int, ...]] = dict(dense_matrices(config))
    hidden, ffn = config.hidden_size, config.intermediate_size
    for layer in range(config.num_hidden_layers):
        gate, up, down = ffn_names(layer)
        found[gate] = found[up] = (ffn, hidden)
        found[down] = (hidden, ffn)
        found.update(_vectors(config, f"model.layers.{layer}."))
    found["model.norm.weight"] = (hidden,)
    return found


def _vectors(config: ModelConfig, prefix: str) -> Iterator[tuple[str, tuple[int]]]:
    yield prefix + "input_layernorm.weight", (config.hidden_size,)
    yield prefix + "post_attention_layernorm.weight", (config.hidden_size,)
    if config.qkv_bias:
        kv = config.num_key_value_heads * config.head_dim
        yield prefix + "self_attn.q_proj.bias", (config.num_attention_heads * config.head_dim,)
        yield prefix + "self_attn.k_proj.bias", (kv,)
        yield prefix + "self_attn.v_proj.bias", (kv,)
    if config.o_bias:
        yield prefix + "self_attn.o_proj.bias", (config.hidden_size,)


def parameter_count(config: ModelConfig) -> int:
    """Weights of the model; tied embeddings count once."""
    return sum(prod(shape) for shape in expected_tensors(config).values())
