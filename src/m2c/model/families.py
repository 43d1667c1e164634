"""What each family's config.json says, and what it leaves out: its keys to the fields of a config.

A family is an entry of FAMILIES: the facts that make it differ from llama. Knows nothing about
tensors, files or torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from m2c.errors import BadInput, UnsupportedModel
from m2c.model.fields import Fields

SLIDING: Final = "sliding_attention"
LAYER_TYPES: Final = ("full_attention", SLIDING)


@dataclass(frozen=True)
class Family:
    """How the models of one model_type differ from llama."""

    architecture: str  # the class in transformers
    gguf: str  # what GGUF calls the architecture
    # fields of ModelConfig that config.json does not spell out
    facts: Mapping[str, Any] = field(default_factory=dict)
    # what a key of config.json that is not there means
    defaults: Mapping[str, Any] = field(default_factory=dict)
    # which layers slide: "none", "all", or "listed" by layer_types or else by max_window_layers
    windows: str = "none"
    fused: bool = False  # q, k and v are stored as one matrix, gate and up as another


FAMILIES: Final[Mapping[str, Family]] = {
    "llama": Family("LlamaForCausalLM", "llama"),
    "qwen2": Family(
        "Qwen2ForCausalLM", "qwen2", {"qkv_bias": True, "o_bias": False},
        {"sliding_window": 4096, "max_window_layers": 28}, "listed",
    ),
    "mistral": Family(
        "MistralForCausalLM", "llama", {"qkv_bias": False, "o_bias": False},
        {"sliding_window": 4096}, "all",
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM", "qwen3", {"qk_norm": True},
        {"head_dim": 128, "sliding_window": 4096, "max_window_layers": 28}, "listed",
    ),
    "phi3": Family(
        "Phi3ForCausalLM", "phi3", {"qkv_bias": False, "o_bias": False}, {"rms_norm_eps": 1e-5},
        "all", fused=True,
    ),
}  # fmt: skip
_UNSAID: Final = ("qk_norm",)  # facts of a family that have no key in config.json
MODEL_TYPES: Final = tuple(FAMILIES)
HIDDEN_ACTS: Final = ("silu", "relu")
ROPE_TYPES: Final = ("linear", "llama3")
SUPPORTED: Final = (
    f"this version runs {', '.join(MODEL_TYPES[:-1])} and {MODEL_TYPES[-1]} models with "
    f"{' or '.join(HIDDEN_ACTS)} activation and default, linear or llama3 rope"
)


def facts_of_hf(data: Mapping[str, Any], file: str) -> dict[str, Any]:
    """The fields of a config by name, unchecked, from a parsed config.json.

    Raises UnsupportedModel for a model this version would compute wrongly, BadInput for a value of
    a wrong type or range where one is needed to go on.
    """
    _refuse_unsupported(data, file)
    family = FAMILIES[data["model_type"]]
    data = {**family.defaults, **data}
    read = Fields(data, file)
    hidden = read.integer("hidden_size", 1, 2**17)
    heads = read.integer("num_attention_heads", 1, 2**12)
    if data.get("head_dim") is None and hidden % heads:
        raise BadInput(f"{file}: hidden_size {hidden} is not a multiple of {heads} heads")
    bias = read.flag("attention_bias", False)
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
        "o_bias": bias,
        "bos_token_id": value("bos_token_id"),
        "eos_token_ids": eos if isinstance(eos, list) else [eos],
        **_windows(data, read, family),
        **family.facts,
    }


def hf_of_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json from the fields of a config, optional ones included: `facts_of_hf` undone."""
    data = dict(facts)
    family = FAMILIES[data["model_type"]]
    eos = data.pop("eos_token_ids")
    data["eos_token_id"] = eos if len(eos) > 1 else (eos[0] if eos else None)
    bias, _ = data.pop("qkv_bias"), data.pop("o_bias")
    if "qkv_bias" not in family.facts:
        data["attention_bias"] = bias
    for name in _UNSAID:
        del data[name]
    sliding = set(data.pop("sliding_layers"))
    if family.windows == "listed":
        layers = range(data["num_hidden_layers"])
        data["layer_types"] = [LAYER_TYPES[layer in sliding] for layer in layers]
        data["use_sliding_window"] = bool(sliding)
    elif family.windows == "none":
        del data["sliding_window"]
    return {"architectures": [family.architecture], **data}


def _refuse_unsupported(data: Mapping[str, Any], file: str) -> None:
    model_type = data.get("model_type")
    reason = ""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        reason = f"model_type {str(model_type)[:80]!r}"
    elif data.get("quantization_config") is not None:
        reason = "a quantized checkpoint (quantization_config)"
    elif data.get("mlp_bias"):
        reason = "mlp_bias"
    if reason:
        raise UnsupportedModel(f"{file}: {reason} is not supported", SUPPORTED)


def _windows(data: Mapping[str, Any], read: Fields, family: Family) -> dict[str, Any]:
    """Which layers see less than the whole context, and how much of it."""
    if family.windows == "none" or data.get("sliding_window") is None:
        return {}
    if family.windows == "listed" and not read.flag("use_sliding_window", False):
        return {}
    layers = range(read.integer("num_hidden_layers", 1, 4096))
    if family.windows == "all":
        sliding = list(layers)
    elif data.get("layer_types") is None:
        sliding = list(layers[read.integer("max_window_layers", 0, 2**31 - 1) :])
    else:
        types = read.choices("layer_types", LAYER_TYPES, len(layers), SUPPORTED)
        sliding = [layer for layer, kind in enumerate(types) if kind == SLIDING]
    if not sliding:
        return {}
    return {"sliding_window": data["sliding_window"], "sliding_layers": sliding}


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
