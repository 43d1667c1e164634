"""The kernels that the model calls: native where it can, the torch reference elsewhere.

Rows that carry their exact plane compressed are decoded piece by piece into 16-bit rows and take
the same path as rows decoded before: where they lie must not change a bit of the result.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from m2c.kernels import reference
from m2c.kernels.native import NativeKernels
from m2c.kernels.reference import CHUNK
from m2c.kernels.rows import ExactRows, PackedRows, Rows, as_exact_tensor
from m2c.kernels.workers import Workers


def matmul_rows(x: Tensor, rows: Rows, workers: Workers) -> Tensor:
    """As `reference.matmul_rows`."""
    native = _native(x, rows, workers)
    if native is None:
        return reference.matmul_rows(x, rows, workers)
    return torch.cat([native.matmul_rows(x, part) for part in _parts(rows, workers)], dim=1)


def gate_up(x: Tensor, rows: Rows, act: str, workers: Workers) -> Tensor:
    """As `reference.gate_up`."""
    native = _native(x, rows, workers)
    if native is None:
        return reference.gate_up(x, rows, act, workers)
    return torch.cat([native.gate_up(x, part, act) for part in _parts(rows, workers)], dim=1)


def down(activations: Tensor, rows: Rows, workers: Workers) -> Tensor:
    """As `reference.down`."""
    native = _native(activations, rows, workers)
    if native is None:
        return reference.down(activations, rows, workers)
    total, start = None, 0
    for part in _parts(rows, workers):
        total = native.down(activations[:, start : start + len(part)], part, into=total)
        start += len(part)
    assert total is not None
    return total


def gather_ffn(
    x: Tensor, rows: Rows, act: str, workers: Workers, *, mask: Tensor | None = None
) -> Tensor:
    """As `reference.gather_ffn`."""
    native = _native(x, rows, workers)
    if native is None:
        return reference.gather_ffn(x, rows, act, workers, mask=mask)
    total, start = torch.zeros_like(x), 0
    for part in _parts(rows, workers):
        own = None if mask is None else mask[:, start : start + len(part)]
        native.ffn(x, part, act, mask=own, into=total)
        start += len(part)
    return total


def _native(x: Tensor, rows: Rows, workers: Workers) -> NativeKernels | None:
    native = workers.native
    return native if native is not None and len(rows) and native.takes(x, rows) else None


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
