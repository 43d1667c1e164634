"""The kernels that the model calls: those in C or for CUDA where they can, elsewhere the torch
reference.

Rows that carry their exact plane compressed are decoded where they are computed: where they lie
must not change a bit of the result.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from m2c.kernels import reference
from m2c.kernels.native import NativeKernels
from m2c.kernels.operands import AttentionCall, Norm, Router, Stack
from m2c.kernels.rows import PackedRows, Rows, as_exact_tensor
from m2c.kernels.workers import Kernels, Workers


def matmul_rows(x: Tensor, rows: Rows, workers: Workers, *, norm: Norm | None = None) -> Tensor:
    """As `reference.matmul_rows`, of norm(x)."""
    native = _native(x, rows, workers)
    if native is None:
        return reference.matmul_rows(reference.apply_norm(x, norm), rows, workers)
    return native.matmul_rows(x, rows, norm=norm)


def matmul_into(
    out: Tensor, x: Tensor, rows: Rows, workers: Workers, *, norm: Norm | None, at_once: int
) -> None:
    """As `matmul_rows`, put into `out`, which may be columns of a larger tensor.

    at_once: tokens whose products may be held twice, where kernels cannot put them there.
    """
    native = _native(x, rows, workers)
    if native is None:
        # torch's sums depend on how many tokens a product has: all of them, as of a whole matrix
        reference.matmul_rows(reference.apply_norm(x, norm), rows, workers, into=out)
        return
    if isinstance(native, NativeKernels):
        native.matmul_into(out, x, rows, norm=norm)
        return
    for at in range(0, len(x), at_once):
        part = slice(at, at + at_once)
        out[part] = native.matmul_rows(x[part], rows, norm=norm)


def gate_up(
    x: Tensor, rows: Rows, act: str, workers: Workers, *, norm: Norm | None = None,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `reference.gate_up`, of norm(x)."""
    native = _native(x, rows, workers)
    if native is None:
        return reference.gate_up(reference.apply_norm(x, norm), rows, act, workers, bias=bias)
    return native.gate_up(x, rows, act, norm=norm, bias=bias)


def down(activations: Tensor, rows: Rows, workers: Workers, *, into: Tensor) -> None:
    """Add what `reference.down` returns to `into` [tokens, hidden]."""
    native = _native(activations, rows, workers)
    if native is None:
        reference.down(activations, rows, workers, into=into)
    else:
        native.down(activations, rows, into=into)


def gather_ffn(
    x: Tensor, rows: Rows, act: str, workers: Workers, *, into: Tensor, mask: Tensor | None = None,
    norm: Norm | None = None, bias: Tensor | None = None,
) -> None:  # fmt: skip
    """Add what `reference.gather_ffn` returns for norm(x) to `into` [tokens, hidden]."""
    native = _native(x, rows, workers)
    if native is None:
        x = reference.apply_norm(x, norm)
        reference.gather_ffn(x, rows, act, workers, mask=mask, into=into, bias=bias)
    else:
        native.ffn(x, rows, act, mask=mask, norm=norm, into=into, bias=bias)


def route(
    x: Tensor, router: Router, workers: Workers, *, norm: Norm | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `reference.route`, of norm(x) [tokens, hidden] f32."""
    native = workers.native
    if isinstance(native, NativeKernels) and native.takes(x, router.rows):
        return native.route(x, router, norm=norm)
    return reference.route(matmul_rows(x, router.rows, workers, norm=norm), router)


def add_experts(
    x: Tensor, experts: Sequence[Rows], weights: Tensor, act: str, workers: Workers, *,
    norm: Norm | None, into: Tensor,
) -> None:  # fmt: skip
    """Add to `into` [1, hidden], one after the other, what each of the experts gives for norm(x),
    times its weight. x [1, hidden], weights [1, experts] f32."""
    native = workers.native
    if isinstance(native, NativeKernels) and all(native.takes(x, rows) for rows in experts):
        native.experts(x, experts, weights, act, norm=norm, into=into)
        return
    for rows, weight in zip(experts, weights[0], strict=True):
        part = torch.zeros_like(x)
        gather_ffn(x, rows, act, workers, norm=norm, into=part)
        into += part * weight


def scored_ffn(
    x: Tensor, rows: Rows, act: str, workers: Workers, *, into: Tensor, norm: Norm,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `gather_ffn`; returns the activations [tokens, rows] f32, of which scores are made."""
    native = _native(x, rows, workers)
    if native is None:
        activations = gate_up(x, rows, act, workers, norm=norm, bias=bias)
        down(activations, rows, workers, into=into)
        return activations
    activations = torch.empty((len(x), len(rows)), device=x.device)
    native.ffn(x, rows, act, kept=activations, norm=norm, into=into, bias=bias)
    return activations


def rank(
    activations: Tensor, norms: Tensor, best: list[tuple[int, int]], workers: Workers
) -> Tensor:
    """As `reference.rank`."""
    if workers.native is None or not workers.native.here(activations):
        return reference.rank(activations, norms, best)
    return workers.native.rank(activations, norms, best)


def add_normed(x: Tensor, y: Tensor, norm: Norm, workers: Workers) -> Tensor:
    """x + norm(y), both [tokens, hidden] f32."""
    if workers.native is None or not workers.native.here(x):
        return x + reference.apply_norm(y, norm)
    out = x.clone()
    workers.native.add_normed(y, norm, into=out)
    return out


def attention(
    x: Tensor, call: AttentionCall, start: int, workers: Workers, *, norm: Norm
) -> Tensor:
    """As `reference.attention`."""
    native = workers.native
    if native is None or not all(native.takes(x, rows) for rows in call.projections):
        return reference.attention(x, call, start, workers, norm=norm, matmul=matmul_rows)
    out = x.clone()
    native.attention(out, call, start, norm=norm)
    return out


def run_stack(x: Tensor, stack: Stack, start: int, workers: Workers) -> Tensor:
    """x [tokens, hidden] f32 through all layers, the first token at position `start`.

    The bits of `attention` and `gather_ffn` layer by layer; natively it is one call.
    """
    native = workers.native
    if isinstance(native, NativeKernels) and native.here(x) and native.takes_stack(stack):
        out = x.clone()
        native.run_stack(out, stack, start)
        return out
    for layer in stack.layers:
        out = attention(x, layer.attention, start, workers, norm=layer.attn_norm)
        given = x if stack.parallel else out.clone()
        gather_ffn(
            given, layer.neurons, layer.act, workers, norm=layer.ffn_norm, into=out,
            bias=layer.up_bias,
        )  # fmt: skip
        x = out if layer.down_bias is None else out + layer.down_bias
    return x


def _native(x: Tensor, rows: Rows, workers: Workers) -> Kernels | None:
    native = workers.native
    return native if native is not None and len(rows) and native.takes(x, rows) else None


def exact_weights(rows: PackedRows, workers: Workers | None = None) -> Tensor:
    """The 16-bit weights [rows, vectors * length] of rows with frames, which are on the host."""
    host = workers.host if workers is not None else None
    if host is not None and host.takes(rows.int4, rows):
        return host.decode(rows)
    assert rows.frames is not None
    return as_exact_tensor(rows.exact_bits(0, len(rows)), rows.frames.exact_type)
