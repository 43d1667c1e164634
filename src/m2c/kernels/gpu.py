"""The CUDA kernels as `dispatch` calls them: rows and activations are torch tensors on a GPU.

Mirrors the structures of cuda/*.cu; knows nothing about layers or tiers. What launches is given: a
GPU's driver, or in tests an emulation on the CPU.
"""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from m2c.kernels.gpu_products import BLOCK, CHUNK, PARTIAL_NBYTES, Launcher, Products, part_of
from m2c.kernels.gpu_structs import at, attention_of, given_of
from m2c.kernels.operands import AttentionCall, LayerCall, Norm, Stack
from m2c.kernels.rows import ExactRows, PackedRows, Rows

_int = ctypes.c_int


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
            self._do.columns(own, piece, into, None)

    def ffn(
        self, x: Tensor, rows: Rows, act: str, *, into: Tensor, mask: Tensor | None = None,
        kept: Tensor | None = None, norm: Norm | None = None, bias: Tensor | None = None,
        out_bias: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Add the neurons' FFN output to `into` [tokens, hidden].

        kept: [tokens, rows], receives the activations. out_bias [hidden] is added last. A call with
        a multiple of CHUNK rows, continued by another, gives the bits of one call.
        """
        inputs = self._do.prepared(x, rows, norm)
        for first, piece in self._do.pieces(rows):
            own = slice(first, first + len(piece))
            part = None if mask is None else mask[:, own].contiguous()
            found = self._do.gate_up(inputs, piece, act, part_of(bias, first, len(piece)), part)
            if kept is not None:
                kept[:, own] = found
            last = own.stop == len(rows)
            self._do.columns(found, piece, into, out_bias if last else None)

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
        self._attention(x, call, norm, chunks=-(-(start + len(x)) // CHUNK))

    def _set_start(self, start: int) -> None:
        if start != self._started:
            self._start.fill_(start)
            self._started = start

    def _attention(self, x: Tensor, call: AttentionCall, norm: Norm, *, chunks: int) -> None:
        """chunks: of positions that there may be."""
        tokens, facts = len(x), attention_of(call, self._start)
        inputs = self._do.prepared(x, call.projections[0], norm)
        made = [torch.empty((tokens, len(r)), device=self.device) for r in call.projections[:3]]
        self._do.product(
            inputs, list(zip(call.projections[:3], call.biases[:3], made, strict=True))
        )
        heads = facts.heads + 2 * facts.kv_heads
        pointers = [at(tensor) for tensor in made]
        self._launch("m2c_place", tokens * heads, BLOCK // 2, (facts, *pointers))
        mixed = torch.empty((tokens, facts.heads * facts.dim), device=self.device)
        part_nbytes = facts.heads * chunks * (facts.dim + 2) * 4
        step = max(1, PARTIAL_NBYTES // part_nbytes)
        for first in range(0, tokens, step):
            count = min(step, tokens - first)
            parts = torch.empty(count * part_nbytes // 4, device=self.device)
            q, out = made[0][first : first + count], mixed[first : first + count]
            given = (_int(first), _int(chunks))
            self._launch(
                "m2c_attend", count * facts.heads * chunks, BLOCK,
                (facts, at(q), *given, at(parts)),
            )  # fmt: skip
            self._launch(
                "m2c_mix", count * facts.heads, BLOCK // 2, (facts, at(parts), *given, at(out))
            )
        output, bias = call.projections[3], call.biases[3]
        inputs = self._do.prepared(mixed, output, None)
        if call.out_norm is None:
            self._do.product(inputs, [(output, bias, x)], add=True)
            return
        out = torch.empty_like(x)
        self._do.product(inputs, [(output, bias, out)])
        self.add_normed(out, call.out_norm, into=x)

    # -- all layers --------------------------------------------------------------------------------

    def takes_stack(self, stack: Stack) -> bool:
        held: bool | None = stack.__dict__.get("_gpu_takes")
        if held is None:
            rows = [r for one in stack.layers for r in (*one.attention.projections, one.neurons)]
            held = stack.__dict__["_gpu_takes"] = all(self._takes(r) and len(r) for r in rows)
        return held

    def run_stack(self, x: Tensor, stack: Stack, start: int) -> None:
        """x [tokens, hidden] through all layers, in place.

        The launches are recorded once for each number of tokens, and then replayed as one: a GPU
        computes a layer of a small model faster than Python can ask for it.
        """
        self._set_start(start)
        if self.device.type != "cuda":
            self._layers(x, stack)
            return
        replays = stack.__dict__.setdefault("_gpu_replays", {})
        replay = replays.get(len(x))
        if replay is None:
            replays[len(x)] = Replay  # the first time it runs as it is: what is made once gets made
            self._layers(x, stack)
            return
        if replay is Replay:
            replay = replays[len(x)] = Replay(x, lambda held: self._layers(held, stack))
        replay(x)

    def _layers(self, x: Tensor, stack: Stack) -> None:
        for layer in stack.layers:
            self._layer(x, layer, parallel=stack.parallel)

    def _layer(self, x: Tensor, layer: LayerCall, *, parallel: bool) -> None:
        given = x.clone() if parallel else x
        positions = layer.attention.keys.shape[1]
        self._attention(x, layer.attention, layer.attn_norm, chunks=-(-positions // CHUNK))
        self.ffn(
            given, layer.neurons, layer.act, norm=layer.ffn_norm, into=x, bias=layer.up_bias,
            out_bias=layer.down_bias,
        )  # fmt: skip

    def decode(self, rows: PackedRows) -> Tensor:
        """The 16-bit weights [rows, vectors * length] of rows with frames."""
        return self._do.decode(rows)


class Replay:
    """Launches recorded once, for an `x` of one shape."""

    def __init__(self, x: Tensor, run: Callable[[Tensor], None]) -> None:
        self._x = torch.empty_like(x)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            run(self._x)

    def __call__(self, x: Tensor) -> None:
        self._x.copy_(x)
        self._graph.replay()
        x.copy_(self._x)
