"""The structures of cuda/*.cu, and how operands become them.

They are kept with the operands, which a model uses again for every token.
"""

import ctypes
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m2c.errors import UsageError
from m2c.kernels.operands import AttentionCall, Norm
from m2c.kernels.rows import ExactRows, PackedRows, Rows

MOST_DIM = 1024  # of a head, as in attention.cu
_POINTER = ctypes.c_void_p
_INT, _I64, _FLOAT = ctypes.c_int, ctypes.c_int64, ctypes.c_float


class RowsOnGpu(ctypes.Structure):
    _fields_ = (
        ("int4", _POINTER), ("int8", _POINTER), ("wide", _POINTER),
        ("index4", _POINTER), ("index8", _POINTER), ("count", _I64),
        ("vectors", _INT), ("length", _INT), ("groups", _INT), ("kind", _INT), ("is_bf16", _INT),
        ("aligned", _INT),
    )  # fmt: skip


class Inputs(ctypes.Structure):
    _fields_ = (
        ("values", _POINTER), ("codes", _POINTER), ("scales", _POINTER),
        ("tokens", _INT), ("length", _INT),
    )  # fmt: skip


class Coded8(ctypes.Structure):
    _fields_ = (("codes", _POINTER), ("scales", _POINTER))


class Given(ctypes.Structure):
    _fields_ = (
        ("x", _POINTER), ("norm", _POINTER), ("norm_bias", _POINTER), ("eps", _FLOAT),
        ("tokens", _INT), ("length", _INT),
    )  # fmt: skip


class Activation(ctypes.Structure):
    _fields_ = (("kind", _INT), ("threshold", _FLOAT), ("bias", _POINTER))


class Matrices(ctypes.Structure):
    _fields_ = (
        ("rows", RowsOnGpu * 3), ("bias", _POINTER * 3), ("out", _POINTER * 3),
        ("stride", _I64 * 3), ("units", _I64), ("add", _INT),
    )  # fmt: skip


class Attention(ctypes.Structure):
    _fields_ = (
        ("keys", _POINTER), ("values", _POINTER), ("cosines", _POINTER), ("sines", _POINTER),
        ("head_norms", _POINTER * 2), ("start", _POINTER), ("positions", _I64), ("window", _I64),
        ("heads", _INT), ("kv_heads", _INT), ("dim", _INT), ("rotary", _INT), ("is_f16", _INT),
        ("scale", _FLOAT), ("eps", _FLOAT), ("softcap", _FLOAT),
    )  # fmt: skip


class Frames(ctypes.Structure):
    _fields_ = (("data", _POINTER), ("at", _POINTER), ("escapes", _POINTER), ("records", _I64))


def at(tensor: Tensor | None) -> Any:
    return _POINTER(None) if tensor is None else _POINTER(tensor.data_ptr())


def given_of(x: Tensor, norm: Norm | None) -> Given:
    weight = None if norm is None else norm.weight.data_ptr()
    bias = None if norm is None or norm.bias is None else norm.bias.data_ptr()
    return Given(x.data_ptr(), weight, bias, 0.0 if norm is None else norm.eps, *x.shape)


def rows_of(rows: Rows) -> RowsOnGpu:
    held: RowsOnGpu | None = rows.__dict__.get("_gpu_rows")
    if held is None:
        held = rows.__dict__["_gpu_rows"] = _make_rows(rows)
    return held


def _make_rows(rows: Rows) -> RowsOnGpu:
    layout = rows.layout
    shape = (len(rows), layout.vectors, layout.length, layout.groups)
    if isinstance(rows, ExactRows):
        aligned = rows.weights.data_ptr() % 16 == 0 and layout.length % 8 == 0
        is_bf16 = rows.weights.dtype == torch.bfloat16
        return RowsOnGpu(None, None, rows.weights.data_ptr(), None, None, *shape, 16, is_bf16,
                         aligned)  # fmt: skip
    planes = (rows.int4, rows.int8)
    aligned = layout.nbytes("int4") % 16 == 0 and all(
        plane is None or plane.data_ptr() % 16 == 0 for plane in planes
    )
    pointers = [
        None if one is None else one.data_ptr() for one in (*planes, None, rows.index4, rows.index8)
    ]
    is_bf16 = rows.frames is not None and rows.frames.exact_type == "bf16"
    kind = 4 if rows.int8 is None else 8
    return RowsOnGpu(*pointers, *shape, kind, is_bf16, aligned)


def attention_of(call: AttentionCall, start: Tensor) -> Attention:
    """start: where the position of the first token lies, int64 [1]."""
    held: Attention | None = call.__dict__.get("_gpu_call")
    if held is None:
        held = call.__dict__["_gpu_call"] = _make_attention(call, start)
    return held


def _make_attention(call: AttentionCall, start: Tensor) -> Attention:
    kv_heads, positions, dim = call.keys.shape
    if dim > MOST_DIM:
        raise UsageError(f"heads of {dim} values on a GPU", "add --kernel torch")
    eps = max((norm.eps for norm in call.qk_norms if norm is not None), default=0.0)
    pointers = (call.keys, call.values, call.cosines, call.sines)
    head_norms = (None if norm is None else norm.weight.data_ptr() for norm in call.qk_norms)
    return Attention(
        *(None if one is None else one.data_ptr() for one in pointers),
        (_POINTER * 2)(*head_norms), start.data_ptr(), positions, call.window or positions,
        call.heads, kv_heads, dim, call.rotary, call.keys.dtype == torch.float16, call.scale,
        eps, call.softcap or 0.0,
    )  # fmt: skip


def frames_of(rows: PackedRows) -> Frames:
    """What it points to is kept with the rows."""
    held: Frames | None = rows.__dict__.get("_gpu_frames")
    if held is None:
        held = rows.__dict__["_gpu_frames"] = _make_frames(rows)
    return held


def _make_frames(rows: PackedRows) -> Frames:
    frames = rows.frames
    assert frames is not None
    ends = np.concatenate((np.zeros(1, np.int64), np.cumsum(frames.nbytes, dtype=np.int64)))
    count = -(-len(rows) // frames.frame_records)
    if count != len(frames.escapes) or ends[-1] != len(frames.data):
        raise ValueError("frames and rows do not belong together")
    tables = [
        torch.from_numpy(table).to(frames.data.device)
        for table in (ends, frames.escapes.astype(np.uint32).view(np.int32))
    ]
    rows.__dict__["_gpu_tables"] = tables
    pointers = (tensor.data_ptr() for tensor in (frames.data, *tables))
    return Frames(*pointers, frames.frame_records)
