"""Parts of what the CUDA kernels compute: activations made ready, products, sums over down columns.

Arguments checked, grids chosen, memory for what lies between. Knows nothing about layers or tiers.
"""

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor

from m2c.bundle.planes import GROUP
from m2c.errors import BadInput
from m2c.kernels.gpu_structs import (
    Activation,
    Coded8,
    Inputs,
    Matrices,
    RowsOnGpu,
    at,
    frames_of,
    given_of,
    rows_of,
)
from m2c.kernels.operands import Norm, activation_of
from m2c.kernels.rows import EXACT_DTYPES, ExactRows, PackedRows, Rows

CHUNK: Final = 256  # rows: a call of a multiple, continued by another, gives the bits of one
SPAN: Final = 64  # positions whose softmax is taken by itself: as in attention.cu
BLOCK: Final = 128  # threads
PARTIAL_NBYTES: Final = 16 << 20  # sums of chunks at a time
_ACT_KINDS: Final = {"silu": 0, "relu": 1, "fatrelu": 1, "gelu_pytorch_tanh": 2, "gelu": 3}
_TILE: Final = 256  # outputs of a block of columns
# rows that a warp of `product` and of `gate_up` takes, by the tokens that share what is read of
# them: ROW_KERNELS in products.cu
_OF_CODES: Final = {1: (1, 1), 4: (2, 1), 8: (2, 2)}
_OF_WIDE: Final = {1: (1, 1), 4: (4, 1)}
_PART: Final = 128  # neurons of a block of columns
_MOST_THREADS: Final = 1024  # of a block
_DECODED_NBYTES: Final = 32 << 20  # 16-bit weights decoded at a time
_WARP: Final = 32
_WARPS: Final = 8192  # that a large GPU holds
_MOST_OF_FRAME: Final = 16  # warps
_LEAST: Final = 8  # groups of a frame that a warp takes at least

_int, _i64 = ctypes.c_int, ctypes.c_int64


class Launcher(Protocol):
    """What runs a kernel: `cuda_driver.CudaDriver`."""

    device: torch.device

    def launch(self, kernel: str, grid: int, block: int, arguments: Sequence[Any]) -> None: ...


