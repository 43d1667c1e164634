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
_SMOLLM2: Final = {
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 49152,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

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
    "smollm2-135m": _model("HuggingFaceTB/SmolLM2-135M-Instruct", _SMOLLM2, (576, 1536, 30, 9, 3)),
    "smollm2-360m": _model("HuggingFaceTB/SmolLM2-360M-Instruct", _SMOLLM2, (960, 2560, 32, 15, 5)),
    "smollm2-1.7b": _model("HuggingFaceTB/SmolLM2-1.7B-Instruct", _SMOLLM2,
                           (2048, 8192, 24, 32, 32), rope_theta=130000.0),
    "prosparse-llama2-7b":
        _model("SparseLLM/prosparse-llama-2-7b", _PROSPARSE, (4096, 11008, 32, 32, 32)),
    "prosparse-llama2-13b":
        _model("SparseLLM/prosparse-llama-2-13b", _PROSPARSE, (5120, 13824, 40, 40, 40)),
}
# fmt: on
