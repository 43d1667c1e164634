"""Quality of a bundle: perplexity, and the distance from the checkpoint's own weights.

Text is cut into windows that do not see each other. The first half of a window is context and is
not scored, as in llama.cpp's llama-perplexity, so that figures can stand side by side. A standard
error comes from the spread between windows: tokens of one window depend on each other. A prefill
batch gives each token the precisions that decoding would, so the figures speak for decoding too.
Knows nothing about files of text or printing.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import exp, sqrt
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from m2c.bundle.files import disk_errors
from m2c.engine import Engine, RunOptions
from m2c.errors import BadInput, UsageError
from m2c.model.config import ModelConfig
from m2c.model.footprint import batch_tokens
from m2c.model.mix import Mix
from m2c.units import MiB

WINDOW: Final = 512
FULL: Final = Mix(100, 0, 0)  # the checkpoint's own weights
_LOGITS_NBYTES: Final = 64 * MiB  # of a pass; a few copies of them are alive at once
_COPIES: Final = 4

Ids = npt.NDArray[np.int32]
F64 = npt.NDArray[np.float64]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Estimate:
    value: float
    standard_error: float


@dataclass(frozen=True)
class Predictions:
    """What was predicted for every scored token, all arrays [windows, scored]."""

    losses: F64  # -log p of the token that came, nats
    best: Ids  # the most probable token

    @property
    def perplexity(self) -> Estimate:
        loss = estimate(self.losses)
        return Estimate(exp(loss.value), exp(loss.value) * loss.standard_error)


@dataclass(frozen=True)
class Quality:
    """One engine beside the reference, token by token."""

    perplexity: Estimate
    log_ratio: Estimate  # mean difference of log perplexity, paired by window
    divergence: Estimate  # KL(reference || engine), nats per token
    divergence_p99: float  # of single tokens
    agreement: Estimate  # share of tokens with the same most probable successor


def estimate(values: npt.NDArray[np.floating]) -> Estimate:
    """The mean of [windows, scored] and its standard error, from the means of the windows."""
    means = values.mean(axis=1, dtype=np.float64)
    return Estimate(float(means.mean()), float(means.std(ddof=1) / sqrt(len(means))))


def cut(ids: list[int], window: int = WINDOW, *, bos: int | None = None) -> Ids:
    """Whole windows of `ids`, [windows, window]; with `bos` in the place of each first token.

    Raises UsageError when a window has no scored token or there are fewer than two windows.
    """
    if window < 4:
        raise UsageError(f"a window of {window} tokens has none to score", "take at least 4")
    count = len(ids) // window
    if count < 2:
        raise UsageError(
            f"{len(ids)} tokens are no two windows of {window}",
            "give more text, more tokens or a smaller window",
        )
    windows = np.asarray(ids[: count * window], np.int32).reshape(count, window)
    if bos is not None:
        windows[:, 0] = bos
    return windows


def scored_tokens(window: int) -> int:
    """Of each window: those after the first half whose successor is in the window."""
    return window - 1 - window // 2


def options_within(options: RunOptions, config: ModelConfig, window: int) -> RunOptions:
    """`options` with a context of one window, and memory left for the logits of a pass."""
    room = _COPIES * 4 * config.vocab_size * _rows(config, window)
    return replace(options, ctx_size=window, aside=room)


class Reference:
    """Predictions of the checkpoint's own weights, and all log-probabilities, in an unnamed file.

    The file holds f16, `nbytes_for` bytes, and is gone with the process. Its rounding adds less
    than 1e-6 nats to a divergence. Use as a context manager.
    """

    def __init__(
        self, engine: Engine, windows: Ids, *, folder: Path,
        progress: Progress = lambda tokens: None,
    ) -> None:  # fmt: skip
        """engine: at `FULL`, everything in 16 bits. folder: where the file lies, if it may.

        Raises NoSpace when the disk is full.
        """
        self.windows = windows
        self.nbytes_per_window = self.nbytes_for(engine.config, windows) // len(windows)
        self._place = str(folder) if os.access(folder, os.W_OK) else tempfile.gettempdir()
        with disk_errors(self._place):
            self._file = tempfile.TemporaryFile(dir=self._place)  # noqa: SIM115
            try:
                self.predictions = predictions_of(engine, windows, self._keep, progress=progress)
                self._file.flush()
            except BaseException:
                self._file.close()
                raise

    def __enter__(self) -> "Reference":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @staticmethod
    def nbytes_for(config: ModelConfig, windows: Ids) -> int:
        return 2 * config.vocab_size * windows.shape[0] * scored_tokens(windows.shape[1])

    def log_probabilities(self, window: int, first: int, rows: int) -> Tensor:
        """Of scored tokens [first, first + rows) of a window, normalised: f32 [rows, vocab].

        Raises StorageError or BadInput when the file cannot be read back.
        """
        row_nbytes = self.nbytes_per_window // scored_tokens(self.windows.shape[1])
        with disk_errors(self._place):
            self._file.seek(window * self.nbytes_per_window + first * row_nbytes)
            data = bytearray(self._file.read(rows * row_nbytes))
        if len(data) != rows * row_nbytes:
            raise BadInput(f"{self._place}: the reference's temporary file is cut short")
        stored = torch.frombuffer(data, dtype=torch.float16).view(rows, -1)
        return stored.float().log_softmax(-1)

    def _keep(self, window: int, first: int, log_p: Tensor) -> None:
        self._file.write(log_p.half().numpy().data)


def compare(
    engine: Engine, reference: Reference, *, progress: Progress = lambda tokens: None
) -> Quality:
    """What `engine` predicts beside the reference, on the reference's windows."""
    known = reference.predictions
    divergence = np.empty(known.losses.shape, np.float64)

    def diverge(window: int, first: int, log_q: Tensor) -> None:
        log_p = reference.log_probabilities(window, first, len(log_q))
        found = (log_p.exp() * log_p.sub(log_q)).sum(-1, dtype=torch.float64)
        divergence[window, first : first + len(log_q)] = found.numpy()

    ours = predictions_of(engine, reference.windows, diverge, progress=progress)
    return Quality(
        perplexity=ours.perplexity,
        log_ratio=estimate(ours.losses - known.losses),
        divergence=estimate(divergence),
        divergence_p99=float(np.quantile(divergence, 0.99)),
        agreement=estimate((ours.best == known.best).astype(np.float64)),
    )


