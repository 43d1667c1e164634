"""The exact plane: what is missing from the INT8 value to the checkpoint's own 16-bit weight.

The INT8 value is rounded to the checkpoint's 16-bit type. Both it and the true weight are then
numbered in the order of floats, and the plane stores the difference of the two numbers: a small
integer, since the INT8 value is close. Differences in [-127, 127] take one byte; others take the
byte -128 and two more bytes at the end of the frame. A frame of one or more records is compressed
with zstd. docs/FORMAT.md, section "The exact plane".

Knows nothing about files or models.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import zstandard

from m2c.errors import BadInput

EXACT_TYPES: Final = ("bf16", "f16")
_ESCAPE = -128
_SMALLEST_WINDOW = 1 << 10  # that zstd can be told
ZSTD_LEVEL = 1  # the distances are noise to LZ matching: higher levels gain under 0.5 %

F32 = npt.NDArray[np.float32]
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


def distances(true: U16, base: U16) -> npt.NDArray[np.int16]:
    """Steps, modulo 2**16, from `base` to `true` in the order of floats."""
    return (_ordered(true) - _ordered(base)).view(np.int16)


def apply_distances(base: U16, steps: npt.NDArray[np.int16]) -> U16:
    """Inverse of `distances`."""
    key = _ordered(base) + steps.view(np.uint16)
    return np.where(key & 0x8000, key ^ 0x8000, ~key)


@dataclass(frozen=True)
class Frames:
    """Frames joined, the compressed bytes of each [frames] u32 and its escapes [frames] u32."""

    data: bytes
    nbytes: U32
    escapes: U32


def encode_frames(true: U16, base: U16, records_per_frame: int = 1) -> Frames:
    """Compress records [records, weights] u16, the last frame may hold fewer of them."""
    steps = distances(true, base)
    near = np.abs(steps.astype(np.int32)) < -_ESCAPE
    small = np.where(near, steps, _ESCAPE).astype(np.int8)
    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_content_size=True)
    parts, escapes = [], []
    for start in range(0, len(steps), records_per_frame):
        rows = slice(start, start + records_per_frame)
        escaped = steps[rows][~near[rows]].astype("<i2")
        parts.append(compressor.compress(small[rows].tobytes() + escaped.tobytes()))
        escapes.append(len(escaped))
    sizes = np.array([len(part) for part in parts], np.uint32)
    return Frames(b"".join(parts), sizes, np.array(escapes, np.uint32))


def decode_frames(data: U8, weights: npt.NDArray[np.int64], escapes: U32) -> npt.NDArray[np.int16]:
    """Decompress consecutive frames to their distances [sum(weights)] i16.

    data: the frames joined, u8; weights, escapes: [frames], values and escapes in each. Raises
    BadInput when the frames do not hold exactly what these say; nothing is allocated by what a
    frame claims of itself.
    """
    wide_nbytes = escapes.astype(np.int64) * 2
    joined = np.empty(int(weights.sum() + wide_nbytes.sum()), np.uint8)
    _decompress(data, joined, int((weights + wide_nbytes).max(initial=0)))
    # a frame is its one-byte distances, then its escapes: tell the two apart in all frames at once
    runs = np.stack((weights, wide_nbytes), axis=1).reshape(-1)
    is_small = np.repeat(np.tile(np.array([True, False]), len(weights)), runs)
    small = joined[is_small].view(np.int8)
    steps = small.astype(np.int16)
    escaped = np.flatnonzero(small == _ESCAPE)
    ends = np.cumsum(weights)
    found = np.bincount(np.searchsorted(ends, escaped, side="right"), minlength=len(weights))
    if (found != escapes).any():
        raise BadInput("the exact plane holds a frame with a wrong number of escapes")
    steps[escaped] = joined[~is_small].view("<i2")
    return steps


def _decompress(data: U8, out: U8, largest: int) -> None:
    """All frames in one call: a frame each would be a Python loop over neurons.

    largest: bytes in the largest frame; one that asks for a larger window is refused.
    """
    source = np.ascontiguousarray(data).tobytes()
    decompressor = zstandard.ZstdDecompressor(max_window_size=max(largest, _SMALLEST_WINDOW))
    try:
        with decompressor.stream_reader(source, read_across_frames=True) as reader:
            filled = 0
            while filled < len(out):
                got = reader.readinto(out[filled:])
                if not got:
                    break
                filled += got
            surplus = reader.read(1)
    except zstandard.ZstdError as error:
        raise BadInput(f"the exact plane holds a damaged frame ({error})") from None
    if filled != len(out) or surplus:
        raise BadInput("the exact plane holds a frame of a wrong length")


def _ordered(bits: U16) -> U16:
    """Bit patterns as integers that rise with the float they stand for; -0 and +0 differ."""
    return np.where(bits & 0x8000, ~bits, bits | 0x8000)
