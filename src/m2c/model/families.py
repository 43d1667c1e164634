"""What each family's config.json says, and what it leaves out: its keys to the fields of a config.

A family is an entry of FAMILIES: the facts that make it differ from llama. Knows nothing about
tensors, files or torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from m2c.errors import BadInput, UnsupportedModel
from m2c.model.fields import Fields
from m2c.model.mixture import EXPERT_FACTS, Mixture, odd_mixture
from m2c.model.plain_mlp import FALCON, OPT, STABLELM, OwnKeys
from m2c.model.rope import ORIGINAL, PARTIAL, hf_of_rope, rope_of_hf

SLIDING: Final = "sliding_attention"
LAYER_TYPES: Final = ("full_attention", SLIDING)


@dataclass(frozen=True)
class Family:
    """How the models of one model_type differ from llama."""

    architecture: str  # the class in transformers
    gguf: str  # what GGUF calls the architecture; "": it does not know it
    # fields of ModelConfig that config.json does not spell out
    facts: Mapping[str, Any] = field(default_factory=dict)
    # what a key of config.json that is not there means; families whose defaults name PARTIAL may
    # turn a part of each head, those that name ORIGINAL may have longrope
    defaults: Mapping[str, Any] = field(default_factory=dict)
    # which layers slide: "none", "all", "listed" by layer_types or else by max_window_layers, or
    # "pattern": by layer_types or else all but every `pattern`th
    windows: str = "none"
    pattern: int = 0
    act_key: str = "hidden_act"
    # weights of norms are stored less one
    one_less_norms: bool = False
    fused: bool = False  # q, k and v are stored as one matrix, gate and up as another
    grouped: bool = False  # and that of q, k and v head by head, in safetensors files
    own: OwnKeys | None = None  # keys of config.json that llama does not have
    mixture: Mixture | None = None  # of experts


_GEMMA: Final = {
    "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256, "sliding_window": 4096,
}  # fmt: skip
# of granite, and from where to where they may go
FACTORS: Final = {
    "embedding_multiplier": (1e-6, 1e6), "residual_multiplier": (1e-3, 1e3),
    "attention_multiplier": (1e-6, 1e6), "logits_scaling": (1e-6, 1e6),
}  # fmt: skip
FAMILIES: Final[Mapping[str, Family]] = {
    "llama": Family("LlamaForCausalLM", "llama"),
    "sparsellama": Family("SparseLlamaForCausalLM", "llama"),  # ProSparse: llama with FATReLU
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
        "Phi3ForCausalLM", "phi3", {"qkv_bias": False, "o_bias": False},
        {"rms_norm_eps": 1e-5, PARTIAL: 1.0, ORIGINAL: 4096}, "all", fused=True,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM", "gemma2", {"post_norms": True, "scale_embeddings": True},
        {
            **_GEMMA, "vocab_size": 256000, "max_position_embeddings": 8192,
            "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
        },
        "pattern", 2, act_key="hidden_activation", one_less_norms=True,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM", "gemma3",
        {"post_norms": True, "scale_embeddings": True, "qk_norm": True},
        {
            **_GEMMA, "vocab_size": 262208, "max_position_embeddings": 131072,
            "final_logit_softcapping": None,  # transformers knows no other cap of this family

            "num_attention_heads": 8, "num_key_value_heads": 4,  # said by no multimodal checkpoint
            "rope_theta": 1e6, "local_rope_theta": 10000.0,
        },
        "pattern", 6, act_key="hidden_activation", one_less_norms=True,
    ),
    "falcon": Family(
        "FalconForCausalLM", "falcon", {"gated": False, "layer_norms": True},
        {
            "activation": "gelu", "layer_norm_epsilon": 1e-5, "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        },
        act_key="activation", fused=True, grouped=True, own=FALCON,
    ),
    "opt": Family(
        "OPTForCausalLM", "", {"gated": False, "layer_norms": True, "learned_positions": True},
        {
            "activation_function": "relu", "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        },
        act_key="activation_function", own=OPT,
    ),
    "stablelm": Family(
        "StableLmForCausalLM", "stablelm", {"layer_norms": True, "o_bias": False},
        {"layer_norm_eps": 1e-5, "max_position_embeddings": 4096, PARTIAL: 0.25}, own=STABLELM,
    ),
    "granite": Family("GraniteForCausalLM", "granite", {}, dict.fromkeys(FACTORS, 1.0)),
    "mixtral": Family(
        "MixtralForCausalLM", "llama", {"qkv_bias": False, "o_bias": False, "norm_topk_prob": True},
        {
            "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        "all", mixture=Mixture("num_local_experts", "intermediate_size"),
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", "qwen3moe", {"qk_norm": True},
        {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
        mixture=Mixture(),
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM", "qwen2moe", {"qkv_bias": True, "o_bias": False},
        {
            "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632, "norm_topk_prob": False,
        },
        mixture=Mixture(shared=True),
    ),
}  # fmt: skip
# facts of a family that have no key in config.json
_UNSAID: Final = (
    "qk_norm", "post_norms", "scale_embeddings", "gated", "layer_norms", "ffn_bias",
    "parallel_norms", "learned_positions",
)  # fmt: skip
# what config.json of families with keys of their own says as llama does
_COMMON: Final = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
    "max_position_embeddings", "tie_word_embeddings", "bos_token_id", "eos_token_id",
)  # fmt: skip
# facts that only the config.json of families whose defaults name them has
_SAID_BY_SOME: Final = (
    "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar",
    "local_rope_theta", *FACTORS,
)  # fmt: skip
_OUTER: Final = ("bos_token_id", "eos_token_id", "quantization_config", "tie_word_embeddings")
MODEL_TYPES: Final = tuple(FAMILIES)
HIDDEN_ACTS: Final = ("silu", "relu", "gelu", "gelu_pytorch_tanh", "fatrelu")
SUPPORTED: Final = (
    f"this version runs {', '.join(MODEL_TYPES[:-1])} and {MODEL_TYPES[-1]} models with "
    f"{', '.join(HIDDEN_ACTS[:-1])} or {HIDDEN_ACTS[-1]} activation and default, linear or llama3 "
    "rope, phi3 also with longrope"
)


def facts_of_hf(data: Mapping[str, Any], file: str) -> dict[str, Any]:
    """The fields of a config by name, unchecked, from a parsed config.json.

    Raises UnsupportedModel for a model this version would compute wrongly, BadInput for a value of
    a wrong type or range where one is needed to go on.
    """
    data = _text_part(data, file)
    _refuse_unsupported(data, file)
    family = FAMILIES[data["model_type"]]
    mixture = family.mixture
    named = mixture.one_name(data) if mixture else {}
    data = _gemma3_rope({**family.defaults, **named, **data}, file)
    read = Fields(data, file)
    hidden = read.integer("hidden_size", 1, 2**17)
    heads = read.integer("num_attention_heads", 1, 2**12)
    if data.get("head_dim") is None and hidden % heads:
        raise BadInput(f"{file}: hidden_size {hidden} is not a multiple of {heads} heads")
    bias = read.flag("attention_bias", False)

    def value(key: str, default: Any = None) -> Any:
        return default if data.get(key) is None else data[key]

    eos = value("eos_token_id", [])
    head_dim = value("head_dim", hidden // heads)
    return {
        "model_type": data["model_type"],
        "hidden_size": hidden,
        "intermediate_size": value(mixture.size_key if mixture else "intermediate_size"),
        "num_hidden_layers": value("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("num_key_value_heads", heads),
        "head_dim": head_dim,
        **rope_of_hf(data, family.defaults, file, SUPPORTED, head_dim=head_dim),
        "vocab_size": value("vocab_size"),
        "hidden_act": value(family.act_key, "silu"),
        # the threshold of fatrelu; other activations have none, whatever the file says
        "hidden_act_param": value("hidden_act_param")
        if data.get(family.act_key) == "fatrelu"
        else None,
        "rms_norm_eps": value("rms_norm_eps", 1e-6),
        "max_position_embeddings": value("max_position_embeddings"),
        "tie_word_embeddings": value("tie_word_embeddings", False),
        "qkv_bias": bias,
        "o_bias": bias,
        "bos_token_id": value("bos_token_id"),
        "eos_token_ids": eos if isinstance(eos, list) else [eos],
        **_windows(data, read, family),
        **{key: data[key] for key in _SAID_BY_SOME if key in family.defaults},
        **(mixture.read(data) if mixture else {}),
        **family.facts,
        **(family.own.read(read) if family.own else {}),
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
    for name in (*_UNSAID, *(name for name in _SAID_BY_SOME if name not in family.defaults)):
        del data[name]
    for name in EXPERT_FACTS:
        del data[name]
    if family.mixture:
        written = family.mixture.write(facts)
        data |= {key: written[key] for key in written if key not in family.facts}
    data |= hf_of_rope(facts)
    del data["rotary_dim"]
    data[family.act_key] = data["hidden_act"]
    if data["hidden_act_param"] is None:
        del data["hidden_act_param"]
    if "local_rope_theta" in data:
        data["rope_local_base_freq"] = data.pop("local_rope_theta")
    sliding = set(data.pop("sliding_layers"))
    if family.windows in ("listed", "pattern"):
        layers = range(data["num_hidden_layers"])
        data["layer_types"] = [LAYER_TYPES[layer in sliding] for layer in layers]
    if family.windows == "listed":
        data["use_sliding_window"] = bool(sliding)
    elif family.windows == "none":
        del data["sliding_window"]
    if family.own:
        data = {key: data[key] for key in _COMMON} | family.own.write(facts)
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
    elif data.get("use_bidirectional_attention"):
        reason = "use_bidirectional_attention"
    elif FAMILIES[model_type].mixture:
        reason = odd_mixture(data)
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
    elif data.get("layer_types") is not None:
        types = read.choices("layer_types", LAYER_TYPES, len(layers), SUPPORTED)
        sliding = [layer for layer, kind in enumerate(types) if kind == SLIDING]
    elif family.windows == "listed":
        sliding = list(layers[read.integer("max_window_layers", 0, 2**31 - 1) :])
    else:
        key = "sliding_window_pattern"
        given = data.get(key) is not None
        sliding = by_pattern(len(layers), read.integer(key, 1, 4096) if given else family.pattern)
    if not sliding:
        return {}
    return {"sliding_window": data["sliding_window"], "sliding_layers": sliding}


def by_pattern(layers: int, pattern: int) -> list[int]:
    """The layers that slide where every `pattern`th sees everything."""
    return [layer for layer in range(layers) if (layer + 1) % pattern]


def _text_part(data: Mapping[str, Any], file: str) -> Mapping[str, Any]:
    """The language model of a multimodal Gemma 3, with the outer keys that concern it."""
    if data.get("model_type") != "gemma3":
        return data
    text = Fields(data, file).mapping("text_config") or {}
    outer = {key: data[key] for key in _OUTER if data.get(key) is not None}
    return {**text, **outer, "model_type": "gemma3_text"}


def _gemma3_rope(data: dict[str, Any], file: str) -> dict[str, Any]:
    """With `local_rope_theta`, and `rope_parameters` as those of the layers that see everything."""
    if "local_rope_theta" not in data:
        return data
    rope = Fields(data, file).mapping("rope_parameters") or {}
    if data.get("rope_local_base_freq") is not None:
        data["local_rope_theta"] = data["rope_local_base_freq"]
    if "full_attention" not in rope and SLIDING not in rope:
        return data
    read = Fields(rope, file, "rope_parameters.")
    local, data["rope_parameters"] = read.mapping(SLIDING) or {}, read.mapping("full_attention")
    if local.get("rope_type", "default") != "default":
        raise UnsupportedModel(f"{file}: scaled rope of sliding layers is not supported", SUPPORTED)
    if local.get("rope_theta") is not None:
        data["local_rope_theta"] = local["rope_theta"]
    return data
