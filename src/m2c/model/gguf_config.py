"""`ModelConfig` from GGUF metadata.

Metadata says little that config.json says plainly: llama3 rope is a table of divisors, ties are
missing tensors, floats went through f32. What cannot be recovered exactly is refused.
Knows nothing about the file's bytes.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from m2c.errors import BadInput, UnsupportedModel
from m2c.model.config import ModelConfig
from m2c.model.families import FAMILIES, MODEL_TYPES, SUPPORTED, Family, by_pattern
from m2c.model.fields import Fields
from m2c.model.mixture import SHARED_SIZE
from m2c.model.rope import LONGROPE, ORIGINAL, PARTIAL, attention_factor

ROPE_DIVISORS: Final = "rope_freqs.weight"
SHORT_FACTORS: Final = "rope_factors_short.weight"
LONG_FACTORS: Final = "rope_factors_long.weight"
_LONGEST: Final = "context_length"
_ORIGINAL: Final = "rope.scaling.original_context_length"
ROPE_TABLES: Final = (ROPE_DIVISORS, SHORT_FACTORS, LONG_FACTORS)
# the family that an architecture is taken for: the first of those that share it
ARCHITECTURES: Final = {
    FAMILIES[name].gguf: name for name in reversed(MODEL_TYPES) if FAMILIES[name].gguf
}
_WITH_EXPERTS: Final = {family.gguf: name for name, family in FAMILIES.items() if family.mixture}
# whose converters put the rows of q and k into pairs
PAIRED: Final = ("llama", "granite")
_EOS_KEYS: Final = ("eos", "eot", "eom")  # any of them ends a turn


def config_from_metadata(
    metadata: Mapping[str, Any],
    names: Collection[str],
    tables: Mapping[str, np.ndarray],
    *,
    file: str,
) -> ModelConfig:
    """`names`: Hugging Face names of the tensors there are. tables: those of ROPE_TABLES that there
    are, vectors of f32.

    Raises UnsupportedModel for another architecture or rope, BadInput for wrong values.
    """
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        message = f"{file}: the architecture {str(arch)[:80]!r} is not supported"
        raise UnsupportedModel(message, SUPPORTED)
    keys = _Keys(metadata, arch, file)
    model_type = _model_type(keys)
    family = FAMILIES[model_type]
    heads, head_dim, rotary = _heads(keys, family)
    theta = _shortest(keys.get("rope.freq_base", family.defaults.get("rope_theta", 10000.0)))
    tokens = metadata.get("tokenizer.ggml.tokens")
    vocab = len(tokens) if isinstance(tokens, list) else keys.get("vocab_size")
    biased = "model.layers.0.self_attn.q_proj.bias" in names
    data = {
        "model_type": model_type,
        "hidden_size": keys.get("embedding_length"),
        "intermediate_size": _ffn_size(keys, family),
        "num_hidden_layers": keys.get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": vocab,
        "hidden_act": family.defaults.get(family.act_key, "silu"),
        "rms_norm_eps": _shortest(keys.get(_eps_key(family))),
        "rope_theta": theta,
        "rope_scaling": _rope(keys, family, tables, rotary or head_dim, theta),
        "rotary_dim": rotary,
        "max_position_embeddings": keys.get("context_length"),
        "tie_word_embeddings": "lm_head.weight" not in names,
        # as config.json can say it: all four biases or none, or what the family always has
        "qkv_bias": biased,
        "o_bias": biased,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_ids": _eos(metadata),
        **_windows(keys, family),
        **_gemma(keys, family, head_dim),
        **_multipliers(keys, family, head_dim),
        **_parallel(family, names),
        **_experts(keys, family),
        **family.facts,
    }
    return ModelConfig.from_dict(data, file=file)


@dataclass(frozen=True)
class _Keys:
    """Metadata below the architecture's name."""

    metadata: Mapping[str, Any]
    arch: str
    file: str

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"{self.arch}.{key}", default)

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if type(value) is not int or not 0 < value < 1 << 20:
            raise BadInput(f"{self.file}: {self.arch}.{key} is {str(value)[:80]}")
        return value


def _model_type(keys: _Keys) -> str:
    """Raises UnsupportedModel for experts in an architecture that we run without."""
    if not keys.get("expert_count", 0):
        return ARCHITECTURES[keys.arch]
    if keys.arch not in _WITH_EXPERTS:
        message = f"{keys.file}: a mixture of experts in {keys.arch} is not supported"
        raise UnsupportedModel(message, SUPPORTED)
    return _WITH_EXPERTS[keys.arch]


