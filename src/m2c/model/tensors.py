"""The tensors that a model has: their names, as in Hugging Face's checkpoints, and shapes.

Knows nothing about files or where checkpoints keep them.
"""

from collections.abc import Iterator
from math import prod
from typing import Final

from m2c.model.config import ModelConfig

POSITIONS: Final = "model.embed_positions.weight"
FIRST_POSITION: Final = 2  # the row of the table that is added to the first token
_FFN: Final = ("gate_proj", "up_proj", "down_proj")


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


def ffn_names(layer: int, expert: int | None = None, *, gated: bool = True) -> tuple[str, ...]:
    """gate, if there is one, and up [intermediate, hidden], down [hidden, intermediate]; expert:
    None for an FFN that is one."""
    prefix = f"model.layers.{layer}.mlp." + ("" if expert is None else f"experts.{expert}.")
    return tuple(f"{prefix}{name}.weight" for name in _FFN[0 if gated else 1 :])


def shared_names(layer: int) -> tuple[str, ...]:
    """As `ffn_names`, of the expert that every token uses."""
    return tuple(f"model.layers.{layer}.mlp.shared_expert.{name}.weight" for name in _FFN)


def up_bias_name(layer: int) -> str:
    return f"model.layers.{layer}.mlp.up_proj.bias"


def experts_of(config: ModelConfig) -> list[int | None]:
    """The parts of a layer's FFN, as `ffn_names` calls them."""
    return list(range(config.num_experts)) or [None]


def router_name(layer: int) -> str:
    """[experts, hidden]"""
    return f"model.layers.{layer}.mlp.gate.weight"


def shared_gate_name(layer: int) -> str:
    """[1, hidden]: how much of the shared expert a token takes, before a sigmoid."""
    return f"model.layers.{layer}.mlp.shared_expert_gate.weight"


def small_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """What is kept in f32, never in planes: norms, biases, routers, learned positions."""
    layers = range(config.num_hidden_layers)
    matrices = {POSITIONS, *map(router_name, layers), *map(shared_gate_name, layers)}
    every = expected_tensors(config)
    return {name: size for name, size in every.items() if len(size) == 1 or name in matrices}


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the model, under its Hugging Face name."""
    found: dict[str, tuple[int, ...]] = dict(dense_matrices(config))
    hidden, ffn = config.hidden_size, config.intermediate_size
    for layer in range(config.num_hidden_layers):
        for expert in experts_of(config):
            *rows, down = ffn_names(layer, expert, gated=config.gated)
            found.update(dict.fromkeys(rows, (ffn, hidden)))
            found[down] = (hidden, ffn)
        if config.num_experts:
            found[router_name(layer)] = (config.num_experts, hidden)
        if shared := config.shared_expert_intermediate_size:
            *rows, down = shared_names(layer)
            found.update(dict.fromkeys(rows, (shared, hidden)))
            found[down] = (hidden, shared)
            found[shared_gate_name(layer)] = (1, hidden)
        found.update(_vectors(config, f"model.layers.{layer}."))
    found.update(_norm(config, "model.norm"))
    if config.learned_positions:
        found[POSITIONS] = (FIRST_POSITION + config.max_position_embeddings, hidden)
    return found


def _norm(config: ModelConfig, name: str) -> Iterator[tuple[str, tuple[int]]]:
    yield name + ".weight", (config.hidden_size,)
    if config.layer_norms:
        yield name + ".bias", (config.hidden_size,)


def _vectors(config: ModelConfig, prefix: str) -> Iterator[tuple[str, tuple[int]]]:
    yield from _norm(config, prefix + "input_layernorm")
    if config.parallel_norms != 1:
        yield from _norm(config, prefix + "post_attention_layernorm")
    if config.post_norms:
        yield prefix + "pre_feedforward_layernorm.weight", (config.hidden_size,)
        yield prefix + "post_feedforward_layernorm.weight", (config.hidden_size,)
    if config.qkv_bias:
        kv = config.num_key_value_heads * config.head_dim
        yield prefix + "self_attn.q_proj.bias", (config.num_attention_heads * config.head_dim,)
        yield prefix + "self_attn.k_proj.bias", (kv,)
        yield prefix + "self_attn.v_proj.bias", (kv,)
    if config.o_bias:
        yield prefix + "self_attn.o_proj.bias", (config.hidden_size,)
    if config.ffn_bias:
        yield prefix + "mlp.up_proj.bias", (config.intermediate_size,)
        yield prefix + "mlp.down_proj.bias", (config.hidden_size,)
    if config.qk_norm:
        yield prefix + "self_attn.q_norm.weight", (config.head_dim,)
        yield prefix + "self_attn.k_norm.weight", (config.head_dim,)


def parameter_count(config: ModelConfig) -> int:
    """Weights of the model; tied embeddings count once."""
    return sum(prod(shape) for shape in expected_tensors(config).values())


def active_count(config: ModelConfig) -> int:
    """Weights that a token meets: of the experts, those it chooses."""
    idle = config.num_experts - config.num_experts_per_tok
    of_expert = 3 * config.hidden_size * config.intermediate_size
    return parameter_count(config) - config.num_hidden_layers * idle * of_expert
