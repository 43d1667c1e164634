"""Running sums over calibration tokens: what a layer's matrices meet, and what its neurons do.

Knows nothing about checkpoints.
"""

from typing import Final

import numpy as np
import torch
from torch import Tensor

from m2c.directions import principal_directions
from m2c.kernels.rows import ExactRows
from m2c.model.mix import scores_of

TOP_SHARE: Final = 0.3  # the set whose membership counts as a use
SAMPLE: Final = 64  # tokens kept for measuring output errors


class InputTally:
    """What the matrices of one layer are multiplied with, over the calibration tokens."""

    def __init__(self) -> None:
        self.tokens = 0
        self._totals: dict[str, Tensor] = {}
        self._seen: dict[str, list[Tensor]] = {}
        self._sample: list[Tensor] = []

    def count(self, attn: Tensor, o: Tensor, ffn: Tensor) -> None:
        """Inputs of q/k/v, of o_proj and of the FFN [tokens, *]."""
        self.tokens += len(ffn)
        for name, x in (("attn_input", attn), ("o_input", o), ("ffn_input", ffn)):
            total = x.square().sum(0, dtype=torch.float64)
            self._totals[name] = self._totals.get(name, 0) + total
        for name, x in (("attn", attn), ("o", o), ("ffn", ffn)):
            self._seen.setdefault(name, []).append(x)
        self._sample.append(ffn[:: max(1, len(ffn) // 16)])

    @property
    def ffn_inputs(self) -> list[Tensor]:
        """As they were counted."""
        return self._seen["ffn"]

    def facts(self) -> dict[str, np.ndarray]:
        """Fields of a LayerImportance."""
        sample = torch.cat(self._sample)
        step = max(1, len(sample) // SAMPLE)
        return {
            "sample": f32(sample[::step][:SAMPLE]),
            **{name: f32(total / self.tokens) for name, total in self._totals.items()},
            **{
                f"{name}_directions": f32(principal_directions(torch.cat(seen)))
                for name, seen in self._seen.items()
            },
        }


class NeuronTally:
    """Running sums over the activations of one layer's neurons, or of one expert's."""

    def __init__(self, ffn: ExactRows) -> None:
        neurons, hidden = len(ffn), ffn.layout.length
        self._down_norm = torch.linalg.vector_norm(ffn.weights[:, -hidden:].float(), dim=1)
        self._tokens = self._pairs = 0
        self._mean = torch.zeros(neurons, dtype=torch.float64)
        self._energy = torch.zeros(neurons, dtype=torch.float64)
        self._uses = torch.zeros(neurons, dtype=torch.float64)
        self._own = torch.zeros(101, dtype=torch.float64)
        self._overlap = torch.zeros(2, dtype=torch.float64)
        self._seen: list[Tensor] = []
        self._at = torch.linspace(0, neurons, 101).long()

    def count(self, activations: Tensor) -> None:
        """activations: [tokens, neurons]"""
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
        self._seen.append(activations)

    def facts(self) -> dict[str, np.ndarray]:
        """Fields of a LayerImportance."""
        mean = self._mean / self._tokens
        order = torch.argsort(mean, descending=True, stable=True)
        static = torch.cat((torch.zeros(1), self._energy[order].cumsum(0).float()))
        chance = torch.tensor([0.1, TOP_SHARE])
        return {
            "mean": f32(mean),
            "energy": f32(self._energy / self._tokens),
            "frequency": f32(self._uses / self._tokens),
            "order": order.to(torch.int32).numpy(),
            "down_norm": f32(self._down_norm),
            "coverage_own": f32(self._own / self._tokens),
            "coverage_static": f32(static[self._at] / static[-1].clamp(min=1e-30)),
            "overlap": f32(self._overlap / max(1, self._pairs) - chance),
            "down_directions": f32(principal_directions(torch.cat(self._seen))),
        }


def _adjacent_overlap(ranked: Tensor, top: int) -> float:
    """Sum over adjacent tokens of the share of the top set they have in common."""
    member = torch.zeros_like(ranked, dtype=torch.float32)
    member.scatter_(1, ranked[:, :top], 1.0)
    return float((member[1:] * member[:-1]).sum()) / top


def f32(x: Tensor) -> np.ndarray:
    return np.ascontiguousarray(x.to(torch.float32).numpy())
