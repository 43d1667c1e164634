"""`m2c profile`: run calibration text through a checkpoint and rank its neurons.

Streams layer by layer: in memory are one layer's weights and, of the calibration tokens, the hidden
states and the inputs of that layer's matrices, whatever the size of the model. Knows nothing about
bundles' shards or about printing.
"""

import hashlib
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from torch import Tensor

from m2c import __version__
from m2c.bundle.importance import Calibration, Importance, LayerImportance
from m2c.directions import principal_directions
from m2c.errors import BadInput
from m2c.expert_profile import run_experts
from m2c.hardware import give_back_freed
from m2c.kernels.reference import apply_norm, attention, down, gate_up
from m2c.kernels.rows import ExactRows
from m2c.kernels.workers import Workers
from m2c.model.attention import (
    LayerFacts,
    Rotary,
    attention_call,
    embedded,
    layer_facts,
    norm_of,
)
from m2c.model.checkpoint import Checkpoint
from m2c.model.config import ModelConfig
from m2c.model.experts import router_of
from m2c.model.weights import layer_rows, require_finite, vector_tensors
from m2c.tally import InputTally, NeuronTally, f32

SEQUENCE: Final = 512  # tokens that see each other
EMBED: Final = "model.embed_tokens.weight"


def profile(
    checkpoint: Checkpoint, ids: list[int], *, text: str, text_source: str, workers: Workers,
    progress: Callable[[int], None] = lambda layers: None,
) -> Importance:  # fmt: skip
    """ids: the calibration text's tokens. Raises BadInput when activations are not finite.

    `progress` is told each finished layer.
    """
    config = checkpoint.config
    if max(ids) >= config.vocab_size:
        raise BadInput(
            f"{checkpoint.path}: the tokenizer gives id {max(ids)}, the model has "
            f"{config.vocab_size} tokens", "fetch the tokenizer that belongs to this model",
        )  # fmt: skip
    vectors = vector_tensors(checkpoint)
    length = min(SEQUENCE, config.max_position_embeddings)
    rotary = Rotary(config, length, torch.device("cpu"))
    parts = (ids[start : start + length] for start in range(0, len(ids), length))
    states = [_embed(checkpoint, vectors, part) for part in parts]
    layers = []
    for layer in range(config.num_hidden_layers):
        layers.append(_run_layer(checkpoint, layer, states, vectors, rotary, workers))
        give_back_freed()  # before the next is read: memory holds one layer
        progress(1)
    final = [apply_norm(x, norm_of(config, vectors, "model.norm")) for x in states]
    calibration = Calibration(
        model=checkpoint.name,
        fingerprint=checkpoint.fingerprint(),
        tokens=sum(len(x) for x in states),
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
        text_source=text_source,
        layers=config.num_hidden_layers,
        created_by=f"m2c {__version__}",
    )
    head = torch.cat(final)
    return Importance(calibration, layers, f32(_mean_square(head)), f32(principal_directions(head)))


def _embed(checkpoint: Checkpoint, vectors: dict[str, Tensor], ids: list[int]) -> Tensor:
    rows = {i: checkpoint.read(EMBED, i, i + 1)[0].float() for i in set(ids)}
    states = torch.stack([rows[i] for i in ids])
    require_finite(states, checkpoint, EMBED)
    return embedded(checkpoint.config, vectors, states, 0)


def _run_layer(
    checkpoint: Checkpoint, layer: int, states: list[Tensor], vectors: dict[str, Tensor],
    rotary: Rotary, workers: Workers,
) -> LayerImportance:  # fmt: skip
    """All sequences [tokens, hidden] through one layer; `states` becomes what it gives."""
    config, inputs = checkpoint.config, InputTally()
    rows, own = layer_rows(checkpoint, layer), layer_facts(config, vectors, layer)
    tally = None if config.num_experts else NeuronTally(rows["ffn"])
    for i, x in enumerate(states):
        states[i] = _run_attention(x, rows, own, inputs, config, rotary, workers)
        if tally is not None:
            activations = gate_up(
                inputs.ffn_inputs[-1], rows["ffn"], config.activation, workers, bias=own.up_bias
            )
            tally.count(activations)
            out = apply_norm(down(activations, rows["ffn"], workers), own.ffn_out_norm)
            states[i] = states[i] + out
            if own.down_bias is not None:
                states[i] = states[i] + own.down_bias
    neurons: dict[str, np.ndarray] = {}
    if tally is None:
        router = router_of(config, vectors, layer)
        outs, neurons = run_experts(checkpoint, layer, router, inputs.ffn_inputs, workers)
        for i, out in enumerate(outs):
            states[i] = states[i] + apply_norm(out, own.ffn_out_norm)
    if not all(bool(torch.isfinite(x).all()) for x in states):
        raise BadInput(f"{checkpoint.path}: activations of layer {layer} are not finite")
    return LayerImportance(**(neurons if tally is None else tally.facts()), **inputs.facts())


def _run_attention(
    x: Tensor, rows: dict[str, ExactRows], facts: LayerFacts, tally: InputTally,
    config: ModelConfig, rotary: Rotary, workers: Workers,
) -> Tensor:  # fmt: skip
    """One sequence [tokens, hidden] through the attention of one layer; the inputs of all its
    matrices are counted."""
    inputs: list[Tensor] = []
    keys, values = torch.empty((2, config.num_key_value_heads, len(x), config.head_dim))
    call = attention_call(config, facts, rows, rotary=rotary, keys=keys, values=values)
    given = x
    x = attention(x, call, 0, workers, norm=facts.attn_norm, inputs=inputs)
    tally.count(
        inputs[0], inputs[1], apply_norm(given if config.parallel_norms else x, facts.ffn_norm)
    )
    return x


def _mean_square(x: Tensor) -> Tensor:
    return x.square().mean(0)
