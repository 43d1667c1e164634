"""The C encoder: from 16-bit weights to the bytes of the three planes, zstd apart, in one pass.

The same bytes as `bundle.planes` and `bundle.exact`, which stay the reference and do the work where
no library was built. Knows nothing about files or checkpoints.
"""

import ctypes
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from m2c.bundle.planes import GROUP, RecordLayout
from m2c.errors import UsageError
from m2c.kernels.native import LIBRARY

_POINTER = ctypes.c_void_p
_MOST: Final = 3  # bytes that the distance of a weight may take

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Codes:
    """Records [n, nbytes] u8 of two planes; of the exact one, frames not compressed yet."""

    int4: U8
    int8: U8
    frames: list[U8]
    escapes: U32  # [frames]


class Encoder:
    """Calls share nothing, release the GIL, and may run in many threads at once."""

    def __init__(self, choice: str = "auto") -> None:
        """choice: "auto", "scalar", "avx2", "avx512". Raises UsageError if it cannot be had."""
        self._function: Any = ctypes.CDLL(str(LIBRARY)).m2c_encode
        self._choice = choice.encode()
        if self._function(self._choice, ctypes.byref(_Call())) < 0:
            raise UsageError(f"this processor cannot run {choice} kernels", "use auto")

    def encode(
        self, bits: U16, importance: F32, layout: RecordLayout, *, exact_type: str,
        frame_records: int,
    ) -> Codes | None:  # fmt: skip
        """All planes of records `bits` [n, weights]; None if one of the weights is no number.

        importance: [GROUP, vectors * groups], as `planes` lays it out.
        """
        weights = layout.vectors * layout.length
        if bits.shape[1:] != (weights,) or importance.shape != (
            GROUP, layout.vectors * layout.groups,
        ):  # fmt: skip
            raise ValueError(f"records {bits.shape} and importance {importance.shape}: {layout}")
        bits, importance = np.ascontiguousarray(bits), np.ascontiguousarray(importance)
        records, starts = len(bits), np.arange(0, len(bits), frame_records)
        int4 = np.empty((records, layout.nbytes("int4")), np.uint8)
        int8 = np.empty((records, layout.nbytes("int8")), np.uint8)
        room = np.empty(_MOST * bits.size, np.uint8)
        escapes = np.empty(len(starts), np.uint32)
        call = _Call(
            bits.ctypes.data, importance.ctypes.data, records, frame_records, layout.vectors,
            layout.length, exact_type == "bf16", int4.ctypes.data, int8.ctypes.data,
            room.ctypes.data, escapes.ctypes.data,
        )  # fmt: skip
        if self._function(self._choice, ctypes.byref(call)):
            return None
        stops = np.minimum(starts + frame_records, records)
        nbytes = (stops - starts) * weights + 2 * escapes.astype(np.int64)
        begins = _MOST * weights * starts
        frames = [room[begin : begin + n] for begin, n in zip(begins, nbytes, strict=True)]
        return Codes(int4, int8, frames, escapes)


def load_encoder() -> Encoder | None:
    """The fastest encoder of this machine; None where the library was not built."""
    return Encoder() if LIBRARY.exists() else None


class _Call(ctypes.Structure):
    """`struct encode_call` of csrc/encode.c."""

    _fields_ = (
        ("weights", _POINTER), ("importance", _POINTER), ("records", ctypes.c_int64),
        ("frame_records", ctypes.c_int64), ("vectors", ctypes.c_int32),
        ("length", ctypes.c_int32), ("is_bf16", ctypes.c_int32), ("int4", _POINTER),
        ("int8", _POINTER), ("frames", _POINTER), ("escapes", _POINTER),
    )  # fmt: skip
