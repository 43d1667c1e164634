"""What config.json of falcon, opt and stablelm says in words of their own, and how it is written.

Layer norms, and of the first two neurons without a gate. Knows nothing about other families.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from m2c.errors import UnsupportedModel
from m2c.model.fields import Fields
from m2c.model.rope import PARTIAL, hf_of_rope

_OPT_EPS: Final = 1e-5  # its config.json does not say


@dataclass(frozen=True)
class OwnKeys:
    """read: from the keys of a config.json to fields of a config; write: back from all fields."""

    read: Callable[[Fields], dict[str, Any]]
    write: Callable[[Mapping[str, Any]], dict[str, Any]]


def _refuse(read: Fields, what: str, hint: str) -> NoReturn:
    raise UnsupportedModel(f"{read.file}: {what} is not supported", hint)


def _heads(read: Fields) -> tuple[int, int, int]:
    """hidden_size, heads, and the size of a head, which no key gives."""
    hidden = read.integer("hidden_size", 1, 2**17)
    heads = read.integer("num_attention_heads", 1, 2**12)
    return hidden, heads, hidden // heads


def _falcon(read: Fields) -> dict[str, Any]:
    hidden, heads, dim = _heads(read)
    if read.flag("alibi", False):
        _refuse(read, "alibi (falcon-rw)", "falcon-7b and falcon-40b have rotary positions")
    new = read.flag("new_decoder_architecture", False)
    kv_heads = read.maybe_integer("num_kv_heads", 1, heads) or heads
    parallel = read.flag("parallel_attn", True)
    norms = read.maybe_integer("num_ln_in_parallel_attn", 1, 2)
    if norms is None:
        norms = 2 if new else 1
    if (new and not parallel) or (norms == 2 and not new):
        what = "this order of norms (new_decoder_architecture, num_ln_in_parallel_attn)"
        _refuse(read, what, "falcon-7b and falcon-40b differ in it, and both run")
    if not new:
        kv_heads = 1 if read.flag("multi_query", True) else heads
    bias = read.flag("bias", False)
    return {
        "intermediate_size": read.maybe_integer("ffn_hidden_size", 1, 2**20) or 4 * hidden,
        "num_key_value_heads": kv_heads,
        "head_dim": dim,
        "rms_norm_eps": read.number("layer_norm_epsilon", 1e-12, 1.0),
        "qkv_bias": bias,
        "o_bias": bias,
        "ffn_bias": bias,
        "parallel_norms": norms if parallel else 0,
    }


def _falcon_keys(facts: Mapping[str, Any]) -> dict[str, Any]:
    heads, kv_heads = facts["num_attention_heads"], facts["num_key_value_heads"]
    norms = facts["parallel_norms"]
    new = norms == 2 or kv_heads not in (1, heads)
    return {
        "activation": facts["hidden_act"],
        "ffn_hidden_size": facts["intermediate_size"],
        "num_kv_heads": kv_heads,
        "layer_norm_epsilon": facts["rms_norm_eps"],
        "new_decoder_architecture": new,
        "num_ln_in_parallel_attn": norms if new else None,
        "multi_query": kv_heads == 1,
        "parallel_attn": norms > 0,
        "bias": facts["o_bias"],
        "alibi": False,
        "rope_theta": facts["rope_theta"],
        "rope_scaling": facts["rope_scaling"],
    }


def _opt(read: Fields) -> dict[str, Any]:
    hidden, heads, dim = _heads(read)
    usual = {
        "do_layer_norm_before": True, "_remove_final_layer_norm": False,
        "layer_norm_elementwise_affine": True,
    }  # fmt: skip
    for key, value in usual.items():
        if read.flag(key, value) != value:
            _refuse(read, f"{key} {not value}", "of the published sizes all but opt-350m run")
    if (read.maybe_integer("word_embed_proj_dim", 1, 2**17) or hidden) != hidden:
        _refuse(read, "word_embed_proj_dim beside hidden_size", "all sizes but opt-350m run")
    bias = read.flag("enable_bias", True)
    return {
        "intermediate_size": read.integer("ffn_dim", 1, 2**20),
        "num_key_value_heads": heads,
        "head_dim": dim,
        "rms_norm_eps": _OPT_EPS,
        "rope_theta": 10000.0,  # nothing is rotated
        "rope_scaling": None,
        "qkv_bias": bias,
        "o_bias": bias,
        "ffn_bias": bias,
    }


def _opt_keys(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "activation_function": facts["hidden_act"],
        "ffn_dim": facts["intermediate_size"],
        "word_embed_proj_dim": facts["hidden_size"],
        "do_layer_norm_before": True,
        "enable_bias": facts["o_bias"],
    }


def _stablelm(read: Fields) -> dict[str, Any]:
    if read.flag("qk_layernorm", False):
        _refuse(read, "qk_layernorm (stablelm-2-12b)", "stablelm-2-1_6b and stablelm-3b-4e1t run")
    return {
        "rms_norm_eps": read.number("layer_norm_eps", 1e-12, 1.0),
        "qkv_bias": read.flag("use_qkv_bias", False),
        "parallel_norms": int(read.flag("use_parallel_residual", False)),
    }


def _stablelm_keys(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "hidden_act": facts["hidden_act"],
        "intermediate_size": facts["intermediate_size"],
        "num_key_value_heads": facts["num_key_value_heads"],
        "head_dim": facts["head_dim"],
        "layer_norm_eps": facts["rms_norm_eps"],
        "use_qkv_bias": facts["qkv_bias"],
        "use_parallel_residual": facts["parallel_norms"] == 1,
        PARTIAL: 1.0,
        **hf_of_rope(facts),
    }


STABLELM: Final = OwnKeys(_stablelm, _stablelm_keys)
FALCON: Final = OwnKeys(_falcon, _falcon_keys)
OPT: Final = OwnKeys(_opt, _opt_keys)
