"""The C encoder: from 16-bit weights to the bytes of the three planes in one pass.

The same bytes as `bundle.planes` and `bundle.exact`, which stay the reference and do the work where
no library was built. Knows nothing about files or checkpoints.
"""

import ctypes
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from m2c.bundle.exact import ESCAPE_NBYTES, Frames
from m2c.bundle.planes import GROUP, RecordLayout
from m2c.errors import UsageError
from m2c.kernels.native import LIBRARY

_POINTER = ctypes.c_void_p
_WORD: Final = 8  # bytes that are written at a time
_MOST: Final = 2 + ESCAPE_NBYTES  # bytes that a weight may take in the exact plane

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]


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
    ) -> tuple[U8, U8, Frames] | None:  # fmt: skip
        """All planes of records `bits` [n, weights]; None if one of the weights is no number.

        Returns INT4 records, INT8 records [n, nbytes] u8, and the frames of the exact plane.
        importance: [GROUP, vectors * groups], as `planes` lays it out.
        """
        weights = layout.vectors * layout.length
        if bits.shape[1:] != (weights,) or importance.shape != (
            GROUP, layout.vectors * layout.groups,
        ):  # fmt: skip
            raise ValueError(f"records {bits.shape} and importance {importance.shape}: {layout}")
        bits, importance = np.ascontiguousarray(bits), np.ascontiguousarray(importance)
        records, frames = len(bits), -(-len(bits) // frame_records)
        int4 = np.empty((records, layout.nbytes("int4")), np.uint8)
        int8 = np.empty((records, layout.nbytes("int8")), np.uint8)
        room = np.empty(_MOST * bits.size + 2 * _WORD, np.uint8)
        nbytes, escapes = np.empty(frames, np.uint32), np.empty(frames, np.uint32)
        call = _Call(
            bits.ctypes.data, importance.ctypes.data, records, frame_records, layout.vectors,
            layout.length, exact_type == "bf16", int4.ctypes.data, int8.ctypes.data,
            room.ctypes.data, nbytes.ctypes.data, escapes.ctypes.data,
        )  # fmt: skip
        if self._function(self._choice, ctypes.byref(call)):
            return None
        data = room[: int(nbytes.sum(dtype=np.int64))].tobytes()
        return int4, int8, Frames(data, nbytes, escapes)


def load_encoder() -> Encoder | None:
    """The fastest encoder of this machine; None where the library was not built."""
    return Encoder() if LIBRARY.exists() else None


class _Call(ctypes.Structure):
    """`struct encode_call` of csrc/encode.c."""

    _fields_ = (
        ("weights", _POINTER), ("importance", _POINTER), ("records", ctypes.c_int64),
        ("frame_records", ctypes.c_int64), ("vectors", ctypes.c_int32),
        ("length", ctypes.c_int32), ("is_bf16", ctypes.c_int32), ("int4", _POINTER),
        ("int8", _POINTER), ("frames", _POINTER), ("nbytes", _POINTER), ("escapes", _POINTER),
    )  # fmt: skip
