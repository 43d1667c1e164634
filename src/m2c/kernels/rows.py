"""Operands of the kernels: rows of weights as they lie in memory, and their f32 values.

The reference reading of the planes in torch; `bundle.planes` is the same in numpy. Knows nothing
about where the bytes came from or which rows a token wants.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from m2c.bundle.exact import decode_frames
from m2c.bundle.planes import CODE_BIAS, GROUP, RecordLayout

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]

EXACT_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True)
class ExactFrames:
    """Frames of the exact plane of consecutive rows; the tables are always on the host."""

    data: Tensor  # u8 [sum(nbytes)], where the rows are
    nbytes: U32  # [frames]
    escapes: U32  # [frames]
    frame_records: int
    exact_type: str


@dataclass(frozen=True)
class PackedRows:
    """Rows at INT4, at INT8, or (with frames, on the host) at the checkpoint's 16 bits."""

    layout: RecordLayout
    int4: Tensor  # [rows, layout.nbytes("int4")] u8
    int8: Tensor | None = None  # [rows, layout.nbytes("int8")] u8
    frames: ExactFrames | None = None
    # which records of int4 and of int8 are the rows, int32 [rows]; None: all, as they lie
    index4: Tensor | None = None
    index8: Tensor | None = None

    def __len__(self) -> int:
        return (self.int4 if self.index4 is None else self.index4).shape[0]

    def values(self, start: int, stop: int, *, first: int = 0, last: int | None = None) -> Tensor:
        """Vectors [first, last) of rows [start, stop): f32 [stop - start, last - first, length].

        With frames, `start` and `stop` must be multiples of `frame_records` (or the end).
        """
        last = self.layout.vectors if last is None else last
        if self.frames is not None:
            # through the same arithmetic, strides and alignment as decoded rows: the same bits
            weights = as_exact_tensor(self.exact_bits(start, stop), self.frames.exact_type)
            return ExactRows(self.layout, weights).values(0, len(weights), first=first, last=last)
        half, groups = self.layout.padded // 2, self.layout.groups
        int4 = self.int4[self._chosen(self.index4, start, stop)]
        q = int4[:, first * half : last * half]
        scales = int4[:, self.layout.code_nbytes :].contiguous()
        scales = scales.view(torch.float16)[:, first * groups : last * groups].float()
        if self.int8 is None:
            codes = _join(q & 15, q >> 4).sub_(CODE_BIAS)
        else:
            # both codes as one byte, 16 (q + 8) + (r + 8): one conversion for two planes
            int8 = self.int8[self._chosen(self.index8, start, stop)]
            r = int8[:, first * half : last * half]
            codes = _join(((q & 15) << 4) | (r & 15), (q & 0xF0) | (r >> 4)).sub_(17 * CODE_BIAS)
            scales /= 16  # exact: a power of two
        codes *= scales.unsqueeze(-1)
        values = codes.view(codes.shape[0], last - first, self.layout.padded)
        return values[..., : self.layout.length]

    @staticmethod
    def _chosen(index: Tensor | None, start: int, stop: int) -> Tensor | slice:
        return slice(start, stop) if index is None else index[start:stop].long()

    def take(self, index: Tensor) -> "PackedRows":
        """Rows at `index` (int64), copied. Only for rows without frames and as they lie."""
        assert self.frames is None
        index = index.to(self.int4.device)
        int8 = None if self.int8 is None else self.int8[index]
        return PackedRows(self.layout, self.int4[index], int8)

    def part(self, start: int, stop: int) -> "PackedRows":
        """Rows [start, stop), which begin a frame and end one (or all rows); only as they lie."""
        assert self.frames is not None
        assert self.int8 is not None
        data, nbytes, escapes = _frames_of(self.frames, start, stop)
        frames = replace(self.frames, data=data, nbytes=nbytes, escapes=escapes)
        return PackedRows(self.layout, self.int4[start:stop], self.int8[start:stop], frames)

    def lowest(self, planes: int) -> "PackedRows":
        """The same rows at the precision of their so many lowest planes."""
        held = 3 if self.frames is not None else 1 if self.int8 is None else 2
        if planes >= held:
            return self
        int8, index8 = (self.int8, self.index8) if planes == 2 else (None, None)
        return PackedRows(self.layout, self.int4, int8, None, self.index4, index8)

    def exact_bits(self, start: int, stop: int) -> npt.NDArray[np.uint16]:
        """The checkpoint's bits of rows [start, stop): u16 [stop - start, vectors * length]."""
        if self.frames is None or self.int8 is None:
            raise ValueError("rows without their exact plane have no exact bits")
        data, nbytes, escapes = _frames_of(self.frames, start, stop)
        int4, int8 = (plane[start:stop].cpu().numpy() for plane in (self.int4, self.int8))
        return decode_frames(
            data.cpu().numpy(), nbytes, escapes, int4, int8,
            self.layout, exact_type=self.frames.exact_type,
            frame_records=self.frames.frame_records,
        )  # fmt: skip


@dataclass(frozen=True)
class ExactRows:
    """Rows decoded to the checkpoint's own 16-bit type."""

    layout: RecordLayout
    weights: Tensor  # [rows, vectors * length] bf16 or f16

    def __len__(self) -> int:
        return self.weights.shape[0]

    def values(self, start: int, stop: int, *, first: int = 0, last: int | None = None) -> Tensor:
        """As `PackedRows.values`."""
        length = self.layout.length
        last = self.layout.vectors if last is None else last
        rows = self.weights[start:stop, first * length : last * length].float()
        return rows.view(-1, last - first, length)

    def take(self, index: Tensor) -> "ExactRows":
        return ExactRows(self.layout, self.weights[index.to(self.weights.device)])


Rows = PackedRows | ExactRows


def as_exact_tensor(bits: npt.NDArray[np.uint16], exact_type: str) -> Tensor:
    """16-bit patterns as a torch tensor of their own type, without a copy."""
    return torch.from_numpy(bits.view(np.int16)).view(EXACT_DTYPES[exact_type])


def _frames_of(frames: ExactFrames, start: int, stop: int) -> tuple[Tensor, U32, U32]:
    """Bytes and tables of the frames of rows [start, stop)."""
    own = slice(start // frames.frame_records, -(-stop // frames.frame_records))
    begin = int(frames.nbytes[: own.start].sum(dtype=np.int64))
    end = begin + int(frames.nbytes[own].sum(dtype=np.int64))
    return frames.data[begin:end], frames.nbytes[own], frames.escapes[own]


def _join(low: Tensor, high: Tensor) -> Tensor:
    """Halves of groups, u8 [rows, n / 2] each, to codes f32 [rows, groups, GROUP]."""
    shape = (low.shape[0], -1, GROUP // 2)
    codes = torch.stack((low.reshape(shape), high.reshape(shape)), dim=2)
    return codes.view(low.shape[0], -1, GROUP).float()
