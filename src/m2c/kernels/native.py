"""The C kernels: loaded with ctypes, one library, no Python ABI. Built when m2c is installed.

Knows nothing about layers or tiers.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from m2c.errors import BadInput, UsageError
from m2c.kernels import structures as c
from m2c.kernels.operands import AttentionCall, LayerCall, Norm, Router, Stack, activation_of
from m2c.kernels.rows import EXACT_DTYPES, ExactFrames, ExactRows, PackedRows, Rows
from m2c.kernels.structures import POINTER

CHOICES: Final = ("auto", "torch", "scalar", "avx2", "avx512")
LIBRARY: Final = Path(__file__).parent / "csrc" / "libm2c.so"
_ACT_KINDS: Final = {"silu": 0, "relu": 1, "fatrelu": 1, "gelu_pytorch_tanh": 2, "gelu": 3}
_DAMAGED: Final = 2
_WIDE: Final = (torch.bfloat16, torch.float16)


def load_native(choice: str, threads: int) -> "NativeKernels | None":
    """The kernels of `choice` (CHOICES), None for torch, or for auto without a built library.

    Raises UsageError when an instruction set asked for by name cannot be had.
    """
    if choice not in CHOICES:
        raise UsageError(f"kernel {choice!r}", f"choose one of {', '.join(CHOICES)}")
    if choice == "torch" or (choice == "auto" and not computes_natively(choice)):
        return None
    if not LIBRARY.exists():
        raise UsageError(
            f"kernel {choice!r}: the native kernels were not built",
            "install a C compiler and m2c again, or use torch",
        )
    return NativeKernels(choice, threads)


def computes_natively(choice: str) -> bool:
    """Whether `choice` means the C kernels here."""
    return choice != "torch" and LIBRARY.exists()


class NativeKernels:
    """The kernels of `reference.py`, for rows and activations in host memory.

    Activations meet 4- and 8-bit codes as int8 with a scale per group of 32, as in llama.cpp;
    16-bit weights meet f32; rows with frames are decoded where they are computed, with the bits of
    rows decoded before. Results do not depend on threads nor on how many tokens share a call.
    """

    def __init__(self, choice: str, threads: int) -> None:
        """Raises UsageError when this machine cannot run `choice`, OSError without the library."""
        self._library = _load(LIBRARY)
        self._handle = POINTER(self._library.m2c_open(choice.encode(), threads))
        if not self._handle:
            raise UsageError(f"this processor cannot run {choice} kernels", "use M2C_KERNEL=auto")
        self.name = self._library.m2c_name(self._handle).decode()

    def close(self) -> None:
        self._library.m2c_close(self._handle)
        self._handle = POINTER(None)

    def check(self) -> None:
        """Damage is told where it is found."""

    def here(self, x: Tensor) -> bool:
        return x.device.type == "cpu"

    def takes(self, x: Tensor, rows: Rows) -> bool:
        """Whether these kernels can compute this; if not, the reference does."""
        held: bool | None = rows.__dict__.get("_c_takes")  # asked for every token
        if held is None:
            held = rows.__dict__["_c_takes"] = _takes(rows)
        return held and self.here(x)

    def matmul_rows(self, x: Tensor, rows: Rows, *, norm: Norm | None = None) -> Tensor:
        out = torch.empty((x.shape[0], len(rows)))
        self.matmul_into(out, x, rows, norm=norm)
        return out

    def matmul_into(self, out: Tensor, x: Tensor, rows: Rows, *, norm: Norm | None) -> None:
        """The same, put into `out`, which may be columns of a larger tensor."""
        if out.stride(1) != 1:
            raise ValueError("the products of a token must lie side by side")
        x, stride = x.contiguous(), ctypes.c_int64(out.stride(0))
        at = POINTER(out.data_ptr())
        self._run(self._library.m2c_matmul, _given(x, norm), _rows(rows), at, stride)

    def gate_up(
        self, x: Tensor, rows: Rows, act: str, *, norm: Norm | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        out = torch.empty((x.shape[0], len(rows)))
        x = x.contiguous()
        how = _act(act, bias)
        self._run(self._library.m2c_gate_up, _given(x, norm), _rows(rows), how, _at(out))
        return out

    def down(self, activations: Tensor, rows: Rows, *, into: Tensor) -> None:
        """Add to `into` [tokens, hidden]; continued calls as with `ffn`."""
        activations = activations.contiguous()
        tokens = ctypes.c_int32(activations.shape[0])
        self._run(self._library.m2c_down, _rows(rows), _at(activations), tokens, _at(into))

    def ffn(
        self, x: Tensor, rows: Rows, act: str, *, into: Tensor, mask: Tensor | None = None,
        kept: Tensor | None = None, norm: Norm | None = None, bias: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Add the neurons' FFN output to `into` [tokens, hidden]: one pass over each record.

        kept: [tokens, rows], receives the activations.
        A call with a multiple of CHUNK rows, continued by another, gives the bits of one call.
        """
        x = x.contiguous()
        mask = None if mask is None else mask.contiguous()
        how, optional = _act(act, bias), (_maybe(mask), _maybe(kept))
        self._run(self._library.m2c_ffn, _given(x, norm), _rows(rows), how, *optional, _at(into))

    def route(
        self, x: Tensor, router: Router, *, norm: Norm | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `dispatch.route`."""
        facts: c.Router | None = router.__dict__.get("_c_router")
        if facts is None:
            facts = router.__dict__["_c_router"] = c.Router(
                ctypes.addressof(_rows(router.rows)), router.experts, router.active,
                router.sums_to_one, router.shared,
            )  # fmt: skip
        tokens, x = len(x), x.contiguous()
        logits = torch.empty((tokens, len(router.rows)))
        chosen = torch.empty((tokens, router.active), dtype=torch.int64)
        weights = torch.empty((tokens, router.active))
        share = torch.empty((tokens, 1)) if router.shared else None
        self._run(
            self._library.m2c_route, _given(x, norm), facts, _at(logits), _at(chosen),
            _at(weights), _maybe(share),
        )  # fmt: skip
        return chosen, weights, share

    def experts(
        self, x: Tensor, experts: Sequence[Rows], weights: Tensor, act: str, *, norm: Norm | None,
        into: Tensor,
    ) -> None:  # fmt: skip
        """As `dispatch.add_experts`; every expert has rows."""
        part = torch.empty_like(x)
        pointers = (POINTER * len(experts))(*(ctypes.addressof(_rows(rows)) for rows in experts))
        self._run(
            self._library.m2c_experts, _given(x, norm), pointers, ctypes.c_int32(len(experts)),
            _act(act, None), _at(weights), _at(part), _at(into),
        )  # fmt: skip

    def add_normed(self, x: Tensor, norm: Norm, *, into: Tensor) -> None:
        """Add norm(x) to `into`, both [tokens, hidden]."""
        x = x.contiguous()
        self._run(self._library.m2c_add_normed, _given(x, norm), _at(into))

    def rank(self, activations: Tensor, norms: Tensor, best: list[tuple[int, int]]) -> Tensor:
        """Levels i8 [tokens, neurons]: for each (count, level) in turn, the `count` neurons with
        the largest |activation| * norm get `level`; 0 elsewhere. Of equals, lower ids first.
        """
        tokens, neurons = activations.shape
        levels = torch.zeros((tokens, neurons), dtype=torch.int8)
        self._run(
            self._library.m2c_rank, _at(activations), _at(norms), ctypes.c_int32(tokens),
            ctypes.c_int64(neurons), ctypes.c_int32(len(best)),
            (ctypes.c_int64 * len(best))(*(count for count, _ in best)),
            (ctypes.c_int8 * len(best))(*(level for _, level in best)), _at(levels),
        )  # fmt: skip
        return levels

    def attention(self, x: Tensor, call: AttentionCall, start: int, *, norm: Norm) -> None:
        """Add the attention of norm(x) to x [tokens, hidden], in place; stores keys and values."""
        facts = _attention(call)
        facts.start = start
        self._run(self._library.m2c_attention, _given(x, norm), facts, _at(x))

    def takes_stack(self, stack: Stack) -> bool:
        """Whether these kernels can compute every layer."""
        held: bool | None = stack.__dict__.get("_c_takes")
        if held is None:
            rows = [r for one in stack.layers for r in (*one.attention.projections, one.neurons)]
            held = stack.__dict__["_c_takes"] = all(_takes(r) and len(r) for r in rows)
        return held

    def run_stack(self, x: Tensor, stack: Stack, start: int) -> None:
        """x [tokens, hidden] through all layers, in place."""
        layers = stack.__dict__.get("_c_layers")
        if layers is None:
            made = [_layer(layer) for layer in stack.layers]
            layers = stack.__dict__["_c_layers"] = (c.Layer * len(made))(*made)
        tokens, hidden = x.shape
        before = torch.empty_like(x) if stack.parallel else None
        self._run(
            self._library.m2c_layers, layers, ctypes.c_int32(len(layers)), ctypes.c_int64(start),
            ctypes.c_int32(tokens), ctypes.c_int32(hidden), _at(x),
            _maybe(before),
        )  # fmt: skip

    def decode(self, rows: PackedRows) -> Tensor:
        """The 16-bit weights [rows, vectors * length] of rows with frames."""
        assert rows.frames is not None
        layout = rows.layout
        dtype = EXACT_DTYPES[rows.frames.exact_type]
        out = torch.empty((len(rows), layout.vectors * layout.length), dtype=dtype)
        self._run(self._library.m2c_decode, _rows(rows), _at(out))
        return out

    def read(self, data: Tensor) -> None:
        """Read all bytes of contiguous `data` and do nothing with them: to time memory."""
        nbytes = ctypes.c_int64(data.numel() * data.element_size())
        self._library.m2c_read(self._handle, _at(data), nbytes)

    def _run(self, function: Any, *arguments: Any) -> None:
        passed = [ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in arguments]
        failed = function(self._handle, *passed)
        if failed == _DAMAGED:
            raise BadInput(
                "the exact plane holds a damaged frame", "check the bundle with m2c check"
            )
        if failed:
            raise MemoryError("no memory for the temporary values of a kernel")


def _takes(rows: Rows) -> bool:
    if isinstance(rows, ExactRows):
        return rows.weights.device.type == "cpu" and rows.weights.dtype in _WIDE
    if rows.frames is not None and (
        rows.frames.data.is_cuda or rows.index4 is not None or rows.index8 is not None
    ):
        return False
    return rows.int4.device.type == "cpu"


def _given(x: Tensor, norm: Norm | None) -> c.Given:
    eps = 0.0 if norm is None else norm.eps
    return c.Given(x.data_ptr(), _weight(norm), _bias(norm), eps, x.shape[0], x.shape[1])


def _weight(norm: Norm | None) -> int | None:
    return None if norm is None else norm.weight.data_ptr()


def _bias(norm: Norm | None) -> int | None:
    return None if norm is None or norm.bias is None else norm.bias.data_ptr()


def _act(act: str, bias: Tensor | None) -> c.Activation:
    name, threshold = activation_of(act)
    return c.Activation(_ACT_KINDS[name], threshold, _maybe(bias))


def _layer(layer: LayerCall) -> c.Layer:
    return c.Layer(
        ctypes.addressof(_attention(layer.attention)), _weight(layer.attn_norm),
        _bias(layer.attn_norm), ctypes.addressof(_rows(layer.neurons)), _weight(layer.ffn_norm),
        _bias(layer.ffn_norm), _maybe(layer.down_bias), layer.attn_norm.eps, layer.ffn_norm.eps,
        _act(layer.act, layer.up_bias),
    )  # fmt: skip


def _attention(call: AttentionCall) -> c.Attention:
    """The C structure; kept with the call, which serves a layer for every token."""
    held: c.Attention | None = call.__dict__.get("_c_call")
    if held is None:
        held = call.__dict__["_c_call"] = _make_attention(call)
    return held


def _make_attention(call: AttentionCall) -> c.Attention:
    kv_heads, positions, dim = call.keys.shape
    norms = (norm for norm in (*call.qk_norms, call.out_norm) if norm is not None)
    eps = max((norm.eps for norm in norms), default=0.0)
    return c.Attention(
        (POINTER * 4)(*(ctypes.addressof(_rows(rows)) for rows in call.projections)),
        (POINTER * 4)(*(None if b is None else b.data_ptr() for b in call.biases)),
        call.keys.data_ptr(), call.values.data_ptr(), _maybe(call.cosines), _maybe(call.sines),
        positions, 0, call.heads, kv_heads, dim,
        call.keys.dtype == torch.float16, call.scale, call.window or positions,
        (POINTER * 2)(*(_weight(norm) for norm in call.qk_norms)), _weight(call.out_norm), eps,
        call.softcap or 0.0, call.rotary,
    )  # fmt: skip


def _rows(rows: Rows) -> c.Rows:
    """The C structure; kept with the rows, which the store hands out again for every token."""
    held: c.Rows | None = rows.__dict__.get("_c_rows")
    if held is None:
        held = rows.__dict__["_c_rows"] = _make_rows(rows)
    return held


def _make_rows(rows: Rows) -> c.Rows:
    layout = rows.layout
    shape = (len(rows), layout.vectors, layout.length, layout.groups)
    if isinstance(rows, ExactRows):
        is_bf16 = rows.weights.dtype == torch.bfloat16
        return c.Rows(None, None, _at(rows.weights), None, None, *shape, 16, is_bf16)
    planes = [_maybe(p) for p in (rows.int4, rows.int8, None, rows.index4, rows.index8)]
    if rows.frames is None:
        return c.Rows(*planes, *shape, 4 if rows.int8 is None else 8, 0)
    return c.Rows(
        *planes, *shape, 16, rows.frames.exact_type == "bf16", *_frames(rows.frames, rows)
    )


def _frames(frames: ExactFrames, rows: PackedRows) -> tuple[int, int, int, int]:
    """Pointers; what they point to is kept with the rows."""
    ends = np.concatenate((np.zeros(1, np.int64), np.cumsum(frames.nbytes, dtype=np.int64)))
    escapes = np.ascontiguousarray(frames.escapes, np.uint32)
    data = frames.data.contiguous()
    if -(-len(rows) // frames.frame_records) != len(escapes) or ends[-1] != len(data):
        raise ValueError("frames and rows do not belong together")
    rows.__dict__["_c_frames"] = ends, escapes, data
    return data.data_ptr(), ends.ctypes.data, escapes.ctypes.data, frames.frame_records


def _maybe(tensor: Tensor | None) -> Any:
    return POINTER(None) if tensor is None else _at(tensor)


def _at(tensor: Tensor) -> Any:
    if not tensor.is_contiguous():
        raise ValueError("kernel operands must be contiguous")
    return POINTER(tensor.data_ptr())


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.m2c_name.restype = ctypes.c_char_p
    library.m2c_open.restype = POINTER
    library.m2c_close.restype = None
    library.m2c_read.restype = ctypes.c_uint64
    return library
