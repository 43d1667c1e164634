"""Facts published about well-known models, so that `m2c plan llama2-70b` needs no weights.

The repository is the instruction-tuned one where its publisher has one. Numbers are those of its
config.json; tests check the parameter counts that follow from them.
Knows nothing about where the files are: that is `m2c.hub`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from m2c.model.config import ModelConfig


@dataclass(frozen=True)
class Alias:
    repo: str
    hf_config: Mapping[str, Any]

    def config(self) -> ModelConfig:
        return ModelConfig.from_hf(self.hf_config, file=f"config of {self.repo}")


def _model(repo: str, family: Mapping[str, Any], sizes: tuple[int, ...], **other: Any) -> Alias:
    """`sizes`: hidden_size, intermediate_size, layers, attention heads, KV heads."""
    hidden, ffn, layers, heads, kv_heads = sizes
    shape = {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }
    return Alias(repo, {**family, **shape, **other})


_LLAMA2: Final = {
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_PROSPARSE: Final = {
    **_LLAMA2,
    "model_type": "sparsellama",
    "hidden_act": "fatrelu",
    "hidden_act_param": 0.01,
}
_LLAMA3: Final = {
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128009],
}


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


_LLAMA31: Final = {
    **_LLAMA3,
    "rope_scaling": _llama3_rope(8.0),
    "max_position_embeddings": 131072,
    "eos_token_id": [128001, 128008, 128009],
}
_LLAMA32: Final = {
    **_LLAMA31,
    "rope_scaling": _llama3_rope(32.0),
    "tie_word_embeddings": True,
}
_QWEN25: Final = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "vocab_size": 152064,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "bos_token_id": 151643,
    "eos_token_id": [151645, 151643],
}
_QWEN25_SMALL: Final = {**_QWEN25, "vocab_size": 151936, "tie_word_embeddings": True}
_QWEN3: Final = {
    **_QWEN25,
    "model_type": "qwen3",
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}
_QWEN3_SMALL: Final = {**_QWEN3, "tie_word_embeddings": True}
_QWEN3_MOE: Final = {
    **_QWEN3,
    "model_type": "qwen3_moe",
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_QWEN2_MOE: Final = {
    **_QWEN25,
    "model_type": "qwen2_moe",
    "vocab_size": 151936,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_MIXTRAL: Final = {
    "model_type": "mixtral",
    "hidden_act": "silu",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 32768,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MISTRAL: Final = {
    "model_type": "mistral",
    "hidden_act": "silu",
    "head_dim": 128,
    "vocab_size": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 32768,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MISTRAL_SMALL: Final = {**_MISTRAL, "vocab_size": 131072, "rope_theta": 100000000.0}
_PHI3: Final = {
    "model_type": "phi3",
    "hidden_act": "silu",
    "vocab_size": 32064,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 32000,
}
# A plan needs no factors of longrope: 96 numbers each, which the files have
_PHI3_LONG: Final = {
    **_PHI3, "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
    "sliding_window": 262144,
}  # fmt: skip
_PHI4: Final = {
    **_PHI3, "vocab_size": 100352, "rope_theta": 250000.0, "max_position_embeddings": 16384,
    "sliding_window": None, "bos_token_id": 100257, "eos_token_id": 100265,
}  # fmt: skip
_PHI4_MINI: Final = {
    **_PHI3_LONG, "vocab_size": 200064, "partial_rotary_factor": 0.75, "bos_token_id": 199999,
    "tie_word_embeddings": True, "eos_token_id": 199999,
}  # fmt: skip
# Gemma's repositories differ in which ids end a text, and a plan needs none
_GEMMA2: Final = {
    "model_type": "gemma2",
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "vocab_size": 256000,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
    "bos_token_id": 2,
}
_GEMMA3: Final = {
    "model_type": "gemma3_text",
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "vocab_size": 262144,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "max_position_embeddings": 32768,
    "sliding_window": 512,
    "bos_token_id": 2,
}
# what reads text in a model that sees pictures too
_GEMMA3_LARGE: Final = {
    **_GEMMA3,
    "vocab_size": 262208,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "max_position_embeddings": 131072,
    "sliding_window": 1024,
}
_SMOLLM2: Final = {
    **_LLAMA2, "vocab_size": 49152, "rope_theta": 100000.0, "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}  # fmt: skip
_GRANITE: Final = {
    **_LLAMA2, "model_type": "granite", "vocab_size": 49159, "rope_theta": 10000000.0,
    "max_position_embeddings": 131072, "tie_word_embeddings": True, "bos_token_id": 0,
    "eos_token_id": 0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
}  # fmt: skip
_FALCON: Final = {
    "model_type": "falcon",
    "vocab_size": 65024,
    "layer_norm_epsilon": 1e-5,
    "alibi": False,
    "bias": False,
    "bos_token_id": 11,
    "eos_token_id": 11,
}


def _opt(size: str, hidden: int, layers: int, heads: int) -> Alias:
    config = {
        "model_type": "opt",
        "activation_function": "relu",
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "ffn_dim": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    return Alias(f"facebook/opt-{size}", config)


# fmt: off
ALIASES: Final[Mapping[str, Alias]] = {
    "llama2-7b": _model("meta-llama/Llama-2-7b-chat-hf", _LLAMA2, (4096, 11008, 32, 32, 32)),
    "llama2-13b": _model("meta-llama/Llama-2-13b-chat-hf", _LLAMA2, (5120, 13824, 40, 40, 40)),
    "llama2-70b": _model("meta-llama/Llama-2-70b-chat-hf", _LLAMA2, (8192, 28672, 80, 64, 8)),
    "llama3-8b": _model("meta-llama/Meta-Llama-3-8B-Instruct", _LLAMA3, (4096, 14336, 32, 32, 8)),
    "llama3-70b": _model("meta-llama/Meta-Llama-3-70B-Instruct", _LLAMA3, (8192, 28672, 80, 64, 8)),
    "llama3.1-8b": _model("meta-llama/Llama-3.1-8B-Instruct", _LLAMA31, (4096, 14336, 32, 32, 8)),
    "llama3.1-70b": _model("meta-llama/Llama-3.1-70B-Instruct", _LLAMA31, (8192, 28672, 80, 64, 8)),
    "llama3.1-405b":
        _model("meta-llama/Llama-3.1-405B-Instruct", _LLAMA31, (16384, 53248, 126, 128, 8)),
    "llama3.2-1b": _model("meta-llama/Llama-3.2-1B-Instruct", _LLAMA32, (2048, 8192, 16, 32, 8)),
    "llama3.2-3b": _model("meta-llama/Llama-3.2-3B-Instruct", _LLAMA32, (3072, 8192, 28, 24, 8)),
    "llama3.3-70b": _model("meta-llama/Llama-3.3-70B-Instruct", _LLAMA31, (8192, 28672, 80, 64, 8)),
    "qwen2.5-0.5b": _model("Qwen/Qwen2.5-0.5B-Instruct", _QWEN25_SMALL, (896, 4864, 24, 14, 2)),
    "qwen2.5-1.5b": _model("Qwen/Qwen2.5-1.5B-Instruct", _QWEN25_SMALL, (1536, 8960, 28, 12, 2)),
    "qwen2.5-3b": _model("Qwen/Qwen2.5-3B-Instruct", _QWEN25_SMALL, (2048, 11008, 36, 16, 2)),
    "qwen2.5-7b": _model("Qwen/Qwen2.5-7B-Instruct", _QWEN25, (3584, 18944, 28, 28, 4)),
    "qwen2.5-14b": _model("Qwen/Qwen2.5-14B-Instruct", _QWEN25, (5120, 13824, 48, 40, 8)),
    "qwen2.5-32b": _model("Qwen/Qwen2.5-32B-Instruct", _QWEN25, (5120, 27648, 64, 40, 8)),
    "qwen2.5-72b": _model("Qwen/Qwen2.5-72B-Instruct", _QWEN25, (8192, 29568, 80, 64, 8)),
    "qwen2.5-coder-0.5b":
        _model("Qwen/Qwen2.5-Coder-0.5B-Instruct", _QWEN25_SMALL, (896, 4864, 24, 14, 2)),
    "qwen2.5-coder-1.5b":
        _model("Qwen/Qwen2.5-Coder-1.5B-Instruct", _QWEN25_SMALL, (1536, 8960, 28, 12, 2)),
    "qwen2.5-coder-3b":
        _model("Qwen/Qwen2.5-Coder-3B-Instruct", _QWEN25_SMALL, (2048, 11008, 36, 16, 2)),
    "qwen2.5-coder-7b":
        _model("Qwen/Qwen2.5-Coder-7B-Instruct", _QWEN25, (3584, 18944, 28, 28, 4)),
    "qwen2.5-coder-14b":
        _model("Qwen/Qwen2.5-Coder-14B-Instruct", _QWEN25, (5120, 13824, 48, 40, 8)),
    "qwen2.5-coder-32b":
        _model("Qwen/Qwen2.5-Coder-32B-Instruct", _QWEN25, (5120, 27648, 64, 40, 8)),
    "qwen1.5-moe-a2.7b":
        _model("Qwen/Qwen1.5-MoE-A2.7B-Chat", _QWEN2_MOE, (2048, 5632, 24, 16, 16),
               moe_intermediate_size=1408, shared_expert_intermediate_size=5632, num_experts=60,
               num_experts_per_tok=4, max_position_embeddings=8192),
    "qwen2-57b-a14b":
        _model("Qwen/Qwen2-57B-A14B-Instruct", _QWEN2_MOE, (3584, 18944, 28, 28, 4),
               moe_intermediate_size=2560, shared_expert_intermediate_size=20480, num_experts=64,
               num_experts_per_tok=8),
    "qwen3-0.6b": _model("Qwen/Qwen3-0.6B", _QWEN3_SMALL, (1024, 3072, 28, 16, 8)),
    "qwen3-1.7b": _model("Qwen/Qwen3-1.7B", _QWEN3_SMALL, (2048, 6144, 28, 16, 8)),
    "qwen3-4b": _model("Qwen/Qwen3-4B", _QWEN3_SMALL, (2560, 9728, 36, 32, 8)),
    "qwen3-8b": _model("Qwen/Qwen3-8B", _QWEN3, (4096, 12288, 36, 32, 8)),
    "qwen3-14b": _model("Qwen/Qwen3-14B", _QWEN3, (5120, 17408, 40, 40, 8)),
    "qwen3-32b": _model("Qwen/Qwen3-32B", _QWEN3, (5120, 25600, 64, 64, 8)),
    "qwen3-30b-a3b": _model("Qwen/Qwen3-30B-A3B", _QWEN3_MOE, (2048, 6144, 48, 32, 4),
                            moe_intermediate_size=768, num_experts=128),
    "mixtral-8x7b":
        _model("mistralai/Mixtral-8x7B-Instruct-v0.1", _MIXTRAL, (4096, 14336, 32, 32, 8)),
    "mistral-7b":
        _model("mistralai/Mistral-7B-Instruct-v0.3", _MISTRAL, (4096, 14336, 32, 32, 8)),
    "mistral-small-24b":
        _model("mistralai/Mistral-Small-24B-Instruct-2501", _MISTRAL_SMALL,
               (5120, 32768, 40, 32, 8)),
    "phi3-mini-4k": _model("microsoft/Phi-3-mini-4k-instruct", _PHI3, (3072, 8192, 32, 32, 32)),
    "phi3-mini-128k":
        _model("microsoft/Phi-3-mini-128k-instruct", _PHI3_LONG, (3072, 8192, 32, 32, 32)),
    "phi3.5-mini":
        _model("microsoft/Phi-3.5-mini-instruct", _PHI3_LONG, (3072, 8192, 32, 32, 32)),
    "phi4": _model("microsoft/phi-4", _PHI4, (5120, 17920, 40, 40, 10)),
    "phi4-mini": _model("microsoft/Phi-4-mini-instruct", _PHI4_MINI, (3072, 8192, 32, 24, 8)),
    "gemma2-2b": _model("google/gemma-2-2b-it", _GEMMA2, (2304, 9216, 26, 8, 4)),
    "gemma2-9b": _model("google/gemma-2-9b-it", _GEMMA2, (3584, 14336, 42, 16, 8)),
    "gemma2-27b": _model("google/gemma-2-27b-it", _GEMMA2, (4608, 36864, 46, 32, 16),
                         head_dim=128, query_pre_attn_scalar=144),
    "gemma3-270m": _model("google/gemma-3-270m-it", _GEMMA3, (640, 2048, 18, 4, 1)),
    "gemma3-1b": _model("google/gemma-3-1b-it", _GEMMA3, (1152, 6912, 26, 4, 1)),
    "gemma3-4b": _model("google/gemma-3-4b-it", _GEMMA3_LARGE, (2560, 10240, 34, 8, 4)),
    "gemma3-12b": _model("google/gemma-3-12b-it", _GEMMA3_LARGE, (3840, 15360, 48, 16, 8)),
    "gemma3-27b": _model("google/gemma-3-27b-it", _GEMMA3_LARGE, (5376, 21504, 62, 32, 16),
                         head_dim=128, query_pre_attn_scalar=168),
    "smollm2-135m": _model("HuggingFaceTB/SmolLM2-135M-Instruct", _SMOLLM2, (576, 1536, 30, 9, 3)),
    "smollm2-360m": _model("HuggingFaceTB/SmolLM2-360M-Instruct", _SMOLLM2, (960, 2560, 32, 15, 5)),
    "smollm2-1.7b": _model("HuggingFaceTB/SmolLM2-1.7B-Instruct", _SMOLLM2,
                           (2048, 8192, 24, 32, 32), rope_theta=130000.0),
    "granite3.3-2b":
        _model("ibm-granite/granite-3.3-2b-instruct", _GRANITE, (2048, 8192, 40, 32, 8),
               attention_multiplier=0.015625, logits_scaling=8.0),
    "granite3.3-8b":
        _model("ibm-granite/granite-3.3-8b-instruct", _GRANITE, (4096, 12800, 40, 32, 8),
               attention_multiplier=0.0078125, logits_scaling=16.0),
    "prosparse-llama2-7b":
        _model("SparseLLM/prosparse-llama-2-7b", _PROSPARSE, (4096, 11008, 32, 32, 32)),
    "prosparse-llama2-13b":
        _model("SparseLLM/prosparse-llama-2-13b", _PROSPARSE, (5120, 13824, 40, 40, 40)),
    "falcon-7b": Alias("tiiuae/falcon-7b", {
        **_FALCON, "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71,
        "multi_query": True, "parallel_attn": True, "new_decoder_architecture": False}),
    "falcon-40b": Alias("tiiuae/falcon-40b", {
        **_FALCON, "hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128,
        "num_kv_heads": 8, "new_decoder_architecture": True}),
    "opt-1.3b": _opt("1.3b", 2048, 24, 32),
    "opt-6.7b": _opt("6.7b", 4096, 32, 32),
    "opt-13b": _opt("13b", 5120, 40, 40),
    "opt-30b": _opt("30b", 7168, 48, 56),
    "opt-66b": _opt("66b", 9216, 64, 72),
}
# fmt: on