def perplexity(engine: Engine, ids: list[int], *, window: int = WINDOW) -> Estimate:
    """Of `ids`, without a reference. Raises UsageError as `cut` does."""
    return predictions_of(engine, cut(ids, window)).perplexity


def predictions_of(
    engine: Engine, windows: Ids, take: Callable[[int, int, Tensor], None] | None = None, *,
    progress: Progress = lambda tokens: None,
) -> Predictions:  # fmt: skip
    """`take(window, first, log_p)` sees all log-probabilities, f32 [rows, vocab] on the host, of
    consecutive scored tokens from `first` on.

    Raises UsageError when a window does not fit the engine's context.
    """
    half = windows.shape[1] // 2
    shape = (len(windows), scored_tokens(windows.shape[1]))
    losses, best = np.empty(shape, np.float64), np.empty(shape, np.int32)
    for window, ids in enumerate(windows):
        targets = torch.from_numpy(ids[half + 1 :].astype(np.int64))
        first = 0
        for log_p in _scored(engine, ids):
            rows = slice(first, first + len(log_p))
            losses[window, rows] = -log_p.gather(1, targets[rows, None])[:, 0].double().numpy()
            best[window, rows] = log_p.argmax(-1).numpy()
            if take is not None:
                take(window, first, log_p)
            first += len(log_p)
        progress(len(ids))
    return Predictions(losses, best)


def _scored(engine: Engine, ids: Ids) -> Iterator[Tensor]:
    """Log-probabilities after the tokens of the second half but the last: f32 [rows, vocab]."""
    model, half = engine.model, len(ids) // 2
    model.kv.truncate(0)
    step = batch_tokens(engine.config)
    for start in range(0, half, step):
        model.forward(ids[start : min(half, start + step)])
    step = _rows(engine.config, len(ids))
    for start in range(half, len(ids) - 1, step):
        part = ids[start : min(len(ids) - 1, start + step)]
        yield model.forward(part, all_logits=True).log_softmax(-1).cpu()


def _rows(config: ModelConfig, window: int) -> int:
    """Tokens of a pass whose logits are all wanted."""
    fits = max(1, _LOGITS_NBYTES // (4 * config.vocab_size))
    return min(fits, batch_tokens(config), scored_tokens(window))
