"""Perplexity of a bundle at a mix: teacher-forced, in windows, with its standard error.

A prefill batch gives each token the same precision assignment that decoding would, so the figure
speaks for decoding too. Knows nothing about printing.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from m2c.engine import Engine
from m2c.errors import UsageError
from m2c.model.footprint import batch_tokens

WINDOW: Final = 512


@dataclass(frozen=True)
class Perplexity:
    value: float
    standard_error: float  # of `value`, from the spread between tokens
    tokens: int


def perplexity(engine: Engine, ids: list[int], *, window: int = WINDOW) -> Perplexity:
    """Of `ids`, cut into windows that do not see each other; a window's first token is not scored.

    Raises UsageError when the window does not fit the engine's context or the text is too short.
    """
    if window > engine.shape.ctx_size or len(ids) < 2:
        raise UsageError(f"perplexity needs 2 tokens and a context of {window}")
    losses = []
    for start in range(0, len(ids) - 1, window):
        losses.append(_window_losses(engine, ids[start : start + window]))
    joined = torch.cat(losses)
    mean = float(joined.mean())
    spread = float(joined.std()) / math.sqrt(len(joined))
    return Perplexity(math.exp(mean), math.exp(mean) * spread, len(joined))


def _window_losses(engine: Engine, ids: list[int]) -> torch.Tensor:
    """Negative log likelihoods in nats of all tokens but the first, f64 on the host."""
    engine.model.kv.truncate(0)
    step = batch_tokens(engine.config)
    rows = []
    for start in range(0, len(ids), step):
        part = np.asarray(ids[start : start + step], np.int32)
        rows.append(engine.model.forward(part, all_logits=True).log_softmax(-1).cpu())
    scores = torch.cat(rows)[:-1]
    targets = torch.tensor(ids[1:])
    return -scores.gather(1, targets[:, None])[:, 0].double()
