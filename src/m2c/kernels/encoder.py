"""The C encoder: from 16-bit weights to the bytes of the three planes in one pass.

The same bytes as `bundle.planes`, `bundle.steering` and `bundle.exact`, which stay the reference
and do the work where no library was built. Knows nothing about files or checkpoints.
"""

import ctypes
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from m2c.bundle.exact import ESCAPE_NBYTES, Frames
from m2c.bundle.planes import GROUP, RecordLayout
from m2c.bundle.steering import MOST_DIRECTIONS, Factors
from m2c.errors import UsageError
from m2c.kernels.native import LIBRARY

_POINTER = ctypes.c_void_p
_WORD: Final = 8  # bytes that are written at a time
_MOST: Final = 2 + ESCAPE_NBYTES  # bytes that a weight may take in the exact plane

F32 = npt.NDArray[np.float32]
I8 = npt.NDArray[np.int8]
U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]


class Encoder:
    """Calls share nothing, release the GIL, and may run in many threads at once."""

    def __init__(self, choice: str = "auto") -> None:
        """choice: "auto", "scalar", "avx2", "avx512". Raises UsageError if it cannot be had."""
        library = ctypes.CDLL(str(LIBRARY))
        self._encode: Any = library.m2c_encode
        self._steer: Any = library.m2c_steer
        self._choice = choice.encode()
        if self._encode(self._choice, ctypes.byref(_Call())) < 0:
            raise UsageError(f"this processor cannot run {choice} kernels", "use auto")

    def encode(
        self, bits: U16, importance: F32, layout: RecordLayout, *, exact_type: str,
        frame_records: int, codes: I8 | None = None,
    ) -> tuple[U8, U8, Frames] | None:  # fmt: skip
        """All planes of records `bits` [n, weights]; None if one of the weights is no number.

        Returns INT4 records, INT8 records [n, nbytes] u8, and the frames of the exact plane.
        importance: [GROUP, vectors * groups], as `planes` lays it out. codes: of the INT4 plane,
        [n, weights], where others than the nearest were chosen.
        """
        bits, importance = _checked(bits, importance, layout)
        if codes is not None and codes.shape != bits.shape:
            raise ValueError(f"codes {codes.shape} for records {bits.shape}")
        given = None if codes is None else np.ascontiguousarray(codes, np.int8)
        records, frames = len(bits), -(-len(bits) // frame_records)
        int4 = np.empty((records, layout.nbytes("int4")), np.uint8)
        int8 = np.empty((records, layout.nbytes("int8")), np.uint8)
        room = np.empty(_MOST * bits.size + 2 * _WORD, np.uint8)
        nbytes, escapes = np.empty(frames, np.uint32), np.empty(frames, np.uint32)
        call = _Call(
            bits.ctypes.data, importance.ctypes.data, None if given is None else given.ctypes.data,
            records, frame_records, layout.vectors, layout.length, exact_type == "bf16",
            int4.ctypes.data, int8.ctypes.data, room.ctypes.data, nbytes.ctypes.data,
            escapes.ctypes.data,
        )  # fmt: skip
        if self._encode(self._choice, ctypes.byref(call)):
            return None
        data = room[: int(nbytes.sum(dtype=np.int64))].tobytes()
        return int4, int8, Frames(data, nbytes, escapes)

    def scales(
        self, bits: U16, importance: F32, layout: RecordLayout, *, exact_type: str
    ) -> U16 | None:
        """The scales that `encode` finds, F16 bits [n, vectors * groups]; None as there."""
        bits, importance = _checked(bits, importance, layout)
        int4 = np.empty((len(bits), layout.nbytes("int4")), np.uint8)
        call = _Call(
            bits.ctypes.data, importance.ctypes.data, None, len(bits), 1, layout.vectors,
            layout.length, exact_type == "bf16", int4.ctypes.data,
        )  # fmt: skip
        if self._encode(self._choice, ctypes.byref(call)):
            return None
        return np.ascontiguousarray(int4[:, layout.code_nbytes :]).view(np.uint16)

    def steer(
        self, bits: U16, scales: U16, factors: Factors, *, exact_type: str, columns: bool = False
    ) -> I8:
        """INT4 codes of finite weights `bits` [n, length], laid out like them.

        scales: F16 bits [n, groups]. An input is a place in the rows or, with `columns`, a row: a
        neuron's down column meets one activation.
        """
        bits, scales = np.ascontiguousarray(bits), np.ascontiguousarray(scales)
        n, length = bits.shape
        steps, lanes = (n, length) if columns else (length, n)
        groups = scales.shape[1]
        v, u = (np.ascontiguousarray(x) for x in (factors.directions, factors.feedback))
        if scales.shape != (n, -(-length // GROUP)) or v.shape != u.shape or len(v) != steps:
            raise ValueError(f"weights {bits.shape}, scales {scales.shape}, factors {v.shape}")
        if v.shape[1] > MOST_DIRECTIONS:
            raise ValueError(f"{v.shape[1]} directions are more than {MOST_DIRECTIONS}")
        codes = np.empty(bits.shape, np.int8)
        call = _SteerCall(
            bits.ctypes.data, codes.ctypes.data, scales.ctypes.data, v.ctypes.data, u.ctypes.data,
            steps, lanes, *((length, 1) if columns else (1, length)),
            *((groups, 1) if columns else (1, groups)), *((1, GROUP) if columns else (GROUP, 1)),
            v.shape[1], exact_type == "bf16",
        )  # fmt: skip
        self._steer(self._choice, ctypes.byref(call))
        return codes


def _checked(bits: U16, importance: F32, layout: RecordLayout) -> tuple[U16, F32]:
    if bits.shape[1:] != (layout.vectors * layout.length,) or importance.shape != (
        GROUP, layout.vectors * layout.groups,
    ):  # fmt: skip
        raise ValueError(f"records {bits.shape} and importance {importance.shape}: {layout}")
    return np.ascontiguousarray(bits), np.ascontiguousarray(importance)


def load_encoder() -> Encoder | None:
    """The fastest encoder of this machine; None where the library was not built."""
    return Encoder() if LIBRARY.exists() else None


class _Call(ctypes.Structure):
    """`struct encode_call` of csrc/encode.c."""

    _fields_ = (
        ("weights", _POINTER), ("importance", _POINTER), ("codes", _POINTER),
        ("records", ctypes.c_int64), ("frame_records", ctypes.c_int64), ("vectors", ctypes.c_int32),
        ("length", ctypes.c_int32), ("is_bf16", ctypes.c_int32), ("int4", _POINTER),
        ("int8", _POINTER), ("frames", _POINTER), ("nbytes", _POINTER), ("escapes", _POINTER),
    )  # fmt: skip


class _SteerCall(ctypes.Structure):
    """`struct steer_call` of csrc/steer.c."""

    _fields_ = (
        ("weights", _POINTER), ("codes", _POINTER), ("scales", _POINTER), ("directions", _POINTER),
        ("feedback", _POINTER), ("steps", ctypes.c_int64), ("lanes", ctypes.c_int64),
        ("step", ctypes.c_int64), ("lane", ctypes.c_int64), ("scale_step", ctypes.c_int64),
        ("scale_lane", ctypes.c_int64), ("step_group", ctypes.c_int32),
        ("lane_group", ctypes.c_int32), ("rank", ctypes.c_int32), ("is_bf16", ctypes.c_int32),
    )  # fmt: skip
