"""The kernels that the model calls: native where it can, the torch reference elsewhere.

Rows that carry their exact plane compressed are decoded piece by piece into 16-bit rows and take
the same path as rows decoded before: where they lie must not change a bit of the result.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from m2c.kernels import reference
from m2c.kernels.native import NativeKernels
from m2c.kernels.operands import AttentionCall, Norm
from m2c.kernels.reference import CHUNK
from m2c.kernels.rows import ExactRows, PackedRows, Rows, as_exact_tensor
from m2c.kernels.workers import Workers


def matmul_rows(x: Tensor, rows: Rows, workers: Workers, *, norm: Norm | None = None) -> Tensor:
    """As `reference.matmul_rows`, of norm(x)."""
    native = _native(x, rows, workers)
    if native is None:
        return reference.matmul_rows(reference.apply_norm(x, norm), rows, workers)
    parts = [native.matmul_rows(x, part, norm=norm) for part in _parts(rows, workers)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def gate_up(
    x: Tensor, rows: Rows, act: str, workers: Workers, *, norm: Norm | None = None
) -> Tensor:
    """As `reference.gate_up`, of norm(x)."""
    native = _native(x, rows, workers)
    if native is None:
        return reference.gate_up(reference.apply_norm(x, norm), rows, act, workers)
    parts = [native.gate_up(x, part, act, norm=norm) for part in _parts(rows, workers)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def down(activations: Tensor, rows: Rows, workers: Workers, *, into: Tensor) -> None:
    """Add what `reference.down` returns to `into` [tokens, hidden]."""
    native = _native(activations, rows, workers)
    if native is None:
        reference.down(activations, rows, workers, into=into)
        return
    start = 0
    for part in _parts(rows, workers):
        native.down(activations[:, start : start + len(part)], part, into=into)
        start += len(part)


def gather_ffn(
    x: Tensor, rows: Rows, act: str, workers: Workers, *, into: Tensor, mask: Tensor | None = None,
    norm: Norm | None = None,
) -> None:  # fmt: skip
    """Add what `reference.gather_ffn` returns for norm(x) to `into` [tokens, hidden]."""
    native = _native(x, rows, workers)
    if native is None:
        x = reference.apply_norm(x, norm)
        reference.gather_ffn(x, rows, act, workers, mask=mask, into=into)
        return
    start = 0
    for part in _parts(rows, workers):
        own = None if mask is None else mask[:, start : start + len(part)]
        native.ffn(x, part, act, mask=own, norm=norm, into=into)
        start += len(part)


def scored_ffn(
    x: Tensor, rows: Rows, act: str, workers: Workers, *, into: Tensor, norm: Norm
) -> Tensor:
    """As `gather_ffn`; returns the activations [tokens, rows] f32, of which scores are made."""
    native = _native(x, rows, workers)
    if native is None or _has_frames(rows):
        activations = gate_up(x, rows, act, workers, norm=norm)
        down(activations, rows, workers, into=into)
        return activations
    activations = torch.empty((len(x), len(rows)))
    native.ffn(x, rows, act, kept=activations, norm=norm, into=into)
    return activations


def rank(
    activations: Tensor, norms: Tensor, best: list[tuple[int, int]], workers: Workers
) -> Tensor:
    """As `reference.rank`."""
    if workers.native is None or activations.device.type != "cpu":
        return reference.rank(activations, norms, best)
    return workers.native.rank(activations, norms, best)


def attention(
    x: Tensor, call: AttentionCall, start: int, workers: Workers, *, norm: Norm
) -> Tensor:
    """As `reference.attention`."""
    native = workers.native
    if native is None or not all(native.takes(x, rows) for rows in call.projections):
        return reference.attention(x, call, start, workers, norm=norm, matmul=matmul_rows)
    if _has_frames(call.projections[0]):
        q, k, v, o = (_decoded(rows, workers) for rows in call.projections)
        call = replace(call, projections=(q, k, v, o))
    out = x.clone()
    native.attention(out, call, start, norm=norm)
    return out


def _native(x: Tensor, rows: Rows, workers: Workers) -> NativeKernels | None:
    native = workers.native
    return native if native is not None and len(rows) and native.takes(x, rows) else None


def _has_frames(rows: Rows) -> bool:
    """Whether the exact plane of the rows is still compressed."""
    return isinstance(rows, PackedRows) and rows.frames is not None


def _decoded(rows: Rows, workers: Workers) -> Rows:
    pieces = [part.weights for part in _parts(rows, workers) if isinstance(part, ExactRows)]
    return ExactRows(rows.layout, torch.cat(pieces))


def _parts(rows: Rows, workers: Workers) -> Iterator[Rows]:
    """The rows themselves, or their decoded pieces in order, a few at a time."""
    if not isinstance(rows, PackedRows) or rows.frames is None:
        yield rows
        return
    frames = rows.frames

    def piece(start: int) -> ExactRows:
        bits = rows.exact_bits(start, min(start + CHUNK, len(rows)))
        return ExactRows(rows.layout, as_exact_tensor(bits, frames.exact_type))

    window = CHUNK * workers.threads
    for begin in range(0, len(rows), window):
        count = -(-min(window, len(rows) - begin) // CHUNK)
        starts = range(begin, begin + count * CHUNK, CHUNK)
        yield from workers.map(lambda i, starts=starts: piece(starts[i]), count)  # type: ignore[misc]
