"""From logits to the next token id.

Filters in llama.cpp's order: repetition penalty, top-k, top-p, min-p, and temperature last.
What is left is drawn by an exponential race: id i arrives after e_i / p_i, the first one wins,
and wins with probability p_i. The noise e_i is a hash of seed, position and id, not the next
number of a generator. Two models that are asked about the same position therefore share it and
mostly agree, which is what a draft needs; and a token does not depend on how often anybody asked.

Knows nothing about models, drafts or text.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from m2c.errors import BadInput, UsageError

F64 = NDArray[np.float64]

# SplitMix64 (Steele, Lea, Flood, 2014): the step between states, and what scrambles a state
_STEP = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
_MASK = (1 << 64) - 1


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
    """Chooses token ids: a pure function of logits, history and seed.

    The position that the noise belongs to is the length of the history. `seed` is the seed in use,
    to be reported with the result.
    """

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        drawn = int.from_bytes(os.urandom(8), "little") >> 1
        self.seed = drawn if params.seed is None else params.seed

    def __call__(self, logits: torch.Tensor, history: Sequence[int]) -> int:
        """The next id after `history`. logits: [vocab], any float dtype and device.

        BadInput when a logit is not finite.
        """
        if self.params.temperature == 0:
            return self._best(logits, history)[0]
        ids, chances = self._candidates(self._penalised(logits, history))
        return int(ids[self._winner(ids, chances, len(history))])

    def with_probability(self, logits: torch.Tensor, history: Sequence[int]) -> tuple[int, float]:
        """The id that a call gives, and the probability it had: how sure the model is of it.

        At temperature 0, where every choice is certain, the probability is that at temperature 1
        without filters.
        """
        if self.params.temperature == 0:
            best, scores = self._best(logits, history)
            return best, 1 / float(np.exp(scores - scores[best]).sum())
        ids, chances = self._candidates(self._penalised(logits, history))
        winner = self._winner(ids, chances, len(history))
        return int(ids[winner]), float(chances[winner])

    def probabilities(self, logits: torch.Tensor, history: Sequence[int]) -> torch.Tensor:
        """The distribution that a call draws from: [vocab] f64 on the CPU, sums to 1.

        At temperature 0 all of it lies on one id. BadInput when a logit is not finite.
        """
        scores = self._penalised(logits, history)
        all_ids = torch.zeros_like(scores)
        if self.params.temperature == 0:
            all_ids[scores.argmax()] = 1.0
        else:
            ids, chances = self._candidates(scores)
            all_ids[ids] = chances
        return all_ids

    def _winner(self, ids: torch.Tensor, chances: torch.Tensor, position: int) -> int:
        """Index of the first to arrive. ids: [n] i64, chances: [n] f64, one of them > 0."""
        arrivals = exponentials(self.seed, position, ids.numpy())
        with np.errstate(divide="ignore", over="ignore"):  # a chance of 0 never arrives
            np.divide(arrivals, chances.numpy(), out=arrivals)
        return int(arrivals.argmin())

    def _best(
        self, logits: torch.Tensor, history: Sequence[int]
    ) -> tuple[int, NDArray[np.floating]]:
        """The most probable id, the lowest among equals, and all scores [vocab].

        Without a penalty f32 logits stay what they are: a copy of 150,000 of them as f64 takes
        longer than finding the largest. BadInput as in a call.
        """
        if logits.dtype == torch.float32 and not self._penalises(history):
            scores: NDArray[np.floating] = logits.detach().cpu().numpy()
            _require_finite(float(scores.min()), float(scores.max()))
        else:
            scores = self._penalised(logits, history).numpy()
        return int(scores.argmax()), scores

    def _penalises(self, history: Sequence[int]) -> bool:
        params = self.params
        return params.repeat_penalty != 1 and params.repeat_last_n > 0 and bool(history)

    def _penalised(self, logits: torch.Tensor, history: Sequence[int]) -> torch.Tensor:
        """A copy of the logits as f64 on the CPU: [vocab], repetition penalty applied."""
        scores = logits.detach().to("cpu", torch.float64, copy=True)
        low, high = scores.aminmax()
        _require_finite(float(low), float(high))
        if not self._penalises(history):
            return scores
        params = self.params
        recent = torch.tensor(sorted(set(history[-params.repeat_last_n :])))
        values = scores[recent]
        scores[recent] = torch.where(
            values > 0, values / params.repeat_penalty, values * params.repeat_penalty
        )
        return scores

    def _candidates(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Filters, temperature, softmax: ids that are left [n] i64, their probabilities [n] f64.

        scores: [vocab] f64.
        """
        params = self.params
        ids = self._first_few(scores)
        left = scores if len(ids) == len(scores) else scores[ids]
        left = left - left.max()
        # relative to the first token, whose score is 0
        if params.min_p > 0:
            likely = left >= math.log(params.min_p)
            ids, left = ids[likely], left[likely]
        return ids, torch.softmax(left / params.temperature, dim=0)

    def _first_few(self, scores: torch.Tensor) -> torch.Tensor:
        """Ids of the top-k, then of the top-p of those: [n] i64, ascending."""
        top_k, top_p = self.params.top_k, self.params.top_p
        kept = min(top_k, len(scores)) or len(scores)
        if kept == len(scores) and top_p == 1:
            return torch.arange(kept)
        if kept < len(scores):
            best = scores.topk(kept).values
        else:
            best = torch.from_numpy(np.sort(scores.numpy())).flip(0)  # far faster than torch's
        if top_p < 1:
            cumulative = torch.softmax(best, dim=0).cumsum(0)
            kept = min(kept, int((cumulative < top_p).sum()) + 1)
        last = best[kept - 1]
        ids = torch.from_numpy(np.flatnonzero(scores.numpy() >= last.item()))
        # among equals of the last one the lower ids stay
        equals = (scores[ids] == last).nonzero().flatten()
        stays = torch.ones(len(ids), dtype=torch.bool)
        stays[equals[len(equals) - (len(ids) - kept) :]] = False
        return ids[stays]


def _require_finite(low: float, high: float) -> None:
    """low, high: of all logits; both NaN if one of them is."""
    if not math.isfinite(low) or not math.isfinite(high):
        raise BadInput(
            "the model's logits are not finite", "check the bundle for damage with m2c check"
        )


def exponentials(seed: int, position: int, ids: NDArray[np.int64]) -> F64:
    """Noise of mean 1 with density exp(-x), one number per id, always the same: [n] f64, > 0.

    Numbers of different seeds, positions and ids are independent for all we can tell.
    """
    key = _scrambled((_scrambled(seed) + (position + 1) * _STEP) & _MASK)
    state = ids.astype(np.uint64)
    state *= np.uint64(_STEP)
    state += np.uint64(key)
    spare = np.empty_like(state)
    for shift, factor in _ROUNDS:
        np.right_shift(state, np.uint64(shift), out=spare)
        state ^= spare
        if factor != 1:
            state *= np.uint64(factor)
    # 52 bits and a half: never 0 or 1, and exact in f64
    state >>= np.uint64(12)
    noise = state.astype(np.float64)
    noise += 0.5
    noise *= 2.0**-52
    np.log(noise, out=noise)
    return np.negative(noise, out=noise)


def _scrambled(state: int) -> int:
    """The scrambling of `exponentials` for one number, 64 bits."""
    for shift, factor in _ROUNDS:
        state = (state ^ state >> shift) * factor & _MASK
    return state
