"""From logits to the next token id.

Filters in llama.cpp's order: repetition penalty, top-k, top-p, min-p, and temperature last.
Knows nothing about models or text; randomness comes from its own generator, so the same seed,
logits and history give the same ids.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from m2c.errors import BadInput, UsageError


@dataclass(frozen=True)
class SamplingParams:
    """The knobs, checked on construction. UsageError names the one that is out of range."""

    temperature: float = 0.0  # 0: always the most probable token
    top_k: int = 0  # keep the k most probable; 0: all
    top_p: float = 1.0  # keep the fewest tokens whose probabilities, at temperature 1, reach this
    min_p: float = 0.0  # keep tokens at least this fraction as probable as the first
    repeat_penalty: float = 1.0  # divides the odds of recent tokens; 1: none
    repeat_last_n: int = 64  # how many of the last tokens count as recent
    seed: int | None = None  # None: drawn from the operating system

    def __post_init__(self) -> None:
        _require(0 <= self.temperature < math.inf, "temperature", "0 or more", self.temperature)
        _require(self.top_k >= 0, "top-k", "0 or more", self.top_k)
        _require(0 < self.top_p <= 1, "top-p", "above 0 and at most 1", self.top_p)
        _require(0 <= self.min_p <= 1, "min-p", "from 0 to 1", self.min_p)
        _require(
            0 < self.repeat_penalty < math.inf, "repeat-penalty", "above 0", self.repeat_penalty
        )
        _require(self.repeat_last_n >= 0, "repeat-last-n", "0 or more", self.repeat_last_n)
        _require(
            self.seed is None or 0 <= self.seed < 1 << 63, "seed", "from 0 to 2^63 - 1", self.seed
        )


def _require(fine: bool, name: str, range_: str, value: object) -> None:
    # Written so that a NaN, for which every comparison is false, is refused as well.
    if not fine:
        raise UsageError(f"--{name} is {value}", f"give a number {range_}")


class Sampler:
    """Draws token ids. `seed` is the seed in use, to be reported with the result."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        # 63 bits: torch takes no more
        drawn = int.from_bytes(os.urandom(8), "little") >> 1
        self.seed = drawn if params.seed is None else params.seed
        self._generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, logits: torch.Tensor, history: Sequence[int]) -> int:
        """The next id after `history`. logits: [vocab], any float dtype and device."""
        scores = self._penalised(logits, history)
        if self.params.temperature == 0:
            return int(scores.argmax())  # the lowest id among equals
        return self.draw(self._distribution(scores))

    def probabilities(self, logits: torch.Tensor, history: Sequence[int]) -> torch.Tensor:
        """The distribution that a call would draw from: [vocab] f64 on the CPU, sums to 1.

        At temperature 0 all of it lies on one id. BadInput when a logit is not finite.
        """
        scores = self._penalised(logits, history)
        if self.params.temperature == 0:
            certain = torch.zeros_like(scores)
            certain[scores.argmax()] = 1.0
            return certain
        return self._distribution(scores)

    def draw(self, weights: torch.Tensor) -> int:
        """An id with probability proportional to `weights`: [vocab], none negative, sum > 0."""
        cumulative = weights.double().cumsum(0)
        point = self.uniform() * cumulative[-1]
        drawn = int(torch.searchsorted(cumulative, point, right=True))
        # The product may round up to the sum itself, which no id lies beyond.
        return min(drawn, int(weights.nonzero()[-1]))

    def uniform(self) -> float:
        """The generator's next number in [0, 1)."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))

    def _penalised(self, logits: torch.Tensor, history: Sequence[int]) -> torch.Tensor:
        """A copy of the logits as f64 on the CPU: [vocab], repetition penalty applied."""
        scores = logits.detach().to("cpu", torch.float64, copy=True)
        if not scores.isfinite().all():
            raise BadInput(
                "the model's logits are not finite", "check the bundle for damage with m2c check"
            )
        params = self.params
        if params.repeat_penalty == 1 or params.repeat_last_n == 0 or not history:
            return scores
        recent = torch.tensor(sorted(set(history[-params.repeat_last_n :])))
        values = scores[recent]
        scores[recent] = torch.where(
            values > 0, values / params.repeat_penalty, values * params.repeat_penalty
        )
        return scores

    def _distribution(self, scores: torch.Tensor) -> torch.Tensor:
        """Filters, temperature, softmax. scores: [vocab] f64, also the result's shape."""
        params = self.params
        scores = scores - scores.max()
        if 0 < params.top_k < len(scores) or params.top_p < 1:
            scores = self._first_few(scores)
        # relative to the first token, whose score is 0
        if params.min_p > 0:
            scores = scores.masked_fill(scores < math.log(params.min_p), -math.inf)
        return torch.softmax(scores / params.temperature, dim=0)

    def _first_few(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores with all but the top-k, then all but the top-p of those, at -inf."""
        # stable: among equals the lower id stays
        ordered, ids = scores.sort(descending=True, stable=True)
        kept = self.params.top_k or len(ids)
        if self.params.top_p < 1:
            cumulative = torch.softmax(ordered[:kept], dim=0).cumsum(0)
            kept = min(kept, int((cumulative < self.params.top_p).sum()) + 1)
        few = torch.full_like(scores, -math.inf)
        few[ids[:kept]] = ordered[:kept]
        return few
