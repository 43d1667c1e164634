"""The attention half of a layer: norm, projections, rotary positions, softmax, residual.

Written once, for decoding and for calibration: weights come in as kernel operands, wherever they
lie. Knows nothing about the FFN or about tiers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from m2c.kernels.dispatch import matmul_rows
from m2c.kernels.rows import Rows
from m2c.kernels.workers import Workers
from m2c.model.config import ModelConfig

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class LayerVectors:
    """Norms and biases of a layer, f32; a bias the model does not have is None."""

    attn_norm: Tensor
    ffn_norm: Tensor
    q_bias: Tensor | None
    k_bias: Tensor | None
    v_bias: Tensor | None
    o_bias: Tensor | None


def layer_vectors(tensors: dict[str, Tensor], layer: int) -> LayerVectors:
    """From f32 tensors under their Hugging Face names."""
    prefix = f"model.layers.{layer}."
    biases = [tensors.get(f"{prefix}self_attn.{name}.bias") for name in MATRICES]
    return LayerVectors(
        tensors[prefix + "input_layernorm.weight"],
        tensors[prefix + "post_attention_layernorm.weight"],
        *biases,
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


class Rotary:
    """cos and sin tables [positions, head_dim / 2] f32."""

    def __init__(self, config: ModelConfig, positions: int, device: torch.device) -> None:
        at = torch.arange(positions, device=device, dtype=torch.float32)
        angles = at[:, None] * rope_frequencies(config).to(device)
        self._cos, self._sin = angles.cos(), angles.sin()

    def __call__(self, x: Tensor, start: int) -> Tensor:
        """Rotate x [tokens, heads, head_dim] whose first token is at position `start`."""
        stop = start + x.shape[0]
        cos, sin = self._cos[start:stop, None], self._sin[start:stop, None]
        low, high = x.chunk(2, dim=-1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


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


def attention(
    x: Tensor, vectors: LayerVectors, rows: dict[str, Rows], *, config: ModelConfig,
    rotary: Rotary, start: int, extend: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    workers: Workers,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The residual stream after attention, and the inputs of q/k/v and of o_proj (calibration).

    x: [tokens, hidden] f32, the first at position `start`. `extend` stores new keys and values
    [tokens, kv_heads, head_dim] and returns all of them so far, [kv_heads, positions, head_dim].
    """
    normed = rms_norm(x, vectors.attn_norm, config.rms_norm_eps)
    tokens, dim = x.shape[0], config.head_dim
    q = _project(normed, rows["q_proj"], vectors.q_bias, workers).view(tokens, -1, dim)
    k = _project(normed, rows["k_proj"], vectors.k_bias, workers).view(tokens, -1, dim)
    v = _project(normed, rows["v_proj"], vectors.v_bias, workers).view(tokens, -1, dim)
    keys, values = extend(rotary(k, start), v)
    mixed = _softmax_attention(rotary(q, start), keys, values, start)
    return x + _project(mixed, rows["o_proj"], vectors.o_bias, workers), normed, mixed


def _project(x: Tensor, rows: Rows, bias: Tensor | None, workers: Workers) -> Tensor:
    y = matmul_rows(x, rows, workers)
    return y if bias is None else y + bias


def _softmax_attention(q: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
    """q [tokens, heads, dim] over keys, values [kv_heads, positions, dim]: [tokens, heads * dim].

    Causal: the token at position start + t sees positions up to its own.
    """
    tokens, heads, dim = q.shape
    groups = keys.shape[0]
    # heads that share keys become rows of one product: broadcasting would copy the keys
    grouped = q.view(tokens, groups, -1, dim).permute(1, 2, 0, 3).reshape(groups, -1, dim)
    scores = grouped @ keys.transpose(-1, -2) / math.sqrt(dim)  # [kv, shared * tokens, positions]
    if tokens > 1:
        positions = torch.arange(keys.shape[1], device=q.device)
        own = start + torch.arange(tokens, device=q.device)
        hidden = (positions > own[:, None]).repeat(heads // groups, 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    mixed = (scores.softmax(dim=-1) @ values).view(groups, -1, tokens, dim)
    return mixed.permute(2, 0, 1, 3).reshape(tokens, heads * dim)
