"""The attention half of a layer, as facts for the kernels: norms, biases, rotary angles.

Written once, for decoding and for calibration: weights come in as kernel operands, wherever they
lie. Knows nothing about the FFN or about tiers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from m2c.kernels.operands import AttentionCall, Norm
from m2c.kernels.rows import Rows
from m2c.model.config import ModelConfig

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class LayerFacts:
    """What a layer is besides its matrices. Vectors are f32; what a model lacks is None."""

    attn_norm: Norm
    ffn_norm: Norm
    biases: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # of MATRICES
    qk_norms: tuple[Norm | None, Norm | None]
    window: int | None  # how many positions a token sees


def layer_facts(config: ModelConfig, tensors: Mapping[str, Tensor], layer: int) -> LayerFacts:
    """tensors: f32, under their Hugging Face names."""
    prefix = f"model.layers.{layer}."

    def norm(name: str) -> Norm:
        return Norm(tensors[f"{prefix}{name}.weight"], config.rms_norm_eps)

    def head_norm(name: str) -> Norm | None:
        return norm(f"self_attn.{name}_norm") if config.qk_norm else None

    q, k, v, o = (tensors.get(f"{prefix}self_attn.{name}.bias") for name in MATRICES)
    return LayerFacts(
        norm("input_layernorm"),
        norm("post_attention_layernorm"),
        (q, k, v, o),
        (head_norm("q"), head_norm("k")),
        config.window(layer),
    )


class Rotary:
    """cos and sin tables [positions, head_dim / 2] f32."""

    def __init__(self, config: ModelConfig, positions: int, device: torch.device) -> None:
        at = torch.arange(positions, device=device, dtype=torch.float32)
        angles = at[:, None] * rope_frequencies(config).to(device)
        self.cosines, self.sines = angles.cos(), angles.sin()


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position [head_dim / 2] f32, stretched as the config says (Llama 3: by band)."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    plain = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    if scaling.rope_type == "linear":
        return plain / scaling.factor
    # long wavelengths are stretched, short ones are not, those between are blended
    wavelengths = 2 * math.pi / plain
    turns = scaling.original_max_position_embeddings / wavelengths
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return blend * plain + (1 - blend) * plain / scaling.factor


def attention_call(
    config: ModelConfig, facts: LayerFacts, rows: Mapping[str, Rows], *, rotary: Rotary,
    keys: Tensor, values: Tensor,
) -> AttentionCall:  # fmt: skip
    """keys, values: of this layer, [kv_heads, positions, head_dim]."""
    q, k, v, o = (rows[name] for name in MATRICES)
    return AttentionCall(
        projections=(q, k, v, o), biases=facts.biases, keys=keys, values=values,
        cosines=rotary.cosines, sines=rotary.sines,
        heads=config.num_attention_heads, scale=1 / math.sqrt(config.head_dim),
        window=facts.window, qk_norms=facts.qk_norms,
    )  # fmt: skip
