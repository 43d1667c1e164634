"""The CUDA kernels as `dispatch` calls them: rows and activations are torch tensors on a GPU.

Knows nothing about layers or tiers. What launches is given: a GPU's driver, or in tests an
emulation on the CPU.
"""

import ctypes
from collections.abc import Callable, Hashable
from typing import Any, Final

import torch
from torch import Tensor

from m2c.bundle.planes import GROUP
from m2c.kernels.gpu_products import (
    BLOCK,
    PARTIAL_NBYTES,
    SPAN,
    Launcher,
    Prepared,
    Products,
    part_of,
)
from m2c.kernels.gpu_structs import Attention, at, attention_of, given_of
from m2c.kernels.operands import AttentionCall, Norm
from m2c.kernels.rows import ExactRows, PackedRows, Rows

_QUERIES: Final = 4  # that share what is read of keys and values
_int = ctypes.c_int
Replays = dict[Hashable, "Replay | None"]


class GpuKernels:
    """The kernels of `reference.py` for rows and activations on one GPU.

    As in the native kernels, activations meet 4- and 8-bit codes as int8 with a scale per group of
    32, and results do not depend on how many tokens share a call. Rows with frames are decoded on
    the GPU, some at a time.
    """

    name = "cuda"

    def __init__(self, launcher: Launcher) -> None:
        self.device = launcher.device
        self._launch = launcher.launch
        self._start = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._started = 0  # what `_start` holds
        self._recording = False
        self._pool: Any = None
        self._do = Products(launcher)

    def close(self) -> None:
        """Nothing to give back: torch owns all memory, and the driver the code."""

    def here(self, x: Tensor) -> bool:
        return x.device == self.device

    def takes(self, x: Tensor, rows: Rows) -> bool:
        held: bool | None = rows.__dict__.get("_gpu_takes")
        if held is None:
            held = rows.__dict__["_gpu_takes"] = self._takes(rows)
        return held and x.device == self.device

    def _takes(self, rows: Rows) -> bool:
        if isinstance(rows, ExactRows):
            wide = rows.weights.dtype in (torch.bfloat16, torch.float16)
            return wide and rows.weights.device == self.device
        if rows.frames is not None and (
            rows.frames.data.device != self.device or rows.index4 is not None
        ):
            return False
        return rows.int4.device == self.device and rows.int4.data_ptr() % 2 == 0

    def check(self) -> None:
        """As `Products.check`."""
        self._do.check()

    # -- products ----------------------------------------------------------------------------------

    def matmul_rows(self, x: Tensor, rows: Rows, *, norm: Norm | None = None) -> Tensor:
        """As `reference.matmul_rows`, of norm(x)."""
        inputs = self._do.prepared(x, rows, norm)
        out = torch.empty((len(x), len(rows)), device=self.device)
        self._do.product(inputs, [(rows, None, out)])
        return out

    def gate_up(
        self, x: Tensor, rows: Rows, act: str, *, norm: Norm | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As `reference.gate_up`, of norm(x)."""
        inputs = self._do.prepared(x, rows, norm)
        parts = [
            self._do.gate_up(inputs, piece, act, part_of(bias, first, len(piece)), None)
            for first, piece in self._do.pieces(rows)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def down(self, activations: Tensor, rows: Rows, *, into: Tensor) -> None:
        """Add to `into` [tokens, hidden]; continued calls as with `ffn`."""
        for first, piece in self._do.pieces(rows):
            own = activations[:, first : first + len(piece)].contiguous()
            self._do.columns(own, piece, into)

    def ffn(
        self, x: Tensor, rows: Rows, act: str, *, into: Tensor, mask: Tensor | None = None,
        kept: Tensor | None = None, norm: Norm | None = None, bias: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Add the neurons' FFN output to `into` [tokens, hidden].

        kept: [tokens, rows], receives the activations. A call with a multiple of CHUNK rows,
        continued by another, gives the bits of one call.
        """
        inputs = self._do.prepared(x, rows, norm)
        for first, piece in self._do.pieces(rows):
            own = slice(first, first + len(piece))
            part = None if mask is None else mask[:, own].contiguous()
            found = self._do.gate_up(inputs, piece, act, part_of(bias, first, len(piece)), part)
            if kept is not None:
                kept[:, own] = found
            self._do.columns(found, piece, into)

    def add_normed(self, x: Tensor, norm: Norm, *, into: Tensor) -> None:
        """Add norm(x) to `into`, both [tokens, hidden]."""
        self._launch("m2c_add_normed", len(x), BLOCK, (given_of(x.contiguous(), norm), at(into)))

    def rank(self, activations: Tensor, norms: Tensor, best: list[tuple[int, int]]) -> Tensor:
        """As `reference.rank`; of equals, lower ids first. Torch sorts well."""
        scores = activations.abs() * norms
        order = scores.sort(dim=1, descending=True, stable=True).indices
        levels = torch.zeros(scores.shape, dtype=torch.int8, device=self.device)
        for count, level in best:
            levels.scatter_(1, order[:, :count], level)
        return levels

    # -- attention ---------------------------------------------------------------------------------

    def attention(self, x: Tensor, call: AttentionCall, start: int, *, norm: Norm) -> None:
        """Add the attention of norm(x) to x [tokens, hidden], in place; stores keys and values."""
        self._set_start(start)
        # what is recorded serves later positions too
        stop = call.keys.shape[1] if self._recording else start + len(x)
        self._attention(x, call, norm, spans=-(-stop // SPAN))

    def _set_start(self, start: int) -> None:
        if start != self._started:
            self._start.fill_(start)
            self._started = start

    def _attention(self, x: Tensor, call: AttentionCall, norm: Norm, *, spans: int) -> None:
        """spans: of positions that there may be."""
        tokens, facts = len(x), attention_of(call, self._start)
        inputs = self._do.prepared(x, call.projections[0], norm)
        made = [torch.empty((tokens, len(r)), device=self.device) for r in call.projections[:3]]
        self._do.product(
            inputs, list(zip(call.projections[:3], call.biases[:3], made, strict=True))
        )
        heads = facts.heads + 2 * facts.kv_heads
        pointers = [at(tensor) for tensor in made]
        self._launch("m2c_place", tokens * heads, BLOCK // 2, (facts, *pointers))
        output, bias = call.projections[3], call.biases[3]
        inputs = self._mixed(made[0], facts, spans, output)
        if call.out_norm is None:
            self._do.product(inputs, [(output, bias, x)], add=True)
            return
        out = torch.empty_like(x)
        self._do.product(inputs, [(output, bias, out)])
        self.add_normed(out, call.out_norm, into=x)

    def _mixed(self, q: Tensor, facts: Attention, spans: int, output: Rows) -> Prepared:
        """What queries [tokens, heads * dim] get of the values, ready for `output`."""
        tokens, heads, dim = len(q), facts.heads, facts.dim
        coded = isinstance(output, PackedRows) and output.frames is None and dim % GROUP == 0
        if coded:
            mixed = self._do.room_for_codes(tokens, heads * dim)
        else:
            mixed = Prepared(tokens, heads * dim, values=torch.empty_like(q))
        part_nbytes = heads * spans * (dim + 2) * 4
        step = max(1, PARTIAL_NBYTES // part_nbytes)
        for first in range(0, tokens, step):
            count = min(step, tokens - first)
            parts = torch.empty(count * part_nbytes // 4, device=self.device)
            queries = count * heads // facts.kv_heads  # that share keys
            at_once = 1 if queries == 1 else _QUERIES
            given = (_int(first), _int(count), _int(spans), at(parts))
            self._launch(
                f"m2c_attend_{at_once}", -(-queries // at_once) * facts.kv_heads * spans, BLOCK,
                (facts, at(q[first:]), *given),
            )  # fmt: skip
            own = mixed.of_tokens(first)
            self._launch(
                "m2c_mix", count * heads, 32 * min(4, -(-dim // 128)),
                (facts, at(parts), _int(first), _int(spans), at(own.values), own.coded),
            )  # fmt: skip
        if coded or not isinstance(output, PackedRows) or output.frames is not None:
            return mixed
        assert mixed.values is not None
        return self._do.prepared(mixed.values, output, None)

    @property
    def replays(self) -> bool:
        """Whether launches can be recorded."""
        return self.device.type == "cuda"

    def replayed(
        self, held: Replays, key: Hashable, x: Tensor, start: int, run: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """run(x) at position `start`, its launches recorded and from then on replayed as one: a GPU
        computes a layer faster than Python can ask for it.

        held: what was recorded before, by `key`: of calls that launch the same on the same memory.
        """
        self._set_start(start)
        if key not in held:
            out = run(x)
            held[key] = None  # only now is made what is made once: no call may fail before
            return out
        replay = held[key]
        if replay is None:
            self._recording = True
            try:
                # one pool for all: none is replayed while another's memory is in use
                self._pool = self._pool or torch.cuda.graph_pool_handle()
                replay = held[key] = Replay(x, run, self._pool)
            finally:
                self._recording = False
        return replay(x)

    def gather(self, source: int, ids: Tensor, into: Tensor, slots: Tensor | None) -> None:
        """Records `ids` int32 [n] of those at `source`, which the GPU sees and whose rows are of
        those of `into` [any, nbytes] u8, into its rows `slots` int32 [n], or in order."""
        nbytes = into.shape[1]
        if nbytes % 2:
            raise ValueError(f"records of {nbytes} bytes")
        self._launch(
            "m2c_gather", -(-len(ids) * 32 // BLOCK), BLOCK,
            (ctypes.c_void_p(source), at(ids), at(slots), at(into), ctypes.c_int64(nbytes),
             _int(len(ids))),
        )  # fmt: skip

    def decode(self, rows: PackedRows) -> Tensor:
        """The 16-bit weights [rows, vectors * length] of rows with frames."""
        return self._do.decode(rows)


class Replay:
    """Launches recorded once, for an `x` of one shape."""

    def __init__(self, x: Tensor, run: Callable[[Tensor], Tensor], pool: Any) -> None:
        self._x = x.clone()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._out = run(self._x)

    def __call__(self, x: Tensor) -> Tensor:
        self._x.copy_(x)
        self._graph.replay()
        return self._out.clone()