def _ffn_size(keys: _Keys, family: Family) -> Any:
    """Of an FFN or of each expert; files of qwen2moe may leave the latter to be reckoned."""
    whole = keys.get("feed_forward_length")
    if family.mixture is None or family.mixture.size_key == "intermediate_size":
        return whole
    share = None
    if family.mixture.shared and type(whole) is int:
        share = whole // keys.positive("expert_used_count")
    return keys.get("expert_feed_forward_length", share)


def _experts(keys: _Keys, family: Family) -> dict[str, Any]:
    """Files that do not say how weights add up are of models where they add up to 1, unless their
    family says otherwise."""
    if family.mixture is None:
        return {}
    facts = {
        "num_experts": keys.get("expert_count"),
        "num_experts_per_tok": keys.get("expert_used_count"),
        "norm_topk_prob": keys.get(
            "expert_weights_norm", family.defaults.get("norm_topk_prob", True)
        ),
    }
    if family.mixture.shared:
        whole = keys.get("feed_forward_length")
        facts[SHARED_SIZE] = keys.get("expert_shared_feed_forward_length", whole)
    return facts


def _heads(keys: _Keys, family: Family) -> tuple[int, int, int | None]:
    """How many attention heads, the size of each, and how much of it turns; None: all."""
    heads = keys.positive("attention.head_count")
    default = keys.positive("embedding_length") // heads
    head_dim = keys.positive("attention.key_length", default)
    turned = keys.positive("rope.dimension_count", head_dim)
    whole = {"attention.value_length": keys.get("attention.value_length", head_dim)}
    if PARTIAL not in family.defaults:
        whole["rope.dimension_count"] = turned
    for key, value in whole.items():
        if value != head_dim:
            message = f"{keys.file}: {keys.arch}.{key} differs from the head size {head_dim}"
            raise UnsupportedModel(message, SUPPORTED)
    return heads, head_dim, None if turned == head_dim else turned


def _windows(keys: _Keys, family: Family) -> dict[str, Any]:
    """Converters write the window of families in which layers slide by a rule, not by a list."""
    window = keys.get("attention.sliding_window", 0)
    if family.windows in ("none", "listed") or not window:
        return {}
    layers = keys.positive("block_count")
    sliding = by_pattern(layers, family.pattern) if family.pattern else list(range(layers))
    return {"sliding_window": window, "sliding_layers": sliding}


