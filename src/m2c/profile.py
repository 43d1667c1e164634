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
from m2c.model.mix import scores_of
from m2c.model.weights import layer_rows, require_finite, vector_tensors

SEQUENCE: Final = 512  # tokens that see each other
TOP_SHARE: Final = 0.3  # the set whose membership counts as a use
SAMPLE: Final = 64  # tokens kept for measuring output errors
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
    rotary = Rotary(config, SEQUENCE, torch.device("cpu"))
    length = min(SEQUENCE, config.max_position_embeddings)
    parts = (ids[start : start + length] for start in range(0, len(ids), length))
    states = [_embed(checkpoint, vectors, part) for part in parts]
    layers = []
    for layer in range(config.num_hidden_layers):
        rows = layer_rows(checkpoint, layer)
        tally = _Tally(config, rows["ffn"])
        own = layer_facts(config, vectors, layer)
        for i, x in enumerate(states):
            states[i] = _run_layer(x, rows, own, tally, config, rotary, workers)
        if not all(bool(torch.isfinite(x).all()) for x in states):
            raise BadInput(f"{checkpoint.path}: activations of layer {layer} are not finite")
        layers.append(tally.result())
        del rows, tally  # before the next are read: memory holds one layer
        give_back_freed()
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
    return Importance(
        calibration, layers, _f32(_mean_square(head)), _f32(principal_directions(head))
    )


def _embed(checkpoint: Checkpoint, vectors: dict[str, Tensor], ids: list[int]) -> Tensor:
    rows = {i: checkpoint.read(EMBED, i, i + 1)[0].float() for i in set(ids)}
    states = torch.stack([rows[i] for i in ids])
    require_finite(states, checkpoint, EMBED)
    return embedded(checkpoint.config, vectors, states, 0)


def _run_layer(
    x: Tensor, rows: dict[str, ExactRows], facts: LayerFacts, tally: "_Tally",
    config: ModelConfig, rotary: Rotary, workers: Workers,
) -> Tensor:  # fmt: skip
    """One sequence [tokens, hidden] through one layer, counted in `tally`."""

    inputs: list[Tensor] = []
    keys, values = torch.empty((2, config.num_key_value_heads, len(x), config.head_dim))
    call = attention_call(config, facts, rows, rotary=rotary, keys=keys, values=values)
    given = x
    x = attention(x, call, 0, workers, norm=facts.attn_norm, inputs=inputs)
    ffn_input = apply_norm(given if config.parallel_norms else x, facts.ffn_norm)
    activations = gate_up(ffn_input, rows["ffn"], config.activation, workers, bias=facts.up_bias)
    tally.count(inputs[0], inputs[1], ffn_input, activations)
    out = apply_norm(down(activations, rows["ffn"], workers), facts.ffn_out_norm)
    return x + out if facts.down_bias is None else x + out + facts.down_bias


class _Tally:
    """Running sums over the calibration tokens of one layer."""

    def __init__(self, config: ModelConfig, ffn: ExactRows) -> None:
        neurons, hidden = config.intermediate_size, config.hidden_size
        self._down_norm = torch.linalg.vector_norm(ffn.weights[:, -hidden:].float(), dim=1)
        self._tokens = self._pairs = 0
        self._mean = torch.zeros(neurons, dtype=torch.float64)
        self._energy = torch.zeros(neurons, dtype=torch.float64)
        self._uses = torch.zeros(neurons, dtype=torch.float64)
        self._own = torch.zeros(101, dtype=torch.float64)
        self._overlap = torch.zeros(2, dtype=torch.float64)
        self._inputs: dict[str, Tensor] = {}
        self._seen: dict[str, list[Tensor]] = {}
        self._sample: list[Tensor] = []
        self._at = torch.linspace(0, neurons, 101).long()

    def count(self, attn: Tensor, o: Tensor, ffn: Tensor, activations: Tensor) -> None:
        """Inputs of q/k/v, of o_proj and of the FFN [tokens, *], and activations [tokens, N]."""
        tokens, neurons = activations.shape
        scores = scores_of(activations, self._down_norm)
        self._tokens += tokens
        self._mean += scores.sum(0, dtype=torch.float64)
        energy = scores.square()
        self._energy += energy.sum(0, dtype=torch.float64)
        ranked = torch.argsort(scores, dim=1, descending=True)
        held = torch.gather(energy, 1, ranked).cumsum(1)
        held = torch.cat((torch.zeros(tokens, 1), held), 1)
        self._own += (held[:, self._at] / held[:, -1:].clamp(min=1e-30)).sum(0, dtype=torch.float64)
        top = ranked[:, : max(1, round(TOP_SHARE * neurons))]
        self._uses += torch.bincount(top.reshape(-1), minlength=neurons)
        for i, share in enumerate((0.1, TOP_SHARE)):
            self._overlap[i] += _adjacent_overlap(ranked, max(1, round(share * neurons)))
        self._pairs += tokens - 1
        for name, x in (("attn_input", attn), ("o_input", o), ("ffn_input", ffn)):
            total = x.square().sum(0, dtype=torch.float64)
            self._inputs[name] = self._inputs.get(name, 0) + total
        for name, x in (("attn", attn), ("o", o), ("ffn", ffn), ("down", activations)):
            self._seen.setdefault(name, []).append(x)
        self._sample.append(ffn[:: max(1, tokens // 16)])

    def result(self) -> LayerImportance:
        mean = self._mean / self._tokens
        order = torch.argsort(mean, descending=True, stable=True)
        static = torch.cat((torch.zeros(1), self._energy[order].cumsum(0).float()))
        sample = torch.cat(self._sample)
        step = max(1, len(sample) // SAMPLE)
        chance = torch.tensor([0.1, TOP_SHARE])
        return LayerImportance(
            mean=_f32(mean),
            energy=_f32(self._energy / self._tokens),
            frequency=_f32(self._uses / self._tokens),
            order=order.to(torch.int32).numpy(),
            down_norm=_f32(self._down_norm),
            sample=_f32(sample[::step][:SAMPLE]),
            coverage_own=_f32(self._own / self._tokens),
            coverage_static=_f32(static[self._at] / static[-1].clamp(min=1e-30)),
            overlap=_f32(self._overlap / max(1, self._pairs) - chance),
            **{name: _f32(total / self._tokens) for name, total in self._inputs.items()},
            **{
                f"{name}_directions": _f32(principal_directions(torch.cat(seen)))
                for name, seen in self._seen.items()
            },
        )


def _adjacent_overlap(ranked: Tensor, top: int) -> float:
    """Sum over adjacent tokens of the share of the top set they have in common."""
    member = torch.zeros_like(ranked, dtype=torch.float32)
    member.scatter_(1, ranked[:, :top], 1.0)
    return float((member[1:] * member[:-1]).sum()) / top


def _mean_square(x: Tensor) -> Tensor:
    return x.square().mean(0)


def _f32(x: Tensor) -> np.ndarray:
    return np.ascontiguousarray(x.to(torch.float32).numpy())
