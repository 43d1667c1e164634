"""The structures that the C kernels take, as csrc/rows.h, layers.c and experts.c have them."""

import ctypes
from typing import Final

POINTER: Final = ctypes.c_void_p


class Rows(ctypes.Structure):
    _fields_ = (
        ("int4", POINTER), ("int8", POINTER), ("wide", POINTER),
        ("index4", POINTER), ("index8", POINTER), ("count", ctypes.c_int64),
        ("vectors", ctypes.c_int32), ("length", ctypes.c_int32), ("groups", ctypes.c_int32),
        ("kind", ctypes.c_int32), ("is_bf16", ctypes.c_int32),
        ("frames", POINTER), ("frame_at", POINTER), ("frame_escapes", POINTER),
        ("frame_records", ctypes.c_int64),
    )  # fmt: skip


class Given(ctypes.Structure):
    _fields_ = (
        ("x", POINTER), ("norm", POINTER), ("norm_bias", POINTER), ("eps", ctypes.c_float),
        ("tokens", ctypes.c_int32), ("length", ctypes.c_int32),
    )  # fmt: skip


class Activation(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("threshold", ctypes.c_float), ("bias", POINTER))


class Attention(ctypes.Structure):
    _fields_ = (
        ("projections", POINTER * 4), ("biases", POINTER * 4),
        ("keys", POINTER), ("values", POINTER), ("cosines", POINTER), ("sines", POINTER),
        ("positions", ctypes.c_int64), ("start", ctypes.c_int64),
        ("heads", ctypes.c_int32), ("kv_heads", ctypes.c_int32), ("dim", ctypes.c_int32),
        ("is_f16", ctypes.c_int32), ("scale", ctypes.c_float), ("window", ctypes.c_int64),
        ("head_norms", POINTER * 2), ("out_norm", POINTER), ("eps", ctypes.c_float),
        ("softcap", ctypes.c_float), ("rotary", ctypes.c_int32),
    )  # fmt: skip


class Layer(ctypes.Structure):
    _fields_ = (
        ("attention", POINTER), ("attn_norm", POINTER), ("attn_norm_bias", POINTER),
        ("neurons", POINTER), ("ffn_norm", POINTER), ("ffn_norm_bias", POINTER),
        ("out_bias", POINTER), ("attn_eps", ctypes.c_float), ("ffn_eps", ctypes.c_float),
        ("act", Activation),
    )  # fmt: skip


class Router(ctypes.Structure):
    _fields_ = (
        ("rows", POINTER), ("experts", ctypes.c_int32), ("active", ctypes.c_int32),
        ("sums_to_one", ctypes.c_int32), ("shared", ctypes.c_int32),
    )  # fmt: skip
