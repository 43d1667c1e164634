"""Calibration of a layer's experts: each with the tokens that the router sends to it.

One expert's weights are in memory at a time. Knows nothing about attention.
"""

from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from m2c.bundle.planes import RecordLayout
from m2c.errors import BadInput
from m2c.kernels.dispatch import route
from m2c.kernels.operands import Router
from m2c.kernels.reference import down, gate_up, gather_ffn
from m2c.kernels.rows import ExactRows
from m2c.kernels.workers import Workers
from m2c.model.checkpoint import Checkpoint
from m2c.model.weights import expert_records, shared_records
from m2c.tally import NeuronTally, f32

# tokens to judge an expert's neurons by: one with fewer of its own borrows from all of the layer's
ENOUGH: Final = 64
_PER_NEURON: Final = ("mean", "energy", "down_norm", "down_directions")


def run_experts(
    checkpoint: Checkpoint, layer: int, router: Router, inputs: list[Tensor], workers: Workers
) -> tuple[list[Tensor], dict[str, np.ndarray]]:
    """inputs: of the FFN, sequences [tokens, hidden]. What the experts give for them, and those
    fields of a LayerImportance that are about neurons.

    Mean and energy are those of the tokens that an expert is judged by; frequency is the share of
    all tokens that use the expert, the same for all of its neurons. Raises BadInput when a weight
    or an activation is no number.
    """
    config = checkpoint.config
    x = torch.cat(inputs)
    chosen, weights, share = route(x, router, workers, norm=None)
    out = torch.zeros_like(x)
    if share is not None:
        out += share * _shared(checkpoint, layer, x, workers)
    found: list[dict[str, np.ndarray]] = []
    uses = []
    for expert in range(config.num_experts):
        layout = RecordLayout(3, config.hidden_size)
        rows = ExactRows(layout, expert_records(checkpoint, layer, expert))
        tokens, place = (chosen == expert).nonzero(as_tuple=True)
        judged = torch.cat((tokens, _borrowed(tokens, len(x))))
        activations = gate_up(x[judged], rows, config.activation, workers)
        if not bool(activations.isfinite().all()):
            raise BadInput(f"{checkpoint.path}: activations of layer {layer} are not finite")
        own = activations[: len(tokens)]
        if len(tokens):
            out.index_add_(0, tokens, down(own, rows, workers) * weights[tokens, place, None])
        tally = NeuronTally(rows)
        tally.count(activations)
        found.append(tally.facts())
        uses.append(len(tokens))
        del rows, activations, own, tally  # before the next is read
    sequences = chosen.split([len(part) for part in inputs])
    overlap = _overlap(sequences, router)
    facts = _joined(found, np.array(uses), len(x), config.intermediate_size)
    return list(out.split([len(part) for part in inputs])), {**facts, "overlap": overlap}


def _shared(checkpoint: Checkpoint, layer: int, x: Tensor, workers: Workers) -> Tensor:
    """What the shared expert gives for x. Its neurons are not ranked: they stay together."""
    layout = RecordLayout(3, checkpoint.config.hidden_size)
    rows = ExactRows(layout, shared_records(checkpoint, layer))
    return gather_ffn(x, rows, checkpoint.config.activation, workers)


def _borrowed(tokens: Tensor, count: int) -> Tensor:
    """Of `count` tokens as many, evenly spaced, as an expert with `tokens` lacks; none twice."""
    lacking = max(0, min(ENOUGH, count) - len(tokens))
    if not lacking:
        return tokens[:0]
    mine = torch.zeros(count, dtype=torch.bool)
    mine[tokens] = True
    others = (~mine).nonzero()[:, 0]
    return others[torch.linspace(0, len(others) - 1, lacking).long()]


def _joined(
    found: list[dict[str, np.ndarray]], uses: np.ndarray, tokens: int, size: int
) -> dict[str, Any]:
    """uses: tokens of each expert. Curves are means over the tokens' uses of experts."""
    share = uses / max(1, uses.sum())
    facts: dict[str, Any] = {
        name: np.concatenate([one[name] for one in found]) for name in _PER_NEURON
    }
    facts["order"] = np.concatenate(
        [one["order"] + np.int32(i * size) for i, one in enumerate(found)]
    )
    facts["frequency"] = np.repeat((uses / tokens).astype(np.float32), size)
    for name in ("coverage_own", "coverage_static"):
        curve = np.average([one[name] for one in found], axis=0, weights=share)
        facts[name] = curve.astype(np.float32)
    return facts


def _overlap(sequences: tuple[Tensor, ...], router: Router) -> np.ndarray:
    """[2], both the same: share of a token's experts that the token before used, minus chance."""
    same, pairs = 0.0, 0
    for chosen in sequences:
        member = torch.zeros(len(chosen), router.experts).scatter_(1, chosen, 1.0)
        same += float((member[1:] * member[:-1]).sum()) / router.active
        pairs += len(chosen) - 1
    value = torch.full((2,), same / max(1, pairs) - router.active / router.experts)
    return f32(value)