class Prepared:
    """Activations as kernels take them, and their memory: values, or codes and scales."""

    def __init__(
        self, tokens: int, length: int, *, values: Tensor | None = None,
        codes: tuple[Tensor, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.tokens, self.values, self._codes = tokens, values, codes
        pointers = [None] * 2 if codes is None else [one.data_ptr() for one in codes]
        self.coded = Coded8(*pointers)
        at_values = None if values is None else values.data_ptr()
        self.facts = Inputs(at_values, *pointers, tokens, length)
        # 16-bit weights would need too many registers for more
        self.at_once = min(_at_once(tokens), 8 if codes is not None else 4)
        self.tiles = -(-tokens // self.at_once)
        self.rows_of_warp = (_OF_WIDE if codes is None else _OF_CODES)[self.at_once]
        self._length = length

    def of_tokens(self, first: int) -> "Prepared":
        """Of the tokens from `first` on."""
        codes = self._codes and (self._codes[0][first:], self._codes[1][first:])
        values = None if self.values is None else self.values[first:]
        return Prepared(self.tokens - first, self._length, values=values, codes=codes)


class Products:
    """What GpuKernels is made of."""

    def __init__(self, launcher: Launcher) -> None:
        self.device = launcher.device
        self._launch = launcher.launch
        self._damaged = torch.zeros(1, dtype=torch.int32, device=self.device)
        self._decoded = False  # since `_damaged` was looked at

    def check(self) -> None:
        """Raises BadInput if a frame that was decoded is not what its codes say."""
        if self._decoded:
            self._decoded = False
            if int(self._damaged.item()):
                self._damaged.zero_()
                raise BadInput(
                    "the exact plane holds a damaged frame", "check the bundle with m2c check"
                )

    def decode(self, rows: PackedRows) -> Tensor:
        """The 16-bit weights [rows, vectors * length] of rows with frames."""
        assert rows.frames is not None
        layout, frames = rows.layout, frames_of(rows)
        shape = (len(rows), layout.vectors * layout.length)
        out = torch.empty(shape, dtype=EXACT_DTYPES[rows.frames.exact_type], device=self.device)
        count = -(-len(rows) // rows.frames.frame_records)
        share = _warps_of_frame(count, rows.frames.frame_records * layout.vectors * layout.groups)
        self._launch(
            "m2c_decode", -(-count * share * _WARP // max(BLOCK, share * _WARP)),
            max(BLOCK, share * _WARP),
            (rows_of(rows), frames, _int(share), at(out), at(self._damaged)),
        )  # fmt: skip
        self._decoded = True
        return out

    def pieces(self, rows: Rows) -> Iterator[tuple[int, Rows]]:
        """The rows as they are, or, with frames, decoded some at a time: (first row, rows)."""
        if isinstance(rows, ExactRows) or rows.frames is None:
            yield 0, rows
            return
        parts = rows.__dict__.get("_gpu_parts")
        if parts is None:  # kept: their tables go to the GPU once
            parts = rows.__dict__["_gpu_parts"] = _cut(rows)
        for first, part in parts or [(0, rows)]:
            yield first, ExactRows(rows.layout, self.decode(part))

    def prepared(self, x: Tensor, rows: Rows, norm: Norm | None) -> "Prepared":
        """norm(x), rounded to int8 where rows have codes."""
        x = x.contiguous()
        tokens, length = x.shape
        coded = isinstance(rows, PackedRows) and rows.frames is None
        if not coded and norm is None:
            return Prepared(tokens, length, values=x)
        if coded:
            into = self.room_for_codes(tokens, length)
        else:
            into = Prepared(tokens, length, values=torch.empty_like(x))
        threads = min(_MOST_THREADS, 32 * -(-length // (4 * 32)))
        self._launch(
            "m2c_prepare", tokens, threads, (given_of(x, norm), at(into.values), into.coded)
        )
        return into

    def room_for_codes(self, tokens: int, length: int) -> "Prepared":
        groups = -(-length // GROUP)
        codes = torch.empty((tokens, groups * GROUP), dtype=torch.int8, device=self.device)
        # a step f32 and a sum int32 each
        scales = torch.empty((tokens, groups, 2), dtype=torch.int32, device=self.device)
        return Prepared(tokens, length, codes=(codes, scales))

    def product(
        self, inputs: "Prepared", wanted: list[tuple[Rows, Tensor | None, Tensor]], *,
        add: bool = False,
    ) -> None:  # fmt: skip
        """For each (rows, bias, out): out [tokens, rows] = inputs times rows + bias (+ out)."""
        if any(isinstance(rows, PackedRows) and rows.frames is not None for rows, *_ in wanted):
            for rows, bias, out in wanted:
                for first, piece in self.pieces(rows):
                    part = part_of(bias, first, len(piece))
                    self._products(inputs, [(piece, part, out[:, first:])], add=add)
            return
        self._products(inputs, wanted, add=add)

    def _products(
        self, inputs: "Prepared", wanted: list[tuple[Rows, Tensor | None, Tensor]], *, add: bool
    ) -> None:
        each = inputs.rows_of_warp[0]
        facts = Matrices(units=sum(-(-len(rows) // each) for rows, *_ in wanted), add=add)
        for i, (rows, bias, out) in enumerate(wanted):
            facts.rows[i] = rows_of(rows)
            facts.bias[i] = None if bias is None else bias.data_ptr()
            facts.out[i], facts.stride[i] = out.data_ptr(), out.stride(0)
        first = facts.rows[0]
        lanes = _lanes(first)
        self._launch(
            f"m2c_product_{first.kind}_{inputs.at_once}",
            inputs.tiles * -(-facts.units * lanes // BLOCK), BLOCK,
            (facts, inputs.facts, _int(lanes)),
        )  # fmt: skip

    def gate_up(
        self, inputs: "Prepared", rows: Rows, act: str, bias: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        out = torch.empty((inputs.tokens, len(rows)), device=self.device)
        facts, lanes = rows_of(rows), _lanes(rows_of(rows))
        units = -(-facts.count // inputs.rows_of_warp[1])
        name, threshold = activation_of(act)
        how = Activation(_ACT_KINDS[name], threshold, None if bias is None else bias.data_ptr())
        self._launch(
            f"m2c_gate_up_{facts.kind}_{inputs.at_once}",
            inputs.tiles * -(-units * lanes // BLOCK), BLOCK,
            (facts, inputs.facts, how, at(mask), at(out), _int(lanes)),
        )  # fmt: skip
        return out

    def columns(self, activations: Tensor, rows: Rows, into: Tensor) -> None:
        facts, tokens, length = rows_of(rows), len(activations), rows.layout.length
        parts, tiles = -(-facts.count // _PART), -(-length // _TILE)
        step = max(1, PARTIAL_NBYTES // (4 * parts * length))
        at_once = _at_once(tokens)
        for first in range(0, tokens, step):
            count = min(step, tokens - first)
            partial = torch.empty(parts * count * length, device=self.device)
            self._launch(
                f"m2c_columns_{facts.kind}_{at_once}", -(-count // at_once) * tiles * parts, _TILE,
                (facts, at(activations), _int(first), _int(count), _int(tiles), at(partial)),
            )  # fmt: skip
            size, own = count * length, into[first : first + count]
            self._launch(
                "m2c_add_chunks", -(-size // _TILE), _TILE,
                (at(partial), _int(parts), _i64(size), at(own)),
            )  # fmt: skip


def _cut(rows: PackedRows) -> list[tuple[int, PackedRows]]:
    """Rows with frames, as many as are decoded at a time: (first row, rows); none: all."""
    assert rows.frames is not None
    unit = int(np.lcm(CHUNK, rows.frames.frame_records))
    nbytes = unit * rows.layout.vectors * rows.layout.length * 2
    step = unit * max(1, _DECODED_NBYTES // nbytes)
    if step >= len(rows):
        return []  # rows that hold themselves would be freed late
    starts = range(0, len(rows), step)
    return [(start, rows.part(start, min(start + step, len(rows)))) for start in starts]


def _warps_of_frame(frames: int, groups: int) -> int:
    """Warps that share a frame of so many groups: few frames alone would leave a GPU idle."""
    share = 1
    while share < _MOST_OF_FRAME and frames * share * 2 <= _WARPS and groups >= share * 2 * _LEAST:
        share *= 2
    return share


def _at_once(tokens: int) -> int:
    return 1 if tokens == 1 else 4 if tokens <= 4 else 8


def _lanes(rows: RowsOnGpu) -> int:
    """Threads that share a row: as many as have something to do."""
    return 32 if rows.groups > 16 else 16 if rows.groups > 8 else 8


def part_of(bias: Tensor | None, first: int, count: int) -> Tensor | None:
    return None if bias is None else bias[first : first + count]