def _gemma(keys: _Keys, family: Family, head_dim: int) -> dict[str, Any]:
    """What metadata says of soft caps, local rope and the scale of scores, and what it implies."""
    if "query_pre_attn_scalar" not in family.defaults:
        return {}
    # not in the file: the largest of each generation, known by its layers, differs
    hidden, heads = keys.positive("embedding_length"), keys.positive("attention.head_count")
    largest = (keys.arch, keys.positive("block_count")) in (("gemma2", 46), ("gemma3", 62))
    found = {"query_pre_attn_scalar": hidden // heads if largest else head_dim}
    for key in {"attn_logit_softcapping", "final_logit_softcapping"} & family.defaults.keys():
        found[key] = _shortest(keys.get(key, family.defaults[key]))
    if "local_rope_theta" in family.defaults:
        default = family.defaults["local_rope_theta"]
        found["local_rope_theta"] = _shortest(keys.get("rope.freq_base_swa", default))
    return found


def _multipliers(keys: _Keys, family: Family, head_dim: int) -> dict[str, Any]:
    """Of granite; what the file does not say, or calls 0, is as in other models."""
    if family.gguf != "granite":
        return {}
    if keys.get("rope.scaling.finetuned") is False:  # what it means in these files
        message = f"{keys.file}: {keys.arch} without rotary embedding is not supported"
        raise UnsupportedModel(message, SUPPORTED)
    usual = 1 / math.sqrt(head_dim)
    return {
        "embedding_multiplier": _shortest(keys.get("embedding_scale") or 1.0),
        "residual_multiplier": _shortest(keys.get("residual_scale") or 1.0),
        "attention_multiplier": _shortest(keys.get("attention.scale") or usual),
        "logits_scaling": _shortest(keys.get("logit_scale") or 1.0),
    }


def _eps_key(family: Family) -> str:
    layer_norms = family.facts.get("layer_norms", False)
    return f"attention.layer_norm_{'' if layer_norms else 'rms_'}epsilon"


def _parallel(family: Family, names: Collection[str]) -> dict[str, Any]:
    """As llama.cpp computes it: the FFN of falcon beside attention, with a norm of its own or not;
    that of stablelm if it has none."""
    own = "model.layers.0.post_attention_layernorm.weight" in names
    if family.gguf == "falcon":
        return {"parallel_norms": 2 if own else 1}
    return {"parallel_norms": int(not own)} if family.gguf == "stablelm" else {}


def _eos(metadata: Mapping[str, Any]) -> list[Any]:
    values = (metadata.get(f"tokenizer.ggml.{key}_token_id") for key in _EOS_KEYS)
    return [value for value in values if value is not None]


def _shortest(value: Any) -> Any:
    """The shortest decimal that is the same f32: 1e-05, not 9.999999747378752e-06."""
    if not isinstance(value, float):
        return value
    with np.errstate(over="ignore"):  # an f64 beyond f32 becomes inf, which no range admits
        return float(str(np.float32(value)))


def _rope(
    keys: _Keys, family: Family, tables: Mapping[str, np.ndarray], rotary: int, theta: Any
) -> dict[str, Any] | None:
    """rope_scaling: by tables of factors, of the families that have longrope, or as others do."""
    if tables.keys() <= {ROPE_DIVISORS}:
        return _scaling(keys, tables.get(ROPE_DIVISORS), rotary, theta)
    known = ORIGINAL in family.defaults and tables.keys() == {SHORT_FACTORS, LONG_FACTORS}
    plain = keys.get("rope.scaling.type", LONGROPE) == LONGROPE and _stretch(keys) in (0, 1)
    if not known or not plain:
        message = f"{keys.file}: {keys.arch} with {', '.join(sorted(tables))} is not supported"
        raise UnsupportedModel(message, SUPPORTED)
    return _longrope(keys, tables)


def _longrope(keys: _Keys, tables: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """rope_scaling of what llama.cpp computes: where an old file does not say it, the factor of
    cosines and sines is 1, and the original context the whole one."""
    lengths = {
        _LONGEST: keys.get(_LONGEST),
        _ORIGINAL: keys.get(_ORIGINAL, keys.get(_LONGEST)),
    }
    read = Fields(lengths, keys.file, f"{keys.arch}.")
    longest, original = (read.integer(key, 2, 2**31 - 1) for key in lengths)
    usual = attention_factor(longest, original)
    factor = _shortest(keys.get("rope.scaling.attn_factor", 1.0))
    return {
        "rope_type": LONGROPE,
        ORIGINAL: original,
        "attention_factor": usual if factor == _shortest(usual) else factor,
        "short_factor": [_shortest(value) for value in tables[SHORT_FACTORS].tolist()],
        "long_factor": [_shortest(value) for value in tables[LONG_FACTORS].tolist()],
    }


def _stretch(keys: _Keys) -> Any:
    """By how much all frequencies are divided; 0 and 1: they are not."""
    return _shortest(keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 1.0)))


def _scaling(
    keys: _Keys, divisors: np.ndarray | None, head_dim: int, theta: Any
) -> dict[str, Any] | None:
    kind = keys.get("rope.scaling.type", "linear")  # llama.cpp's default too
    if kind not in ("none", "linear"):
        message = f"{keys.file}: {str(kind)[:40]!r} rope scaling is not supported"
        raise UnsupportedModel(message, SUPPORTED)
    factor = _stretch(keys)
    linear = kind == "linear" and factor not in (0, 1)
    if divisors is None or bool((divisors == 1).all()):
        return {"rope_type": "linear", "factor": factor} if linear else None
    scaling = {
        "rope_type": "llama3",
        "factor": _shortest(float(divisors.max())),
        # GGUF does not keep the next two; every published llama3 checkpoint has them so
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        ORIGINAL: keys.get(_ORIGINAL, 8192),
    }
    if linear or not _matches(divisors, scaling, head_dim, theta):
        raise UnsupportedModel(f"{keys.file}: {ROPE_DIVISORS} is not llama3 rope", SUPPORTED)
    return scaling


def _matches(divisors: np.ndarray, scaling: Mapping[str, Any], head_dim: int, theta: Any) -> bool:
    numbers = (theta, scaling["original_max_position_embeddings"])
    if not all(type(number) in (int, float) and 1 <= number < 1e12 for number in numbers):
        return False
    if divisors.shape != (head_dim // 2,) or not 1 <= scaling["factor"] < 1e6:
        return False
    expected = llama3_divisors(scaling, head_dim, theta)
    return bool(np.allclose(divisors, expected, rtol=1e-4, atol=0))


def llama3_divisors(scaling: Mapping[str, Any], head_dim: int, theta: float) -> np.ndarray:
    """By what llama3 rope divides each frequency, [head_dim / 2] f64: 1 (fast) to factor (slow)."""
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / wavelength
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - blend) / scaling["factor"] + blend)
