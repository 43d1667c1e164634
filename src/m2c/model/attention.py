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
from m2c.model.rope import LONGROPE
from m2c.model.tensors import FIRST_POSITION, POSITIONS, up_bias_name

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class LayerFacts:
    """What a layer is besides its matrices. Vectors are f32; what a model lacks is None."""

    attn_norm: Norm
    ffn_norm: Norm
    biases: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # of MATRICES
    qk_norms: tuple[Norm | None, Norm | None]
    attn_out_norm: Norm | None
    ffn_out_norm: Norm | None
    window: int | None  # how many positions a token sees
    local_rope: bool
    up_bias: Tensor | None  # of neurons, in the order of `tensors`
    down_bias: Tensor | None


def layer_facts(config: ModelConfig, tensors: Mapping[str, Tensor], layer: int) -> LayerFacts:
    """tensors: f32, under their Hugging Face names."""
    prefix = f"model.layers.{layer}."

    def norm(name: str) -> Norm:
        return norm_of(config, tensors, prefix + name)

    heads = (norm("self_attn.q_norm"), norm("self_attn.k_norm")) if config.qk_norm else (None, None)
    after = config.post_norms
    window = config.window(layer)
    # with norms after attention and FFN, the name of the one before the FFN is another
    ffn_norm = "pre_feedforward_layernorm" if after else "post_attention_layernorm"
    q, k, v, o = (tensors.get(f"{prefix}self_attn.{name}.bias") for name in MATRICES)
    return LayerFacts(
        attn_norm=norm("input_layernorm"),
        ffn_norm=norm("input_layernorm" if config.parallel_norms == 1 else ffn_norm),
        biases=(q, k, v, o),
        qk_norms=heads,
        attn_out_norm=norm("post_attention_layernorm") if after else None,
        ffn_out_norm=norm("post_feedforward_layernorm") if after else None,
        window=window,
        local_rope=window is not None and config.local_rope_theta is not None,
        up_bias=tensors.get(up_bias_name(layer)),
        down_bias=tensors.get(f"{prefix}mlp.down_proj.bias"),
    )


def norm_of(config: ModelConfig, tensors: Mapping[str, Tensor], name: str) -> Norm:
    """name: of the norm, without what ends its tensors' names.

    Where layers multiply what they add, hidden states are kept divided by that factor, here and in
    `embedded`: layers then simply add. Norms give the same of such states if eps is divided too.
    """
    eps = config.rms_norm_eps / (config.residual_multiplier or 1.0) ** 2
    return Norm(tensors[f"{name}.weight"], eps, tensors.get(f"{name}.bias"))


def embedded(
    config: ModelConfig, tensors: Mapping[str, Tensor], rows: Tensor, start: int
) -> Tensor:
    """Rows of the embedding matrix [tokens, hidden] f32, of tokens from position `start` on, as the
    first layer takes them."""
    if config.learned_positions:
        start += FIRST_POSITION
        return rows + tensors[POSITIONS][start : start + len(rows)]
    if config.embedding_multiplier is not None:
        return rows * (config.embedding_multiplier / (config.residual_multiplier or 1.0))
    return rows * math.sqrt(config.hidden_size) if config.scale_embeddings else rows


class Rotary:
    """cos and sin tables [positions, rotary / 2] f32; none where positions are learned.

    positions: of the whole context. Their number chooses longrope's factors, once, as in
    llama.cpp: a key in the cache and a query that comes thousands of tokens later must be turned
    by the same ones, whoever drafts and however many tokens share a pass. transformers asks for
    the length of the text in every pass, and computes all keys again where the answer changes.
    """

    def __init__(self, config: ModelConfig, positions: int, device: torch.device) -> None:
        self._at = torch.arange(positions, device=device, dtype=torch.float32)
        self._tables: tuple[Tensor | None, Tensor | None] = (None, None)
        if not config.learned_positions:
            factor = 1.0 if config.rope_scaling is None else config.rope_scaling.attention_factor
            self._tables = self._made(rope_frequencies(config, positions), factor)
        if config.local_rope_theta is not None:
            self._local = self._made(_frequencies(config.local_rope_theta, config.head_dim))

    def tables(self, *, local: bool) -> tuple[Tensor | None, Tensor | None]:
        """cosines and sines; local: of layers that slide, where they have their own."""
        return self._local if local else self._tables

    def _made(self, frequencies: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        angles = self._at[:, None] * frequencies.to(self._at.device)
        return angles.cos().mul_(factor), angles.sin().mul_(factor)


def _frequencies(theta: float, rotary: int, divisors: Tensor | float = 1.0) -> Tensor:
    exponent = torch.arange(0, rotary, 2, dtype=torch.float32) / rotary
    return 1.0 / (divisors * theta**exponent)


def rope_frequencies(config: ModelConfig, positions: int) -> Tensor:
    """Radians per position [rotary / 2] f32 in a context of `positions`, stretched as the config
    says (Llama 3: by band; longrope: each by its own factor)."""
    rotary, scaling = config.rotary_dim or config.head_dim, config.rope_scaling
    plain = _frequencies(config.rope_theta, rotary)
    if scaling is None:
        return plain
    if scaling.rope_type == LONGROPE:
        is_long = positions > scaling.original_max_position_embeddings
        factors = scaling.long_factor if is_long else scaling.short_factor
        return _frequencies(config.rope_theta, rotary, torch.tensor(factors))
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
    cosines, sines = rotary.tables(local=facts.local_rope)
    return AttentionCall(
        projections=(q, k, v, o), biases=facts.biases, keys=keys, values=values,
        cosines=cosines, sines=sines, heads=config.num_attention_heads,
        scale=config.attention_multiplier
        or 1 / math.sqrt(config.query_pre_attn_scalar or config.head_dim),
        window=facts.window, qk_norms=facts.qk_norms, out_norm=facts.attn_out_norm,
        softcap=config.attn_logit_softcapping,
    )  # fmt: skip
