"""The exact plane: what is missing from the INT8 code to the checkpoint's own 16-bit weight.

A code stands for an interval: of all that rounds to it. Of the 16-bit numbers in that interval the
plane stores which one the weight is, in as few bits as their count needs. Bits of equal
significance of two groups lie together, so that a reader finds them with one instruction. A weight
outside its interval is listed at the end of its frame. docs/FORMAT.md, section "The exact plane".

Knows nothing about files or models.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from m2c.bundle.planes import GROUP, RecordLayout, unpack_nibbles
from m2c.errors import BadInput

EXACT_TYPES: Final = ("bf16", "f16")
ESCAPE_NBYTES: Final = 6  # u32 position in the frame, u16 the weight
_ABOVE, _BELOW = 5, 3  # half steps that the intervals of r = 7 and r = -8 reach further
_AT_ONCE: Final = 1 << 17  # weights: bounds the temporary values, some 80 bytes each

Arrays = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]
F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]


def round_to(values: F32, exact_type: str) -> U16:
    """Bits of `values` rounded to nearest even in `exact_type` ("bf16" or "f16")."""
    if exact_type == "f16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def widen(bits: U16, exact_type: str) -> F32:
    """The f32 values of 16-bit weights."""
    if exact_type == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


@dataclass(frozen=True)
class Frames:
    """Frames joined, the bytes of each [frames] u32 and its escapes [frames] u32."""

    data: bytes
    nbytes: U32
    escapes: U32


def encode_frames(
    true: U16, int4: U8, int8: U8, layout: RecordLayout, *, exact_type: str, frame_records: int
) -> Frames:
    """What leads from records of the two lower planes to the weights; the last frame may be short.

    true: bits of finite weights [records, vectors * length] u16. int4, int8: records
    [records, nbytes] u8.
    """
    data, nbytes, escapes = [], [np.empty(0, np.uint32)], [np.empty(0, np.uint32)]
    for rows in _chunks(len(true), frame_records, layout):
        codes = _Codes.of(int4[rows], int8[rows], layout, exact_type)
        starts = np.arange(0, len(codes.zero), frame_records)
        offsets, escaped = codes.offsets_of(_pad(true[rows], layout))
        counts = np.add.reduceat(codes.uses.sum(axis=(1, 2, 3)), starts)
        bits = np.arange(codes.uses.shape[2], dtype=np.uint16)[:, None]
        planes = offsets.astype(np.uint16)[:, :, None] >> bits & 1
        packed, bits_nbytes = _pack_bits(planes[codes.uses], counts)
        where, listed = _list_escapes(_unpad(escaped, layout), true[rows], frame_records)
        found = np.bincount(where, minlength=len(starts))
        sizes = bits_nbytes + ESCAPE_NBYTES * found
        joined = np.empty(int(sizes.sum()), np.uint8)
        begins = _before(sizes)
        joined[_places(begins, bits_nbytes)] = packed
        joined[_places(begins + bits_nbytes, ESCAPE_NBYTES * found)] = listed
        data.append(joined.tobytes())
        nbytes.append(sizes.astype(np.uint32))
        escapes.append(found.astype(np.uint32))
    return Frames(b"".join(data), np.concatenate(nbytes), np.concatenate(escapes))


def decode_frames(
    data: U8, nbytes: U32, escapes: U32, int4: U8, int8: U8, layout: RecordLayout, *,
    exact_type: str, frame_records: int,
) -> U16:  # fmt: skip
    """The weights of consecutive frames: bits [records, vectors * length] u16.

    data: the frames joined, u8; nbytes, escapes: [frames] u32. int4, int8: [records, nbytes] u8.
    Raises BadInput when a frame has another length than its codes and escapes give, or lists
    positions that are not ascending or beyond its weights.
    """
    frames = -(-len(int4) // frame_records)
    if len(data) != int(nbytes.sum(dtype=np.int64)) or not len(nbytes) == len(escapes) == frames:
        raise BadInput("the exact plane holds frames of a wrong length")
    begins, sizes, listed = _before(nbytes), nbytes.astype(np.int64), escapes.astype(np.int64)
    out = np.empty((len(int4), layout.vectors * layout.length), np.uint16)
    for rows in _chunks(len(int4), frame_records, layout):
        codes = _Codes.of(int4[rows], int8[rows], layout, exact_type)
        own = slice(rows.start // frame_records, -(-rows.stop // frame_records))
        starts = np.arange(0, rows.stop - rows.start, frame_records)
        counts = np.add.reduceat(codes.uses.sum(axis=(1, 2, 3)), starts)
        bits_nbytes = -(-counts // 8)
        if (sizes[own] != bits_nbytes + ESCAPE_NBYTES * listed[own]).any():
            raise BadInput("the exact plane holds a frame of a wrong length")
        packed = data[_places(begins[own], bits_nbytes)]
        out[rows] = _unpad(codes.weights_of(_unpack_bits(packed, counts)), layout)
        tail = data[_places(begins[own] + bits_nbytes, ESCAPE_NBYTES * listed[own])]
        _put_escapes(out[rows], tail, listed[own], frame_records)
    return out


@dataclass(frozen=True)
class _Codes:
    """What the codes of records say of their weights: [records, pairs, 2 * GROUP], with padding.

    Candidates are `low` to `low + last` as bits of the magnitude; where the code is zero, twice the
    magnitude and the sign in the lowest bit.
    """

    zero: Bools
    negative: Bools  # the weight; means nothing where the code is zero
    low: I32
    last: I32
    uses: Bools  # [records, pairs, bits, 2 * GROUP]: which bits of the offset are stored

    @classmethod
    def of(cls, int4: U8, int8: U8, layout: RecordLayout, exact_type: str) -> "_Codes":
        shape = (len(int4), layout.vectors * layout.groups, GROUP)
        fine = unpack_nibbles(int8).astype(np.int32).reshape(shape)
        code = 16 * unpack_nibbles(int4[:, : layout.code_nbytes]).astype(np.int32).reshape(shape)
        code += fine
        scale = np.ascontiguousarray(int4[:, layout.code_nbytes :]).view("<u2")[..., None]
        # |scale| / 32, exactly; no infinities here, so that hostile scales stay numbers
        unit = ((scale & 0x7FFF).astype(np.uint32) << 13).view(np.float32) * np.float32(2.0**107)
        zero, size = code == 0, np.abs(code)
        # r is limited, and q need not be the nearest: its ends stand for what lies further
        up, down = _ABOVE * (fine == 7), _BELOW * (fine == -8)
        least = 2 * size - 1 - np.where(code < 0, up, down)
        most = 2 * size + 1 + np.where(code < 0, down, up)
        low = np.where(zero, 0, _at_least(unit * np.abs(least, dtype=np.float32), exact_type))
        high = _at_most(unit * most.astype(np.float32), exact_type)
        last = np.where(zero, 2 * high + 1, np.maximum(high - low, 0))
        real = np.arange(layout.padded) < layout.length
        widths = np.frexp(last.astype(np.float32))[1].astype(np.uint8)  # of 0 it is 0
        widths *= np.tile(real, layout.vectors).reshape(shape[1:])
        bits = np.arange(widths.max(initial=0), dtype=np.uint8)
        uses = _pairs(widths)[:, :, None] > bits[:, None]
        negative = (code < 0) ^ (scale > 0x7FFF)
        return cls(_pairs(zero), _pairs(negative), _pairs(low), _pairs(last), uses)

    def offsets_of(self, true: U16) -> tuple[I32, Bools]:
        """Offsets of padded weights, and which are escapes; those have the offset 0."""
        magnitude, sign = (true & 0x7FFF).astype(np.int32), true > 0x7FFF
        offsets = np.where(self.zero, 2 * magnitude + sign, magnitude - self.low)
        near = (offsets >= 0) & (offsets <= self.last) & (self.zero | (sign == self.negative))
        return np.where(near, offsets, 0), ~near

    def weights_of(self, bits: U8) -> U16:
        """The padded weights whose offsets have these bits, in the order of the frame."""
        planes = np.zeros(self.uses.shape, np.uint8)
        planes[self.uses] = bits
        offsets = np.zeros(self.low.shape, np.int32)
        for k in range(self.uses.shape[2]):
            offsets |= planes[:, :, k].astype(np.int32) << k
        signed = (self.low + offsets) & 0xFFFF | self.negative.astype(np.int32) << 15
        return np.where(self.zero, offsets >> 1 | (offsets & 1) << 15, signed).astype(np.uint16)


def _at_most(values: F32, exact_type: str) -> I32:
    """Bits of the largest finite number of `exact_type` not above each value >= 0."""
    if exact_type == "bf16":
        return (values.view(np.uint32) >> 16).astype(np.int32)
    near = round_to(values, exact_type)
    return near.astype(np.int32) - (widen(near, exact_type) > values)


def _at_least(values: F32, exact_type: str) -> I32:
    """Bits of the smallest number of `exact_type`, infinity included, not below each value >= 0."""
    if exact_type == "bf16":
        return ((values.view(np.uint32) + 0xFFFF) >> 16).astype(np.int32)
    near = round_to(values, exact_type)
    return near.astype(np.int32) + (widen(near, exact_type) < values)


def _chunks(records: int, frame_records: int, layout: RecordLayout) -> Iterator[slice]:
    """Whole frames at a time."""
    frames = max(1, _AT_ONCE // (frame_records * layout.vectors * layout.padded))
    for start in range(0, records, frames * frame_records):
        yield slice(start, min(start + frames * frame_records, records))


def _pairs(groups: Arrays) -> Arrays:
    """[records, groups, GROUP] to [records, pairs, 2 * GROUP]; zeros where the last is alone."""
    if groups.shape[1] % 2:
        groups = np.pad(groups, ((0, 0), (0, 1), (0, 0)))
    return groups.reshape(len(groups), -1, 2 * GROUP)


def _pad(weights: U16, layout: RecordLayout) -> U16:
    """Weights [records, vectors * length] to [records, pairs, 2 * GROUP]."""
    padded = np.zeros((len(weights), layout.vectors, layout.padded), np.uint16)
    padded[..., : layout.length] = weights.reshape(-1, layout.vectors, layout.length)
    return _pairs(padded.reshape(len(weights), -1, GROUP))


def _unpad(pairs: Arrays, layout: RecordLayout) -> Arrays:
    """Inverse of `_pad`."""
    flat = pairs.reshape(len(pairs), -1)[:, : layout.vectors * layout.padded]
    vectors = flat.reshape(len(pairs), layout.vectors, layout.padded)[..., : layout.length]
    return vectors.reshape(len(pairs), -1)


def _before(counts: Arrays) -> I64:
    """Sum of the counts before each."""
    return np.cumsum(counts, dtype=np.int64) - counts


def _places(begins: I64, counts: I64) -> I64:
    """begin, begin + 1, ... for each of `counts`, joined."""
    return np.arange(int(counts.sum())) + np.repeat(begins - _before(counts), counts)


def _pack_bits(bits: Arrays, counts: I64) -> tuple[U8, I64]:
    """Bits of frames, `counts` of each, to bytes; and the bytes of each: none holds bits of two."""
    nbytes = -(-counts // 8)
    room = np.zeros(8 * int(nbytes.sum()), np.bool_)
    room[_places(8 * _before(nbytes), counts)] = bits
    return np.packbits(room, bitorder="little"), nbytes


def _unpack_bits(packed: U8, counts: I64) -> U8:
    """Inverse of `_pack_bits`."""
    places = _places(8 * _before(-(-counts // 8)), counts)
    return np.unpackbits(packed, bitorder="little")[places]


def _list_escapes(escaped: Bools, true: U16, frame_records: int) -> tuple[I64, U8]:
    """The frame of each escape, and their entries joined."""
    frame_weights = frame_records * true.shape[1]
    where = np.flatnonzero(escaped)
    entries = np.empty(len(where), [("position", "<u4"), ("weight", "<u2")])
    entries["position"] = where % frame_weights
    entries["weight"] = true.reshape(-1)[where]
    return where // frame_weights, entries.view(np.uint8)


def _put_escapes(weights: U16, listed: U8, counts: I64, frame_records: int) -> None:
    """Put `listed` entries, `counts` of each frame, into weights [records, weights], contiguous."""
    entries = listed.view([("position", "<u4"), ("weight", "<u2")])
    frame, position = np.repeat(np.arange(len(counts)), counts), entries["position"]
    where = frame * frame_records * weights.shape[1] + position
    last = np.minimum((frame + 1) * frame_records * weights.shape[1], weights.size)
    if (where >= last).any() or (np.diff(where) <= 0).any():
        raise BadInput("the exact plane holds an escape that is out of place")
    weights.reshape(-1)[where] = entries["weight"]
