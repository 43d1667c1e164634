"""The C kernels: loaded with ctypes, one library, no Python ABI. Built when m2c is installed.

Mirrors the structures of csrc/rows.h; knows nothing about layers or tiers.
"""

import ctypes
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from m2c.errors import UsageError
from m2c.kernels.rows import ExactRows, Rows

CHOICES: Final = ("auto", "torch", "scalar", "avx2", "avx512")
LIBRARY: Final = Path(__file__).parent / "csrc" / "libm2c.so"
# beyond this many tokens a dense product of decoded values is faster than row after row
MAX_TOKENS: Final = 32
_POINTER = ctypes.c_void_p


class _Rows(ctypes.Structure):
    _fields_ = (
        ("int4", _POINTER), ("int8", _POINTER), ("wide", _POINTER),
        ("index4", _POINTER), ("index8", _POINTER), ("count", ctypes.c_int64),
        ("vectors", ctypes.c_int32), ("length", ctypes.c_int32), ("groups", ctypes.c_int32),
        ("kind", ctypes.c_int32), ("is_bf16", ctypes.c_int32), ("use", _POINTER),
    )  # fmt: skip


class _Inputs(ctypes.Structure):
    _fields_ = (
        ("x", _POINTER), ("xq", _POINTER), ("xs", _POINTER), ("xsum", _POINTER),
        ("tokens", ctypes.c_int32),
    )  # fmt: skip


def load_native(choice: str, threads: int) -> "NativeKernels | None":
    """The kernels of `choice` (CHOICES), None for torch, or for auto without a built library.

    Raises UsageError when an instruction set asked for by name cannot be had.
    """
    if choice not in CHOICES:
        raise UsageError(f"kernel {choice!r}", f"choose one of {', '.join(CHOICES)}")
    if choice == "torch" or (choice == "auto" and not LIBRARY.exists()):
        return None
    if not LIBRARY.exists():
        raise UsageError(
            f"kernel {choice!r}: the native kernels were not built",
            "install a C compiler and m2c again, or use torch",
        )
    return NativeKernels(choice, threads)


class NativeKernels:
    """The four kernels of `reference.py`, for rows and activations in host memory.

    Activations meet 4- and 8-bit codes as int8 with a scale per group of 32, as in llama.cpp;
    16-bit weights meet f32. Results do not depend on threads nor on how many tokens share a call.
    """

    def __init__(self, choice: str, threads: int) -> None:
        """Raises UsageError when this machine cannot run `choice`, OSError without the library."""
        self._library = _load(LIBRARY)
        self._handle = _POINTER(self._library.m2c_open(choice.encode(), threads))
        if not self._handle:
            raise UsageError(f"this processor cannot run {choice} kernels", "use M2C_KERNEL=auto")
        self.name = self._library.m2c_name(self._handle).decode()

    def close(self) -> None:
        self._library.m2c_close(self._handle)
        self._handle = _POINTER(None)

    def takes(self, x: Tensor, rows: Rows) -> bool:
        """Whether these kernels can compute this; if not, the reference does."""
        if x.device.type != "cpu" or x.shape[0] > MAX_TOKENS:
            return False
        if isinstance(rows, ExactRows):
            return rows.weights.dtype in (torch.bfloat16, torch.float16)
        return rows.int4.device.type == "cpu"

    def matmul_rows(self, x: Tensor, rows: Rows) -> Tensor:
        out = torch.empty((x.shape[0], len(rows)))
        given, _keep = self._inputs(x, rows)
        packed = _rows(rows)
        self._library.m2c_matmul(
            self._handle, ctypes.byref(packed), ctypes.byref(given), _POINTER(out.data_ptr())
        )
        return out

    def gate_up(self, x: Tensor, rows: Rows, act: str) -> Tensor:
        out = torch.empty((x.shape[0], len(rows)))
        given, _keep = self._inputs(x, rows)
        packed = _rows(rows)
        self._library.m2c_gate_up(
            self._handle, ctypes.byref(packed), ctypes.byref(given), ctypes.c_int32(act == "relu"),
            _POINTER(out.data_ptr()),
        )  # fmt: skip
        return out

    def down(self, activations: Tensor, rows: Rows, *, into: Tensor | None = None) -> Tensor:
        """`into`: [tokens, hidden], the sum over the rows before these, continued in place."""
        activations = activations.contiguous()
        tokens = activations.shape[0]
        out = torch.zeros((tokens, rows.layout.length)) if into is None else into
        packed = _rows(rows)
        self._library.m2c_down(
            self._handle, ctypes.byref(packed), _POINTER(activations.data_ptr()),
            ctypes.c_int32(tokens), _POINTER(out.data_ptr()),
        )  # fmt: skip
        return out

    def ffn(
        self, x: Tensor, rows: Rows, act: str, *, mask: Tensor | None, into: Tensor
    ) -> None:  # fmt: skip
        """Add the neurons' FFN output to `into` [tokens, hidden]: one pass over each record.

        A call with a multiple of CHUNK rows, continued by another, gives the bits of one call.
        """
        given, _keep = self._inputs(x, rows)
        packed = _rows(rows)
        mask = None if mask is None else mask.contiguous()
        failed = self._library.m2c_ffn(
            self._handle, ctypes.byref(packed), ctypes.byref(given), ctypes.c_int32(act == "relu"),
            _POINTER(None if mask is None else mask.data_ptr()), _POINTER(into.data_ptr()),
        )  # fmt: skip
        if failed:
            raise MemoryError("no memory for the partial sums of a kernel")

    def _inputs(self, x: Tensor, rows: Rows) -> tuple[_Inputs, list[Tensor]]:
        """The structure, and the tensors that must outlive the call."""
        x = x.contiguous()
        tokens, length = x.shape
        if isinstance(rows, ExactRows):
            return _Inputs(x.data_ptr(), None, None, None, tokens), [x]
        groups = rows.layout.groups
        xq = torch.empty((tokens, rows.layout.padded), dtype=torch.int8)
        xs, xsum = torch.empty((tokens, groups)), torch.empty((tokens, groups))
        self._library.m2c_quantize(
            _POINTER(x.data_ptr()), ctypes.c_int32(tokens), ctypes.c_int32(length),
            ctypes.c_int32(groups), _POINTER(xq.data_ptr()), _POINTER(xs.data_ptr()),
            _POINTER(xsum.data_ptr()),
        )  # fmt: skip
        kept = [x, xq, xs, xsum]
        return _Inputs(*(t.data_ptr() for t in kept), tokens), kept


def _rows(rows: Rows) -> _Rows:
    layout = rows.layout
    shape = (len(rows), layout.vectors, layout.length, layout.groups)
    if isinstance(rows, ExactRows):
        is_bf16 = rows.weights.dtype == torch.bfloat16
        return _Rows(None, None, _at(rows.weights), None, None, *shape, 16, is_bf16)
    kind = 4 if rows.int8 is None else 8
    return _Rows(
        _at(rows.int4), None if rows.int8 is None else _at(rows.int8), None,
        None if rows.index4 is None else _at(rows.index4),
        None if rows.index8 is None else _at(rows.index8), *shape, kind, 0,
    )  # fmt: skip


def _at(tensor: Tensor) -> int:
    if not tensor.is_contiguous():
        raise ValueError("kernel operands must be contiguous")
    return tensor.data_ptr()


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.m2c_name.restype = ctypes.c_char_p
    library.m2c_open.restype = _POINTER
    for name in ("m2c_matmul", "m2c_gate_up", "m2c_down", "m2c_quantize", "m2c_close"):
        getattr(library, name).restype = None
    return library
